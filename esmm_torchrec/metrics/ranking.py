"""Ranking quality of scores: the exact, tie-aware area under the ROC curve.

AUC is the probability that a positive row scores higher than a negative one, a tie counting one
half. It is computed over all rows at once, never averaged over batches. TorchRec's AUC orders tied
rows arbitrarily; this one is the figure of record.

Everything is NumPy on the CPU. Scores are float32 or float64, (n,), and never rounded or
transformed; infinities are ranked. Weights are (n,), not negative; None means that all are 1, and
a pair counts the product of its weights. If one class has no weight, the AUC is None.

Each function raises OptionError if lengths differ, a score is NaN, a label is neither 0 nor 1, a
probability is outside [0, 1], or a weight is negative or not finite.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.errors import OptionError

Scores = NDArray[np.floating]
Labels = NDArray[np.integer] | NDArray[np.bool_] | NDArray[np.floating]


def auc(
    scores: Scores, labels: Labels, weights: NDArray[np.floating] | None = None
) -> float | None:
    """Computes the AUC of hard labels.

    Without weights, the number of ordered pairs is an integer and the result its correctly rounded
    share: constant scores have an AUC of exactly 0.5, and the order of the rows has no effect. With
    weights, it is exact up to the rounding of float64 sums.

    Args:
        scores: (n,).
        labels: (n,), each 0 or 1; int8 needs the least memory.
        weights: (n,), not negative; None: all 1. A pair counts the product of its weights.

    Returns:
        from 0 to 1; None if all rows are of one class, or one class has no weight.

    Raises:
        OptionError: the lengths differ, a score is NaN, a label is neither 0 nor 1, or a weight
            is negative or not finite.
    """
    _check(scores, labels=labels)
    positive = _positive(labels)
    if weights is None:
        return _auc_of_classes(scores[positive], scores[~positive])
    weights = _checked_weights(scores, weights)
    return _auc_of_masses(scores, weights * positive, weights * ~positive)


def soft_auc(
    scores: Scores,
    probability: NDArray[np.floating],
    weights: NDArray[np.floating] | None = None,
) -> float | None:
    """Computes the AUC against known probabilities, without the noise of sampled labels.

    Row i counts as a positive of weight pᵢ and, at once, as a negative of weight 1 − pᵢ:

        Σᵢⱼ pᵢ (1 − pⱼ) [sᵢ > sⱼ] + ½ [sᵢ = sⱼ]  /  Σᵢⱼ pᵢ (1 − pⱼ)        over all i, j

    The sums include i = j: a row ties with itself and adds ½ pᵢ (1 − pᵢ). The result thus equals
    scikit-learn's if every row occurs twice, once per label, with those weights, and `auc` if all
    probabilities are 0 or 1. With sampled labels, no row is paired with itself; without these
    pairs, the result would be the expected ordered pairs over the expected pairs. The two differ
    by at most 1 / (2n), because Σ pᵢ (1 − pᵢ) ≤ n p̄ (1 − p̄).

    Args:
        scores: (n,).
        probability: (n,), in [0, 1].
        weights: (n,), or None.
    """
    _check(scores, probability=probability)
    if not ((probability >= 0) & (probability <= 1)).all():
        raise OptionError("probability must lie between 0 and 1")
    probability = probability.astype(np.float64, copy=False)
    if weights is None:
        return _auc_of_masses(scores, probability, 1.0 - probability)
    weights = _checked_weights(scores, weights)
    return _auc_of_masses(scores, weights * probability, weights * (1.0 - probability))


class GroupedAuc(NamedTuple):
    """Result of `grouped_auc`."""

    auc: float | None
    """Mean over the groups with both classes, weighted by their rows; None: no such group."""
    coverage: float
    """Share of rows in such groups; 0 if there are no rows. Rows count their weights."""
    num_groups: int
    """Number of groups with both classes."""


def grouped_auc(
    scores: Scores,
    labels: Labels,
    groups: NDArray[np.integer] | NDArray[np.str_],
    weights: NDArray[np.floating] | None = None,
) -> GroupedAuc:
    """Computes the AUC within each group (a user, a session), averaged by the groups' rows.

    A group with only one class has no AUC and is left out (GAUC of Zhu et al., "Optimized Cost per
    Click in Taobao Display Advertising", KDD 2017).

    Args:
        scores: (n,).
        labels: (n,), each 0 or 1.
        groups: (n,), integers or strings. Integers in [0, n) are used directly, which avoids a
            sort.
        weights: (n,), or None. A group counts the sum of the weights of its rows.
    """
    _check(scores, labels=labels, groups=groups)
    positive = _positive(labels)
    n = scores.size
    if n == 0:
        return GroupedAuc(None, 0.0, 0)
    codes = _dense_codes(groups)
    if weights is not None:
        return _grouped_auc_of_masses(scores, positive, codes, _checked_weights(scores, weights))
    rows = np.bincount(codes)
    positives = np.bincount(codes[positive], minlength=rows.size)
    mixed = (positives > 0) & (positives < rows)
    if not mixed.any():
        return GroupedAuc(None, 0.0, 0)
    kept = mixed[codes]
    # Renumbered, so that groups in the sorted keys start at the cumulative counts.
    renumbered = np.cumsum(mixed, dtype=np.int64) - 1
    rows, positives = rows[mixed], positives[mixed]

    # One integer encodes group, score and label, so a single sort orders by all three.
    key = renumbered[codes[kept]].astype(np.uint64) << np.uint64(33)
    key |= ordered_bits(scores[kept]).astype(np.uint64) << np.uint64(1)
    key |= positive[kept].astype(np.uint64)
    key.sort()
    at = np.flatnonzero(key & np.uint64(1))
    group = np.repeat(np.arange(rows.size), positives)
    tie = key[at] & ~np.uint64(1)
    first_tied = np.searchsorted(key, tie)
    negatives_tied = np.searchsorted(key, tie | np.uint64(1)) - first_tied
    rows_before = np.cumsum(rows) - rows
    positives_before = np.cumsum(positives) - positives
    below = first_tied - rows_before[group]
    positives_below = np.searchsorted(at, first_tied) - positives_before[group]
    twice_ordered = np.add.reduceat(
        2 * (below - positives_below) + negatives_tied, positives_before
    )
    aucs = twice_ordered / (2 * positives * (rows - positives))
    covered = int(rows.sum())
    return GroupedAuc(float((aucs * rows).sum() / covered), covered / n, rows.size)


def auc_within_strata(
    scores: Scores,
    target: NDArray[np.floating] | NDArray[np.integer],
    strata_score: Scores,
    weights: NDArray[np.floating] | None = None,
    *,
    num_strata: int = 20,
) -> float | None:
    """Computes the AUC within equal-mass strata of another score, averaged by the strata's rows.

    If clicks and conversions are correlated, pCTR alone is a good conversion score. Within a
    stratum of pCTR, it has little value.

    Strata are divided at the quantiles of `strata_score`; equal values stay in one stratum, so
    strata can be uneven, or fewer, if it has many ties. A stratum with one class is left out.

    Args:
        scores: (n,).
        target: (n,), labels or probabilities in [0, 1], see `soft_auc`.
        strata_score: (n,), any monotone function of pCTR.
        weights: (n,), or None. Strata do not depend on them.
        num_strata: number of strata, at least 1.
    """
    if num_strata < 1:
        raise OptionError(f"num_strata must be positive, not {num_strata}")
    _check(scores, target=target, strata_score=strata_score)
    _check(strata_score)
    if scores.size == 0:
        return None
    edges = equal_mass_edges(strata_score, num_strata)
    stratum = np.searchsorted(edges, strata_score, side="right")
    order = np.argsort(stratum, kind="stable")
    bounds = np.searchsorted(stratum[order], np.arange(num_strata + 1))
    total = covered = 0.0
    for start, stop in pairwise(bounds):
        rows = order[start:stop]
        own = None if weights is None else weights[rows]
        value = soft_auc(scores[rows], target[rows].astype(np.float64, copy=False), own)
        if value is not None:
            size = rows.size if own is None else float(own.sum(dtype=np.float64))
            total += value * size
            covered += size
    return total / covered if covered else None


def equal_mass_edges(values: Scores, num_bins: int) -> Scores:
    """Returns the lower edges of all quantile bins but the first, (num_bins − 1,); n > 0 values.

    `np.searchsorted(edges, values, side="right")` returns each value's bin, which depends on the
    value only: equal values share the bin of their median element, so bins are uneven or empty if
    there are many ties.
    """
    ordered = np.sort(values)
    at = np.arange(1, num_bins) * ordered.size // num_bins
    edges = ordered[at]
    first = np.searchsorted(ordered, edges, side="left")
    end = np.searchsorted(ordered, edges, side="right")
    # NaN sorts last, above infinity too: an edge that no value reaches.
    above = np.where(end < ordered.size, ordered[np.minimum(end, ordered.size - 1)], np.nan)
    return np.where(first + end >= 2 * at, edges, above).astype(ordered.dtype)


def _check(scores: Scores, **columns: NDArray[np.generic]) -> None:
    if scores.dtype not in (np.float32, np.float64):
        raise OptionError(f"scores must be float32 or float64, not {scores.dtype}")
    for name, column in columns.items():
        if column.shape != scores.shape:
            raise OptionError(f"{name} has shape {column.shape}, but scores {scores.shape}")
    if np.isnan(scores).any():
        raise OptionError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")


def _checked_weights(scores: Scores, weights: NDArray[np.floating]) -> NDArray[np.float64]:
    _check(scores, weights=weights)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise OptionError("weights must be finite and not negative")
    return weights.astype(np.float64, copy=False)


def _positive(labels: Labels) -> NDArray[np.bool_]:
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise OptionError("labels must be 0 or 1; probabilities go to soft_auc")
    return positive


def _auc_of_classes(positive: Scores, negative: Scores) -> float | None:
    """Computes the AUC from the scores of each class, and sorts both in place."""
    pairs = positive.size * negative.size
    if pairs == 0:
        return None
    positive.sort()
    negative.sort()
    # With sorted needles, the binary searches move forward through memory; the smaller class
    # needs fewer searches.
    needles, others = sorted((positive, negative), key=len)
    twice_below = int(np.searchsorted(others, needles, side="left").sum(dtype=np.int64))
    twice_below += int(np.searchsorted(others, needles, side="right").sum(dtype=np.int64))
    twice_ordered = twice_below if needles is positive else 2 * pairs - twice_below
    return twice_ordered / (2 * pairs)


class Ties(NamedTuple):
    """Scores, or bits with the same order, and the mass of each class per score; each (n,)."""

    scores: NDArray[Any]
    positive: NDArray[Any]
    """float64, or an integer if there are no weights."""
    negative: NDArray[Any]


def merged(ties: Ties) -> Ties:
    """Sorts ties by score, and merges equal scores."""
    if not len(ties.scores):
        return ties
    order = np.argsort(ties.scores)
    ordered = ties.scores[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    masses = (np.add.reduceat(mass[order], starts) for mass in (ties.positive, ties.negative))
    return Ties(ordered[starts], *masses)


def _auc_of_masses(
    scores: Scores, positive: NDArray[np.float64], negative: NDArray[np.float64]
) -> float | None:
    """Computes the AUC of rows that each have a positive and a negative mass."""
    _, positive, negative = merged(Ties(scores, positive, negative))
    pairs = float(positive.sum()) * float(negative.sum())
    if pairs == 0:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + 0.5 * negative)).sum()) / pairs


def _grouped_auc_of_masses(
    scores: Scores,
    positive: NDArray[np.bool_],
    codes: NDArray[np.integer],
    weights: NDArray[np.float64],
) -> GroupedAuc:
    """Computes `grouped_auc` of rows with weights."""
    order = np.lexsort((scores, codes))
    ordered, code = scores[order], codes[order]
    is_first = np.append(True, (ordered[1:] != ordered[:-1]) | (code[1:] != code[:-1]))
    starts = np.flatnonzero(is_first)
    mass = weights[order]
    positives = np.add.reduceat(mass * positive[order], starts)
    negatives = np.add.reduceat(mass * ~positive[order], starts)
    group = code[starts]
    num_groups = int(codes.max()) + 1
    of_group = [np.bincount(group, each, num_groups) for each in (positives, negatives)]
    # Mass of negatives with lower scores in the same group.
    before_group = np.cumsum(of_group[1]) - of_group[1]
    below = np.cumsum(negatives) - negatives - before_group[group]
    ordered_pairs = np.bincount(group, positives * (below + 0.5 * negatives), num_groups)
    pairs, size = of_group[0] * of_group[1], of_group[0] + of_group[1]
    mixed = pairs > 0
    covered, total = float(size[mixed].sum()), float(size.sum())
    if covered == 0:
        return GroupedAuc(None, 0.0, 0)
    mean = float((ordered_pairs[mixed] / pairs[mixed] * size[mixed]).sum()) / covered
    return GroupedAuc(mean, covered / total, int(mixed.sum()))


def _dense_codes(groups: NDArray[np.integer] | NDArray[np.str_]) -> NDArray[np.integer]:
    if np.issubdtype(groups.dtype, np.integer):
        codes = groups.astype(np.int64, copy=False)
        if codes.min() >= 0 and codes.max() < codes.size:
            return codes
    return np.unique(groups, return_inverse=True)[1]


def ordered_bits(scores: Scores) -> NDArray[np.uint32]:
    """Returns uint32 (n,) with the order of the scores; float64: comparable within a call only."""
    if scores.dtype == np.float64:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    # IEEE 754 magnitudes compare as integers; −0.0 + 0.0 is 0.0, so that the two zeros tie.
    bits = (scores + np.float32(0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign)
