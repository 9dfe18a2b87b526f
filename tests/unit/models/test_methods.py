"""Each method's rows and objective against a few lines of NumPy and plain torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.methods import AFTER_METHODS, METHODS, ModelOptions, build_train_task
from esmm_torchrec.models.parts import BaseRates, LoggedImpressions, Rows, TrainingRows
from esmm_torchrec.models.rows.clicked import ClickedRows, MissingAsNegativeRows, OversampledRows
from esmm_torchrec.models.rows.inverse_propensity import (
    InversePropensityRows,
    RejectionSampledRows,
)
from esmm_torchrec.models.scores import read_scores
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.tasks import DEFAULT_TASKS, Task, TaskChain

SCHEMA = Schema(
    tables=(Table("item", 7), Table("user", 5)),
    id_features=(IdFeature("item", "item"), IdFeature("user", "user")),
)


def _log(size: int = 4000, seed: int = 0) -> LoggedImpressions:
    rng = np.random.default_rng(seed)
    pctr = rng.uniform(0.05, 0.6, size)
    click = (rng.random(size) < pctr).astype(np.int8)
    conversion = click * (rng.random(size) < 0.3).astype(np.int8)
    return _impressions(click, conversion, pctr, seed)


def _impressions(
    click: np.ndarray, conversion: np.ndarray, pctr: np.ndarray, seed: int = 0
) -> LoggedImpressions:
    return LoggedImpressions({"click": click, "conversion": conversion}, DEFAULT_TASKS, pctr, seed)


def _selected(rows: Rows, log: LoggedImpressions) -> TrainingRows:
    chosen = rows.select(log)
    assert chosen is not None
    return chosen


def test_titles_are_unique() -> None:
    titles = [method.title for method in METHODS.values()]
    assert len(set(titles)) == len(titles)


def test_tuned_values_are_options_of_their_part() -> None:
    for method in METHODS.values():
        for option, values in method.tune.items():
            part, _, name = option.partition(".")
            for value in values:
                replace(getattr(method, part), **{name: value})


def test_base_trains_on_clicks() -> None:
    log = _log()
    chosen = _selected(METHODS["base"].rows, log)
    assert chosen.weights is None
    assert chosen.rows.tolist() == [row for row, click in enumerate(log.clicked) if click]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_aman_adds_a_share_of_the_unclicked(rate: float) -> None:
    log = _log()
    chosen = _selected(MissingAsNegativeRows(rate), log)
    taken = set(chosen.rows.tolist())
    assert len(taken) == len(chosen.rows)
    clicked = set(np.flatnonzero(log.clicked).tolist())
    assert clicked < taken
    unclicked = len(log.clicked) - len(clicked)
    noise = math.sqrt(unclicked * rate * (1 - rate))
    assert abs(len(taken) - len(clicked) - rate * unclicked) < 4 * noise


def test_oversampling_repeats_conversions() -> None:
    log = _log()
    chosen = _selected(OversampledRows(3), log)
    expected = Counter()
    for row, (click, conversion) in enumerate(zip(*log.labels.values(), strict=True)):
        if click:
            expected[row] = 3 if conversion else 1
    assert Counter(chosen.rows.tolist()) == expected


def test_rows_at_their_neutral_rates_are_those_of_base() -> None:
    log = _log()
    base = _selected(ClickedRows(), log)
    even = log._replace(pctr=np.full(len(log.clicked), 0.2))
    for rows, impressions in (
        (MissingAsNegativeRows(1e-12), log),
        (OversampledRows(1), log),
        (RejectionSampledRows(0.5), even),
        (InversePropensityRows(0.5), even),
    ):
        chosen = _selected(rows, impressions)
        np.testing.assert_array_equal(chosen.rows, base.rows, err_msg=str(rows))
        if chosen.weights is not None:
            np.testing.assert_allclose(chosen.weights, 1.0, rtol=1e-6)
    everything = _selected(MissingAsNegativeRows(1.0), log)
    np.testing.assert_array_equal(everything.rows, np.arange(len(log.clicked)))


def test_unbias_accepts_in_proportion_to_inverse_pctr_up_to_the_cap() -> None:
    log = _log(size=300)
    assert log.pctr is not None
    inverse = 1 / log.pctr[log.clicked]
    cap = np.sort(inverse)[math.ceil(0.8 * (len(inverse) - 1))]
    expected = np.minimum(inverse, cap) / cap
    draws = 400
    accepted = np.zeros(300)
    for seed in range(draws):
        chosen = _selected(RejectionSampledRows(0.8), log._replace(seed=seed))
        accepted[chosen.rows] += 1
    assert accepted[~log.clicked].sum() == 0
    noise = np.sqrt(expected * (1 - expected) / draws) + 1e-9
    assert (np.abs(accepted[log.clicked] / draws - expected) < 5 * noise).all()

    weighted = _selected(InversePropensityRows(0.8), log)
    assert weighted.weights is not None
    np.testing.assert_allclose(weighted.weights, expected / expected.mean(), rtol=1e-6)
    kish = expected.sum() ** 2 / (expected**2).sum()
    assert weighted.notes["effective_sample_size"] == pytest.approx(kish)
    assert weighted.notes["acceptance_rate"] == pytest.approx(expected.mean())


def test_unbias_gives_clicks_the_distribution_of_impressions() -> None:
    """Two kinds of impressions, 70 % and 30 % of all, clicked with 4 % and 40 %."""
    rng = np.random.default_rng(5)
    rare = rng.random(200_000) < 0.3
    pctr = np.where(rare, 0.4, 0.04)
    click = (rng.random(200_000) < pctr).astype(np.int8)
    chosen = _selected(RejectionSampledRows(1.0), _impressions(click, click, pctr))
    assert rare[click == 1].mean() > 0.7
    assert rare[chosen.rows].mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("rows", "rate"),
    [
        (MissingAsNegativeRows, 0),
        (MissingAsNegativeRows, -0.1),
        (MissingAsNegativeRows, 1.2),
        (OversampledRows, 2.5),
        (OversampledRows, 0),
        (RejectionSampledRows, 1.5),
        (InversePropensityRows, 0.0),
    ],
)
def test_rates_out_of_range_are_refused(rows: type, rate: float) -> None:
    with pytest.raises(OptionError, match=r"rows\.rate"):
        rows(rate)


def _batch(*, clicks: bool = True, seed: int = 1) -> ImpressionBatch:
    """Weighted rows and a row of padding; its global means come from two such ranks."""
    generator = torch.Generator().manual_seed(seed)
    click = torch.randint(0, 2, (12,), generator=generator).float() * clicks
    weight = torch.rand(12, generator=generator) + 0.5
    weight[-1] = 0
    return ImpressionBatch(
        click=click,
        conversion=click * torch.randint(0, 2, (12,), generator=generator),
        weight=weight,
        mean_weight=torch.tensor(9.5),
        mean_label_weight={"click": torch.tensor(4.25)},
    )


def _plain_loss(method: str, p: dict[str, torch.Tensor], batch: ImpressionBatch) -> torch.Tensor:
    """The objectives in float64, from probabilities, as they are written on paper."""
    y, z, w = batch.click.double(), batch.conversion.double(), batch.weight.double()  # pyright: ignore
    click = (w * F.binary_cross_entropy(p["click"], y, reduction="none")).sum() / 9.5
    if method == "ctr":
        return click
    if method == "division":
        return click + (w * F.binary_cross_entropy(p["ctcvr"], y * z, reduction="none")).sum() / 9.5
    conversion = F.binary_cross_entropy(p["conversion"], y * z, reduction="none")
    if method in ("esmm", "esmm-ns"):
        product = F.binary_cross_entropy(p["click"] * p["conversion"], y * z, reduction="none")
        return click + (w * product).sum() / 9.5
    if method == "shared-bottom":
        return click + (w * y * conversion).sum() / 4.25
    return (w * conversion).sum() / 9.5


@pytest.mark.parametrize("method", [name for name in METHODS if name not in AFTER_METHODS])
@pytest.mark.parametrize("clicks", [True, False])
def test_objectives_and_gradients_equal_plain_torch(method: str, clicks: bool) -> None:
    batch = _batch(clicks=clicks)
    task = build_train_task(SCHEMA, ModelOptions(method=method, embedding_dim=4, tower=(3,)))
    fields = {
        "ctr": ("click",),
        "division": ("click", "ctcvr"),
        **dict.fromkeys(("esmm", "esmm-ns", "shared-bottom"), ("click", "conversion")),
    }.get(method, ("conversion",))
    generator = torch.Generator().manual_seed(9)
    logits = {name: torch.randn(12, generator=generator) * 2 for name in fields}
    ours = {name: logit.clone().requires_grad_() for name, logit in logits.items()}
    plain = {name: logit.double().requires_grad_() for name, logit in logits.items()}
    loss = task.objective(Logits(ours), batch)
    expected = _plain_loss(
        method,
        {"click": torch.zeros(12).double()} | {k: v.sigmoid() for k, v in plain.items()},
        batch,
    )
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in fields:
        grad, exact = ours[name].grad, plain[name].grad
        assert grad is not None
        assert exact is not None
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-7)


def test_a_global_batch_without_clicks_gives_no_conversion_loss() -> None:
    batch = _batch(clicks=False)
    task = build_train_task(
        SCHEMA, ModelOptions(method="shared-bottom", embedding_dim=4, tower=(3,))
    )
    conversion = torch.randn(12, requires_grad=True)
    logits = Logits(click=torch.zeros(12), conversion=conversion)
    loss = task.objective(
        logits,
        ImpressionBatch(
            click=batch.click,
            conversion=batch.conversion,
            weight=batch.weight,
            mean_weight=batch.mean_weight,
            mean_label_weight={"click": torch.tensor(0.0)},
        ),
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert conversion.grad is not None
    assert not conversion.grad.any()


def test_scores_of_division_are_the_unclipped_quotient() -> None:
    click = torch.tensor([-3.0, 2.0, -200.0])
    ctcvr = torch.tensor([-5.0, 4.0, -100.0])
    scores = read_scores({"click": click, "ctcvr": ctcvr})
    exact = np.log(1 / (1 + np.exp(-ctcvr.double().numpy()))) - np.log(
        1 / (1 + np.exp(-click.double().numpy()))
    )
    assert [score.form for score in scores.values()] == ["logit", "log_probability", "logit"]
    np.testing.assert_allclose(scores["cvr"].values.numpy(), exact, rtol=1e-5)
    assert scores["cvr"].values[1] > 0
    assert scores["cvr"].values[2] == pytest.approx(100.0)
    assert torch.equal(scores["ctcvr"].values, ctcvr)


CART = TaskChain(
    (Task("click", "click", short="ctr"), Task("cart", "cart", given="click"),
     Task("order", "bought", given="cart"))
)  # fmt: skip
LABELS = {
    "click": torch.tensor([1.0, 1.0, 1.0, 0.0]),
    "cart": torch.tensor([1.0, 1.0, 0.0, 0.0]),
    "bought": torch.tensor([1.0, 0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("method", ["esmm", "esmm-ns", "shared-bottom", "division"])
def test_a_chain_of_three_is_trained_as_written_on_paper(method: str) -> None:
    schema = replace(SCHEMA, tasks=CART)
    task = build_train_task(
        schema, ModelOptions(method=method, embedding_dim=4, tower=(3,)), embedding_device="cpu"
    )
    names = [head.name for head in METHODS[method].objective.heads(CART)]
    generator = torch.Generator().manual_seed(3)
    logits = {name: torch.randn(4, generator=generator) for name in names}
    loss = task.objective(Logits(logits), ImpressionBatch(labels=LABELS))
    p = [logit.double().sigmoid() for logit in logits.values()]
    y = [label.double() for label in LABELS.values()]
    bce = F.binary_cross_entropy
    if method == "division":
        expected = sum(bce(q, label) for q, label in zip(p, y, strict=True))
    elif method == "shared-bottom":
        expected = bce(p[0], y[0]) + bce(p[1][:3], y[1][:3]) + bce(p[2][:2], y[2][:2])
    else:
        expected = bce(p[0], y[0]) + bce(p[0] * p[1], y[1]) + bce(p[0] * p[1] * p[2], y[2])
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_scores_of_a_chain_of_three() -> None:
    logits = {name: torch.tensor([0.3, -2.0]) * n for n, name in enumerate(CART.names, 1)}
    scores = read_scores(logits, CART)
    p = [logit.double().sigmoid() for logit in logits.values()]
    wanted = {"ctr": p[0], "cart_given_click": p[1], "cart": p[0] * p[1],
              "order_given_cart": p[2], "order": p[0] * p[1] * p[2]}  # fmt: skip
    assert list(scores) == list(wanted)
    for name, exact in wanted.items():
        torch.testing.assert_close(scores[name].probability.double(), exact, rtol=1e-5, atol=0)
    columns = [name for task in CART for name in (task.score, task.joint_score)]
    assert columns == [
        "pctr", "pctr", "p_cart_given_click", "p_cart", "p_order_given_cart", "p_order",
    ]  # fmt: skip


def test_base_needs_a_chain_of_two() -> None:
    with pytest.raises(OptionError, match="needs a chain of two tasks, not of 3"):
        build_train_task(replace(SCHEMA, tasks=CART), ModelOptions(method="base"))


def test_priors_keep_half_an_impression_from_certainty() -> None:
    rates = BaseRates(100, {"click": 100, "conversion": 0})
    assert rates.prior("click", None) == pytest.approx(1 - 0.5 / 100)
    assert rates.prior("conversion", "click") == pytest.approx(0.5 / 100)
    assert BaseRates(100, {"click": 4, "conversion": 1}).prior("conversion", "click") == 0.25
    assert BaseRates(0, {"click": 0, "conversion": 0}).prior("conversion", "click") == 0.5


def _below(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def test_equal_parts_start_from_equal_weights() -> None:
    options = {"embedding_dim": 4, "tower": (3,)}

    def weights(method: str, part: str) -> dict[str, torch.Tensor]:
        task = build_train_task(
            SCHEMA, ModelOptions(method=method, **options), seed=4, embedding_device="cpu"
        )
        return dict(task.model.get_submodule(part).state_dict())

    base = weights("base", "conversion")
    for other in (weights("division", "ctcvr"), weights("esmm-ns", "conversion")):
        assert other.keys() == base.keys()
        assert all(torch.equal(other[key], base[key]) for key in base)
    ctr = weights("ctr", "click")
    for method in ("esmm", "shared-bottom"):
        towers, features = weights(method, "towers"), weights(method, "features")
        for name, network in (("click", ctr), ("conversion", base)):
            alone = _below("tower", network)
            assert alone
            shared = _below(name, towers)
            assert shared.keys() == alone.keys()
            assert all(torch.equal(shared[key], alone[key]) for key in alone), (method, name)
        tables = _below("features", base)
        assert features.keys() == tables.keys()
        assert all(torch.equal(features[key], tables[key]) for key in tables)
    assert any(".click:item." in key for key in weights("division", "click"))
