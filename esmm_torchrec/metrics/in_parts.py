"""Distributed metrics of impressions that do not fit in the memory of one rank.

The sums of `ProbabilityFit` are added. For an AUC, the ranks partition the range of the scores:
each sorts its scores, sends every other rank the scores in that rank's range, and counts the
ordered pairs in its own range and across the ranges below. A rank thus stores about twice its share
of the scores, and the result is the exact, tie-aware AUC of `ranking.auc` over all impressions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from esmm_torchrec.metrics.probability import Prediction, ProbabilityFit, fit
from esmm_torchrec.metrics.ranking import Ties, merged, ordered_bits
from esmm_torchrec.metrics.report import Part, put_fit, row_counts
from esmm_torchrec.metrics.scored import ScoredImpressions, Scores, one_class_reason

SAMPLES = 1024
"""Number of scores that each rank samples to partition the range. A rank exceeds its share by at
most about 1 / SAMPLES of all impressions, and those of one score, which stay together."""


def measure_in_parts(own: ScoredImpressions) -> dict[str, dict[str, Any]]:
    """Computes the sums and AUCs of part "test" of `report.measure` over all ranks. It is a
    collective: every rank calls it, and all ranks get the result.

    Args:
        own: impressions of this rank, possibly none.
    """
    part = Part()
    part.values |= _summed(row_counts(own))
    for name, _, task, given in own.tasks.probabilities:
        space = own.space(task, given)
        label, weights = space.label, space.weights
        mass = np.ones(len(label)) if weights is None else weights.astype(np.float64)
        sizes = _gathered((len(label), label.sum(), mass[label].sum(), mass[~label].sum()))
        size, happened, positive, negative = np.sum(sizes, axis=0).tolist()
        one_class = one_class_reason(
            task, given, size=int(size), happened=int(happened), weighs=positive * negative > 0
        )
        prediction = space.of(own.scores.get(name))
        sums = area = None
        flaw = f"the model gives no {name} score"
        if prediction is not None:
            sums = _fit(prediction, label, weights)
            flaw = "" if sums is not None else f"a {name} score is not finite"
            if sums is not None:
                area = auc_in_parts(prediction.values, label, weights)
        part.put(f"{name}_auc", area, flaw or one_class)
        put_fit(part, name, sums, flaw or one_class)
        total = positive + negative
        part.put(f"{name}_base_rate", positive / total if total else None, one_class)
    return {"test": part.finished()}


def auc_in_parts(
    scores: Scores, labels: NDArray[np.bool_], weights: NDArray[np.floating] | None = None
) -> float | None:
    """Computes `ranking.auc` over the rows of all ranks; every rank must call it.

    Args:
        scores: float32 (n,), scores of this rank, not NaN.
        labels: bool (n,).
        weights: (n,), not negative; None on all ranks: all 1.
    """
    mass = np.ones(len(labels), np.int64) if weights is None else weights.astype(np.float64)
    ties = merged(Ties(ordered_bits(scores), mass * labels, mass * ~labels))
    ties = merged(_exchanged(ties, _splitters(ties)))
    totals = _gathered((ties.positive.sum().item(), ties.negative.sum().item()))
    positive, negative = (sum(column) for column in zip(*totals, strict=True))
    if not positive * negative:
        return None
    below = sum(of_rank[1] for of_rank in totals[: dist.get_rank()])
    ranked = np.cumsum(ties.negative) - ties.negative + below
    # Integers, if there are no weights: 2^63 suffices for 10^10 impressions of which 4 % click.
    twice = sum(_gathered((ties.positive * (2 * ranked + ties.negative)).sum().item()))
    return twice / (2 * positive * negative)


def _splitters(ties: Ties) -> NDArray[np.uint32]:
    """Returns the bounds between the ranges of the W ranks, (W − 1,), equal on all ranks.

    Each sample counts as 1 / SAMPLES of the impressions of its rank.
    """
    reached = np.cumsum(ties.positive + ties.negative)
    total = reached[-1].item() if len(reached) else 0
    at = np.searchsorted(reached, (np.arange(SAMPLES) + 0.5) / SAMPLES * total)
    own = ties.scores[at] if total else ties.scores[:0]
    by_rank = _gathered((own, total))
    samples = np.concatenate([of_rank for of_rank, _ in by_rank])
    mass = np.concatenate([np.full(len(of), total / SAMPLES) for of, total in by_rank])
    order = np.argsort(samples, kind="stable")
    world_size = len(by_rank)
    if not len(samples):
        return np.zeros(world_size - 1, np.uint32)
    reached = np.cumsum(mass[order])
    at = np.searchsorted(reached, np.arange(1, world_size) / world_size * reached[-1])
    return samples[order][np.minimum(at, len(samples) - 1)]


def _exchanged(ties: Ties, splitters: NDArray[np.uint32]) -> Ties:
    """Exchanges ties, so that each rank gets those of all ranks in its range."""
    ends = np.append(np.searchsorted(ties.scores, splitters, side="left"), len(ties.scores))
    sent = np.diff(ends, prepend=0).tolist()
    counts = torch.tensor(sent)
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts)
    sizes: list[int] = received.tolist()
    columns = []
    # torch cannot send uint32 tensors.
    for column in (ties.scores.astype(np.int64), ties.positive, ties.negative):
        own = torch.from_numpy(np.ascontiguousarray(column))
        got = own.new_empty(sum(sizes))
        dist.all_to_all_single(got, own, sizes, sent)
        columns.append(got.numpy())
    return Ties(columns[0].astype(np.uint32), columns[1], columns[2])


def _fit(
    prediction: Prediction, label: NDArray[np.bool_], weights: NDArray[np.floating] | None
) -> ProbabilityFit | None:
    """Returns the sums over all ranks, or None if a score is not finite."""
    finite = bool(np.isfinite(prediction.values).all())
    of_ranks = _gathered(fit(prediction, label, weights) if finite else None)
    found = [of_rank for of_rank in of_ranks if of_rank is not None]
    if len(found) < len(of_ranks):
        return None
    names = ("rows", "predicted", "observed", "loss", "oracle_loss")
    return ProbabilityFit(**{name: sum(getattr(one, name) for one in found) for name in names})


def _summed(values: dict[str, Any]) -> dict[str, Any]:
    by_rank = _gathered(values)
    return {name: sum(of_rank[name] for of_rank in by_rank) for name in values}


def _gathered(value: Any) -> list[Any]:
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, value)
    return everything
