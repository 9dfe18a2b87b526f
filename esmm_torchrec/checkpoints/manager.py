"""Checkpoints of a training run, written by all ranks and read on any number of ranks.

Example::

    with CheckpointManager(run.checkpoints, ranks=ranks, keep_last=3) as checkpoints:
        latest = checkpoints.find()
        if latest is not None:
            loaded = checkpoints.load(latest, model=model, optimizer=optimizer)
            reader.load_state_dict(loaded.progress["reader"])
        for step in ...:
            checkpoints.save(
                step=step,
                model=model,
                optimizer=optimizer,
                progress={"reader": reader.state_dict()},
                rank_state={"window": window.state_dict()},
            )
"""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from esmm_torchrec.checkpoints import files
from esmm_torchrec.checkpoints.state import State, host_copy, load_state, quiet_torch, reason
from esmm_torchrec.durable import write_durably
from esmm_torchrec.errors import RunError
from esmm_torchrec.sharding.process_group import COLLECTIVE_TIMEOUT, Ranks, on_every_rank


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Content of a checkpoint other than the state of the model and its optimiser."""

    path: Path
    step: int
    """Number of steps done when the checkpoint was written."""
    progress: Mapping[str, Any]
    """`progress` that was passed to `CheckpointManager.save`."""
    num_ranks: int
    """Number of ranks that wrote the checkpoint."""

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """Returns the `rank_state` that a rank saved, with tensors on the CPU; None if it saved
        none.

        Args:
            rank: one of the `num_ranks` that wrote the checkpoint.
        """
        file = self.path / files.rank_file(rank)
        if not file.exists():
            return None
        return torch.load(file, map_location="cpu", weights_only=True)


class CheckpointManager:
    """Saves, finds, loads and prunes the checkpoints in one folder.

    Every rank must create a manager, and call its methods in the same order as the other ranks.

    Args:
        folder: folder of all checkpoints; created by the first save.
        ranks: this process among the others.
        keep_last: number of checkpoints to keep; None keeps all. The best one is always kept.
        asynchronous: whether `save` returns once the state has been copied to host memory, while a
            thread writes it. Until the checkpoint is complete, the copy takes as much host memory
            as this rank's part of the weights and of the optimiser state.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ranks: Ranks,
        keep_last: int | None = None,
        asynchronous: bool = True,
    ) -> None:
        self.folder = folder
        self._ranks = ranks
        self._keep_last = keep_last
        self._earlier_steps = 0  # optimiser steps in the run that this one started from
        # The thread has its own group, so that its collectives do not mix with those of training.
        self._group: dist.ProcessGroup | None = None
        if asynchronous:
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._writing: Future[None] | None = None

    def find(self, step: int | None = None) -> Path | None:
        """Returns the checkpoint of a step, or the last one; None if there is no checkpoint. Every
        rank returns the result of rank 0.

        Raises:
            RunError: there is no checkpoint of that step.
        """

        def find() -> Path | None:
            files.remove_leftovers(self.folder)
            return files.find_checkpoint(self.folder, step)

        return self._ranks.from_first(find)

    def save(
        self,
        *,
        step: int,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        progress: Mapping[str, Any],
        rank_state: Mapping[str, Any] | None = None,
        best: bool = False,
    ) -> None:
        """Saves the state after `step` steps.

        A checkpoint of the same step is replaced only once the new one is complete.

        Args:
            step: number of steps done.
            model: sharded model.
            optimizer: optimiser of the model.
            progress: JSON values that do not depend on the rank, such as the reader's position;
                those of rank 0 are saved.
            rank_state: tensors, numbers, strings and containers of them that belong to this rank,
                such as its part of a metric's window.
            best: whether this is the best checkpoint so far, which is never pruned. The previous
                best checkpoint is pruned like any other.

        Raises:
            RunError: this checkpoint, or the one saved asynchronously before it, cannot be written.
                Earlier checkpoints are unchanged.
        """
        self.wait()
        state: State = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        buffer = io.BytesIO()
        if rank_state is not None:
            torch.save(dict(rank_state), buffer)
        # Convert to the values that reading the file returns: the checksum is computed from them.
        description = json.loads(
            json.dumps(
                {
                    "step": step,
                    "optimizer_step": self._earlier_steps + step,
                    "num_ranks": self._ranks.world_size,
                    "progress": dict(progress),
                }
            )
        )
        if self._group is not None:
            state = host_copy(state)
        writing: Future[None] = Future()

        def write() -> None:
            try:
                self._write(state, buffer.getbuffer(), description, best=best)
            except BaseException as error:
                writing.set_exception(error)
            else:
                writing.set_result(None)

        self._writing = writing
        threading.Thread(target=write, name="checkpoint", daemon=True).start()
        if self._group is None:
            self.wait()

    def load(
        self, checkpoint: Path, *, model: DistributedModelParallel, optimizer: CombinedOptimizer
    ) -> LoadedCheckpoint:
        """Loads a checkpoint into a sharded model and its optimiser.

        The placement, the kernels and the number of ranks may differ from those at saving.

        Args:
            checkpoint: result of `find`.
            model: sharded model, whose weights are overwritten.
            optimizer: optimiser of the model, whose state and step count are overwritten.

        Raises:
            RunError: the checkpoint cannot be read, belongs to another model, or contains an
                optimiser state whose shape depends on the placement and does not match.
        """
        found = load_state(checkpoint, model=model, optimizer=optimizer)
        self._earlier_steps = found["optimizer_step"] - found["step"]
        return LoadedCheckpoint(checkpoint, found["step"], found["progress"], found["num_ranks"])

    def start_from(
        self, checkpoint: Path, *, model: DistributedModelParallel, optimizer: CombinedOptimizer
    ) -> None:
        """Starts a run with the weights and the optimiser state of another run, whose tables may
        have fewer rows: the first rows are loaded, the others keep their values.

        Args:
            checkpoint: checkpoint of the other run.
            model: sharded model, whose weights are overwritten.
            optimizer: optimiser of the model, whose state is overwritten; its step count continues.

        Raises:
            RunError: as `load`.
        """
        found = load_state(checkpoint, model=model, optimizer=optimizer, tables_may_grow=True)
        self._earlier_steps = found["optimizer_step"]

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the last checkpoint; after an error, it is either complete or does not exist.
        After an error on several ranks, it does not wait, as the thread could wait forever for a
        rank that has ended; the thread then ends with the process."""
        if error is None:
            self.wait()
        elif self._writing is not None and self._ranks.world_size == 1:
            wait([self._writing])

    def _write(
        self,
        state: State,
        rank_state: memoryview,
        description: Mapping[str, Any],
        *,
        best: bool,
    ) -> None:
        """Writes a checkpoint; a collective operation with the same outcome on all ranks."""
        final = files.checkpoint_path(self.folder, description["step"])
        partial = final.with_name(f"{final.name}.partial")

        def write_own() -> dict[str, tuple[int, int]]:
            if len(rank_state):
                write_durably(partial / files.rank_file(self._ranks.rank), rank_state)
            return files.written_by(partial, self._ranks.rank)

        def complete() -> None:
            files.complete(partial, final, description=description, files=written)
            if best:
                files.mark_best(self.folder, description["step"])
            if self._keep_last is not None:
                files.prune(self.folder, keep_last=self._keep_last)

        try:
            self._ranks.from_first(lambda: files.remove_leftovers(self.folder), group=self._group)
            with quiet_torch():
                save(state, checkpoint_id=partial, process_group=self._group)
            of_ranks = on_every_rank(write_own, group=self._group)
            written = {name: entry for own in of_ranks for name, entry in own.items()}
            self._ranks.from_first(complete, group=self._group)
        except (CheckpointException, OSError) as error:
            why = reason(error)
            if self._ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            folders = (self.folder, *self.folder.absolute().parents)
            there = next(path for path in folders if path.exists())
            raise RunError(
                f"checkpoint {final} cannot be written ({why}; "
                f"{shutil.disk_usage(there).free / 1e6:,.0f} MB are free on its disk); make room "
                "and rerun the same command"
            ) from error
