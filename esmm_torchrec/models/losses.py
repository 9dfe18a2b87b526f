"""Losses along a chain of tasks, computed from logits in float32.

Notation: a₁ … a_k are the logits of the tasks of a prefix of the chain, each conditional on the
task before, all (B,); p = σ(a₁)·…·σ(a_k) is their joint probability. For the default chain k is 2:
a₁ is the click logit, a₂ the logit of a conversion given a click, p is pCTCVR. Multiplying the
sigmoids first and taking the cross entropy afterwards loses most of the precision and, for
confident predictions, the gradient; every function here starts from the logits instead.

Losses are per impression, (B,); `weighted_mean` reduces them. The functions are leaves for
torch.fx, so that TorchRec's pipelines can trace a train task that calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def product_logit(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the exact logit of σ(a₁)·…·σ(a_k): L(a, b) = −logsumexp(−a, −b, −a−b), applied
    repeatedly. It ranks like the product, but does not underflow.

    Args:
        logits: k tensors (B,) of any float dtype, at least one.

    Returns:
        float32 (B,).
    """
    return reduce(_logit_of_two, (logit.float() for logit in logits))


def _logit_of_two(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), dim=0)


def ctcvr_logit(click_logit: torch.Tensor, conversion_logit: torch.Tensor) -> torch.Tensor:
    """Returns the logit of pCTR · pCVR: `product_logit` of the default chain.

    Args:
        click_logit: (B,), any float dtype.
        conversion_logit: (B,), any float dtype.

    Returns:
        float32 (B,).
    """
    return product_logit((click_logit, conversion_logit))


def log_conversion_ratio(ctcvr_logit: torch.Tensor, click_logit: torch.Tensor) -> torch.Tensor:
    """Returns log(pCTCVR / pCTR) of two independent networks, float32 (B,); above 0 if the
    quotient exceeds 1. Dividing the probabilities instead overflows for small pCTR."""
    return F.logsigmoid(ctcvr_logit.float()) - F.logsigmoid(click_logit.float())


class _ProductLoss(torch.autograd.Function):
    """Loss −t·log p − (1−t)·log(1−p) for p = Π σ(aᵢ), with its gradient in closed form.

    ∂/∂aᵢ = −t·σ(−aᵢ) + (1−t)·p·σ(softplus(Lᵢ) − aᵢ), where Lᵢ is the logit of the product without
    aᵢ: autograd through the logsumexp would be a hundred times less precise.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, target: torch.Tensor, *logits: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(target, *logits)
        happened = sum(F.softplus(-logit) for logit in logits)
        did_not = F.softplus(product_logit(logits))
        return target * happened + (1 - target) * did_not

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        target, *logits = ctx.saved_tensors
        product = 1 - target
        for logit in logits:
            product = product * torch.sigmoid(logit)
        grads: list[torch.Tensor | None] = [None]
        for place, logit in enumerate(logits):
            others = product_logit([*logits[:place], *logits[place + 1 :]])
            own = -target * torch.sigmoid(-logit)
            grads.append(grad * (own + product * torch.sigmoid(F.softplus(others) - logit)))
        return tuple(grads)


@torch.fx.wrap
def binary_cross_entropy(logit: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Computes the cross entropy of σ(logit) and a target in [0, 1], float32 (B,)."""
    return F.binary_cross_entropy_with_logits(logit.float(), target.float(), reduction="none")


@torch.fx.wrap
def entropy(logit: torch.Tensor) -> torch.Tensor:
    """Computes the entropy of a label of probability σ(logit), in nats, float32 (B,): the cross
    entropy of σ(logit) with itself. Its gradient at logit x is −x·σ(x)·σ(−x)."""
    size = logit.float().abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


@torch.fx.wrap
def product_loss(logits: Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Computes the cross entropy of σ(a₁)·…·σ(a_k) and a label: the entire-space term of a prefix
    of the chain (for two tasks: Ma et al., SIGIR 2018, equation 2, second term).

    Args:
        logits: k tensors (B,), at least one.
        target: (B,), 1 if all k tasks happened.

    Returns:
        float32 (B,). Not twice differentiable for k > 1.
    """
    if len(logits) == 1:
        return binary_cross_entropy(logits[0], target)
    return _ProductLoss.apply(target.float(), *(logit.float() for logit in logits))


@torch.fx.wrap
def ctcvr_loss(
    click_logit: torch.Tensor, conversion_logit: torch.Tensor, conversion: torch.Tensor
) -> torch.Tensor:
    """Computes the cross entropy of pCTR · pCVR and the conversion label: the second term of
    ESMM's loss (Ma et al., SIGIR 2018, equation 2).

    Args:
        click_logit: (B,).
        conversion_logit: (B,).
        conversion: (B,), 1 if the impression was clicked and converted.

    Returns:
        float32 (B,). Not twice differentiable.
    """
    return product_loss((click_logit, conversion_logit), conversion)


@torch.fx.wrap
def weighted_mean(
    loss: torch.Tensor, weight: torch.Tensor | None, mean_weight: torch.Tensor | None
) -> torch.Tensor:
    """Returns Σ weight·loss over this rank, divided by `mean_weight`.

    If `mean_weight` is the sum of weights over all ranks divided by the number of ranks, the
    average of the results over the ranks, which data-parallel training differentiates, is the
    weighted mean over the global batch, however the weights are distributed. The result is 0 for a
    global batch whose weights are all 0.

    Args:
        loss: float32 (B,).
        weight: float32 (B,), or None for all 1.
        mean_weight: float32 (), or None for this rank's own sum.
    """
    weights = torch.ones_like(loss) if weight is None else weight
    total = weights.sum() if mean_weight is None else mean_weight
    return (loss * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
