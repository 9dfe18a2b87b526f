"""What the objectives that weight clicks by 1 / pCTR have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch

from esmm_torchrec.batch import ImpressionBatch, NamedTensors
from esmm_torchrec.choices import Range
from esmm_torchrec.models import losses, propensities
from esmm_torchrec.models.objectives.esmm import joint_label
from esmm_torchrec.models.parts import Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain


@dataclass(frozen=True)
class PropensityObjective(Objective):
    """Clicks weighted by 1 / q, q = max(sg o, ε): o is pCTR of the model's own click tower and sg
    stops its gradient.

    Some of the papers take q from a click network trained before. Here it is the tower that is
    trained beside, so that each method is one training of one model with one budget, and the same
    on data that arrives in order; a network trained before would need a second pass over every
    impression, out of fold. The clip is what protects the first steps.
    """

    clip_quantile: Annotated[float, Range("from 0 to 1", lambda value: 0 <= value <= 1)] = 0.1
    """ε is this quantile of pCTR over the clicks of a step; 0 clips nothing."""

    def inverse(
        self, logit: torch.Tensor, happened: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """1 / q where it happened and else 0, float32 (B,) without gradient.

        Args:
            logit: of the propensity, (B,).
            happened: (B,), 1 or 0.
            weight: of the batch.
        """
        return happened * propensities.inverse_propensity(
            logit, happened, weight, self.clip_quantile
        )

    def figures(
        self, logits: Logits, labels: NamedTensors, tasks: TaskChain
    ) -> Mapping[str, torch.Tensor]:
        """How many clicks the weighted clicks of a step are worth, and as a share of the clicks."""
        click = tasks[0]
        happened, weight = labels[click.label], labels.get("weight")
        weights = self.inverse(logits[click.name], happened, weight)
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
