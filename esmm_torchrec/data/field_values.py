"""The value of one field in each impression of a split, for metrics by value."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.feature_columns import CONSTANT
from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import SHARED_ROW, UNKNOWN_ROW, missing_column

DENSE_PARTS = 10
"""Number of ranges of about equally many impressions that a dense field is divided into."""


def usual_fields(dataset: PreparedDataSet, most: int) -> list[str]:
    """Returns at most `most` default fields for metrics by value: first the id features with the
    fewest values, because they are the easiest to read, then the dense features."""
    schema, tables = dataset.schema, set(dataset.vocabulary_tables)
    single = [
        feature
        for feature in schema.id_features
        if not feature.multi_valued and feature.table in tables and feature.name != CONSTANT
    ]
    single.sort(key=lambda feature: schema.table(feature.table).num_embeddings)
    indicators = {missing_column(name) for name in schema.dense_features}
    dense = [name for name in schema.dense_features if name not in indicators]
    return [*(feature.name for feature in single), *dense][:most]


class FieldValues(NamedTuple):
    """The value of one field in each of N impressions."""

    codes: np.ndarray
    """Index of each value in `names`, int (N,)."""
    names: list[str]
    """For an id feature, raw ids, "unknown" (rare or not seen in training) and "missing"; for a
    dense feature, ranges of raw values, and "missing" if training rows lacked values."""
    are_ranges: bool = False
    """Whether the names are ranges, in ascending order, "missing" last."""


def field_values(dataset: PreparedDataSet, split: MappedSplit, field: str) -> FieldValues:
    """Returns the values of a single-valued id feature or of a dense feature.

    Args:
        dataset: data set with the vocabularies.
        split: split with the impressions.
        field: name of the feature.

    Raises:
        OptionError: the feature does not exist, is multi-valued, or has hashed ids.
    """
    schema = split.schema
    if field in schema.dense_features:
        return _dense(dataset, split, field)
    single = {f.name: f for f in schema.id_features if not f.multi_valued}
    if field not in single:
        several = any(feature.name == field for feature in schema.id_features)
        problem = "may have several values" if several else "is not a feature of the data set"
        raise OptionError(
            f"`by` {field} {problem}; choose from {', '.join((*single, *schema.dense_features))}"
        )
    if single[field].table not in dataset.vocabulary_tables:
        raise OptionError(f"`by` {field} has hashed ids, which have no names; choose another field")
    store = next(store for store in split.stores if field in store.features)
    rows, codes = np.unique(store.ids_of(field), return_inverse=True)
    if store.shared:
        codes = codes[split.scalars[SHARED_ROW]]
    raw_ids = dataset.vocabulary(single[field].table).raw_ids
    known = iter(raw_ids.take(rows[rows > UNKNOWN_ROW] - 1).to_pylist())
    other = {-1: "missing", UNKNOWN_ROW: "unknown"}
    names = [other.get(row) or _shown(next(known)) for row in rows.tolist()]
    return FieldValues(codes, names)


def _shown(raw_id: int | str) -> str:
    """Quotes the ids "missing" and "unknown", which could be mistaken for the names of no id."""
    return repr(raw_id) if raw_id in ("missing", "unknown") else str(raw_id)


def _dense(dataset: PreparedDataSet, split: MappedSplit, field: str) -> FieldValues:
    names = split.schema.dense_features
    inputs = split.dense[:, names.index(field)].astype(np.float64)
    transform = dataset.statistics.dense.get(field)  # None for an indicator
    missing = np.zeros(len(inputs), np.bool_)
    if transform is not None and transform.has_indicator:
        missing = split.dense[:, names.index(missing_column(field))] > 0
    raw = inputs
    if transform is not None:
        raw = transform.inverse(inputs)
        # After subtracting the mean, a float32 cannot distinguish smaller values from 0.
        raw[np.abs(raw) < 1e-6 * abs(transform.mean) * (transform.scale or 1)] = 0
    codes, shown = _in_ranges(raw[~missing])
    if missing.any():
        filled = np.full(len(inputs), len(shown))
        filled[~missing] = codes
        codes, shown = filled, [*shown, "missing"]
    return FieldValues(codes, shown, True)


def _in_ranges(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Divides values into ranges of about equally many; a value that would fill a range alone gets
    its own. Returns the range of each value, and the names of the ranges in ascending order."""
    distinct, counts = np.unique(values, return_counts=True)
    # A distinct value belongs to the range of its middle row, in order of value.
    middle = np.cumsum(counts) - counts / 2
    of_distinct = np.floor(middle * DENSE_PARTS / max(1, len(values)))
    alone = counts * DENSE_PARTS >= len(values)
    begins = np.ones(len(distinct), np.bool_)
    begins[1:] = (of_distinct[1:] != of_distinct[:-1]) | alone[1:] | alone[:-1]
    starts = np.flatnonzero(begins)
    ends = np.r_[starts[1:], len(distinct)] - 1
    place = np.cumsum(begins) - 1
    lows, highs = distinct[starts], distinct[ends[: len(starts)]]
    digits = next(n for n in range(3, 18) if n == 17 or _differ(lows, highs, n))
    shown = [
        f"{low:.{digits}g}" if low == high else f"{low:.{digits}g} to {high:.{digits}g}"
        for low, high in zip(lows, highs, strict=True)
    ]
    return place[np.searchsorted(distinct, values)], shown


def _differ(lows: np.ndarray, highs: np.ndarray, digits: int) -> bool:
    """Returns whether the ranges have distinct names at this number of digits."""
    edges = np.unique(np.concatenate([lows, highs]))
    return len({f"{edge:.{digits}g}" for edge in edges.tolist()}) == len(edges)
