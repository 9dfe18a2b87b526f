"""The objectives that came after ESMM's, in float64, from probabilities, as they are on paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchrec.distributed.train_pipeline.tracing import Tracer

from esmm_torchrec.batch import ImpressionBatch, NamedTensors
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models import losses
from esmm_torchrec.models.methods import AFTER_METHODS, METHODS, ModelOptions, build_train_task
from esmm_torchrec.models.objectives.dcmt import DcmtObjective
from esmm_torchrec.models.objectives.doubly_robust import DoublyRobustObjective
from esmm_torchrec.models.objectives.esmm import EsmmObjective
from esmm_torchrec.models.objectives.ips import IpsObjective
from esmm_torchrec.models.objectives.nise import NiseObjective
from esmm_torchrec.models.objectives.propensity import effective_sample_size, inverse_propensity
from esmm_torchrec.models.parts import Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.tasks import DEFAULT_TASKS, Task, TaskChain

ROWS = 64
SCHEMA = Schema(tables=(Table("item", 7),), id_features=(IdFeature("item", "item"),))
BCE: Callable[..., torch.Tensor] = lambda p, t: F.binary_cross_entropy(p, t, reduction="none")  # noqa: E731

NEW = [name for name in AFTER_METHODS if not isinstance(METHODS[name].objective, EsmmObjective)]
OBJECTIVES: dict[str, Objective] = {
    **{name: METHODS[name].objective for name in NEW},
    "escm2-ips unclipped": IpsObjective(clip_quantile=0.0, conversion_loss_weight=0.7),
    "escm2-dr, other weights": DoublyRobustObjective(0.5, 0.3, 2.0),
    "dcmt, other weights": DcmtObjective(0.2, 0.6, 1.7, 0.5),
    "nise at its largest weight": NiseObjective(max_conversion_weight=0.01),
}


def _batch(*, clicks: bool = True, seed: int = 1) -> ImpressionBatch:
    generator = torch.Generator().manual_seed(seed)
    click = (torch.rand(ROWS, generator=generator) < 0.3).float() * clicks
    weight = torch.rand(ROWS, generator=generator) + 0.5
    weight[-3:] = 0
    return ImpressionBatch(
        click=click,
        conversion=click * torch.randint(0, 2, (ROWS,), generator=generator),
        weight=weight,
        mean_weight=weight.sum(),
        mean_label_weight={"click": (weight * click).sum()},
    )


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    ascending = values.sort().values
    return ascending[math.floor(q * (len(values) - 1))] if len(values) else torch.tensor(0.5)


def _plain(objective: Any, p: dict[str, torch.Tensor], batch: ImpressionBatch) -> torch.Tensor:
    assert batch.weight is not None
    y, z, w = batch.click.double(), batch.conversion.double(), batch.weight.double()
    o, r = p["click"], p["conversion"]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (w * values).sum() / w.sum()

    def share(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return (w * by * values).sum() / (w * by).sum() if by.any() else torch.tensor(0.0)

    click, ctcvr, e = mean(BCE(o, y)), mean(BCE(o * r, z)), BCE(r, z)
    if isinstance(objective, NiseObjective):
        conversion = mean(y * e + (1 - y) * -(r * r.log() + (1 - r) * (1 - r).log()))
        weight = min((click / conversion).item(), objective.max_conversion_weight)
        return click + weight * conversion
    seen = w > 0
    clip = objective.clip_quantile
    q = o.detach().clamp(min=_quantile(o.detach()[seen & (y == 1)], clip).item())
    n = (1 - o.detach()).clamp(min=_quantile((1 - o.detach())[seen & (y == 0)], clip).item())
    both = click + objective.ctcvr_loss_weight * ctcvr
    if isinstance(objective, IpsObjective):
        return both + objective.conversion_loss_weight * mean(y * e / q)
    if isinstance(objective, DoublyRobustObjective):
        imputed = p["imputation"]
        v = y * (1 - q) / q**2 if objective.imputation == "mrdr" else y / q
        robust = imputed.detach() + y * (e - imputed.detach()) / q
        robust = robust + v * (e.detach() - imputed) ** 2
        return both + objective.conversion_loss_weight * mean(robust)
    if isinstance(objective, DcmtObjective):
        star = p["counterfactual"]
        inside = share(e, y / q) + share(BCE(star, torch.ones_like(y)), (1 - y) / n)
        inside = inside + objective.counterfactual_weight * mean((1 - r - star).abs())
        return both + objective.conversion_loss_weight * inside
    c = p["clicked_conversion"]
    soft = share(BCE(r, (z + c.detach()).clamp(max=1)), y / q)
    soft = soft + share(BCE(r, c.detach()), (1 - y) / n)
    return both + mean(y * BCE(c, z)) + objective.conversion_loss_weight * soft


def _logits(objective: Objective) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        head.name: torch.randn(ROWS, generator=generator) * 2
        for head in objective.heads(DEFAULT_TASKS)
    }


@pytest.mark.parametrize("clicks", [True, False], ids=["clicks", "no click"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_equal_their_statement_in_float64(name: str, clicks: bool) -> None:
    objective, batch = OBJECTIVES[name], _batch(clicks=clicks)
    logits = _logits(objective)
    ours = {name: logit.clone().requires_grad_() for name, logit in logits.items()}
    plain = {name: logit.double().requires_grad_() for name, logit in logits.items()}
    loss = objective.loss(Logits(ours), batch, DEFAULT_TASKS)
    expected = _plain(
        objective,
        {k: F.softplus(v) if k == "imputation" else v.sigmoid() for k, v in plain.items()},
        batch,
    )
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for head, logit in ours.items():
        grad, exact = logit.grad, plain[head].grad
        exact = torch.zeros(ROWS).double() if exact is None else exact
        grad = torch.zeros(ROWS) if grad is None else grad
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-7)
    assert clicks is False or all(logit.grad is not None for logit in ours.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_confident_logits_give_finite_losses_and_gradients(name: str) -> None:
    objective, batch = OBJECTIVES[name], _batch()
    signs = torch.tensor([1.0, -1.0]).repeat(ROWS // 2)
    logits = {
        head: (logit.sign() * signs * 90).requires_grad_()
        for head, logit in _logits(objective).items()
    }
    loss = objective.loss(Logits(logits), batch, DEFAULT_TASKS)
    loss.backward()
    assert loss.isfinite()
    assert all(logit.grad is None or logit.grad.isfinite().all() for logit in logits.values())


@pytest.mark.parametrize("method", NEW)
def test_pipelines_trace_the_objective(method: str) -> None:
    class Given(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = ModelOptions(method=method, embedding_dim=4, tower=(3,))
            self.objective = build_train_task(SCHEMA, options).objective

        def forward(self, logits: Logits, batch: ImpressionBatch) -> torch.Tensor:
            return self.objective(logits, batch)

    module = Given()
    traced = torch.fx.GraphModule(module, Tracer().trace(module))
    for seed in (1, 2):
        logits, batch = Logits(_logits(METHODS[method].objective)), _batch(seed=seed)
        assert torch.equal(traced(logits, batch), module(logits, batch))


def test_propensities_are_clipped_at_a_quantile_of_the_clicks() -> None:
    click = torch.tensor([1.0] * 11 + [0.0] * 5)
    pctr = torch.cat([torch.linspace(0.05, 0.55, 11), torch.full((5,), 0.01)])
    inverse = inverse_propensity(pctr.logit(), click, None, 0.2)
    torch.testing.assert_close(inverse, 1 / pctr.clamp(min=0.15))
    weight = torch.ones(16)
    weight[:2] = 0
    torch.testing.assert_close(
        inverse_propensity(pctr.logit(), click, weight, 0.0), 1 / pctr.clamp(min=0.15)
    )
    nothing = inverse_propensity(torch.full((4,), -90.0), torch.zeros(4), None, 0.1)
    assert nothing.isfinite().all()


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.tensor([2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(3)
    assert effective_sample_size(torch.tensor([3.0, 1.0])).item() == pytest.approx(16 / 10)
    assert effective_sample_size(torch.zeros(3)).item() == 0


def test_figures_of_a_step_say_what_the_weights_leave_of_the_clicks() -> None:
    objective, batch = IpsObjective(clip_quantile=0.1), _batch()
    logits = Logits(_logits(objective))
    assert batch.weight is not None
    labels = NamedTensors({**batch.labels, "weight": batch.weight})
    figures = objective.figures(logits, labels, DEFAULT_TASKS)
    chosen = (batch.click == 1) & (batch.weight > 0)
    pctr = logits["click"].double().sigmoid()[chosen]
    w = batch.weight.double()[chosen] / pctr.clamp(min=_quantile(pctr, 0.1).item())
    size = w.sum() ** 2 / (w**2).sum()
    assert figures["effective_sample_size"].item() == pytest.approx(size.item(), rel=1e-5)
    share = size / chosen.sum()
    assert figures["effective_sample_share"].item() == pytest.approx(share.item(), rel=1e-5)


def test_entropy_and_its_gradient() -> None:
    logit = torch.linspace(-30, 30, 600).requires_grad_()
    exact = logit.detach().double().requires_grad_()
    losses.entropy(logit).sum().backward()
    p, n = exact.sigmoid(), (-exact).sigmoid()
    (-(p * F.logsigmoid(exact) + n * F.logsigmoid(-exact))).sum().backward()
    assert logit.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logit.grad.double(), exact.grad, rtol=1e-4, atol=1e-12)


def test_dr_trains_the_conversion_tower_as_ips_does() -> None:
    """The imputation does not see pCVR, so that it only moves what towers share."""
    batch, gradients = _batch(), []
    for objective in (IpsObjective(), DoublyRobustObjective()):
        logits = {k: v.requires_grad_() for k, v in _logits(DoublyRobustObjective()).items()}
        objective.loss(Logits(logits), batch, DEFAULT_TASKS).backward()
        gradients.append(logits["conversion"].grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("method", NEW)
def test_they_need_a_chain_of_two(method: str) -> None:
    chain = TaskChain(
        (Task("click", "click"), Task("cart", "cart", given="click"),
         Task("order", "order", given="cart"))
    )  # fmt: skip
    with pytest.raises(OptionError, match="needs a chain of two tasks, not of 3"):
        build_train_task(replace(SCHEMA, tasks=chain), ModelOptions(method=method))


@pytest.mark.parametrize(
    ("build", "option"),
    [
        (lambda: IpsObjective(clip_quantile=1.5), "objective.clip_quantile"),
        (lambda: IpsObjective(conversion_loss_weight=-1), "objective.conversion_loss_weight"),
        (lambda: DoublyRobustObjective(imputation="x"), "imputation"),  # pyright: ignore
        (lambda: NiseObjective(max_conversion_weight=-1), "objective.max_conversion_weight"),
        (lambda: DcmtObjective(counterfactual_weight=-1), "objective.counterfactual_weight"),
        (lambda: DcmtObjective(ctcvr_loss_weight=math.nan), "objective.ctcvr_loss_weight"),
    ],
)
def test_options_out_of_range_are_refused(build: Callable[[], object], option: str) -> None:
    with pytest.raises(OptionError, match=option):
        build()
