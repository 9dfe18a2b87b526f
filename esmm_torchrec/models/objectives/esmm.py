"""ESMM's loss over the entire space, with a term for every prefix of the chain."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import NotNegative
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models import losses
from esmm_torchrec.models.parts import Head, Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain


def task_heads(tasks: TaskChain) -> tuple[Head, ...]:
    """Returns a logit for each task, conditional on its `given`."""
    heads = []
    for task in tasks:
        before = tasks.given(task)
        heads.append(Head(task.name, task.label, None if before is None else before.label))
    return tuple(heads)


def heads_of_two(tasks: TaskChain, objective: str) -> tuple[Head, Head]:
    """Returns the click and the conversion logit.

    Raises:
        OptionError: the chain does not have two tasks.
    """
    if len(tasks) != 2:
        raise OptionError(
            f"the {objective} objective needs a chain of two tasks, not of {len(tasks)}; use the "
            "esmm, click-space or division objective"
        )
    click, conversion = task_heads(tasks)
    return click, conversion


def joint_label(batch: ImpressionBatch, labels: tuple[str, ...]) -> torch.Tensor:
    """Returns float32 (B,), 1 where all of `labels` are 1: a later task does not count without the
    earlier ones."""
    joint = batch.labels[labels[0]]
    for label in labels[1:]:
        joint = joint * batch.labels[label]
    return joint


@dataclass(frozen=True)
class EsmmObjective(Objective):
    """mean BCE(y, pCTR) + mean BCE(y·z, pCTR · pCVR), both over all impressions.

    Equation 2 of Ma et al., SIGIR 2018, as a mean. A longer chain of tasks adds a term for the
    product of each longer prefix.
    """

    click_loss_weight: NotNegative = 1.0
    """Factor of the first term."""
    ctcvr_loss_weight: NotNegative = 1.0
    """Factor of the second term, and of the terms of further tasks."""
    detach_click: bool = False
    """Keep the second term from training the click tower (and the terms of further tasks from
    training the towers of the tasks before)."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for each task."""
        return task_heads(tasks)

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the weighted sum of the terms, each a mean over all impressions."""
        first = tasks[0]
        total = self.click_loss_weight * losses.binary_cross_entropy(
            logits[first.name], batch.labels[first.label]
        )
        for task in tasks[1:]:
            prefix = tasks.prefix(task)
            chained = [logits[other.name] for other in prefix]
            if self.detach_click:
                chained = [logit.detach() for logit in chained[:-1]] + chained[-1:]
            target = joint_label(batch, tuple(other.label for other in prefix))
            total = total + self.ctcvr_loss_weight * losses.product_loss(chained, target)
        return losses.weighted_mean(total, batch.weight, batch.mean_weight)
