"""Weights by the inverse of a predicted propensity, and sums over all ranks.

What a model predicts decides these weights, so that, unlike the sums of a batch's own weights, they
are not known before the step and are exchanged within it. The default process group is used; every
rank must call these functions in the same order and, as everywhere, with equally many impressions.
Results carry no gradient. The functions are leaves for torch.fx.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

MIN_LOGIT = -20.0
"""Propensities are clipped at its sigmoid (2e-9) in any case, so that an inverse stays finite."""


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
