"""Learning rates that change over the steps of a run, by TorchRec's WarmupOptimizer."""

from __future__ import annotations

from torchrec.optim.warmup import WarmupPolicy, WarmupStage

from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import ScheduleOption


class ScheduleLearningRates(Callback):
    """Multiplies the learning rates of tables and towers by a factor that depends on the step.

    The factor follows from the step and the last step alone, so a resumed run has the rates of an
    uninterrupted one, and a run that is continued beyond its last step has those of the longer run.

    Args:
        schedule: after the warm-up.
        warmup_steps: over which the factor rises linearly from 1 / warmup_steps to 1.
    """

    def __init__(self, schedule: ScheduleOption, *, warmup_steps: int) -> None:
        self._schedule: ScheduleOption = schedule
        self._warmup_steps = warmup_steps

    def on_start(self, loop: TrainingLoop) -> None:
        """Sets the rates of the step to start from."""
        stages = schedule_stages(
            self._schedule, warmup_steps=self._warmup_steps, last_step=loop.last_step
        )
        if stages:
            loop.trainer.optimizer.schedule(stages, step=loop.step)


def schedule_stages(
    schedule: ScheduleOption, *, warmup_steps: int, last_step: int
) -> list[WarmupStage]:
    """The stages of a schedule; none if the rates are constant.

    Of step n, counted from 0, the factor is min(1, (n + 1) / warmup_steps) before `warmup_steps`,
    then 1 (constant), 1 - n / last_step (linear) or (1 + cos(π n / last_step)) / 2 (cosine).

    Args:
        schedule: after the warm-up.
        warmup_steps: 0 for no warm-up.
        last_step: steps of the whole run.
    """
    stages = []
    if warmup_steps > 1:  # in a warm-up of one step the factor is 1
        # The factor is value + (1 - value) · n / max_iters for n ≤ max_iters.
        first = 1 / warmup_steps
        stages.append(WarmupStage(WarmupPolicy.LINEAR, max_iters=warmup_steps - 1, value=first))
    if schedule == "linear" and last_step > warmup_steps:
        stages.append(
            WarmupStage(WarmupPolicy.POLY, max_iters=last_step, value=1.0, decay_iters=last_step)
        )
    elif schedule == "cosine" and last_step > warmup_steps:
        stages.append(
            WarmupStage(
                WarmupPolicy.COSINE_ANNEALING_WARM_RESTARTS,
                max_iters=last_step,
                value=0.0,
                sgdr_period=last_step,
            )
        )
    return stages
