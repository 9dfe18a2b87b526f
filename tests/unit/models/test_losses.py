"""The losses against 60-digit arithmetic, at logits where probabilities no longer exist."""

from __future__ import annotations

import mpmath
import pytest
import torch

from esmm_torchrec.models.losses import (
    binary_cross_entropy,
    ctcvr_logit,
    ctcvr_loss,
    product_logit,
    product_loss,
    weighted_mean,
)

mpmath.mp.dps = 60
FLOOR = mpmath.mpf(2) ** -110
"""Below it float32 has few digits or none, and a gradient moves nothing."""

LOGITS = [-1e4, -300.0, -90.0, -17.0, -8.0, -1.0, -1e-3, 0.0, 0.4, 3.0, 20.0, 88.0, 1e3, 1e4]
PAIRS = [(a, b) for a in LOGITS for b in LOGITS]


def _sigmoid(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def _exact(a: float, b: float, target: int) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """Loss and its two derivatives, from the float32 values of a and b."""
    x, y = (mpmath.mpf(float(torch.tensor(value))) for value in (a, b))
    p, q = _sigmoid(x), _sigmoid(y)
    # 1 − pq without cancellation: (1 + e^x + e^y) / ((1 + e^x)(1 + e^y)).
    rest = (1 + mpmath.exp(x) + mpmath.exp(y)) / ((1 + mpmath.exp(x)) * (1 + mpmath.exp(y)))
    if target:
        return -mpmath.log(p) - mpmath.log(q), -_sigmoid(-x), -_sigmoid(-y)
    return -mpmath.log(rest), p * q * _sigmoid(-x) / rest, p * q * _sigmoid(-y) / rest


def _relative_errors(values: torch.Tensor, exact: list[mpmath.mpf]) -> list[float]:
    return [
        float(abs(mpmath.mpf(value) - true) / max(abs(true), FLOOR))
        for value, true in zip(values.tolist(), exact, strict=True)
    ]


@pytest.mark.parametrize("target", [0, 1])
def test_ctcvr_loss_and_gradient_are_exact_to_float32(target: int) -> None:
    a = torch.tensor([pair[0] for pair in PAIRS], requires_grad=True)
    b = torch.tensor([pair[1] for pair in PAIRS], requires_grad=True)
    loss = ctcvr_loss(a, b, torch.full_like(a, target))
    loss.sum().backward()
    exact = [_exact(*pair, target) for pair in PAIRS]
    assert a.grad is not None
    assert b.grad is not None
    assert max(_relative_errors(loss, [values[0] for values in exact])) < 1e-5
    assert max(_relative_errors(a.grad, [values[1] for values in exact])) < 1e-5
    assert max(_relative_errors(b.grad, [values[2] for values in exact])) < 1e-5


def test_ctcvr_logit_is_the_logit_of_the_product() -> None:
    a, b = torch.tensor(PAIRS).T
    exact = []
    for pair in PAIRS:
        x, y = (mpmath.mpf(float(torch.tensor(value))) for value in pair)
        exact.append(-mpmath.log(mpmath.exp(-x) + mpmath.exp(-y) + mpmath.exp(-x - y)))
    errors = [
        float(abs(mpmath.mpf(value) - true) / max(abs(true), mpmath.mpf("0.1")))
        for value, true in zip(ctcvr_logit(a, b).tolist(), exact, strict=True)
    ]
    assert max(errors) < 1e-5


def test_gradient_agrees_with_finite_differences() -> None:
    a = torch.tensor([-2.0, 0.3, 1.5], dtype=torch.float64)
    b = torch.tensor([0.7, -1.1, 2.0], dtype=torch.float64)
    target = torch.tensor([0.0, 1.0, 0.0])

    def naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = torch.sigmoid(a) * torch.sigmoid(b)
        return -(target * product.log() + (1 - target) * (1 - product).log()).sum()

    wanted = torch.autograd.functional.jacobian(naive, (a, b))
    x, y = a.float().requires_grad_(), b.float().requires_grad_()
    ctcvr_loss(x, y, target).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad.double(), wanted[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(y.grad.double(), wanted[1], atol=1e-6, rtol=1e-5)


def test_bfloat16_logits_give_a_float32_loss() -> None:
    a = torch.tensor([-8.0, 2.0], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ctcvr_loss(a, a, torch.tensor([0.0, 1.0]))
        click = binary_cross_entropy(a, torch.tensor([0.0, 1.0]))
    assert loss.dtype == click.dtype == torch.float32
    assert loss[0] == pytest.approx(float(_exact(-8.0, -8.0, 0)[0]), rel=1e-5)


@pytest.mark.parametrize("target", [0, 1])
def test_the_loss_of_three_factors_and_its_gradient_are_exact(target: int) -> None:
    triples = [(a, b, c) for a in LOGITS[::2] for b in LOGITS[1::3] for c in LOGITS[::3]]
    logits = [torch.tensor(column, requires_grad=True) for column in zip(*triples, strict=True)]
    loss = product_loss(logits, torch.full((len(triples),), target).float())
    loss.sum().backward()
    exact: list[list[mpmath.mpf]] = []
    for triple in triples:
        x = [mpmath.mpf(float(torch.tensor(value))) for value in triple]
        p = [_sigmoid(value) for value in x]
        # 1 − p₁p₂p₃ = (1−p₁) + p₁(1−p₂) + p₁p₂(1−p₃), a sum without cancellation.
        rest = _sigmoid(-x[0]) + p[0] * _sigmoid(-x[1]) + p[0] * p[1] * _sigmoid(-x[2])
        if target:
            exact.append([-sum(map(mpmath.log, p)), *(-_sigmoid(-value) for value in x)])
        else:
            product = p[0] * p[1] * p[2]
            grads = [product * _sigmoid(-value) / rest for value in x]
            exact.append([-mpmath.log(rest), *grads])
    for values, wanted in zip(
        [loss, *(x.grad for x in logits)], zip(*exact, strict=True), strict=True
    ):
        assert values is not None
        assert max(_relative_errors(values, list(wanted))) < 2e-5


def test_a_product_of_one_is_the_logit_itself() -> None:
    logit, target = torch.tensor([-3.0, 2.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(product_logit([logit]), logit)
    assert torch.equal(product_loss([logit], target), binary_cross_entropy(logit, target))


def test_weighted_mean_over_ranks_is_the_global_mean() -> None:
    losses = [torch.tensor([1.0, 2.0, 5.0]), torch.tensor([7.0, 3.0, 4.0])]
    weights = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 0.0])]
    share = torch.tensor(3.0) / 2
    parts = [weighted_mean(x, w, share) for x, w in zip(losses, weights, strict=True)]
    assert sum(parts) / 2 == pytest.approx((1.0 * 1 + 5.0 * 2) / 3)


def test_weighted_mean_without_weight_is_zero_and_without_weights_the_mean() -> None:
    loss = torch.tensor([1.0, 2.0])
    assert weighted_mean(loss, torch.zeros(2), torch.tensor(0.0)) == 0
    assert weighted_mean(loss, torch.zeros(2), None) == 0
    assert weighted_mean(loss, None, None) == 1.5
