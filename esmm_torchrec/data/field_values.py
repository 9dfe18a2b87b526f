"""The value of one field in every impression of a split, for figures per value."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from esmm_torchrec.data.mapped import MappedBags, MappedSplit
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
    stores = (store for stores in split.bags.values() for store in stores)
    store = next(store for store in stores if field in store.features)
    rows, codes = np.unique(_rows(store, field), return_inverse=True)
    if store.shared:
        codes = codes[split.scalars[SHARED_ROW]]
    raw_ids = dataset.vocabulary(single[field].table).raw_ids
    known = iter(raw_ids.take(rows[rows > UNKNOWN_ROW] - 1).to_pylist())
    other = {-1: "missing", UNKNOWN_ROW: "unknown"}
    return FieldValues(codes, [other.get(row) or str(next(known)) for row in rows.tolist()])


def _rows(store: MappedBags, field: str) -> np.ndarray:
    """The row of the table for each stored bag, −1 where it is empty."""
    place = store.features.index(field)
    before = store.lengths[:, :place].sum(axis=1, dtype=np.int64)
    starts = store.offsets[: len(store.lengths)].astype(np.int64) + before
    rows = np.full(len(store.lengths), -1, np.int64)
    there = store.lengths[:, place] > 0
    rows[there] = store.values[starts[there]]
    return rows


def _dense(dataset: PreparedDataSet, split: MappedSplit, field: str) -> FieldValues:
    names = split.schema.dense_features
    inputs = split.dense[:, names.index(field)].astype(np.float64)
    transform = dataset.statistics.dense.get(field)  # None: of an indicator
    missing = np.zeros(len(inputs), np.bool_)
    if transform is not None and transform.has_indicator:
        missing = split.dense[:, names.index(missing_column(field))] > 0
    given = inputs[~missing]
    if len(given) == 0:
        return FieldValues(np.zeros(len(inputs), np.int64), ["missing"], True)
    edges = np.unique(np.quantile(given, np.linspace(0, 1, DENSE_PARTS + 1)))
    codes = np.searchsorted(edges[1:-1], inputs, side="right")
    raw = edges if transform is None else transform.inverse(edges)
    ends = list(pairwise(raw)) if len(raw) > 1 else [(raw[0], raw[0])]
    shown = [f"{low:.3g} to {high:.3g}" for low, high in ends]
    if missing.any():
        codes = np.where(missing, len(shown), codes)
        shown.append("missing")
    return FieldValues(codes, shown, True)
