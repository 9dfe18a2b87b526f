"""The value of one field in every impression of a split, for figures per value."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.feature_columns import CONSTANT
from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import SHARED_ROW, UNKNOWN_ROW, missing_column

DENSE_PARTS = 10
"""Parts of equally many impressions that a dense field is divided into."""


def usual_fields(dataset: PreparedDataSet, most: int) -> list[str]:
    """Fields to show figures by if nobody chose any, at most `most`: those with the fewest values
    first, which say most at a glance."""
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
    """Which value each of N impressions has."""

    codes: np.ndarray
    """int (N,), places in `names`."""
    names: list[str]
    """Raw ids, "unknown" (rare, or not seen in training) and "missing"; or ranges of raw values of
    a dense feature, and "missing" if training rows lacked values."""
    are_ranges: bool = False
    """Whether the names are ranges, in ascending order, "missing" last."""


def field_values(dataset: PreparedDataSet, split: MappedSplit, field: str) -> FieldValues:
    """The values of a single-valued id feature or of a dense one.

    Args:
        dataset: has the vocabularies.
        split: whose impressions.
        field: name of the feature.

    Raises:
        OptionError: there is no such feature, or it may have several values.
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
    """An id that is called as what is not one is quoted."""
    return repr(raw_id) if raw_id in ("missing", "unknown") else str(raw_id)


def _dense(dataset: PreparedDataSet, split: MappedSplit, field: str) -> FieldValues:
    names = split.schema.dense_features
    inputs = split.dense[:, names.index(field)].astype(np.float64)
    transform = dataset.statistics.dense.get(field)  # None: of an indicator
    missing = np.zeros(len(inputs), np.bool_)
    if transform is not None and transform.has_indicator:
        missing = split.dense[:, names.index(missing_column(field))] > 0
    raw = inputs
    if transform is not None:
        raw = transform.inverse(inputs)
        # Where the mean was subtracted, 32 bits do not tell smaller values from 0.
        raw[np.abs(raw) < 1e-6 * abs(transform.mean) * (transform.scale or 1)] = 0
    codes, shown = _in_ranges(raw[~missing])
    if missing.any():
        filled = np.full(len(inputs), len(shown))
        filled[~missing] = codes
        codes, shown = filled, [*shown, "missing"]
    return FieldValues(codes, shown, True)


def _in_ranges(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The range of each value, and the ranges in ascending order: of about equally many values, but
    a value that would fill a range is one by itself."""
    distinct, counts = np.unique(values, return_counts=True)
    # The range of a distinct value is that of its middle row, in order of value.
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
    """Whether as many digits tell the ranges apart."""
    edges = np.unique(np.concatenate([lows, highs]))
    return len({f"{edge:.{digits}g}" for edge in edges.tolist()}) == len(edges)
