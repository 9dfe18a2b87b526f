"""Common functions of the objectives that weight clicks by 1 / pCTR.

These weights depend on the model's predictions. Unlike the sums of a batch's own weights, they are
not known before the step and are exchanged within it, over the default process group. Every rank
must call these functions in the same order and with the same number of impressions. Weights have
no gradient. The functions are leaves for torch.fx.
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
"""Minimum logit of a propensity (σ is 2e-9), so that its inverse is finite."""


@dataclass(frozen=True)
class PropensityObjective(Objective):
    """Base class of objectives that weight clicks by 1 / q, q = max(sg o, ε), where o is the pCTR
    of the model's own click tower and sg stops its gradient.

    Some of the papers take q from a pretrained click network. Here it comes from the click tower
    that is trained jointly, so that each method is one training of one model with one budget, also
    on data that arrives in order. A pretrained network would need a second, out-of-fold pass over
    every impression. The clip protects the first steps.
    """

    clip_quantile: Annotated[
        float, Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
    ] = 0.1
    """ε is this quantile of pCTR over the clicks of a step; 0 clips nothing."""

    def inverse(
        self, logit: torch.Tensor, happened: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns 1 / q where `happened` is 1 and 0 elsewhere, float32 (B,) without gradient.

        Args:
            logit: logit of the propensity, (B,).
            happened: (B,), 1 or 0.
            weight: weight of the batch, (B,) or None.
        """
        return happened * inverse_propensity(logit, happened, weight, self.clip_quantile)

    def figures(
        self, logits: Logits, labels: NamedTensors, tasks: TaskChain
    ) -> Mapping[str, torch.Tensor]:
        """Returns the effective sample size of a step's weighted clicks, also as a share of the
        clicks."""
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
    """Computes BCE(y, pCTR), float32 (B,)."""
    click = tasks[0]
    return losses.binary_cross_entropy(logits[click.name], batch.labels[click.label])


def ctcvr_loss(logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
    """Computes BCE(y·z, pCTR · pCVR), float32 (B,)."""
    chained = [logits[task.name] for task in tasks]
    return losses.product_loss(chained, joint_label(batch, tasks.labels))


def conversion_loss(logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
    """Computes BCE(y·z, pCVR), float32 (B,); only meaningful on clicked impressions."""
    return losses.binary_cross_entropy(logits[tasks[-1].name], joint_label(batch, tasks.labels))


def share_of(loss: torch.Tensor, weights: torch.Tensor, batch: ImpressionBatch) -> torch.Tensor:
    """Returns this rank's share of Σ weights·loss / Σ weights over all ranks, float32 (); 0 if all
    weights are 0.

    Args:
        loss: float32 (B,).
        weights: float32 (B,), without gradient; multiplied by the weights of the batch.
        batch: batch whose weights apply in addition.
    """
    if batch.weight is not None:
        weights = weights * batch.weight
    return losses.weighted_mean(loss, weights, mean_over_ranks(weights.sum()))


@torch.fx.wrap
def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a tensor over all ranks, without gradient.

    Applied to a sum over this rank's impressions, it yields the `mean_weight` with which
    `losses.weighted_mean` normalises over the global batch; applied to a result of
    `losses.weighted_mean`, it yields the global mean.
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
    """Returns 1 / max(σ(logit), ε), where ε is a quantile of σ(logit) over the impressions of all
    ranks for which `happened` is 1.

    Args:
        logit: logit of the propensity, (B,).
        happened: (B,), 1 for the impressions to weight.
        weight: weight of the batch, (B,) or None; impressions of weight 0 do not count.
        clip_quantile: in [0, 1]; 0 clips at the lowest propensity of these impressions.

    Returns:
        float32 (B,) without gradient, finite for every impression.
    """
    logit = logit.detach().float()
    counted = happened > 0
    if weight is not None:
        counted = counted & (weight > 0)
    everywhere = _gathered(torch.where(counted, logit, torch.nan))
    lowest = torch.nanquantile(everywhere, clip_quantile, interpolation="lower")
    # In a batch without clicks, all weights are 0.
    lowest = torch.where(lowest.isnan(), 0.0, lowest).clamp(min=MIN_LOGIT)
    return 1 + torch.exp(-torch.maximum(logit, lowest))


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """Returns (Σw)² / Σw² over all ranks, float32 (): the number of equally weighted impressions
    with as much information (Kish, "Survey Sampling", 1965); 0 if all weights are 0.

    Args:
        weights: float32 (B,), not negative.
    """
    sums = mean_over_ranks(torch.stack([weights.sum(), weights.square().sum()]))
    size = dist.get_world_size() if dist.is_initialized() else 1
    total, squares = sums.unbind()
    return torch.where(squares > 0, size * total.square() / squares, torch.zeros_like(total))


def _gathered(values: torch.Tensor) -> torch.Tensor:
    """Gathers the values of all ranks, in the order of the ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)
