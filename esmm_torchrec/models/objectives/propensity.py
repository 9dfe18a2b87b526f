"""What the objectives that weight clicks by 1 / pCTR have in common.

What a model predicts decides these weights, so that, unlike the sums of a batch's own weights, they
are not known before the step and are exchanged within it. The default process group is used; every
rank must call these functions in the same order and, as everywhere, with equally many impressions.
Results carry no gradient. The functions are leaves for torch.fx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist

from esmm_torchrec.batch import ImpressionBatch, NamedTensors
from esmm_torchrec.choices import Range
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.esmm import joint_label
from esmm_torchrec.models.parts import Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain

MIN_LOGIT = -20.0
"""Propensities are clipped at its sigmoid (2e-9) in any case, so that an inverse stays finite."""


@dataclass(frozen=True)
class PropensityObjective(Objective):
    """Clicks weighted by 1 / q, q = max(sg o, ε): o is pCTR of the model's own click tower and sg
    stops its gradient.

    Some of the papers take q from a click network trained before. Here it is the tower that is
    trained beside, so that each method is one training of one model with one budget, and the same
    on data that arrives in order; a network trained before would need a second pass over every
    impression, out of fold. The clip is what protects the first steps.
    """

    clip_quantile: Annotated[
        float, Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
    ] = 0.1
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
        return happened * inverse_propensity(logit, happened, weight, self.clip_quantile)

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
        size = effective_sample_size(weights)
        clicks = effective_sample_size(counted)
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
    return losses.weighted_mean(loss, weights, mean_over_ranks(weights.sum()))


@torch.fx.wrap
def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks divided by their number, without gradient.

    As `mean_weight` of `losses.weighted_mean` it makes a sum over this rank's impressions the
    normaliser of the global batch; of a result of `losses.weighted_mean` it makes the global mean.
    """
    total = value.detach().clone()
    if not dist.is_initialized():
        return total
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.fx.wrap
def inverse_propensity(
    logit: torch.Tensor,
    happened: torch.Tensor,
    weight: torch.Tensor | None,
    clip_quantile: float,
) -> torch.Tensor:
    """1 / max(σ(logit), ε), where ε is a quantile of σ(logit) over the impressions of all ranks
    that happened.

    Args:
        logit: (B,) of the propensity.
        happened: (B,), 1 for the impressions that are to be weighted.
        weight: (B,) of the batch, or None; impressions of weight 0 do not count.
        clip_quantile: in [0, 1]; 0 clips at the lowest propensity of what happened.

    Returns:
        float32 (B,) without gradient, finite for every impression.
    """
    logit = logit.detach().float()
    counted = happened > 0
    if weight is not None:
        counted = counted & (weight > 0)
    everywhere = _gathered(torch.where(counted, logit, torch.nan))
    lowest = torch.nanquantile(everywhere, clip_quantile, interpolation="lower")
    # In a batch without a click all weights are 0.
    lowest = torch.where(lowest.isnan(), 0.0, lowest).clamp(min=MIN_LOGIT)
    return 1 + torch.exp(-torch.maximum(logit, lowest))


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """(Σw)² / Σw² over all ranks, float32 (): how many equally weighted impressions carry as much
    information (Kish, "Survey Sampling", 1965). 0 without weights.

    Args:
        weights: float32 (B,), not negative.
    """
    sums = mean_over_ranks(torch.stack([weights.sum(), weights.square().sum()]))
    size = dist.get_world_size() if dist.is_initialized() else 1
    total, squares = sums.unbind()
    return torch.where(squares > 0, size * total.square() / squares, torch.zeros_like(total))


def _gathered(values: torch.Tensor) -> torch.Tensor:
    """The values of all ranks, those of the first rank first."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)
