"""Calibration by value of a field, against each value measured by itself."""

from __future__ import annotations

import numpy as np
import pytest

from esmm_torchrec.metrics.probability import Prediction, fit, reliability_curve
from esmm_torchrec.metrics.report import measure, relative_improvements
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.metrics.slices import BINS, measure_slices

NAMES = ["Oslo", "Rome", "never", "Bonn"]
ROWS = 4000


def _scored(seed: int = 0, *, weighted: bool = False) -> tuple[ScoredImpressions, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.choice([0, 1, 3], ROWS, p=[0.5, 0.3, 0.2])
    a, b = rng.normal(-1, 1, (2, ROWS))
    click = rng.random(ROWS) < 1 / (1 + np.exp(-a))
    # In Rome conversions are twice as likely as predicted, elsewhere as likely.
    buy = click & (rng.random(ROWS) < np.where(codes == 1, 2, 1) / (1 + np.exp(-b)))
    scores = {"ctr": Prediction(a, "logit"), "cvr": Prediction(b, "logit")}
    weight = rng.uniform(0.5, 2, ROWS) if weighted else None
    labels = {"click": click.astype(np.int8), "conversion": buy.astype(np.int8)}
    return ScoredImpressions(labels, scores, weight=weight), codes


@pytest.mark.parametrize("weighted", [False, True])
def test_each_value_is_measured_as_if_it_were_alone(weighted: bool) -> None:
    scored, codes = _scored(weighted=weighted)
    report = measure_slices(scored, codes, NAMES)
    assert list(report) == ["ctr", "cvr"]
    for name, space in (("ctr", np.ones(ROWS, bool)), ("cvr", scored.happened("click"))):
        assert {of["value"] for of in report[name]} == {"Oslo", "Rome", "Bonn"}
        for of in report[name]:
            rows = space & (codes == NAMES.index(of["value"]))
            label = scored.happened("click" if name == "ctr" else "conversion")[rows]
            own = None if scored.weight is None else scored.weight[rows]
            alone = fit(scored.scores[name][rows], label, own)
            curve = reliability_curve(scored.scores[name][rows], label, own, num_bins=BINS)
            assert of["impressions"] == rows.sum()
            assert of["pcoc"] == pytest.approx(alone.calibration)
            assert of["predicted"] == pytest.approx(alone.predicted / alone.rows)
            assert of["observed"] == pytest.approx(alone.observed / alone.rows)
            # The edges of bins are half a row apart.
            assert of["ece"] == pytest.approx(curve.expected_calibration_error, abs=0.01)


def test_the_miscalibrated_value_comes_first() -> None:
    scored, codes = _scored()
    first, *others = measure_slices(scored, codes, NAMES)["cvr"]
    assert first["value"] == "Rome"
    assert first["pcoc"] == pytest.approx(0.5, abs=0.1)
    assert first["z"] > 5
    assert all(abs(of["z"]) < 4 for of in others)


def test_the_mean_of_pcvr_stands_beside_the_rate_of_the_clicks() -> None:
    scored, _ = _scored()
    test = measure(scored)["test"]
    pcvr = scored.scores["cvr"].probability.astype(np.float64)
    assert test["cvr_mean_entire_space"] == pytest.approx(pcvr.mean())
    clicked = scored.labels["click"] == 1
    assert test["cvr_base_rate"] == pytest.approx(scored.labels["conversion"][clicked].mean())
    assert test["ctr_base_rate"] == pytest.approx(clicked.mean())


def test_weights_count_in_the_effective_sample_size() -> None:
    click = np.array([1, 1, 1, 0], np.int8)
    scores = {"ctr": Prediction(np.zeros(4, np.float32), "logit")}
    labels = {"click": click, "conversion": np.zeros(4, np.int8)}
    weight = np.array([3.0, 1.0, 0.0, 9.0])
    test = measure(ScoredImpressions(labels, scores, weight=weight))["test"]
    assert test["ips_effective_sample_size"] == pytest.approx(4**2 / (3**2 + 1))


def test_effective_sample_size_of_the_clicks() -> None:
    scored, _ = _scored()
    test = measure(scored)["test"]
    clicked = scored.labels["click"] == 1
    pctr = np.sort(scored.scores["ctr"].block(slice(None)).probability[clicked])
    pctr = np.maximum(pctr, pctr[int(0.1 * (len(pctr) - 1))])
    size = (1 / pctr).sum() ** 2 / (1 / pctr**2).sum()
    assert test["ips_effective_sample_size"] == pytest.approx(size, rel=1e-4)
    assert test["ips_effective_sample_share"] == pytest.approx(size / clicked.sum(), rel=1e-4)


def test_relative_improvement() -> None:
    found = relative_improvements(
        {"ctr_auc": 0.7, "cvr_auc": 0.6, "cvr_ne": 0.9, "ctcvr_auc": None},
        {"ctr_auc": 0.6, "cvr_auc": 0.5, "cvr_ne": 0.8, "ctcvr_auc": 0.7},
    )
    assert found == {"ctr_relaimpr": pytest.approx(1.0), "cvr_relaimpr": None}
