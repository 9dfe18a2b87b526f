"""Each prefix of the chain by a logit of its own; a conditional probability is a quotient."""

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
    """Name of the logit of P(task and all tasks before it): "ctcvr" for a conversion."""
    if task.given is None:
        return task.name
    return task.joint_short or f"{task.name}_joint"


@dataclass(frozen=True)
class DivisionObjective(Objective):
    """mean BCE(y, pCTR) + mean BCE(y·z, pCTCVR), both over all impressions; pCVR = pCTCVR / pCTR.

    With separate networks, which have no parameter in common, and optimisers that look at each
    parameter alone (Adam, Adagrad), one training of the sum is two trainings side by side.
    """

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """A logit for the probability of each prefix."""
        return tuple(Head(joint_name(task), task.label, starts_as=task.name) for task in tasks)

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """The sum of the terms, each a mean over all impressions."""
        terms = []
        for task in tasks:
            labels = tuple(other.label for other in tasks.prefix(task))
            terms.append(
                losses.binary_cross_entropy(logits[joint_name(task)], joint_label(batch, labels))
            )
        return losses.weighted_mean(torch.stack(terms).sum(dim=0), batch.weight, batch.mean_weight)
