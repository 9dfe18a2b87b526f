"""Log loss, NE, calibration and ECE against high-precision arithmetic, scikit-learn, TorchRec."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss
from torchrec.metrics.calibration import compute_calibration, get_calibration_states
from torchrec.metrics.ne import compute_ne, get_ne_states

from esmm_torchrec.metrics import probability
from esmm_torchrec.metrics.probability import (
    LARGEST_PROBABILITY,
    Prediction,
    fit,
    log1mexp,
    log_sigmoid,
    mean_entropy,
    product,
    reliability_curve,
)

EXTREME = np.array(
    [-1e4, -746.0, -100.0, -37.0, -16.0, -1.0, -1e-8, 0.0, 1e-8, 0.5, 16.0, 37.0, 100.0, 746.0, 1e4]
)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit.astype(np.float64)))


def exact_sigmoid(logit: float) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-mpmath.mpf(float(logit))))


def exact_log_sigmoid(logit: float) -> mpmath.mpf:
    return -mpmath.log1p(mpmath.exp(-mpmath.mpf(float(logit))))


def world(n: int = 5_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 logits that are wrong by noise and bias, labels, true probabilities."""
    random = np.random.default_rng(seed)
    true_logit = random.normal(-2.0, 1.0, n)
    labels = (random.random(n) < sigmoid(true_logit)).astype(np.int8)
    logits = (true_logit + random.normal(0.3, 0.5, n)).astype(np.float32)
    return logits, labels, sigmoid(true_logit)


def test_log_sigmoid_is_exact_for_extreme_logits() -> None:
    with mpmath.workdps(80):
        expected = [float(exact_log_sigmoid(x)) for x in EXTREME]
    np.testing.assert_allclose(log_sigmoid(EXTREME), expected, rtol=1e-15)


def test_log1mexp_is_exact() -> None:
    values = -np.array([1e-300, 1e-17, 1e-8, 0.1, 0.69, 0.7, 1.0, 36.0, 37.0, 700.0])
    with mpmath.workdps(400):
        expected = [float(mpmath.log(1 - mpmath.exp(mpmath.mpf(x)))) for x in values]
    np.testing.assert_allclose(log1mexp(values), expected, rtol=1e-14)
    assert log1mexp(np.zeros(1))[0] == -np.inf


def test_product_of_extreme_logits_is_exact() -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(EXTREME, EXTREME))
    log_product, log_complement = [], []
    with mpmath.workdps(80):
        for x, y in zip(a, b, strict=True):
            log_product.append(float(exact_log_sigmoid(x) + exact_log_sigmoid(y)))
            # 1 − σ(x)σ(y), without a subtraction.
            complement = exact_sigmoid(-x) + exact_sigmoid(x) * exact_sigmoid(-y)
            log_complement.append(
                float(
                    mpmath.log(complement)
                    if complement < 0.5
                    else mpmath.log1p(-exact_sigmoid(x) * exact_sigmoid(y))
                )
            )
    logit = product(Prediction(a, "logit"), Prediction(b, "logit")).values
    # Where L is near 0 its error is absolute: that of the logits that nearly cancel.
    np.testing.assert_allclose(log_sigmoid(logit), log_product, rtol=1e-13)
    np.testing.assert_allclose(log_sigmoid(-logit), log_complement, rtol=1e-13)
    np.testing.assert_allclose(log_sigmoid(a) + log_sigmoid(b), log_product, rtol=1e-15)


def test_log_loss_equals_scikit_learns() -> None:
    logits, labels, true = world()
    sums = fit(Prediction(logits, "logit"), labels)
    p = sigmoid(logits)
    assert sums.log_loss == pytest.approx(log_loss(labels, p), rel=1e-12)
    assert sums.oracle_loss == 0
    soft = fit(Prediction(logits, "logit"), true)
    n = labels.size
    expected = log_loss(
        np.repeat([1, 0], n), np.tile(p, 2), sample_weight=np.concatenate([true, 1 - true])
    )
    assert soft.log_loss == pytest.approx(expected, rel=1e-12)


def test_log_loss_of_extreme_logits_is_exact() -> None:
    logits = np.repeat(EXTREME.astype(np.float32), 2)
    labels = np.tile(np.array([0, 1], np.int8), EXTREME.size)
    with mpmath.workdps(80):
        expected = mpmath.fsum(
            -exact_log_sigmoid(x if t else -x) for x, t in zip(logits, labels, strict=True)
        )
    assert fit(Prediction(logits, "logit"), labels).loss == pytest.approx(float(expected), 1e-14)


def test_a_logit_and_its_log_probability_fit_alike() -> None:
    logits, labels, _ = world()
    one = fit(Prediction(logits.astype(np.float64), "logit"), labels)
    other = fit(Prediction(log_sigmoid(logits), "log_probability"), labels)
    assert other.loss == pytest.approx(one.loss, rel=1e-12)
    assert other.predicted == pytest.approx(one.predicted, rel=1e-12)


def test_ratios_above_one_are_cut_for_log_loss_only() -> None:
    ratios = np.array([0.5, 1.0, 2.0, 0.25])
    labels = np.array([1, 1, 0, 0], np.int8)
    prediction = Prediction(np.log(ratios), "log_probability")
    sums = fit(prediction, labels)
    assert sums.predicted == pytest.approx(ratios.sum())
    cut = np.minimum(ratios, LARGEST_PROBABILITY)
    expected = -(labels * np.log(cut) + (1 - labels) * np.log1p(-cut)).sum()
    assert sums.loss == pytest.approx(expected, rel=1e-9)
    assert sums.log_loss == pytest.approx(log_loss(labels, ratios.astype(np.float32).clip(0, 1)))
    np.testing.assert_array_equal(prediction.values, np.log(ratios))


def test_ne_and_calibration_equal_torchrecs() -> None:
    logits, labels, _ = world()
    p = torch.from_numpy(sigmoid(logits)).view(1, -1)
    t = torch.from_numpy(labels).double().view(1, -1)
    weights = torch.ones_like(t)
    ne = get_ne_states(t, p.clone(), weights, 1e-12)
    calibration = get_calibration_states(t, p, weights)
    sums = fit(Prediction(logits, "logit"), labels)
    assert sums.normalised_entropy == pytest.approx(
        float(
            compute_ne(
                ne["cross_entropy_sum"],
                ne["weighted_num_samples"],
                ne["pos_labels"],
                ne["neg_labels"],
                1e-12,
            )
        ),
        rel=1e-10,
    )
    assert sums.calibration == pytest.approx(
        float(
            compute_calibration(calibration["calibration_num"], calibration["calibration_denom"])
        ),
        rel=1e-12,
    )


def test_predicting_the_base_rate_has_ne_one_and_calibration_one() -> None:
    labels = (np.arange(1_000) % 8 == 0).astype(np.int8)
    logits = np.full(1_000, np.log(1 / 7))
    sums = fit(Prediction(logits, "logit"), labels)
    assert sums.normalised_entropy == pytest.approx(1.0, rel=1e-12)
    assert sums.calibration == pytest.approx(1.0, rel=1e-12)


def test_the_true_probability_has_no_excess_log_loss_and_any_other_has() -> None:
    logits, _, true = world()
    exact = fit(Prediction(np.log(true), "log_probability"), true)
    assert exact.excess_log_loss == pytest.approx(0.0, abs=1e-14)
    assert exact.log_loss == pytest.approx(mean_entropy(true), rel=1e-12)
    p = sigmoid(logits)
    divergence = true * np.log(true / p) + (1 - true) * np.log((1 - true) / (1 - p))
    noisy = fit(Prediction(logits, "logit"), true)
    assert noisy.excess_log_loss == pytest.approx(divergence.mean(), rel=1e-9)
    assert divergence.mean() > 0.01


def test_entropy_of_certain_targets_is_zero() -> None:
    assert mean_entropy(np.array([0.0, 1.0, 1.0])) == 0.0
    assert mean_entropy(np.zeros(0)) is None


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, _ = world()
    prediction = Prediction(logits, "logit")
    whole, curve = fit(prediction, labels), reliability_curve(prediction, labels)
    monkeypatch.setattr(probability, "_BLOCK", 7)
    assert fit(prediction, labels).loss == pytest.approx(whole.loss, rel=1e-12)
    blocked = reliability_curve(prediction, labels)
    np.testing.assert_array_equal(blocked.rows, curve.rows)
    np.testing.assert_allclose(blocked.mean_prediction, curve.mean_prediction, rtol=1e-12)
    np.testing.assert_allclose(blocked.mean_target, curve.mean_target, rtol=1e-12)


def test_one_class_and_no_row_leave_figures_open() -> None:
    logits = np.array([0.0, 1.0], np.float32)
    none = fit(Prediction(logits, "logit"), np.array([0, 0], np.int8))
    assert none.normalised_entropy is None
    assert none.calibration is None
    assert none.log_loss is not None
    every = fit(Prediction(logits, "logit"), np.array([1, 1], np.int8))
    assert every.normalised_entropy is None
    assert every.calibration == pytest.approx((0.5 + sigmoid(logits)[1]) / 2)
    empty = fit(Prediction(logits[:0], "logit"), np.zeros(0, np.int8))
    assert empty.log_loss is None
    assert empty.excess_log_loss is None
    assert empty.calibration is None
    curve = reliability_curve(Prediction(logits[:0], "logit"), np.zeros(0, np.int8))
    assert curve.expected_calibration_error is None


def test_reliability_curve_equals_scikit_learns() -> None:
    logits, labels, _ = world(n=6_000)
    curve = reliability_curve(Prediction(logits, "logit"), labels, num_bins=10)
    observed, predicted = calibration_curve(labels, sigmoid(logits), n_bins=10, strategy="quantile")
    np.testing.assert_array_equal(curve.rows, np.full(10, 600))
    np.testing.assert_allclose(curve.mean_prediction, predicted, rtol=1e-3)
    np.testing.assert_allclose(curve.mean_target, observed, rtol=1e-3)
    assert curve.expected_calibration_error == pytest.approx(
        np.abs(predicted - observed).mean(), rel=1e-3
    )


def test_equal_predictions_share_a_bin() -> None:
    labels = np.array([0, 1, 1, 1, 0, 0], np.int8)
    logits = np.zeros(6, np.float32)
    curve = reliability_curve(Prediction(logits, "logit"), labels, num_bins=4)
    assert curve.rows.tolist() == [6]
    assert curve.expected_calibration_error == pytest.approx(0.0)
