"""How well probabilities fit: log loss, normalised entropy, calibration.

Models are read by name as logits or log-probabilities, never as probabilities: a float32
probability near 1 has lost its complement and a product of two small ones underflows. Everything
is computed in float64, block by block, so that memory stays at one block however many rows there
are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.metrics.ranking import equal_mass_edges

LARGEST_PROBABILITY = 1.0 - float(np.finfo(np.float32).eps)
"""Where log loss cuts a ratio of probabilities that exceeds it. scikit-learn cuts float32
probabilities at the same place."""

_BLOCK = 1 << 18

Floats = NDArray[np.float64]


def log_sigmoid(logit: NDArray[np.floating]) -> Floats:
    """log σ(logit), float64, without overflow or cancellation."""
    logit = logit.astype(np.float64, copy=False)
    return np.minimum(logit, 0.0) - np.log1p(np.exp(-np.abs(logit)))


def log1mexp(log_probability: NDArray[np.floating]) -> Floats:
    """log(1 − exp(log_probability)) for log-probabilities ≤ 0, float64; −inf at 0.

    The two branches of Mächler, "Accurately computing log(1 − exp(−|a|))", 2012.
    """
    log_probability = log_probability.astype(np.float64, copy=False)
    near_one = log_probability > -math.log(2.0)
    result = np.empty_like(log_probability)
    with np.errstate(divide="ignore"):
        result[near_one] = np.log(-np.expm1(log_probability[near_one]))
    result[~near_one] = np.log1p(-np.exp(log_probability[~near_one]))
    return result


def ctcvr_logit(
    click_logit: NDArray[np.floating], conversion_logit: NDArray[np.floating]
) -> Floats:
    """Logit of pCTR · pCVR, float64: −log(e^−a + e^−b + e^(−a−b)) for logits a and b.

    Its log-sigmoids are the product's log-probability and the log of the complement; taking
    log1mexp of the product's log-probability instead gives −inf where that rounds to 0.
    """
    a = click_logit.astype(np.float64, copy=False)
    b = conversion_logit.astype(np.float64, copy=False)
    return -np.logaddexp(np.logaddexp(-a, -b), -a - b)


class ProbabilityBlock(NamedTuple):
    """Some rows of a `Prediction`; float64 (rows,) each."""

    probability: Floats
    """As predicted; above 1 where a ratio is."""
    log_probability: Floats
    """Cut at LARGEST_PROBABILITY where a ratio exceeds it."""
    log_complement: Floats
    """log(1 − probability), after the same cut."""


@dataclass(frozen=True)
class Prediction:
    """Predicted probabilities of n rows, in a form that keeps their precision."""

    values: NDArray[np.floating]
    """(n,), float32 or float64. What rows are ranked by, whichever form it is."""
    form: Literal["logit", "log_probability"]
    """A log-probability may be above 0: the ratio of two networks is (DIVISION of the ESMM
    paper). It is ranked and averaged as it is and cut for log loss only."""

    def __getitem__(self, rows: NDArray[np.bool_] | slice) -> Prediction:
        """The prediction of some rows."""
        return Prediction(self.values[rows], self.form)

    def block(self, rows: slice) -> ProbabilityBlock:
        """Probabilities of some rows, float64."""
        values = self.values[rows].astype(np.float64)
        if self.form == "logit":
            log_probability = log_sigmoid(values)
            return ProbabilityBlock(np.exp(log_probability), log_probability, log_sigmoid(-values))
        cut = np.minimum(values, math.log(LARGEST_PROBABILITY))
        return ProbabilityBlock(np.exp(values), cut, log1mexp(cut))


@dataclass(frozen=True)
class ProbabilityFit:
    """Sums over rows, from which every figure of fit follows. Of two sets of rows, they add up."""

    rows: int
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
        """Log loss over the entropy of the base rate: 1 is what predicting the base rate for
        every row gives, lower is better. TorchRec's NE; He et al., "Practical Lessons from
        Predicting Clicks on Ads at Facebook", ADKDD 2014. None where one class has no row."""
        if not 0 < self.observed < self.rows:
            return None
        base = self.observed / self.rows
        entropy = -base * math.log(base) - (1 - base) * math.log1p(-base)
        return self.loss / self.rows / entropy

    @property
    def calibration(self) -> float | None:
        """Σ predicted / Σ target, TorchRec's name; PCOC ("predicted click over click") is the
        same quantity. 1 is right, above 1 predicts too much. None where no target is positive."""
        return self.predicted / self.observed if self.observed > 0 else None


def fit(prediction: Prediction, target: NDArray[np.generic]) -> ProbabilityFit:
    """The sums behind log loss, normalised entropy and calibration.

    Args:
        prediction: n rows, finite values.
        target: (n,), labels or true probabilities, in [0, 1].
    """
    predicted = observed = loss = oracle_loss = 0.0
    for rows in _blocks(target.size):
        block = prediction.block(rows)
        t = target[rows].astype(np.float64)
        predicted += float(block.probability.sum())
        observed += float(t.sum())
        loss -= float((t * block.log_probability + (1.0 - t) * block.log_complement).sum())
        oracle_loss += float(_entropy(t).sum())
    return ProbabilityFit(target.size, predicted, observed, loss, oracle_loss)


class ReliabilityCurve(NamedTuple):
    """Predicted against observed probability in equal-mass bins; each (bins,), empty bins left
    out, by ascending prediction."""

    rows: NDArray[np.int64]
    mean_prediction: Floats
    mean_target: Floats

    @property
    def expected_calibration_error(self) -> float | None:
        """Σ rows·|mean prediction − mean target| / Σ rows (ECE; Naeini et al., AAAI 2015). Equal
        masses, because nearly all predictions of a rare event would share the first of equally
        wide bins. Label noise alone puts it above 0. None without rows."""
        if self.rows.size == 0:
            return None
        gap = np.abs(self.mean_prediction - self.mean_target)
        return float((self.rows * gap).sum() / self.rows.sum())


def reliability_curve(
    prediction: Prediction, target: NDArray[np.generic], *, num_bins: int = 15
) -> ReliabilityCurve:
    """The curve that a calibration plot shows.

    Args:
        prediction: n rows, finite values.
        target: (n,), labels or true probabilities.
        num_bins: bins of n / num_bins rows each; equal predictions share a bin, so bins can be
            uneven, or fewer, where many are equal.
    """
    if target.size == 0:
        return ReliabilityCurve(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    rows = np.zeros(num_bins, np.int64)
    predicted = np.zeros(num_bins)
    observed = np.zeros(num_bins)
    edges = equal_mass_edges(prediction.values, num_bins)
    for block in _blocks(target.size):
        bins = np.searchsorted(edges, prediction.values[block], side="right")
        probability = prediction.block(block).probability
        rows += np.bincount(bins, minlength=num_bins)
        predicted += np.bincount(bins, weights=probability, minlength=num_bins)
        observed += np.bincount(bins, weights=target[block], minlength=num_bins)
    used = rows > 0
    return ReliabilityCurve(rows[used], predicted[used] / rows[used], observed[used] / rows[used])


def mean_entropy(probability: NDArray[np.floating]) -> float | None:
    """Log loss of the true probability itself, in nats: the least any prediction reaches. None
    without rows."""
    if probability.size == 0:
        return None
    total = sum(float(_entropy(probability[rows]).sum()) for rows in _blocks(probability.size))
    return total / probability.size


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def _entropy(probability: NDArray[np.floating]) -> Floats:
    probability = probability.astype(np.float64, copy=False)
    return -_x_log_x(probability) - _x_log_x(1.0 - probability)


def _x_log_x(x: Floats) -> Floats:
    return x * np.log(np.where(x > 0, x, 1.0))
