"""The checkpoints of a training run, written by all ranks and read by any number of them.

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
from esmm_torchrec.errors import RunError
from esmm_torchrec.sharding.process_group import COLLECTIVE_TIMEOUT, Ranks, on_every_rank


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint holds beside the model and its optimiser."""

    path: Path
    step: int
    """Steps done when it was written."""
    progress: Mapping[str, Any]
    """As `CheckpointManager.save` was given it."""
    num_ranks: int
    """Ranks that wrote it."""

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """The `rank_state` that one of the ranks saved, tensors on the CPU; None if it saved none.

        Args:
            rank: one of the `num_ranks` that wrote the checkpoint.
        """
        file = self.path / files.rank_file(rank)
        if not file.exists():
            return None
        return torch.load(file, map_location="cpu", weights_only=True)


class CheckpointManager:
    """Saves, finds, loads and prunes the checkpoints in one folder.

    Every rank must make one, and call its methods in the same order as the others.

    Args:
        folder: of all checkpoints; made by the first save.
        ranks: this process among the others.
        keep_last: number of checkpoints to keep; None keeps all. The best one is kept in any case.
        asynchronous: whether `save` returns once the state has been copied to host memory, and a
            thread writes it. The copy takes as much host memory as this rank's part of the weights
            and of the optimiser's state, from `save` until the checkpoint is complete.
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
        self._earlier_steps = 0  # of the optimiser, in the run that this one started from
        # Collectives of the thread must not mix with those of training.
        self._group: dist.ProcessGroup | None = None
        if asynchronous:
            group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._writer: _Writer | None = None

    def find(self, step: int | None = None) -> Path | None:
        """The checkpoint of a step, or the last one; None if there is none at all. Every rank gets
        the answer of rank 0.

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

        A checkpoint of the same step is replaced once the new one is complete, not before.

        Args:
            step: number of steps done.
            model: sharded.
            optimizer: of the model.
            progress: JSON values that do not depend on the rank, such as the reader's position;
                those of rank 0 are saved.
            rank_state: tensors, numbers, strings and containers of them that belong to this rank,
                such as its part of a metric's window.
            best: whether this is the best checkpoint so far, which is never pruned. The one that
                was the best until now is pruned like any other.

        Raises:
            RunError: this checkpoint, or the one saved asynchronously before it, cannot be written.
                Those written earlier are as they were.
        """
        self.wait()
        state: State = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        buffer = io.BytesIO()
        if rank_state is not None:
            torch.save(dict(rank_state), buffer)
        # The form that reading the file gives, of which the checksum is taken.
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
        writer = _Writer(
            self.folder,
            state=state if self._group is None else host_copy(state),
            rank_state=buffer.getbuffer(),
            description=description,
            ranks=self._ranks,
            group=self._group,
            best=best,
            keep_last=self._keep_last,
        )
        if self._group is None:
            writer.run()
            writer.result()
        else:
            self._writer = writer
            writer.start()

    def load(
        self, checkpoint: Path, *, model: DistributedModelParallel, optimizer: CombinedOptimizer
    ) -> LoadedCheckpoint:
        """Loads a checkpoint into a sharded model and its optimiser.

        Placement, kernels and number of ranks may differ from those it was written with.

        Args:
            checkpoint: as `find` returns it.
            model: its weights are overwritten.
            optimizer: of the model; its state and its count of steps are overwritten.

        Raises:
            RunError: it cannot be read, belongs to another model, or holds an optimiser state whose
                form depends on the placement.
        """
        found = load_state(checkpoint, model=model, optimizer=optimizer)
        self._earlier_steps = found["optimizer_step"] - found["step"]
        return LoadedCheckpoint(checkpoint, found["step"], found["progress"], found["num_ranks"])

    def start_from(
        self, checkpoint: Path, *, model: DistributedModelParallel, optimizer: CombinedOptimizer
    ) -> None:
        """Starts a run with the weights and the optimiser state of another one, whose tables may
        have fewer rows: the first rows are loaded, the others keep what they have.

        Args:
            checkpoint: of the other run.
            model: its weights are overwritten.
            optimizer: of the model; its state is overwritten, and its count of steps continues.

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
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.join()
            writer.result()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        self.close()

    def close(self) -> None:
        """Ends the thread after an error, so that the last checkpoint is complete or does not
        exist. Of several ranks, another may have ended, and then the thread would wait for it: it
        is left to end with the process."""
        if self._writer is not None and self._ranks.world_size == 1:
            self._writer.join()


class _Writer(threading.Thread):
    """Writes one checkpoint; `run` is a collective of all ranks, and has the same outcome on all of
    them."""

    def __init__(
        self,
        folder: Path,
        *,
        state: State,
        rank_state: memoryview,
        description: Mapping[str, Any],
        ranks: Ranks,
        group: dist.ProcessGroup | None,
        best: bool,
        keep_last: int | None,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._final = files.checkpoint_path(folder, description["step"])
        self._partial = self._final.with_name(f"{self._final.name}.partial")
        self._state = state
        self._rank_state = rank_state
        self._description = description
        self._ranks = ranks
        self._group = group
        self._best = best
        self._keep_last = keep_last
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._error = error
        finally:
            self._state.clear()

    def result(self) -> None:
        """Raises what `run` ended with."""
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        folder = self._final.parent
        try:
            self._ranks.from_first(lambda: files.remove_leftovers(folder), group=self._group)
            with quiet_torch():
                save(self._state, checkpoint_id=self._partial, process_group=self._group)
            of_ranks = on_every_rank(self._write_own, group=self._group)
            written = {name: entry for own in of_ranks for name, entry in own.items()}
            self._ranks.from_first(lambda: self._complete(written), group=self._group)
        except (CheckpointException, OSError) as error:
            why = reason(error)
            if self._ranks.is_first:
                shutil.rmtree(self._partial, ignore_errors=True)
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            raise RunError(
                f"checkpoint {self._final} cannot be written ({why}; "
                f"{shutil.disk_usage(there).free / 1e6:,.0f} MB are free on its disk); make room "
                "and rerun the same command"
            ) from error

    def _write_own(self) -> dict[str, tuple[int, int]]:
        if len(self._rank_state):
            path = self._partial / files.rank_file(self._ranks.rank)
            files.write_durably(path, self._rank_state)
        return files.written_by(self._partial, self._ranks.rank)

    def _complete(self, written: Mapping[str, tuple[int, int]]) -> None:
        files.complete(self._partial, self._final, description=self._description, files=written)
        folder = self._final.parent
        if self._best:
            files.mark_best(folder, self._description["step"])
        if self._keep_last is not None:
            files.prune(folder, keep_last=self._keep_last)
