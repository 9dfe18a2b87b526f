"""Delayed feedback: rows by hand, losses against float64, and what their weights undo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.objectives.delayed import (
    DelayedFeedbackObjective,
    ElapsedTimeObjective,
    FakeNegativeObjective,
    dfm_loss,
)
from esmm_torchrec.models.parts import LoggedImpressions, Objective, Rows
from esmm_torchrec.models.rows.delayed import (
    ElapsedTimeRows,
    FakeNegativeRows,
    ObservedRows,
    WaitedRows,
)
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.schema import NEVER
from esmm_torchrec.tasks import DEFAULT_TASKS

HOUR = 3600
CLICK = np.array([1, 0, 1, 1, 1])
TIMES = np.array([0, 1, 2, 25, 47]) * HOUR
CONVERTED = np.array([4 * HOUR, NEVER, 30 * HOUR, NEVER, 60 * HOUR])
"""The last impression is at hour 47, in the second day; the last conversion is not known then."""

LOG = LoggedImpressions(
    {"click": CLICK, "conversion": (CONVERTED != NEVER).astype(int)},
    DEFAULT_TASKS,
    times=TIMES,
    conversion_times=CONVERTED,
)


def _entered(rows: Rows) -> list[tuple[int, int, int]]:
    """(row, day, label) of what enters training."""
    chosen = rows.select(LOG)
    assert chosen is not None
    assert chosen.periods is not None
    assert (np.diff(chosen.rows) >= 0).all()
    labels = chosen.labels["conversion"]
    return sorted(zip(chosen.rows.tolist(), chosen.periods.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ObservedRows(), [(0, 0, 1), (2, 0, 0), (3, 1, 0), (4, 1, 0)]),
        (ObservedRows(at_end=True), [(0, 0, 1), (2, 0, 1), (3, 1, 0), (4, 1, 0)]),
        (ObservedRows(hindsight=True), [(0, 0, 1), (2, 0, 1), (3, 1, 0), (4, 1, 1)]),
        (ObservedRows(until=3 * HOUR), [(0, 0, 0), (2, 0, 0)]),
        (WaitedRows(), [(0, 1, 1), (2, 1, 0)]),
        (FakeNegativeRows(), [(0, 0, 0), (0, 0, 1), (2, 0, 0), (2, 1, 1), (3, 1, 0), (4, 1, 0)]),
    ],
)
def test_rows_enter_on_the_day_they_are_known(
    rows: Rows, expected: list[tuple[int, int, int]]
) -> None:
    assert _entered(rows) == expected


def test_elapsed_and_delay_are_days() -> None:
    chosen = ObservedRows().select(LOG)
    np.testing.assert_allclose(chosen.labels["elapsed"] * 24, [24, 22, 22, 0], atol=1e-5)
    np.testing.assert_allclose(chosen.labels["delay"] * 24, [4, 0, 0, 0], atol=1e-5)


def test_elapsed_time_rows_enter_up_to_three_times() -> None:
    """After 6 hours with the label of then, at a later conversion, and after a day as final."""
    chosen = ElapsedTimeRows(wait=0.25, window=1.0).select(LOG)
    columns = {"row": chosen.rows, "day": chosen.periods, **chosen.labels}
    found = {tuple(int(of[n]) for of in columns.values()) for n in range(len(chosen.rows))}
    assert list(columns) == [
        "row", "day", "conversion", "click", "matured", "observed_negative", "delayed_positive",
        "real_negative",
    ]  # fmt: skip
    assert found == {
        (0, 0, 1, 1, 0, 0, 0, 0),
        (0, 1, 0, 0, 1, 0, 0, 0),
        (2, 0, 0, 1, 0, 0, 0, 0),
        (2, 1, 1, 1, 0, 0, 0, 0),
        (2, 1, 0, 0, 1, 1, 0, 1),  # it converts after the window
        (3, 1, 0, 1, 0, 0, 0, 0),
    }


def test_what_cannot_be_selected_is_refused() -> None:
    with pytest.raises(OptionError, match="conversion_time"):
        WaitedRows().select(LOG._replace(conversion_times=None))
    with pytest.raises(OptionError, match=r"`rows\.wait` 7 is not"):
        ElapsedTimeRows(wait=7.0)
    with pytest.raises(OptionError, match=r"`rows\.day` 0"):
        WaitedRows(day=0)


SIZE = 50


def _random(seed: int) -> torch.Tensor:
    return 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def _batch() -> ImpressionBatch:
    rng = np.random.default_rng(0)
    click = (rng.random(SIZE) < 0.8).astype(np.float32)
    labels = {
        "click": click,
        "conversion": click * (rng.random(SIZE) < 0.5),
        "elapsed": rng.exponential(2, SIZE),
        "delay": rng.exponential(1, SIZE),
        "matured": 1 - click,
        "observed_negative": (1 - click) * (rng.random(SIZE) < 0.7),
        "delayed_positive": rng.random(SIZE) < 0.5,
        "real_negative": rng.random(SIZE) < 0.5,
    }
    return ImpressionBatch(
        labels={name: torch.from_numpy(of.astype(np.float32)) for name, of in labels.items()},
        weight=torch.from_numpy(rng.random(SIZE).astype(np.float32)),
    )


def _dfm(p: Any, h: Any, z: Any, of: Any) -> Any:
    rate = torch.log1p(h.exp())
    converted = -(p * rate * torch.exp(-rate * of["delay"])).log()
    return torch.where(z > 0, converted, -(1 - p + p * torch.exp(-rate * of["elapsed"])).log())


def _fnw(p: Any, z: Any) -> Any:
    c = p.detach()
    return -z * (1 + c) * p.log() - (1 - z) * (1 - c) * (1 + c) * (1 - p).log()


def _es_dfm(p: Any, dp: Any, rn: Any, z: Any, of: Any) -> Any:
    late, real = dp.detach(), rn.detach()
    main = -z * (1 + late) * p.log() - (1 - z) * (1 + late) * real * (1 - p).log()
    terms = of["click"] * main
    for q, label, space in ((dp, "delayed_positive", "matured"), (rn, "real_negative", "observed_negative")):  # fmt: skip # noqa: E501
        terms = terms - of[space] * (of[label] * q.log() + (1 - of[label]) * (1 - q).log())
    return terms


@pytest.mark.parametrize(
    "objective", [DelayedFeedbackObjective(), FakeNegativeObjective(), ElapsedTimeObjective()]
)
def test_each_objective_equals_its_statement(objective: Objective) -> None:
    heads = [head.name for head in objective.heads(DEFAULT_TASKS)]
    values = {name: _random(place) for place, name in enumerate(heads)}
    batch = _batch()
    ours = Logits({name: value.clone().requires_grad_() for name, value in values.items()})
    loss = objective.loss(ours, batch, DEFAULT_TASKS)
    exact = {name: value.double().requires_grad_() for name, value in values.items()}
    of = {name: label.double() for name, label in batch.labels.items()}
    p, z = exact["conversion"].sigmoid(), of["click"] * of["conversion"]
    if isinstance(objective, DelayedFeedbackObjective):
        terms = _dfm(p, exact["delay_rate"], z, of)
    elif isinstance(objective, FakeNegativeObjective):
        terms = _fnw(p, z)
    else:
        q = [exact[name].sigmoid() for name in ("delayed_positive", "real_negative")]
        terms = _es_dfm(p, *q, z, of)
    assert batch.weight is not None
    weight = batch.weight.double()
    stated = (terms * weight).sum() / weight.sum()
    torch.testing.assert_close(loss.double(), stated, rtol=2e-6, atol=0)
    loss.backward()
    stated.backward()
    for name, value in exact.items():
        torch.testing.assert_close(ours[name].grad.double(), value.grad, rtol=1e-4, atol=1e-7)


def test_dfm_is_stable_for_rates_near_0() -> None:
    x, h = (torch.tensor([0.0], requires_grad=True), torch.tensor([-150.0], requires_grad=True))
    one = torch.ones(1)
    loss = dfm_loss(x, h, one, elapsed=one, delay=one)
    loss.sum().backward()
    assert loss.item() == pytest.approx(np.log(2) + 150)
    assert h.grad is not None
    assert h.grad.item() == pytest.approx(-1)


@pytest.mark.parametrize("objective", [FakeNegativeObjective(), ElapsedTimeObjective()])
def test_weights_undo_the_sampling(objective: Objective) -> None:
    """With the true probabilities, the gradient of the expected loss is 0 at the true p."""
    p, late = torch.tensor(0.3), torch.tensor(0.12)
    if isinstance(objective, FakeNegativeObjective):
        positives, negatives = p, torch.tensor(1.0)  # per click: once as a negative, p as positive
    else:
        positives, negatives = p, 1 - p + late
    x = torch.logit(p).reshape(1).repeat(2).requires_grad_()
    others = {"delayed_positive": late, "real_negative": (1 - p) / (1 - p + late)}
    logits = Logits({"conversion": x} | {n: torch.logit(of).repeat(2) for n, of in others.items()})
    zeros = dict.fromkeys(("matured", "observed_negative", *others), torch.zeros(2))
    batch = ImpressionBatch(
        labels={"click": torch.ones(2), "conversion": torch.tensor([1.0, 0.0])} | zeros,
        weight=torch.stack([positives, negatives]),
    )
    objective.loss(logits, batch, DEFAULT_TASKS).backward()
    assert x.grad is not None
    assert x.grad.sum().item() == pytest.approx(0, abs=1e-6)
    assert x.grad.abs().min().item() > 0.05
