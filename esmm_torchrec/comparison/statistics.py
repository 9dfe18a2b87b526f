"""Means, intervals and corrections of a comparison.

Runs of two methods with the same seed share data and initial weights, so they are compared in
pairs with Student's t on the differences. The comparisons made on one figure form one family, and
Holm's step-down correction bounds the chance of any false finding within it. If all seeds share one
data set, they say nothing about other data; the users of the test half are resampled instead.

Shapes: n test impressions, U their users, R resamplings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t
from statsmodels.stats.multitest import multipletests

from esmm_torchrec.metrics.ranking import equal_mass_edges

CONFIDENCE = 0.95

Name = TypeVar("Name")

_TOGETHER = 16
"""Resamplings worked on at once: a row's weights in them are one piece of memory."""

_ROWS_PER_BLOCK = 4096


class Summary(NamedTuple):
    """Of the runs of one method; None if a run has no figure."""

    mean: float | None
    std: float | None
    """Sample standard deviation over runs; None for a single run."""


def summary(runs: Sequence[float | None]) -> Summary:
    """Mean and standard deviation of the runs."""
    known = [run for run in runs if run is not None]
    if not known or len(known) < len(runs):
        return Summary(None, None)
    return Summary(fmean(known), stdev(known) if len(known) > 1 else None)


class Difference(NamedTuple):
    """Of a method from a baseline, over paired runs."""

    mean: float
    low: float | None
    high: float | None
    """Ends of the 95 % interval; None for a single pair, which has none."""
    p_value: float | None
    """Two-sided, of no difference; None for a single pair."""


def paired_difference(runs: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Mean paired difference with Student's t interval."""
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
    """p-values corrected for their number by Holm's step-down method (1979)."""
    if not p_values:
        return {}
    corrected = np.asarray(multipletests(list(p_values.values()), method="holm")[1])
    return dict(zip(p_values, corrected.tolist(), strict=True))


class UserBootstrap:
    """Figures over resampled users: the same users for every model that is given, so that
    differences between models are paired.

    Args:
        users: (n,), whose each impression is.
        resamplings: R.
        seed: of the resampling.
    """

    def __init__(
        self, users: NDArray[np.integer], *, resamplings: int = 1000, seed: int = 0
    ) -> None:
        distinct, self._user = np.unique(users, return_inverse=True)
        rng = np.random.default_rng([seed, len(distinct)])
        size = len(distinct)
        even = np.full(size, 1 / size)
        self._times = rng.multinomial(size, even, size=resamplings).astype(np.float32)

    def auc(
        self,
        scores: NDArray[np.floating],
        target: NDArray[np.integer] | NDArray[np.floating],
        rows: NDArray[np.bool_] | None = None,
    ) -> list[float | None]:
        """AUC of each resampling, over the impressions of `rows`; None if it has one class.

        Args:
            scores: (n,).
            target: (n,), labels, or probabilities as in `metrics.ranking.soft_auc`.
            rows: (n,), which impressions; None: all.
        """
        kept = slice(None) if rows is None else rows
        values, _ = self._auc(scores[kept], target[kept], self._user[kept])
        return _known(values)

    def auc_within_strata(
        self,
        scores: NDArray[np.floating],
        target: NDArray[np.floating],
        strata_score: NDArray[np.floating],
        *,
        num_strata: int = 20,
    ) -> list[float | None]:
        """`metrics.ranking.auc_within_strata` of each resampling; the strata stay those of all
        impressions."""
        edges = equal_mass_edges(strata_score, num_strata)
        stratum = np.searchsorted(edges, strata_score, side="right")
        total, covered = np.zeros(len(self._times)), np.zeros(len(self._times))
        for number in np.unique(stratum):
            rows = np.flatnonzero(stratum == number)
            values, mass = self._auc(scores[rows], target[rows], self._user[rows])
            known = ~np.isnan(values)
            total[known] += (values * mass)[known]
            covered[known] += mass[known]
        with np.errstate(invalid="ignore"):
            return _known(total / covered)

    def mean(self, values: NDArray[np.floating]) -> list[float | None]:
        """Mean of `values`, (n,), in each resampling."""
        sums = np.bincount(self._user, weights=values)
        counts = np.bincount(self._user)
        return _known((self._times @ sums) / (self._times @ counts))

    def _auc(
        self,
        scores: NDArray[np.floating],
        target: NDArray[np.integer] | NDArray[np.floating],
        users: NDArray[np.integer],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """AUC of each resampling, (R,), NaN if it has one class; and its impressions, (R,)."""
        order = np.argsort(scores, kind="stable")
        ordered, user = scores[order], users[order]
        positive_share = target[order].astype(np.float64)[:, None]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        # Neighbours of one class need no order among themselves: of labels, few groups are left.
        share = np.add.reduceat(positive_share[:, 0], starts) / np.diff(starts, append=len(ordered))
        pure = np.select([share == 0, share == 1], [-1, 1], 0)
        starts = starts[np.r_[True, (pure[1:] != pure[:-1]) | (pure[1:] == 0)]]
        # Blocks that stay in the cache, of whole ties.
        wanted = np.arange(0, len(ordered), _ROWS_PER_BLOCK)
        edges = [
            *np.unique(starts[np.searchsorted(starts, wanted, side="right") - 1]),
            len(ordered),
        ]
        blocks = [
            (slice(start, stop), starts[(starts >= start) & (starts < stop)] - start)
            for start, stop in pairwise(edges)
        ]
        values, mass = np.empty(len(self._times)), np.empty(len(self._times))
        for first in range(0, len(self._times), _TOGETHER):
            part = slice(first, first + _TOGETHER)
            times = np.ascontiguousarray(self._times[part].T, np.float64)
            positives, negatives, ordered_pairs = np.zeros((3, times.shape[1]))
            for rows, ties in blocks:
                weight = times[user[rows]]
                positive = weight * positive_share[rows]
                negative = weight - positive
                if len(ties) < len(weight):
                    positive = np.add.reduceat(positive, ties, axis=0)
                    negative = np.add.reduceat(negative, ties, axis=0)
                below = np.cumsum(negative, axis=0)
                ordered_pairs += np.einsum("ij,ij->j", positive, below - negative / 2 + negatives)
                positives += positive.sum(axis=0)
                negatives += below[-1]
            pairs = positives * negatives
            values[part] = np.divide(
                ordered_pairs, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0
            )
            mass[part] = positives + negatives
        return values, mass


def _known(values: NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of resampled differences."""
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def bootstrap_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of no difference: twice the share of resampled differences on the rarer
    side of 0, which counts as one more than it is, so that p is never below what R can tell
    (Davison and Hinkley, "Bootstrap Methods and their Application", section 4.2)."""
    values = np.asarray(differences)
    rarer = min((values <= 0).sum(), (values >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(values) + 1))
