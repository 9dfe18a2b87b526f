"""Multi-task loss before ESMM: each task over the impressions on which it can happen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import NotNegative
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.esmm import joint_label, task_heads
from esmm_torchrec.models.parts import Head, Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain


@dataclass(frozen=True)
class ClickSpaceObjective(Objective):
    """mean over D of BCE(y, pCTR) + mean over O of BCE(z, pCVR).

    The second term is a mean over the clicks of all ranks, and 0 for a batch without clicks. At
    weight 1, its gradient is about 1 / CTR times that of ESMM's second term, a mean over D.
    """

    conversion_loss_weight: NotNegative = 1.0
    """Factor of the second term, and of the terms of further tasks."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for each task."""
        return task_heads(tasks)

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the sum of the terms, each a mean over the impressions with the task before."""
        first = tasks[0]
        click = losses.binary_cross_entropy(logits[first.name], batch.labels[first.label])
        total = losses.weighted_mean(click, batch.weight, batch.mean_weight)
        for task in tasks[1:]:
            before = tasks.prefix(task)[:-1]
            loss = losses.binary_cross_entropy(logits[task.name], batch.labels[task.label])
            weight = joint_label(batch, tuple(other.label for other in before))
            if batch.weight is not None:
                weight = weight * batch.weight
            mean_weight = batch.mean_label_weight.get(before[-1].label)
            total = total + self.conversion_loss_weight * losses.weighted_mean(
                loss, weight, mean_weight
            )
        return total
