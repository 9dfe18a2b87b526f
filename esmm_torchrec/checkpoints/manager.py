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

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from esmm_torchrec.checkpoints.checkpoint import (
    checkpoint_folders,
    find_checkpoint,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from esmm_torchrec.sharding.process_group import Ranks

BEST = "best.json"
"""File that names the best checkpoint."""


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
        file = self.path / rank_file(rank)
        if not file.exists():
            return None
        return torch.load(file, map_location="cpu", weights_only=True)


def rank_file(rank: int) -> str:
    """Name of the file that holds the `rank_state` of a rank."""
    return f"rank-{rank:05d}.pt"


class CheckpointManager:
    """Saves, finds, loads and prunes the checkpoints in one folder.

    Every rank must make one, and call its methods in the same order as the others.

    Args:
        folder: of all checkpoints; made by the first save.
        ranks: this process among the others.
        keep_last: number of checkpoints to keep; None keeps all. The best one is kept in any case.
        asynchronous: whether `save` returns once the state has been copied to host memory, and a
            thread writes it. The copy takes as much host memory as this rank's part of the weights
            and of the optimiser's state.
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
        self._asynchronous = asynchronous

    def find(self, step: int | None = None) -> Path | None:
        """The checkpoint of a step, or the last one; None if there is none at all. Every rank gets
        the answer of rank 0.

        Raises:
            RunError: there is no checkpoint of that step.
        """
        return self._ranks.from_first(lambda: find_checkpoint(self.folder, step))

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
        save_checkpoint(
            self.folder,
            step=step,
            model=model,
            optimizer=optimizer,
            progress=dict(progress),
            ranks=self._ranks,
            rank_state=rank_state,
        )
        self._ranks.from_first(lambda: self._finish(step, best))

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
        progress = load_checkpoint(checkpoint, model=model, optimizer=optimizer)
        step, num_ranks = progress.pop("step"), progress.pop("num_ranks", 1)
        return LoadedCheckpoint(checkpoint, step, progress, num_ranks)

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            RunError: it could not be written.
        """

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

    def _finish(self, step: int, best: bool) -> None:
        if best:
            _write(self.folder / BEST, json.dumps({"step": step}))
        if self._keep_last is None:
            return
        best_step = find_best(self.folder)
        for earlier in list(checkpoint_folders(self.folder))[: -self._keep_last]:
            if earlier != best_step:
                remove_checkpoint(self.folder, earlier)


def find_best(folder: Path) -> int | None:
    """The step of the best checkpoint in a folder; None if none was marked."""
    try:
        step = json.loads((folder / BEST).read_text())["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return step if step in checkpoint_folders(folder) else None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)
