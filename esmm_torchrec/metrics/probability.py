"""Fit of probabilities: log loss, normalised entropy, calibration.

Predictions are logits or log-probabilities, never probabilities: a float32 probability near 1 has
lost its complement, and a product of two small ones underflows. Everything is computed in float64,
block by block, so that the memory needed is one block for any number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.choices import check_choices
from esmm_torchrec.metrics.ranking import equal_mass_edges

LARGEST_PROBABILITY = 1.0 - float(np.finfo(np.float32).eps)
"""Value at which log loss clips a ratio of probabilities. scikit-learn clips float32 probabilities
at the same value."""

_BLOCK = 1 << 18

Floats = NDArray[np.float64]


def log_sigmoid(logit: NDArray[np.floating]) -> Floats:
    """Returns log σ(logit), float64, without overflow or cancellation."""
    logit = logit.astype(np.float64, copy=False)
    return np.minimum(logit, 0.0) - np.log1p(np.exp(-np.abs(logit)))


def log1mexp(log_probability: NDArray[np.floating]) -> Floats:
    """Returns log(1 − exp(log_probability)) for log-probabilities ≤ 0, float64; −inf at 0.

    Uses the two branches of Mächler, "Accurately computing log(1 − exp(−|a|))", 2012.
    """
    log_probability = log_probability.astype(np.float64, copy=False)
    near_one = log_probability > -math.log(2.0)
    result = np.empty_like(log_probability)
    with np.errstate(divide="ignore"):
        result[near_one] = np.log(-np.expm1(log_probability[near_one]))
    result[~near_one] = np.log1p(-np.exp(log_probability[~near_one]))
    return result


class ProbabilityBlock(NamedTuple):
    """Probabilities of some rows of a `Prediction`, float64 (rows,) each."""

    probability: Floats
    """Predicted probability; a ratio may exceed 1."""
    log_probability: Floats
    """Logarithm of the probability, clipped at LARGEST_PROBABILITY, which a ratio may exceed."""
    log_complement: Floats
    """log(1 − probability) of the clipped probability."""


@dataclass(frozen=True)
class Prediction:
    """Predicted probabilities of n rows, in a form that keeps their precision."""

    values: NDArray[np.floating]
    """(n,), float32 or float64. Rows are ranked by these values in either form."""
    form: Literal["logit", "log_probability"]
    """Form of the values. A log-probability may exceed 0 if it is the ratio of two networks
    (DIVISION of the ESMM paper). It is clipped for log loss only, not for ranks and means."""

    def __post_init__(self) -> None:
        check_choices(self)

    def __getitem__(self, rows: NDArray[np.bool_] | slice) -> Prediction:
        """Returns the prediction of some rows."""
        return Prediction(self.values[rows], self.form)

    @property
    def probability(self) -> NDArray[np.float32]:
        """Probabilities, float32 (n,); a ratio is not clipped at 1."""
        values = self.values.astype(np.float64)
        log_probability = log_sigmoid(values) if self.form == "logit" else values
        return np.exp(log_probability).astype(np.float32)

    def block(self, rows: slice) -> ProbabilityBlock:
        """Returns the probabilities of some rows, float64."""
        values = self.values[rows].astype(np.float64)
        if self.form == "logit":
            log_probability = log_sigmoid(values)
            return ProbabilityBlock(np.exp(log_probability), log_probability, log_sigmoid(-values))
        clipped = np.minimum(values, math.log(LARGEST_PROBABILITY))
        return ProbabilityBlock(np.exp(values), clipped, log1mexp(clipped))


def product(first: Prediction, second: Prediction) -> Prediction:
    """Multiplies two probabilities of n rows, in their dtype.

    For two logits a and b, the result is the exact logit −log(e^−a + e^−b + e^(−a−b)), whose
    log-sigmoids are the product's log-probability and the log of its complement; log1mexp of the
    product's log-probability is −inf if that rounds to 0. Otherwise it is a log-probability.
    """
    exact = first.form == second.form == "logit"
    values = np.empty(first.values.size, np.result_type(first.values, second.values))
    # Scores that are not finite stay non-finite, and are reported as such.
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in _blocks(values.size):
            a, b = (each.values[rows].astype(np.float64) for each in (first, second))
            if exact:
                values[rows] = -np.logaddexp(np.logaddexp(-a, -b), -a - b)
            else:
                log_probability = [
                    log_sigmoid(each) if prediction.form == "logit" else each
                    for prediction, each in ((first, a), (second, b))
                ]
                values[rows] = sum(log_probability)
    return Prediction(values, "logit" if exact else "log_probability")


@dataclass(frozen=True)
class ProbabilityFit:
    """Weighted sums over rows that determine every figure of fit. The sums of disjoint sets of
    rows can be added."""

    rows: float
    """Σ weight: the number of rows if there are no weights."""
    predicted: float
    """Σ predicted probability."""
    observed: float
    """Σ target."""
    loss: float
    """Σ cross entropy of prediction and target, in nats."""
    oracle_loss: float
    """Σ entropy of the target, in nats: the cross entropy of the true probability; 0 for labels."""

    @property
    def log_loss(self) -> float | None:
        """Mean cross entropy, in nats; None without rows."""
        return self.loss / self.rows if self.rows else None

    @property
    def excess_log_loss(self) -> float | None:
        """Mean cross entropy above that of the true probability: the mean Kullback–Leibler
        divergence of the prediction from it, in nats; None without rows."""
        return (self.loss - self.oracle_loss) / self.rows if self.rows else None

    @property
    def normalised_entropy(self) -> float | None:
        """Log loss over the entropy of the base rate: 1 for predicting the base rate for every
        row; lower is better. TorchRec's NE; He et al., "Practical Lessons from Predicting Clicks
        on Ads at Facebook", ADKDD 2014. None if one class has no rows."""
        if not 0 < self.observed < self.rows:
            return None
        base = self.observed / self.rows
        entropy = -base * math.log(base) - (1 - base) * math.log1p(-base)
        return self.loss / self.rows / entropy

    @property
    def calibration(self) -> float | None:
        """Σ predicted / Σ target, as TorchRec defines calibration; PCOC ("predicted click over
        click") is the same quantity. 1 is ideal; above 1, predictions are too high. None if no
        target is positive."""
        return self.predicted / self.observed if self.observed > 0 else None


def fit(
    prediction: Prediction,
    target: NDArray[np.generic],
    weights: NDArray[np.floating] | None = None,
) -> ProbabilityFit:
    """Computes the sums that determine log loss, normalised entropy and calibration.

    Args:
        prediction: n rows, finite values.
        target: (n,), labels or true probabilities, in [0, 1].
        weights: (n,), not negative; None: all 1.
    """
    total = predicted = observed = loss = oracle_loss = 0.0
    for rows in _blocks(target.size):
        block = prediction.block(rows)
        t = target[rows].astype(np.float64)
        w = np.ones_like(t) if weights is None else weights[rows].astype(np.float64)
        total += float(w.sum())
        predicted += float((w * block.probability).sum())
        observed += float((w * t).sum())
        loss -= float((w * (t * block.log_probability + (1.0 - t) * block.log_complement)).sum())
        oracle_loss += float((w * _entropy(t)).sum())
    return ProbabilityFit(total, predicted, observed, loss, oracle_loss)


class ReliabilityCurve(NamedTuple):
    """Predicted against observed probability in bins with equal numbers of rows; each (bins,), by
    ascending prediction, without empty bins."""

    rows: Floats
    """Σ weight of each bin: its number of rows if there are no weights."""
    mean_prediction: Floats
    mean_target: Floats

    @property
    def expected_calibration_error(self) -> float | None:
        """Σ rows·|mean prediction − mean target| / Σ rows (ECE; Naeini et al., AAAI 2015). Bins
        have equal mass, because nearly all predictions of a rare event would be in the first of
        equally wide bins. Label noise alone makes it positive. None without rows."""
        if self.rows.size == 0:
            return None
        gap = np.abs(self.mean_prediction - self.mean_target)
        return float((self.rows * gap).sum() / self.rows.sum())


def reliability_curve(
    prediction: Prediction,
    target: NDArray[np.generic],
    weights: NDArray[np.floating] | None = None,
    *,
    num_bins: int = 15,
) -> ReliabilityCurve:
    """Computes the curve of a calibration plot.

    Args:
        prediction: n rows, finite values.
        target: (n,), labels or true probabilities.
        weights: (n,), not negative; None: all 1. Bins do not depend on them.
        num_bins: bins of n / num_bins rows each; equal predictions share a bin, so bins can be
            uneven, or fewer, if many are equal.
    """
    if target.size == 0:
        return ReliabilityCurve(np.zeros(0), np.zeros(0), np.zeros(0))
    rows = np.zeros(num_bins)
    predicted = np.zeros(num_bins)
    observed = np.zeros(num_bins)
    edges = equal_mass_edges(prediction.values, num_bins)
    for block in _blocks(target.size):
        bins = np.searchsorted(edges, prediction.values[block], side="right")
        probability = prediction.block(block).probability
        w = np.ones(bins.size) if weights is None else weights[block].astype(np.float64)
        rows += np.bincount(bins, weights=w, minlength=num_bins)
        predicted += np.bincount(bins, weights=w * probability, minlength=num_bins)
        observed += np.bincount(
            bins, weights=w * target[block].astype(np.float64), minlength=num_bins
        )
    used = rows > 0
    return ReliabilityCurve(rows[used], predicted[used] / rows[used], observed[used] / rows[used])


def mean_entropy(
    probability: NDArray[np.floating], weights: NDArray[np.floating] | None = None
) -> float | None:
    """Computes the log loss of the true probability itself, in nats: the minimum over all
    predictions. None without rows of positive weight."""
    sums = fit(Prediction(np.zeros_like(probability), "logit"), probability, weights)
    return sums.oracle_loss / sums.rows if sums.rows else None


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def _entropy(probability: NDArray[np.floating]) -> Floats:
    probability = probability.astype(np.float64, copy=False)
    return -_x_log_x(probability) - _x_log_x(1.0 - probability)


def _x_log_x(x: Floats) -> Floats:
    return x * np.log(np.where(x > 0, x, 1.0))
