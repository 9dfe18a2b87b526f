"""A separate logit for each prefix of the chain; conditional probabilities are quotients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.esmm import joint_label
from esmm_torchrec.models.parts import Head, Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import Task, TaskChain


def joint_name(task: Task) -> str:
    """Returns the logit name of P(task and all tasks before it): "ctcvr" for a conversion."""
    if task.given is None:
        return task.name
    return task.joint_short or f"{task.name}_joint"


@dataclass(frozen=True)
class DivisionObjective(Objective):
    """mean BCE(y, pCTR) + mean BCE(y·z, pCTCVR), both over all impressions; pCVR = pCTCVR / pCTR.

    With separate networks, which share no parameters, and element-wise optimisers (Adam, Adagrad),
    training on the sum is equivalent to training each network separately.
    """

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for the probability of each prefix."""
        return tuple(Head(joint_name(task), task.label, starts_as=task.name) for task in tasks)

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the sum of the terms, each a mean over all impressions."""
        terms = []
        for task in tasks:
            labels = tuple(other.label for other in tasks.prefix(task))
            terms.append(
                losses.binary_cross_entropy(logits[joint_name(task)], joint_label(batch, labels))
            )
        return losses.weighted_mean(torch.stack(terms).sum(dim=0), batch.weight, batch.mean_weight)
