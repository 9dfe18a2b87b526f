"""Losses of chains of three tasks against a statement of them in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.objectives.esm2 import BranchedModel, Esm2Objective, mixture_logit
from esmm_torchrec.models.objectives.esmm import EsmmObjective
from esmm_torchrec.models.scores import read_scores
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain

SIZE = 64


def _labels(*, branched: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    click, cart, order = (torch.rand(3, SIZE, generator=generator) < 0.6).float()
    cart = cart * click
    return {"click": click, "cart": cart, "order": order * (click if branched else cart)}


def _entropy(probability: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return -(label * probability.log() + (1 - label) * (1 - probability).log())


def _logits(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: 2 * torch.randn(SIZE, generator=generator) for name in names}


def test_esmm_of_three_tasks_equals_its_statement() -> None:
    tasks = TaskChain.of("click", "cart", "order")
    labels, weight = _labels(branched=False), torch.rand(SIZE)
    values = _logits(*tasks.names)
    ours = Logits({name: value.clone().requires_grad_() for name, value in values.items()})
    loss = EsmmObjective(0.7, 1.3).loss(ours, ImpressionBatch(labels=labels, weight=weight), tasks)

    exact = {name: value.double().requires_grad_() for name, value in values.items()}
    click, cart, order = (logit.sigmoid() for logit in exact.values())
    terms = 0.7 * _entropy(click, labels["click"].double())
    terms = terms + 1.3 * _entropy(click * cart, labels["cart"].double())
    terms = terms + 1.3 * _entropy(click * cart * order, labels["order"].double())
    stated = (terms * weight).sum() / weight.sum()

    torch.testing.assert_close(loss.double(), stated, rtol=1e-6, atol=0)
    loss.backward()
    stated.backward()
    for name, value in exact.items():
        torch.testing.assert_close(ours[name].grad.double(), value.grad, rtol=2e-5, atol=1e-8)


class _Given(nn.Module):
    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, features: object) -> Logits:  # noqa: ARG002
        return self.logits


def test_esm2_equals_its_statement() -> None:
    tasks = TaskChain.of("click", "cart", "order:click")
    objective = Esm2Objective()
    heads = [head.name for head in objective.heads(tasks)]
    assert heads == ["click", "cart", "order_given_cart", "order_given_no_cart"]
    labels = _labels(branched=True)
    assert (labels["order"] > labels["cart"]).any()
    values = _logits(*heads)
    ours = Logits({name: value.clone().requires_grad_() for name, value in values.items()})
    model = objective.complete(_Given(ours), tasks)
    assert isinstance(model, BranchedModel)
    logits = model(None)
    loss = objective.loss(logits, ImpressionBatch(labels=labels), tasks)

    exact = {name: value.double().requires_grad_() for name, value in values.items()}
    y1, y2, y3, y4 = (logit.sigmoid() for logit in exact.values())
    bought = y2 * y3 + (1 - y2) * y4
    stated = (
        _entropy(y1, labels["click"].double())
        + _entropy(y1 * y2, labels["cart"].double())
        + _entropy(y1 * bought, labels["order"].double())
    ).mean()
    torch.testing.assert_close(loss.double(), stated, rtol=1e-6, atol=0)
    loss.backward()
    stated.backward()
    for name, value in exact.items():
        torch.testing.assert_close(ours[name].grad.double(), value.grad, rtol=2e-5, atol=1e-8)
    scores = read_scores(logits, tasks)
    torch.testing.assert_close(
        scores["order_given_click"].probability.double(), bought.detach(), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        scores["order"].probability.double(), (y1 * bought).detach(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("values", list(product((-300.0, -30.0, 0.0, 30.0, 300.0), repeat=3)))
def test_the_logit_of_a_mixture_is_stable(values: tuple[float, float, float]) -> None:
    chosen, on, beside = (torch.tensor([value], requires_grad=True) for value in values)
    logit = mixture_logit(chosen, on, beside)
    logit.sum().backward()
    assert torch.isfinite(logit).all()
    for tensor in (chosen, on, beside):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    # Between the two logits that it mixes.
    assert min(values[1:]) - 1e-4 <= logit.item() <= max(values[1:]) + 1e-4


@pytest.mark.parametrize("tasks", [DEFAULT_TASKS, TaskChain.of("click", "cart", "order")])
def test_esm2_needs_a_chain_that_branches(tasks: TaskChain) -> None:
    with pytest.raises(OptionError, match="order:click"):
        Esm2Objective().heads(tasks)
