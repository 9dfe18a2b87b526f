"""Calibration by scikit-learn's regressions, as a model's scores have it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from esmm_torchrec.errors import DataError
from esmm_torchrec.metrics.calibration import (
    Calibration,
    CalibrationKind,
    IsotonicCurve,
    PlattCurve,
    fit_calibration,
)
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions

ROWS = 20_000


def _scored(seed: int) -> ScoredImpressions:
    """Click logits that are twice as large as they should be, conversion logits 1 too high."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(-1, 1, (2, ROWS))
    click = rng.random(ROWS) < 1 / (1 + np.exp(-a))
    buy = click & (rng.random(ROWS) < 1 / (1 + np.exp(-b)))
    scores = {
        "ctr": Prediction((2 * a).astype(np.float32), "logit"),
        "cvr": Prediction((b + 1).astype(np.float32), "logit"),
    }
    labels = {"click": click.astype(np.int8), "conversion": buy.astype(np.int8)}
    return ScoredImpressions(labels, scores)


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
def test_other_impressions_are_calibrated(kind: CalibrationKind) -> None:
    calibration = fit_calibration(_scored(0), kind)
    other = _scored(1)
    after = measure(ScoredImpressions(other.labels, calibration.apply(other.scores, other.tasks)))[
        "test"
    ]
    before = measure(other)["test"]
    for name in ("ctr", "cvr"):
        assert before[f"{name}_ece"] > 0.05
        assert after[f"{name}_ece"] < 0.025
        assert after[f"{name}_ne"] < before[f"{name}_ne"]
        assert after[f"{name}_pcoc"] == pytest.approx(1, abs=0.05)
    assert after["ctcvr_pcoc"] == pytest.approx(1, abs=0.1)


def test_platt_is_a_logistic_regression_on_the_score() -> None:
    scored = _scored(0)
    calibration = fit_calibration(scored, "platt")
    clicked = scored.happened("click")
    own = scored.scores["cvr"].values[clicked].astype(float)
    exact = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    exact.fit(own[:, None], scored.happened("conversion")[clicked])
    calibrated = calibration.apply(scored.scores, scored.tasks)["cvr"]
    np.testing.assert_allclose(
        calibrated[clicked].probability, exact.predict_proba(own[:, None])[:, 1], rtol=1e-5
    )
    # The logits that were drawn: σ(b) from b + 1.
    assert calibration.curves["cvr"].slope == pytest.approx(1, abs=0.1)  # pyright: ignore
    assert calibration.curves["cvr"].intercept == pytest.approx(-1, abs=0.1)  # pyright: ignore
    labels = scored.happened("click")
    before, after = (auc(s["ctr"].values, labels) for s in (
        scored.scores, calibration.apply(scored.scores, scored.tasks)))  # fmt: skip
    assert after == pytest.approx(before, abs=1e-6)


def test_isotonic_is_that_of_scikit_learn() -> None:
    scored = _scored(0)
    calibrated = fit_calibration(scored, "isotonic").apply(scored.scores, scored.tasks)
    values = scored.scores["ctr"].values.astype(float)
    margin = 0.5 / ROWS
    exact = IsotonicRegression(y_min=margin, y_max=1 - margin, out_of_bounds="clip")
    exact.fit(values, scored.happened("click").astype(float))
    np.testing.assert_allclose(
        calibrated["ctr"].probability, exact.predict(values), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
def test_joint_scores_are_products_and_json_keeps_everything(kind: CalibrationKind) -> None:
    scored = _scored(0)
    calibration = fit_calibration(scored, kind)
    restored = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    assert restored == calibration
    scores = restored.apply(scored.scores, scored.tasks)
    assert list(scores) == ["ctr", "cvr", "ctcvr"]
    np.testing.assert_allclose(
        scores["ctcvr"].probability,
        scores["ctr"].probability * scores["cvr"].probability,
        rtol=1e-4,
        atol=1e-7,
    )


def test_a_conversion_network_alone_is_calibrated_alone() -> None:
    scored = _scored(0)
    alone = ScoredImpressions(scored.labels, {"cvr": scored.scores["cvr"]})
    calibration = fit_calibration(alone, "platt")
    assert list(calibration.apply(alone.scores, alone.tasks)) == ["cvr"]


def test_one_class_is_refused() -> None:
    scored = _scored(0)
    none = dict(scored.labels) | {"conversion": np.zeros(ROWS, np.int8)}
    with pytest.raises(DataError, match="conversion has only one class in the"):
        fit_calibration(ScoredImpressions(none, scored.scores), "isotonic")


@pytest.mark.parametrize("curve", [PlattCurve(0.7, -0.2), IsotonicCurve((0.5,), (0.25,))])
def test_a_curve_of_tensors_is_that_of_arrays(curve: PlattCurve | IsotonicCurve) -> None:
    scores = np.random.default_rng(0).normal(size=1000)
    tensors = curve.logits(torch.from_numpy(scores), torch)
    np.testing.assert_allclose(tensors.numpy(), curve.logits(scores), rtol=1e-14)


def test_an_isotonic_curve_is_numpys_interpolation() -> None:
    random = np.random.default_rng(0)
    knots, heights = np.sort(random.normal(size=50)), np.sort(random.uniform(0.01, 0.99, 50))
    curve = IsotonicCurve(tuple(knots.tolist()), tuple(heights.tolist()))
    scores = np.concatenate([random.normal(size=1000), knots, [-9.0, 9.0]])
    p = np.interp(scores, knots, heights)
    expected = np.log(p) - np.log1p(-p)
    np.testing.assert_allclose(curve.logits(scores), expected, rtol=1e-10, atol=1e-12)
    tensors = curve.logits(torch.from_numpy(scores), torch)
    np.testing.assert_allclose(tensors.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_score_that_ranks_in_reverse_is_calibrated_to_a_constant() -> None:
    scored = _scored(0)
    click = scored.scores["ctr"]
    reversed_ = ScoredImpressions(scored.labels, {"ctr": replace(click, values=-click.values)})
    calibration = fit_calibration(reversed_, "platt")
    found = calibration.apply(reversed_.scores, reversed_.tasks)["ctr"].probability
    np.testing.assert_allclose(found, scored.happened("click").mean(), rtol=1e-5)


def test_a_damaged_calibration_is_refused() -> None:
    values = fit_calibration(_scored(0), "platt").to_dict()
    values["curves"]["ctr"]["slope"] = 9.25
    with pytest.raises(ValueError, match="checksum"):
        Calibration.from_dict(values)
