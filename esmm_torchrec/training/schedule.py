"""Learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import ScheduleOption


class ScheduleLearningRates(Callback):
    """Multiplies the learning rates of tables and towers by a factor that depends on the step.

    For step n, counted from 0, the factor is (n + 1) / warmup_steps in the warm-up and then
    1 (constant), 1 - n / last_step (linear) or (1 + cos(π n / last_step)) / 2 (cosine). A resumed
    run has the rates of an uninterrupted run, and a run that is continued beyond its last step has
    the rates of the longer run.

    Args:
        schedule: schedule after the warm-up.
        warmup_steps: number of steps in the warm-up.
    """

    def __init__(self, schedule: ScheduleOption, *, warmup_steps: int) -> None:
        self._schedule: ScheduleOption = schedule
        self._warmup_steps = warmup_steps
        self._groups: list[tuple[Any, float]] = []
        """Parameter groups, each with its learning rate at a factor of 1."""
        self._last_step = 0

    def on_start(self, loop: TrainingLoop) -> None:
        """Sets the rates of the starting step."""
        groups = loop.trainer.optimizer.param_groups
        self._groups = [(group, group["lr"]) for group in groups]
        self._last_step = loop.last_step
        self._set(loop.step)

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        """Sets the rates of the next step; a fused optimiser reads them when the step starts."""
        self._set(loop.step)

    def _set(self, step: int) -> None:
        for group, rate in self._groups:
            group["lr"] = rate * self._factor(step)

    def _factor(self, step: int) -> float:
        if step < self._warmup_steps:
            first = 1 / self._warmup_steps
            return first + (1 - first) * step / max(1, self._warmup_steps - 1)
        if self._schedule == "constant":
            return 1.0
        if self._schedule == "linear":
            return 1 - step / self._last_step
        return 0.5 * (1 + math.cos(math.pi * step / self._last_step))
