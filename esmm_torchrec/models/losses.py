"""Losses of the chain impression → click → conversion, computed from logits in float32.

Notation: a is the click logit, b the logit of a conversion given a click, both (B,);
pCTR = σ(a), pCVR = σ(b), pCTCVR = σ(a)·σ(b). Multiplying the sigmoids first and taking the cross
entropy afterwards loses most of the precision and, for sure predictions, the gradient; every
function here starts from the logits instead.

Losses come per impression, (B,); `weighted_mean` reduces them. The functions are leaves for
torch.fx, so that TorchRec's pipelines can trace through a train task that calls them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def ctcvr_logit(click_logit: torch.Tensor, conversion_logit: torch.Tensor) -> torch.Tensor:
    """Logit of the product pCTR · pCVR, exactly: L(a, b) = −logsumexp(−a, −b, −a−b).

    Ranking by it ranks by pCTCVR without the product's underflow.

    Args:
        click_logit: (B,) any float dtype.
        conversion_logit: (B,) any float dtype.

    Returns:
        float32 (B,).
    """
    a, b = click_logit.float(), conversion_logit.float()
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), dim=0)


def log_ctcvr(click_logit: torch.Tensor, conversion_logit: torch.Tensor) -> torch.Tensor:
    """log(pCTR · pCVR), float32 (B,)."""
    return F.logsigmoid(click_logit.float()) + F.logsigmoid(conversion_logit.float())


def log_conversion_ratio(ctcvr_logit: torch.Tensor, click_logit: torch.Tensor) -> torch.Tensor:
    """log(pCTCVR / pCTR) of two networks that know nothing of each other, float32 (B,): above 0
    where the quotient exceeds 1. Dividing the probabilities instead overflows where pCTR is
    small."""
    return F.logsigmoid(ctcvr_logit.float()) - F.logsigmoid(click_logit.float())


class _CtcvrLoss(torch.autograd.Function):
    """−t·log p − (1−t)·log(1−p) for p = σ(a)·σ(b), with its gradient in closed form.

    ∂/∂a = −t·σ(−a) + (1−t)·σ(a)·σ(b)·σ(softplus(b) − a), and the same with a and b exchanged:
    autograd through the logsumexp would be a hundred times less precise.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b, target)
        converted = F.softplus(-a) + F.softplus(-b)
        not_converted = F.softplus(ctcvr_logit(a, b))
        return target * converted + (1 - target) * not_converted

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        a, b, target = ctx.saved_tensors
        product = (1 - target) * torch.sigmoid(a) * torch.sigmoid(b)
        grad_a = -target * torch.sigmoid(-a) + product * torch.sigmoid(F.softplus(b) - a)
        grad_b = -target * torch.sigmoid(-b) + product * torch.sigmoid(F.softplus(a) - b)
        return grad * grad_a, grad * grad_b, None


@torch.fx.wrap
def binary_cross_entropy(logit: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of σ(logit) and a target in [0, 1], float32 (B,)."""
    return F.binary_cross_entropy_with_logits(logit.float(), target.float(), reduction="none")


@torch.fx.wrap
def ctcvr_loss(
    click_logit: torch.Tensor, conversion_logit: torch.Tensor, conversion: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of pCTR · pCVR and the conversion label: the second term of ESMM's loss
    (Ma et al., SIGIR 2018, equation 2).

    Args:
        click_logit: (B,).
        conversion_logit: (B,).
        conversion: (B,), 1 where the impression was clicked and converted.

    Returns:
        float32 (B,). Not twice differentiable.
    """
    return _CtcvrLoss.apply(click_logit.float(), conversion_logit.float(), conversion.float())


@torch.fx.wrap
def weighted_mean(
    loss: torch.Tensor, weight: torch.Tensor | None, mean_weight: torch.Tensor | None
) -> torch.Tensor:
    """Σ weight·loss over this rank, divided by `mean_weight`.

    Where `mean_weight` is the sum of weights over all ranks divided by their number, the average
    of the results over the ranks, which is what data-parallel training differentiates, is the
    weighted mean over the global batch however the weights are spread. A global batch whose
    weights are all 0 gives 0.

    Args:
        loss: float32 (B,).
        weight: float32 (B,), or None for all 1.
        mean_weight: float32 (), or None for this rank's own sum.
    """
    weights = torch.ones_like(loss) if weight is None else weight
    total = weights.sum() if mean_weight is None else mean_weight
    return (loss * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
