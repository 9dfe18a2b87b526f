"""Means, intervals and corrections of a comparison.

Runs of two methods with the same seed share data and initial weights, so they are compared in pairs
with Student's t on the differences. The comparisons made on one figure form one family, and Holm's
step-down correction bounds the chance of any false finding within it. Seeds that share one data set
carry no information about other data, so the users of the test split are resampled as well.

Shapes: n test impressions, U their users, R resamplings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import t as student_t
from statsmodels.stats.multitest import multipletests

from esmm_torchrec.metrics.ranking import equal_mass_edges

CONFIDENCE = 0.95

Name = TypeVar("Name")

_TOGETHER = 128
"""Number of resamplings processed at once."""

_GROUPS_PER_BLOCK = 128


class Summary(NamedTuple):
    """Mean and standard deviation of the runs of one method; None if a run has no figure."""

    mean: float | None
    std: float | None
    """Sample standard deviation over runs; None for a single run."""


def summary(runs: Sequence[float | None]) -> Summary:
    """Returns the mean and standard deviation of the runs."""
    known = [run for run in runs if run is not None]
    if not known or len(known) < len(runs):
        return Summary(None, None)
    return Summary(fmean(known), stdev(known) if len(known) > 1 else None)


class Difference(NamedTuple):
    """Difference of a method from a baseline, over paired runs."""

    mean: float
    low: float | None
    high: float | None
    """Ends of the 95 % interval, `low` and `high`; None for a single pair."""
    p_value: float | None
    """Two-sided p-value of no difference; None for a single pair."""


def paired_difference(runs: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Returns the mean paired difference with Student's t interval."""
    differences = [run - other for run, other in zip(runs, baseline, strict=True)]
    mean = fmean(differences)
    freedom = len(differences) - 1
    if freedom == 0:
        return Difference(mean, None, None, None)
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    reach = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = 2 * float(student_t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - reach, mean + reach, p_value)


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Corrects p-values for their number by Holm's step-down method (1979)."""
    if not p_values:
        return {}
    corrected = np.asarray(multipletests(list(p_values.values()), method="holm")[1])
    return dict(zip(p_values, corrected.tolist(), strict=True))


class UserBootstrap:
    """Figures over resampled users, the same users for every model, so that differences between
    models are paired.

    Args:
        users: (n,), user of each impression.
        weights: (n,), weight of each impression; None: all 1.
        resamplings: number of resamplings, R.
        seed: seed of the resampling.
    """

    def __init__(
        self,
        users: NDArray[np.integer],
        weights: NDArray[np.floating] | None = None,
        *,
        resamplings: int = 1000,
        seed: int = 0,
    ) -> None:
        self._weights = np.ones(len(users)) if weights is None else weights.astype(np.float64)
        distinct, self._user = np.unique(users, return_inverse=True)
        rng = np.random.default_rng([seed, len(distinct)])
        size = len(distinct)
        even = np.full(size, 1 / size)
        # A user is drawn about once, and practically never 256 times.
        self._times = np.empty((size, resamplings), np.uint8)
        for number in range(resamplings):
            self._times[:, number] = rng.multinomial(size, even)

    def auc(
        self,
        scores: NDArray[np.floating],
        target: NDArray[np.integer] | NDArray[np.floating],
        rows: NDArray[np.bool_] | None = None,
    ) -> list[float | None]:
        """Returns the AUC over `rows` in each resampling; None if they have one class.

        Args:
            scores: (n,).
            target: (n,), labels, or probabilities as in `metrics.ranking.soft_auc`.
            rows: (n,), mask of the impressions; None: all.
        """
        kept = slice(None) if rows is None else rows
        values, _ = self._auc(scores[kept], target[kept], kept)
        return _known(values)

    def auc_within_strata(
        self,
        scores: NDArray[np.floating],
        target: NDArray[np.floating],
        strata_score: NDArray[np.floating],
        *,
        num_strata: int = 20,
    ) -> list[float | None]:
        """Returns `metrics.ranking.auc_within_strata` of each resampling; the strata remain those
        of all impressions."""
        edges = equal_mass_edges(strata_score, num_strata)
        stratum = np.searchsorted(edges, strata_score, side="right")
        total, covered = np.zeros((2, self._times.shape[1]))
        for number in np.unique(stratum):
            rows = np.flatnonzero(stratum == number)
            values, mass = self._auc(scores[rows], target[rows], rows)
            known = ~np.isnan(values)
            total[known] += (values * mass)[known]
            covered[known] += mass[known]
        with np.errstate(invalid="ignore"):
            return _known(total / covered)

    def mean(self, values: NDArray[np.floating]) -> list[float | None]:
        """Returns the mean of `values`, (n,), in each resampling."""
        masses = (self._weights * values, self._weights)
        sums = np.stack(
            [np.bincount(self._user, weights=mass) for mass in masses], dtype=np.float64
        )
        found, size = np.concatenate(
            [_product(sums, times) for times in self._chunks(np.float64)], axis=1
        )
        with np.errstate(invalid="ignore"):
            return _known(found / size)

    def _chunks(self, dtype: type[np.floating]) -> Iterator[NDArray[np.floating]]:
        """Yields draw counts of the users, (U, up to `_TOGETHER`), for successive resamplings."""
        for first in range(0, self._times.shape[1], _TOGETHER):
            yield self._times[:, first : first + _TOGETHER].astype(dtype)

    def _auc(
        self,
        scores: NDArray[np.floating],
        target: NDArray[np.integer] | NDArray[np.floating],
        rows: slice | NDArray[np.bool_] | NDArray[np.integer],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns AUC and mass of some rows in each resampling, both (R,); AUC is NaN for one
        class.

        Impressions are grouped, lowest scores first: those that tie, or neighbours of one class,
        whose order does not matter. One matrix, groups by users, contains the positive mass,
        another the negative mass. Multiplied by the draw counts of the users, they yield the masses
        of the groups in each resampling.
        """
        order = np.argsort(scores, kind="stable")
        ordered, share = scores[order], target[order].astype(np.float64)
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        tied = np.add.reduceat(share, starts) / np.diff(starts, append=len(ordered))
        pure = np.select([tied == 0, tied == 1], [-1, 1], 0)
        starts = starts[np.r_[True, (pure[1:] != pure[:-1]) | (pure[1:] == 0)]]
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(ordered)))
        weights = self._weights[rows][order]
        place, shape = (group, self._user[rows][order]), (len(starts), len(self._times))
        masses = [csr_array((weights * of, place), shape) for of in (share, 1 - share)]
        for mass in masses:
            mass.eliminate_zeros()
        blocks = [
            [mass[first : first + _GROUPS_PER_BLOCK].astype(np.float32) for mass in masses]
            for first in range(0, len(starts), _GROUPS_PER_BLOCK)
        ]
        # A group ranks above all groups before it and, being tied, above half of itself.
        above = np.tri(_GROUPS_PER_BLOCK, dtype=np.float32) - np.eye(
            _GROUPS_PER_BLOCK, dtype=np.float32
        ) / np.float32(2)
        values, sizes = [], []
        for times in self._chunks(np.float32):
            positives, negatives, pairs = np.zeros((3, times.shape[1]))
            for block in blocks:
                positive, negative = (mass @ times for mass in block)
                within = _product(above[: len(negative), : len(negative)], negative)
                positive_sum = positive.sum(axis=0, dtype=np.float64)
                pairs += positive_sum * negatives
                pairs += np.einsum("ij,ij->j", positive, within, dtype=np.float64)
                positives += positive_sum
                negatives += negative.sum(axis=0, dtype=np.float64)
            possible = positives * negatives
            values.append(
                np.divide(pairs, possible, out=np.full(len(pairs), np.nan), where=possible > 0)
            )
            sizes.append(positives + negatives)
        return np.concatenate(values), np.concatenate(sizes)


def _product(left: NDArray[np.floating], right: NDArray[np.floating]) -> NDArray[np.floating]:
    """Multiplies matrices with torch, whose threads a comparison limits; NumPy's threads would slow
    down the other processes of the comparison."""
    return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()


def _known(values: NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Returns the middle 95 % of resampled differences."""
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def bootstrap_p_value(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of no difference: twice the share of resampled differences on
    the rarer side of 0. One is added to their count, so that p is never below the resolution of R
    resamplings (Davison and Hinkley, "Bootstrap Methods and their Application", section 4.2)."""
    values = np.asarray(differences)
    rarer = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(values) + 1))
