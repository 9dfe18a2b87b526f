"""Every figure of the report against a few independent lines, and what it says when there is
nothing to say."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from esmm_torchrec.errors import OptionError
from esmm_torchrec.metrics import report as report_module
from esmm_torchrec.metrics.probability import Prediction, product
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.tasks import Task, TaskChain


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit.astype(np.float64)))


def logit_of(probability: np.ndarray) -> np.ndarray:
    return (np.log(probability) - np.log1p(-probability)).astype(np.float32)


@pytest.fixture(scope="module")
def scored() -> ScoredImpressions:
    random = np.random.default_rng(0)
    n = 20_000
    taste = random.normal(size=n)
    true_ctr = sigmoid(-2 + taste).astype(np.float32)
    true_cvr = sigmoid(-1.5 + 0.6 * taste + 0.8 * random.normal(size=n)).astype(np.float32)
    click = (random.random(n) < true_ctr).astype(np.int8)
    conversion = ((random.random(n) < true_cvr) * click).astype(np.int8)
    click_logit = logit_of(true_ctr) + random.normal(0, 0.5, n).astype(np.float32)
    conversion_logit = logit_of(true_cvr) + random.normal(0.2, 0.7, n).astype(np.float32)
    return ScoredImpressions(
        labels={"click": click, "conversion": conversion},
        scores={
            "ctr": Prediction(click_logit, "logit"),
            "cvr": Prediction(conversion_logit, "logit"),
            "ctcvr": Prediction(
                logit_of(sigmoid(click_logit) * sigmoid(conversion_logit)), "logit"
            ),
        },
        common_ctr_logit=logit_of(true_ctr) + random.normal(0, 0.4, n).astype(np.float32),
        group_id=random.integers(10**12, 10**12 + 150, n),
        true_ctr=true_ctr,
        true_cvr=true_cvr,
    )


def with_scores(scored: ScoredImpressions, **scores: Prediction | None) -> ScoredImpressions:
    """Other scores; None takes one away."""
    merged = {**scored.scores, **scores}
    known = {name: score for name, score in merged.items() if score is not None}
    return dataclasses.replace(scored, scores=known)


def with_labels(scored: ScoredImpressions, **labels: np.ndarray) -> ScoredImpressions:
    return dataclasses.replace(scored, labels={**scored.labels, **labels})


def taken(scored: ScoredImpressions, rows: np.ndarray | slice) -> ScoredImpressions:
    """Some of the impressions."""
    columns = ("weight", "group_id", "common_ctr_logit", "true_ctr", "true_cvr")
    return dataclasses.replace(
        scored,
        labels={name: label[rows] for name, label in scored.labels.items()},
        scores={
            name: Prediction(score.values[rows], score.form)
            for name, score in scored.scores.items()
        },
        **{
            name: None if (column := getattr(scored, name)) is None else column[rows]
            for name in columns
        },
    )


def soft(score: np.ndarray, probability: np.ndarray) -> float:
    p = probability.astype(np.float64)
    return roc_auc_score(
        np.repeat([1, 0], p.size), np.tile(score, 2), sample_weight=np.concatenate([p, 1 - p])
    )


def entropy(p: np.ndarray) -> np.ndarray:
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def test_torchrecs_auc_is_beside_ours_where_a_window_holds_the_rows(
    scored: ScoredImpressions, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = measure(scored)["test"]
    for task in ("ctr", "cvr", "ctcvr"):
        assert test[f"{task}_auc_torchrec"] == pytest.approx(test[f"{task}_auc"], abs=1e-6)
    monkeypatch.setattr(report_module, "WINDOW_SIZE", scored.size - 1)
    beyond = measure(scored)["test"]
    assert beyond.keys() == test.keys() - {"ctr_auc_torchrec", "ctcvr_auc_torchrec"}
    untold = with_labels(scored, conversion=np.zeros_like(scored.labels["click"]))
    assert measure(untold)["test"]["cvr_auc_torchrec"] is None


def test_figures_against_labels(scored: ScoredImpressions) -> None:
    test = measure(scored)["test"]
    click, conversion = scored.labels["click"], scored.labels["conversion"]
    clicked = click == 1
    pctr, pcvr = sigmoid(scored.scores["ctr"].values), sigmoid(scored.scores["cvr"].values)
    assert test["impressions"] == 20_000
    assert test["clicks"] == clicked.sum()
    assert test["conversions"] == conversion.sum()
    for task, label, p, groups in (
        ("ctr", click, pctr, scored.group_id),
        ("cvr", conversion[clicked], pcvr[clicked], scored.group_id[clicked]),
        ("ctcvr", conversion, pctr * pcvr, scored.group_id),
    ):
        base = label.mean()
        assert test[f"{task}_auc"] == pytest.approx(roc_auc_score(label, p), abs=1e-7)
        assert test[f"{task}_log_loss"] == pytest.approx(log_loss(label, p), rel=1e-6)
        assert test[f"{task}_ne"] == pytest.approx(log_loss(label, p) / entropy(base), rel=1e-6)
        assert test[f"{task}_calibration"] == pytest.approx(p.sum() / label.sum(), rel=1e-6)
        assert test[f"{task}_pcoc"] == test[f"{task}_calibration"]
        parts = np.array_split(np.argsort(p, kind="stable"), 15)
        ece = sum(abs(p[part].sum() - label[part].sum()) for part in parts) / label.size
        assert test[f"{task}_ece"] == pytest.approx(ece, rel=0.02)
        mixed = [g for g in np.unique(groups) if np.unique(label[groups == g]).size == 2]
        sizes = np.array([(groups == g).sum() for g in mixed])
        aucs = [roc_auc_score(label[groups == g], p[groups == g]) for g in mixed]
        assert test[f"gauc_{task}"] == pytest.approx(np.average(aucs, weights=sizes), abs=1e-6)
        assert test[f"gauc_{task}_coverage"] == pytest.approx(sizes.sum() / label.size)
    common = sigmoid(scored.common_ctr_logit) * pcvr
    assert test["ctcvr_auc_common_ctr"] == pytest.approx(
        roc_auc_score(conversion, common), abs=1e-7
    )
    by_pctr = roc_auc_score(conversion[clicked], pctr[clicked])
    assert test["cvr_auc_by_pctr"] == pytest.approx(by_pctr, abs=1e-7)
    by_pctcvr = roc_auc_score(conversion[clicked], (pctr * pcvr)[clicked])
    assert test["cvr_auc_by_pctcvr"] == pytest.approx(by_pctcvr, abs=1e-7)
    assert test["reasons"] == {}


def test_figures_against_the_truth(scored: ScoredImpressions) -> None:
    truth = measure(scored)["truth"]
    q = scored.true_cvr.astype(np.float64)
    ctr = scored.true_ctr.astype(np.float64)
    p = sigmoid(scored.scores["cvr"].values)
    clicked = scored.labels["click"] == 1
    assert truth["cvr_auc_entire_space"] == pytest.approx(soft(p, q), abs=1e-7)
    cross_entropy = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()
    assert truth["cvr_log_loss_entire_space"] == pytest.approx(cross_entropy, rel=1e-6)
    assert truth["cvr_excess_log_loss_entire_space"] == pytest.approx(
        cross_entropy - entropy(q).mean(), rel=1e-6
    )
    for space, rows in (
        ("entire_space", clicked | True),
        ("clicked", clicked),
        ("unclicked", ~clicked),
    ):
        ours, true = p[rows], q[rows]
        assert truth[f"cvr_pcoc_{space}"] == pytest.approx(ours.sum() / true.sum(), rel=1e-6)
        loss = -(true * np.log(ours) + (1 - true) * np.log(1 - ours)).mean()
        expected = loss / entropy(true.mean())
        assert truth[f"cvr_ne_{space}"] == pytest.approx(expected, rel=1e-6)
        order = np.argsort(ours)
        cuts = np.arange(1, 15) * len(order) // 15
        gaps = [abs((ours[bin] - true[bin]).sum()) for bin in np.split(order, cuts)]
        assert truth[f"cvr_ece_{space}"] == pytest.approx(sum(gaps) / len(order), rel=1e-5)
    for task, prediction, true in (
        ("ctr", sigmoid(scored.scores["ctr"].values), ctr),
        ("ctcvr", sigmoid(scored.scores["ctr"].values) * p, ctr * q),
    ):
        loss = -(true * np.log(prediction) + (1 - true) * np.log(1 - prediction)).mean()
        assert truth[f"{task}_auc_soft"] == pytest.approx(soft(prediction, true), abs=1e-7)
        assert truth[f"{task}_log_loss_soft"] == pytest.approx(loss, rel=1e-6)
        excess = loss - entropy(true).mean()
        assert truth[f"{task}_excess_log_loss"] == pytest.approx(excess, rel=1e-5)
    strata = np.array_split(np.argsort(scored.true_ctr, kind="stable"), 20)
    within = [soft(p[rows], q[rows]) for rows in strata]
    assert truth["cvr_auc_entire_space_within_ctr_strata"] == pytest.approx(
        np.mean(within), abs=2e-3
    )
    assert truth["reasons"] == {}


def test_oracle_and_reference_rows(scored: ScoredImpressions) -> None:
    truth = measure(scored)["truth"]
    clicked = scored.labels["click"] == 1
    q, ctr = scored.true_cvr, scored.true_ctr
    ctcvr = ctr.astype(np.float64) * q
    oracle = truth["oracle"]
    assert oracle["ctr_auc"] == pytest.approx(roc_auc_score(scored.labels["click"], ctr))
    assert oracle["ctcvr_auc"] == pytest.approx(roc_auc_score(scored.labels["conversion"], ctcvr))
    assert oracle["cvr_log_loss_entire_space"] == pytest.approx(entropy(q).mean(), rel=1e-6)
    for row, score in (
        ("oracle", q),
        ("pctr as conversion score", ctr),
        ("pctcvr as conversion score", ctcvr),
    ):
        assert truth[row]["cvr_auc_entire_space"] == pytest.approx(soft(score, q), abs=1e-9)
        on_clicks = roc_auc_score(scored.labels["conversion"][clicked], score[clicked])
        assert truth[row]["cvr_auc"] == pytest.approx(on_clicks)
    within = "cvr_auc_entire_space_within_ctr_strata"
    assert truth["pctr as conversion score"][within] == pytest.approx(0.5, abs=0.03)
    assert truth["cvr_auc_entire_space"] < oracle["cvr_auc_entire_space"]
    assert truth["ctr_auc_soft"] < oracle["ctr_auc_soft"]
    assert truth["ctcvr_auc_soft"] < oracle["ctcvr_auc_soft"]


def test_the_true_logits_reach_the_oracle(scored: ScoredImpressions) -> None:
    ctr, cvr = (
        Prediction(logit_of(true.astype(np.float64)), "logit")
        for true in (scored.true_ctr, scored.true_cvr)
    )
    perfect = with_scores(scored, ctr=ctr, cvr=cvr, ctcvr=product(ctr, cvr))
    truth = measure(perfect)["truth"]
    for key in ("cvr_excess_log_loss_entire_space", "ctr_excess_log_loss", "ctcvr_excess_log_loss"):
        assert truth[key] == pytest.approx(0.0, abs=1e-9)
    for key, value in truth["oracle"].items():
        if key in truth:
            assert truth[key] == pytest.approx(value, abs=1e-6)


def test_every_reported_key_is_in_the_docstring(scored: ScoredImpressions) -> None:
    documented = report_module.__doc__
    assert documented is not None
    words = set(re.findall(r"[\w<>]+", documented))
    log_pcvr = np.log(sigmoid(scored.scores["cvr"].values))
    ratio = with_scores(scored, cvr=Prediction(log_pcvr, "log_probability"))
    for part in measure(ratio).values():
        for key in part:
            general = re.sub(r"^(gauc_)?(ctr|cvr|ctcvr)(?=_|$)", r"\1<task>", key)
            assert key in words or general in words or f"\n    {key} " in documented


def test_the_common_protocol_with_the_models_own_ctr_is_its_own_product(
    scored: ScoredImpressions,
) -> None:
    ctr, cvr = scored.scores["ctr"], scored.scores["cvr"]
    own = with_scores(scored, ctcvr=product(ctr, cvr))
    test = measure(dataclasses.replace(own, common_ctr_logit=ctr.values))["test"]
    assert test["ctcvr_auc_common_ctr"] == test["ctcvr_auc"]


def test_a_ratio_above_one_is_ranked_as_it_is(scored: ScoredImpressions) -> None:
    random = np.random.default_rng(1)
    log_pcvr = (np.log(scored.true_cvr) + random.normal(0.5, 0.8, 20_000)).astype(np.float32)
    ratio = with_scores(scored, cvr=Prediction(log_pcvr, "log_probability"))
    report = measure(ratio)
    clicked = scored.labels["click"] == 1
    label = scored.labels["conversion"][clicked]
    pcvr = np.exp(log_pcvr.astype(np.float64))
    assert (pcvr > 1).mean() > 0.02
    assert report["test"]["cvr_share_above_one"] == pytest.approx((pcvr > 1).mean())
    assert report["test"]["cvr_auc"] == pytest.approx(roc_auc_score(label, pcvr[clicked]))
    assert report["test"]["cvr_pcoc"] == pytest.approx(pcvr[clicked].sum() / label.sum())
    cut = np.minimum(pcvr[clicked], 1 - 2.0**-23)
    assert report["test"]["cvr_log_loss"] == pytest.approx(log_loss(label, cut), rel=1e-6)
    common = np.log(sigmoid(scored.common_ctr_logit)) + log_pcvr
    assert report["test"]["ctcvr_auc_common_ctr"] == pytest.approx(
        roc_auc_score(scored.labels["conversion"], common), abs=1e-6
    )
    assert report["truth"]["cvr_auc_entire_space"] == pytest.approx(
        soft(pcvr, scored.true_cvr), abs=1e-9
    )


def test_a_conversion_network_alone_has_no_click_figures(scored: ScoredImpressions) -> None:
    alone = with_scores(scored, ctr=None, ctcvr=None)
    report = measure(alone)
    full = measure(scored)
    for part in ("test", "truth"):
        for key, value in report[part].items():
            about_click = key.startswith(
                ("ctr_", "ctcvr_", "gauc_ctr", "gauc_ctcvr", "cvr_auc_by", "ips_")
            ) and not key.endswith("_base_rate")
            if about_click and key != "ctcvr_auc_common_ctr":
                assert value is None
                assert "the model gives no c" in report[part]["reasons"][key]
            elif key != "reasons":
                assert value == full[part][key]


def test_one_class_gives_none_and_a_reason(scored: ScoredImpressions) -> None:
    no_click = measure(with_labels(scored, click=np.zeros_like(scored.labels["click"])))
    test = no_click["test"]
    assert test["clicks"] == test["conversions"] == 0
    assert test["ctr_auc"] is None
    assert test["reasons"]["ctr_auc"] == "click is 0 for all 20000 impressions"
    assert test["reasons"]["cvr_auc"] == "there are no impressions with click = 1"
    assert no_click["truth"]["cvr_pcoc_clicked"] is None
    assert no_click["truth"]["cvr_pcoc_unclicked"] is not None
    assert no_click["truth"]["oracle"]["cvr_auc"] is None

    test = measure(with_labels(scored, conversion=np.zeros_like(scored.labels["click"])))["test"]
    clicks = test["clicks"]
    for key in ("cvr_auc", "cvr_ne", "cvr_calibration", "gauc_cvr"):
        assert test[key] is None
        assert test["reasons"][key] == (
            f"conversion is 0 for all {clicks} impressions with click = 1"
        )
    assert test["cvr_log_loss"] > 0

    test = measure(with_labels(scored, click=np.ones_like(scored.labels["click"])))["test"]
    assert test["ctr_auc"] is None
    assert test["reasons"]["ctr_auc"] == "click is 1 for all 20000 impressions"
    assert test["ctr_calibration"] is not None


def test_each_none_has_its_reason_and_no_other_value_has(scored: ScoredImpressions) -> None:
    empty = taken(scored, slice(0))
    single = dataclasses.replace(with_scores(scored, ctr=None, ctcvr=None), group_id=None)
    for columns in (empty, single, scored):
        for part in measure(columns).values():
            nones = {key for key, value in part.items() if value is None}
            assert set(part["reasons"]) == nones
            assert all(part["reasons"].values())


def test_scores_that_are_not_finite_are_reported(scored: ScoredImpressions) -> None:
    broken = scored.scores["cvr"].values.copy()
    broken[:3] = np.nan, np.inf, -np.inf
    cvr = Prediction(broken, "logit")
    ctcvr = product(scored.scores["ctr"], cvr)
    report = measure(with_scores(scored, cvr=cvr, ctcvr=ctcvr))
    assert report["truth"]["cvr_auc_entire_space"] is None
    assert (
        report["truth"]["reasons"]["cvr_auc_entire_space"] == "3 of 20000 cvr scores are not finite"
    )
    assert "not finite" in report["test"]["reasons"]["ctcvr_auc"]
    assert report["test"]["ctr_auc"] == measure(scored)["test"]["ctr_auc"]
    json.dumps(report, allow_nan=False)


def test_a_conversion_without_a_click_does_not_count(scored: ScoredImpressions) -> None:
    stray = scored.labels["conversion"] | (1 - scored.labels["click"])
    report = measure(with_labels(scored, conversion=stray))
    assert report == measure(scored)


def test_the_order_of_impressions_does_not_matter(scored: ScoredImpressions) -> None:
    order = np.random.default_rng(2).permutation(scored.size)
    shuffled = taken(scored, order)
    report, expected = measure(shuffled), measure(scored)
    for part in ("test", "truth"):
        for key, value in expected[part].items():
            tolerance = 1e-6 if key.endswith("_torchrec") else 1e-10  # which orders ties by chance
            assert report[part][key] == (
                pytest.approx(value, rel=tolerance) if key != "reasons" else value
            )
    for key in ("ctr_auc", "cvr_auc", "ctcvr_auc", "gauc_ctr"):
        assert report["test"][key] == expected["test"][key]


def test_the_report_is_json_and_has_no_truth_without_it(scored: ScoredImpressions) -> None:
    assert json.loads(json.dumps(measure(scored), allow_nan=False)) == measure(scored)
    unknown = measure(dataclasses.replace(scored, true_ctr=None, true_cvr=None))
    assert set(unknown) == {"test"}
    assert unknown["test"] == measure(scored)["test"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scores": {"ctr": Prediction(np.zeros(3, np.float32), "logit")}}, "ctr has shape"),
        ({"labels": {"click": np.zeros(20_000, np.int8)}}, "labels has no 'conversion'"),
        ({"weight": np.zeros(20_000, np.int64)}, "weight must be float32"),
        ({"group_id": np.zeros(7, np.int64)}, "group_id has shape"),
        ({"true_ctr": None}, "both true_ctr and true_cvr"),
    ],
)
def test_unusable_columns_are_named(scored: ScoredImpressions, change: dict, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        dataclasses.replace(scored, **change)


def test_a_label_that_is_no_label_is_named(scored: ScoredImpressions) -> None:
    with pytest.raises(OptionError, match="click must be 0 or 1"):
        with_labels(scored, click=np.full(20_000, 2, np.int8))


def test_impressions_without_any_weight_have_no_figures(scored: ScoredImpressions) -> None:
    figures = measure(dataclasses.replace(scored, weight=np.zeros(20_000, np.float32)))["test"]
    for name in ("ctr_auc", "cvr_auc", "cvr_mean_entire_space"):
        assert figures[name] is None
        assert "weight" in figures["reasons"][name]


def test_weights_count_like_repeated_impressions(scored: ScoredImpressions) -> None:
    """Every figure of whole weights is that of each impression written down so many times."""
    some = taken(scored, slice(3000))
    weight = np.random.default_rng(3).integers(0, 4, some.size)
    weighted = measure(dataclasses.replace(some, weight=weight.astype(np.float32)))
    repeated = measure(taken(some, np.repeat(np.arange(some.size), weight)))
    assert weighted["test"]["impressions"] == 3000
    assert weighted["test"]["sum_of_weights"] == weight.sum()
    compared = 0
    for part, figures in repeated.items():
        for key, value in figures.items():
            # Bins and strata hold equal numbers of rows; TorchRec orders ties by chance.
            by_rows = "_ece" in key or key.endswith(("_strata", "_torchrec"))
            # An impression of weight 3 is worth less than three impressions.
            by_rows = by_rows or "effective_sample" in key
            if isinstance(value, float) and not by_rows:
                assert weighted[part][key] == pytest.approx(value, rel=1e-5), key
                compared += 1
    assert compared > 30
    scores, label = some.scores["ctr"].values, some.labels["click"]
    expected = roc_auc_score(label, scores, sample_weight=weight)
    assert weighted["test"]["ctr_auc"] == pytest.approx(expected, abs=1e-12)
    assert weighted["test"]["ctr_auc_torchrec"] == pytest.approx(expected, abs=1e-6)


def test_a_chain_of_three_tasks_is_measured_task_by_task() -> None:
    random = np.random.default_rng(4)
    n = 5000
    tasks = TaskChain(
        (
            Task("click", "clicked"),
            Task("cart", "in_cart", given="click"),
            Task("order", "ordered", given="cart"),
        )
    )
    logits = {
        name: random.normal(mean, 1, n).astype(np.float32)
        for name, mean in (("click", 0), ("cart_given_click", -0.5), ("order_given_cart", -1))
    }
    rates = {name: sigmoid(logit) for name, logit in logits.items()}
    click = random.random(n) < rates["click"]
    cart = click & (random.random(n) < rates["cart_given_click"])
    order = cart & (random.random(n) < rates["order_given_cart"])
    joint = {"cart": rates["click"] * rates["cart_given_click"]}
    joint["order"] = joint["cart"] * rates["order_given_cart"]
    scores = logits | {name: logit_of(probability) for name, probability in joint.items()}
    scored = ScoredImpressions(
        labels={
            name: label.astype(np.int8)
            for name, label in (("clicked", click), ("in_cart", cart), ("ordered", order))
        },
        scores={name: Prediction(score, "logit") for name, score in scores.items()},
        tasks=tasks,
    )
    (test,) = measure(scored).values()
    assert (test["clicks"], test["carts"], test["orders"]) == (click.sum(), cart.sum(), order.sum())
    everywhere = np.ones(n, bool)
    for name, label, rows in (
        ("click", click, everywhere),
        ("cart_given_click", cart, click),
        ("cart", cart, everywhere),
        ("order_given_cart", order, cart),
        ("order", order, everywhere),
    ):
        probability = sigmoid(scores[name])[rows]
        assert test[f"{name}_auc"] == pytest.approx(roc_auc_score(label[rows], probability))
        assert test[f"{name}_log_loss"] == pytest.approx(log_loss(label[rows], probability))
    by_joint = roc_auc_score(order[cart], scores["order"][cart])
    assert test["order_given_cart_auc_by_p_order"] == pytest.approx(by_joint)
    assert test["reasons"] == {}
