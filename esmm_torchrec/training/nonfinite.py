"""Handling of a loss that is not finite: the run stops, or the step is skipped.

An infinite or missing number in a batch, or a learning rate that is too high, turns every weight
that a step updates into NaN. Such weights must not be saved in a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from esmm_torchrec.errors import RunError
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.sharding.apply import local_shards
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import NonfiniteOption

MAX_STEPS_UNCHECKED = 20
"""Maximum number of steps between two checks on several ranks or on a GPU, where each check costs a
synchronisation."""

MAX_SKIPPED_STEPS = 10
"""Maximum number of consecutive steps that are skipped before the run stops."""


class WatchLoss(Callback):
    """Stops a run whose loss is not finite, and saves the batch for replay.

    Args:
        folder: folder in which the batch is saved.
        action: "stop", or "skip" if the trainer skips such steps; the run then stops only after
            MAX_SKIPPED_STEPS consecutive ones.
    """

    def __init__(self, folder: Path, action: NonfiniteOption) -> None:
        self._folder = folder
        self._action = action
        self._losses: list[torch.Tensor] = []
        self._position: Mapping[str, Any] = {}
        self._positions: list[Mapping[str, Any]] = []
        self._skipped = 0

    def on_start(self, loop: TrainingLoop) -> None:
        """Records the position of the first step."""
        self._position = loop.reader.state_dict()

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:
        """Checks the loss at once if that is cheap, else every MAX_STEPS_UNCHECKED steps."""
        self._losses.append(output.loss)
        self._positions.append(self._position)
        self._position = loop.reader.state_dict()
        alone = loop.ranks.world_size == 1 and loop.ranks.device.type == "cpu"
        if alone or len(self._losses) == MAX_STEPS_UNCHECKED or loop.step == loop.last_step:
            self._check_losses(loop)

    def check(self, loop: TrainingLoop) -> None:
        """Checks the losses of all ranks since the last check, and the weights.

        Raises:
            RunError: a loss or a weight is not finite.
        """
        self._check_losses(loop)
        check_weights(loop)

    def _check_losses(self, loop: TrainingLoop) -> None:
        if not self._losses:
            return
        losses = torch.stack(self._losses)
        if loop.ranks.world_size > 1:
            dist.all_reduce(losses)
        positions, first = self._positions, loop.step - len(self._losses) + 1
        self._losses, self._positions = [], []
        for offset, finite in enumerate(losses.isfinite().tolist()):
            if finite:
                self._skipped = 0
            elif self._action == "stop" or self._skipped == MAX_SKIPPED_STEPS:
                self._stop(loop, first + offset, positions[offset])
            else:
                self._skipped += 1
                if loop.ranks.is_first:
                    print(
                        f"warning: step {first + offset} is skipped because its loss is not finite",
                        flush=True,
                    )

    def _stop(self, loop: TrainingLoop, step: int, position: Mapping[str, Any]) -> None:
        reader = copy.copy(loop.reader)
        reader.load_state_dict(dict(position))
        batch = next(iter(reader))
        path = self._folder / f"step-{step:08d}-rank-{loop.ranks.rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "reader": dict(position), "batch": batch}, path)
        loop.ranks.barrier()
        raise RunError(
            f"the loss of step {step} is not finite and its batch is saved in {self._folder}; "
            "lower `dense_lr` or `sparse_lr`, or skip such steps with `on_nonfinite` skip"
        )


def check_weights(loop: TrainingLoop) -> None:
    """Checks that every weight is finite; to be called on every rank.

    Raises:
        RunError: a weight is not finite.
    """
    finite = torch.ones((), device=loop.ranks.device)
    for value in loop.trainer.model.state_dict().values():
        for part, _ in local_shards(value):
            # Unlike isfinite() of its elements, the sum does not allocate a copy of a table.
            finite *= part.detach().sum().isfinite()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise RunError(
            f"the weights are not finite after step {loop.step}, which is not saved; lower "
            "`dense_lr` or `sparse_lr`"
        )
