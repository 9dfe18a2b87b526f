"""Metrics within slices of the impressions, by the values of a field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from esmm_torchrec.metrics.probability import Prediction, fit
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.metrics.scored import ScoredImpressions, Space

BINS = 10
"""Number of bins of the expected calibration error of a slice."""


def measure_slices(
    scored: ScoredImpressions, codes: np.ndarray, names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Computes the calibration of each probability for each value of a field.

    Args:
        scored: n impressions.
        codes: int (n,), value of each impression, as an index into `names`.
        names: names of the values.

    Returns:
        for each `TaskProbability.name` that the model has, a list over the values that occur in
        its space, sorted by descending |z|:

            value        name of the value
            impressions  number of impressions in the space of the task
            observed     share of them with the label
            predicted    mean of the predicted probability
            pcoc         Σ predicted / Σ observed, None without a positive label
            ece          expected calibration error in 10 bins of equal mass within the value;
                         label noise alone makes it positive, more so with few impressions
            z            (Σ observed − Σ predicted) / standard deviation of Σ observed if the
                         predictions were right: beyond ±3 is not chance, unless among many values
    """
    report = {}
    for name, _, task, given in scored.tasks.probabilities:
        prediction = scored.scores.get(name)
        if prediction is None:
            continue
        report[name] = _slices(prediction, codes, names, scored.space(task, given))
    return report


def figures_by_value(
    scored: ScoredImpressions,
    codes: np.ndarray,
    names: Sequence[str],
    *,
    most: int,
    in_order: bool = False,
) -> list[dict[str, Any]]:
    """Computes AUC, NE and PCOC of each probability for the values with the most impressions.

    Args:
        scored: n impressions.
        codes: int (n,), value of each impression, as an index into `names`.
        names: names of the values.
        most: maximum number of values.
        in_order: whether the values are in the order of `names`, not by descending impressions.

    Returns:
        for each value "value", "impressions" and, by `TaskProbability.name`, "ctr auc", "ctr ne",
        "ctr pcoc" and so on, None if the labels do not determine the figure.
    """
    counts = np.bincount(codes, minlength=len(names))
    largest = np.argsort(-counts, kind="stable")[:most]
    largest = np.sort(largest) if in_order else largest
    rows = []
    for code in largest[counts[largest] > 0]:
        row: dict[str, Any] = {"value": names[code], "impressions": int(counts[code])}
        own = scored.of(codes == code)
        for name, _, task, given in scored.tasks.probabilities:
            if name not in own.scores:
                continue
            space = own.space(task, given)
            prediction, label, weights = space.of(own.scores[name]), space.label, space.weights
            sums = fit(prediction, label, weights) if len(label) else None
            row[f"{name} auc"] = auc(prediction.values, label, weights)
            row[f"{name} ne"] = None if sums is None else _finite(sums.normalised_entropy)
            row[f"{name} pcoc"] = None if sums is None else _finite(sums.calibration)
        rows.append(row)
    return rows


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _slices(
    prediction: Prediction, codes: np.ndarray, names: Sequence[str], space: Space
) -> list[dict[str, Any]]:
    p = space.of(prediction).block(slice(None)).probability
    y = space.label.astype(np.float64)
    w = np.ones(len(y)) if space.weights is None else space.weights.astype(np.float64)
    codes = space.of(codes)

    def total(values: np.ndarray) -> list[float]:
        return np.bincount(codes, weights=values, minlength=len(names)).tolist()

    counts = np.bincount(codes, minlength=len(names))
    rows, predicted, observed = total(w), total(w * p), total(w * y)
    # A quotient of two networks may exceed 1; it then has no variance.
    variance = total(w**2 * np.clip(p * (1 - p), 0, None))
    errors = _calibration_errors(p, y, codes, counts, w).tolist()
    found = []
    for code, weight in enumerate(rows):
        if weight > 0:
            deviation = variance[code] ** 0.5
            found.append(
                {
                    "value": names[code],
                    "impressions": int(counts[code]),
                    "observed": observed[code] / weight,
                    "predicted": predicted[code] / weight,
                    "pcoc": predicted[code] / observed[code] if observed[code] > 0 else None,
                    "ece": errors[code] / weight,
                    "z": (observed[code] - predicted[code]) / deviation if deviation > 0 else None,
                }
            )
    return sorted(found, key=lambda figures: -abs(figures["z"] or 0.0))


def _calibration_errors(
    p: np.ndarray, y: np.ndarray, codes: np.ndarray, counts: np.ndarray, w: np.ndarray
) -> np.ndarray:
    """Returns Σ |Σ predicted − Σ observed| over the bins of each value, (values,)."""
    order = np.lexsort((p, codes))
    starts = np.cumsum(counts) - counts
    own = codes[order]
    place = np.arange(len(order)) - starts[own]
    bins = own * BINS + place * BINS // counts[own]
    gap = np.bincount(bins, weights=(w * (p - y))[order], minlength=len(counts) * BINS)
    return np.abs(gap).reshape(-1, BINS).sum(axis=1)
