"""Objectives with one probability, learned on the rows that the method selects."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.esmm import heads_of_two, joint_label
from esmm_torchrec.models.parts import Head, Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain


@dataclass(frozen=True)
class ClickObjective(Objective):
    """mean BCE(y, pCTR) over the selected rows: only the first task of the chain."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns the logit of the first task."""
        return (Head(tasks[0].name, tasks[0].label),)

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the mean over the rows of the global batch."""
        first = tasks[0]
        loss = losses.binary_cross_entropy(logits[first.name], batch.labels[first.label])
        return losses.weighted_mean(loss, batch.weight, batch.mean_weight)


@dataclass(frozen=True)
class ConversionObjective(Objective):
    """mean BCE(y·z, pCVR) over the selected rows: only the last task of the chain.

    The rows determine the condition of pCVR: a click, if the rows are the clicks. Hence it is the
    probability of the last task given the task before only in a chain of two.
    """

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns the logit of the last task, over all rows.

        Raises:
            OptionError: the chain does not have two tasks.
        """
        _, conversion = heads_of_two(tasks, "conversion")
        return (conversion._replace(given=None),)

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the mean over the rows of the global batch."""
        loss = losses.binary_cross_entropy(logits[tasks[-1].name], joint_label(batch, tasks.labels))
        return losses.weighted_mean(loss, batch.weight, batch.mean_weight)
