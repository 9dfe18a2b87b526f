"""Each method's rows and objective against a few lines of NumPy and plain torch."""

from __future__ import annotations

import math
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.esmm import Logits, TrainTask
from esmm_torchrec.models.methods import (
    METHODS,
    Base,
    Builder,
    LoggedImpressions,
    MethodOption,
    ModelOptions,
    build_train_task,
    read_scores,
)
from esmm_torchrec.models.networks import SeparateNetworks
from esmm_torchrec.schema import IdFeature, Schema, Table

SCHEMA = Schema(
    tables=(Table("item", 7), Table("user", 5)),
    id_features=(IdFeature("item", "item"), IdFeature("user", "user")),
)
CLICKS_ONLY = ("base", "oversampling", "unbias", "unbias-weighted")


def _log(size: int = 4000, seed: int = 0) -> LoggedImpressions:
    rng = np.random.default_rng(seed)
    pctr = rng.uniform(0.05, 0.6, size)
    click = (rng.random(size) < pctr).astype(np.int8)
    conversion = click * (rng.random(size) < 0.3).astype(np.int8)
    return LoggedImpressions(click, conversion, pctr, seed)


def test_every_name_of_the_option_is_a_method() -> None:
    assert set(METHODS) == set(get_args(MethodOption))
    names = [method.name for method in METHODS.values()]
    assert len(set(names)) == len(names)


def test_base_trains_on_clicks() -> None:
    log = _log()
    chosen = METHODS["base"].rows(log, None)
    assert chosen is not None
    assert chosen.weights is None
    assert chosen.rows.tolist() == [row for row, click in enumerate(log.click) if click]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_aman_adds_a_share_of_the_unclicked(rate: float) -> None:
    log = _log()
    chosen = METHODS["aman"].rows(log, rate)
    assert chosen is not None
    taken = set(chosen.rows.tolist())
    assert len(taken) == len(chosen.rows)
    clicked = set(np.flatnonzero(log.click).tolist())
    assert clicked < taken
    unclicked = len(log.click) - len(clicked)
    noise = math.sqrt(unclicked * rate * (1 - rate))
    assert abs(len(taken) - len(clicked) - rate * unclicked) < 4 * noise


def test_oversampling_repeats_conversions() -> None:
    log = _log()
    chosen = METHODS["oversampling"].rows(log, 3)
    assert chosen is not None
    expected = Counter()
    for row, (click, conversion) in enumerate(zip(log.click, log.conversion, strict=True)):
        if click:
            expected[row] = 3 if conversion else 1
    assert Counter(chosen.rows.tolist()) == expected


def test_rows_at_their_neutral_rates_are_those_of_base() -> None:
    log = _log()
    base = METHODS["base"].rows(log, None)
    assert base is not None
    even = log._replace(pctr=np.full(len(log.click), 0.2))
    for method, impressions, rate in (
        ("aman", log, 0.0),
        ("oversampling", log, 1),
        ("unbias", even, 0.5),
        ("unbias-weighted", even, 0.5),
    ):
        chosen = METHODS[method].rows(impressions, rate)  # pyright: ignore[reportArgumentType]
        assert chosen is not None
        np.testing.assert_array_equal(chosen.rows, base.rows, err_msg=method)
        if chosen.weights is not None:
            np.testing.assert_allclose(chosen.weights, 1.0, rtol=1e-6)
    everything = METHODS["aman"].rows(log, 1.0)
    assert everything is not None
    np.testing.assert_array_equal(everything.rows, np.arange(len(log.click)))


def test_unbias_accepts_in_proportion_to_inverse_pctr_up_to_the_cap() -> None:
    log = _log(size=300)
    assert log.pctr is not None
    inverse = 1 / log.pctr[log.click == 1]
    cap = np.sort(inverse)[math.ceil(0.8 * (len(inverse) - 1))]
    expected = np.minimum(inverse, cap) / cap
    draws = 400
    accepted = np.zeros(300)
    for seed in range(draws):
        chosen = METHODS["unbias"].rows(log._replace(seed=seed), 0.8)
        assert chosen is not None
        accepted[chosen.rows] += 1
    assert accepted[log.click == 0].sum() == 0
    noise = np.sqrt(expected * (1 - expected) / draws) + 1e-9
    assert (np.abs(accepted[log.click == 1] / draws - expected) < 5 * noise).all()

    weighted = METHODS["unbias-weighted"].rows(log, 0.8)
    assert weighted is not None
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
    chosen = METHODS["unbias"].rows(LoggedImpressions(click, click, pctr), 1.0)
    assert chosen is not None
    assert rare[click == 1].mean() > 0.7
    assert rare[chosen.rows].mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ("aman", 0),
        ("aman", -0.1),
        ("aman", 1.2),
        ("oversampling", 2.5),
        ("unbias", 1.5),
        ("esmm", 1),
    ],
)
def test_rates_that_do_not_exist_are_refused(method: MethodOption, rate: float) -> None:
    with pytest.raises(OptionError, match="--rate"):
        METHODS[method].checked_rate(rate)


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
        mean_click_weight=torch.tensor(4.25),
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


@pytest.mark.parametrize("method", get_args(MethodOption))
@pytest.mark.parametrize("clicks", [True, False])
def test_objectives_and_gradients_equal_plain_torch(method: MethodOption, clicks: bool) -> None:
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
    loss = task.objective(Logits(**ours), batch)
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
    none = torch.tensor(0.0)
    loss = task.objective(
        logits,
        ImpressionBatch(
            click=batch.click,
            conversion=batch.conversion,
            weight=batch.weight,
            mean_weight=batch.mean_weight,
            mean_click_weight=none,
        ),
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert conversion.grad is not None
    assert not conversion.grad.any()


def test_scores_of_division_are_the_uncut_quotient() -> None:
    click = torch.tensor([-3.0, 2.0, -200.0])
    ctcvr = torch.tensor([-5.0, 4.0, -100.0])
    scores = read_scores(Logits(click=click, ctcvr=ctcvr))
    exact = np.log(1 / (1 + np.exp(-ctcvr.double().numpy()))) - np.log(
        1 / (1 + np.exp(-click.double().numpy()))
    )
    assert scores.conversion_logit is None
    assert scores.log_pcvr is not None
    np.testing.assert_allclose(scores.log_pcvr.numpy(), exact, rtol=1e-5)
    assert scores.log_pcvr[1] > 0
    assert scores.log_pcvr[2] == pytest.approx(100.0)


def _below(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def test_equal_parts_start_from_equal_weights() -> None:
    options = {"embedding_dim": 4, "tower": (3,)}

    def weights(method: MethodOption, part: str) -> dict[str, torch.Tensor]:
        task = build_train_task(
            SCHEMA, ModelOptions(method=method, **options), seed=4, embedding_device="cpu"
        )
        network = getattr(task.model, part)
        return dict(network.state_dict())

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
    assert any(".click_item." in key for key in weights("division", "click"))


def test_a_new_method_is_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CONTRIBUTING tells: a subclass with rows, task and a name, and an entry in METHODS."""

    class LastClicks(Base):
        """BASE on the last tenth of the clicks."""

        name = "LAST"
        summary = "BASE on the last clicks"

        def rows(self, impressions: LoggedImpressions, rate: float | None):
            chosen = super().rows(impressions, rate)
            return type(chosen)(chosen.rows[-len(chosen.rows) // 10 :])

        def task(self, builder: Builder) -> TrainTask:
            network = builder.network("conversion", prior=builder.ctcvr_prior)
            return TrainTask(
                SeparateNetworks(conversion=network), lambda logits, _: logits.conversion.sum()
            )

    monkeypatch.setitem(METHODS, "last", LastClicks())  # pyright: ignore[reportArgumentType]
    log = _log()
    chosen = METHODS["last"].rows(log, None)  # pyright: ignore[reportArgumentType]
    assert chosen is not None
    assert len(chosen.rows) == math.ceil(log.click.sum() / 10)
    task = build_train_task(SCHEMA, ModelOptions(method="last", embedding_dim=4, tower=(3,)))  # pyright: ignore[reportArgumentType]
    assert isinstance(task.model, SeparateNetworks)
