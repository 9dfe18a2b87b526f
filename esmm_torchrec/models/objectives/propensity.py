"""What the objectives that weight clicks by 1 / pCTR have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch, NamedTensors
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models import losses, propensities
from esmm_torchrec.models.objectives.esmm import joint_label, task_heads
from esmm_torchrec.models.parts import Head, Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain


def heads_of_two(tasks: TaskChain, objective: str) -> tuple[Head, Head]:
    """The click and the conversion logit.

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


def check_not_negative(part: Objective, *names: str) -> None:
    """Raises OptionError if one of these options is negative."""
    for name in names:
        if getattr(part, name) < 0:
            option = f"objective.{name}"
            raise OptionError(f"`{option}` is negative; give 0 or more")


@dataclass(frozen=True)
class PropensityObjective(Objective):
    """Clicks weighted by 1 / q, q = max(sg o, ε): o is pCTR of the model's own click tower and sg
    stops its gradient.

    Some of the papers take q from a click network trained before. Here it is the tower that is
    trained beside, so that each method is one training of one model with one budget, and the same
    on data that arrives in order; a network trained before would need a second pass over every
    impression, out of fold. The clip is what protects the first steps.

    Raises:
        OptionError: the quantile is not in [0, 1].
    """

    clip_quantile: float = 0.1
    """ε is this quantile of pCTR over the clicks of a step; 0 clips nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_quantile <= 1:
            option = "objective.clip_quantile"
            raise OptionError(f"`{option}` {self.clip_quantile:g} is not from 0 to 1")

    def click_weights(
        self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain
    ) -> torch.Tensor:
        """1 / q, float32 (B,), for clicked and other impressions."""
        click = tasks[0]
        return propensities.inverse_propensity(
            logits[click.name], batch.labels[click.label], batch.weight, self.clip_quantile
        )

    def figures(
        self, logits: Logits, labels: NamedTensors, tasks: TaskChain
    ) -> Mapping[str, torch.Tensor]:
        """How many clicks the weighted clicks of a step are worth, and as a share of the clicks."""
        click = tasks[0]
        happened, weight = labels[click.label], labels.get("weight")
        weights = happened * propensities.inverse_propensity(
            logits[click.name], happened, weight, self.clip_quantile
        )
        counted = happened
        if weight is not None:
            weights, counted = weights * weight, counted * (weight > 0)
        size = propensities.effective_sample_size(weights)
        clicks = propensities.effective_sample_size(counted)
        return {
            "effective_sample_size": size,
            "effective_sample_share": size / clicks.clamp(min=1),
        }


def click_loss(logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
    """BCE(y, pCTR), float32 (B,)."""
    click = tasks[0]
    return losses.binary_cross_entropy(logits[click.name], batch.labels[click.label])


def ctcvr_loss(logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
    """BCE(y·z, pCTR · pCVR), float32 (B,)."""
    chained = [logits[task.name] for task in tasks]
    return losses.product_loss(chained, joint_label(batch, tasks.labels))


def conversion_loss(logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
    """BCE(y·z, pCVR), float32 (B,); of use on clicked impressions."""
    return losses.binary_cross_entropy(logits[tasks[-1].name], joint_label(batch, tasks.labels))


def share_of(loss: torch.Tensor, weights: torch.Tensor, batch: ImpressionBatch) -> torch.Tensor:
    """This rank's share of Σ weights·loss / Σ weights over all ranks, float32 (): 0 if all weights
    are 0.

    Args:
        loss: float32 (B,).
        weights: float32 (B,), without gradient; multiplied by those of the batch.
        batch: whose weights they multiply.
    """
    if batch.weight is not None:
        weights = weights * batch.weight
    return losses.weighted_mean(loss, weights, propensities.mean_over_ranks(weights.sum()))
