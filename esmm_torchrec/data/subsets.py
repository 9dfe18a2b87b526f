"""Subsets of a split: by user for validation and nested volumes, by id for unseen ids.

A hash of the user decides which subset an impression belongs to. So the similar impressions of one
user stay together, and a smaller volume is a subset of every larger one. The user is the group_id,
else the shared row, else the impression itself.

Shapes: N impressions of a split, M selected rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from esmm_torchrec.data.hashing import splitmix64
from esmm_torchrec.data.mapped import MappedBags, MappedSplit
from esmm_torchrec.schema import GROUP_ID, SAMPLE_ID, SHARED_ROW, UNKNOWN_ROW

Purpose = Literal["validation", "volume", "fold", "sample"]
"""Purpose of a hash; each has its own, so that folds of a volume are balanced."""

_SALTS: dict[Purpose, int] = {"validation": 1, "volume": 2, "fold": 3, "sample": 4}
_ROWS_PER_BLOCK = 1 << 16


def user_column(split: MappedSplit) -> str:
    """Returns the name of the column that identifies the user of an impression."""
    return next(name for name in (GROUP_ID, SHARED_ROW, SAMPLE_ID) if name in split.scalars)


def user_hash(split: MappedSplit, purpose: Purpose) -> np.ndarray:
    """Returns a number in [0, 1) for each impression, equal within a user, float64 (N,)."""
    user = split.scalars[user_column(split)].astype(np.int64).view(np.uint64)
    hashed = splitmix64(splitmix64(user) ^ np.uint64(_SALTS[purpose]))
    return (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def rows_between(split: MappedSplit, low: float, high: float, *, purpose: Purpose) -> np.ndarray:
    """Returns the rows whose user's hash is in [low, high), ascending, int64 (M,)."""
    hashed = user_hash(split, purpose)
    return np.flatnonzero((hashed >= low) & (hashed < high))


def count_ids(split: MappedSplit, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Counts the ids of each table in some impressions, int64 (rows of the table,).

    A shared row counts once, however many of the impressions use it.

    Args:
        split: split of the impressions.
        rows: int (M,), row numbers; duplicates are ignored; None: all.
    """
    schema = split.schema
    counts = {table.name: np.zeros(table.num_embeddings, np.int64) for table in schema.tables}
    table_of = {feature.name: feature.table for feature in schema.id_features}
    own_rows = np.arange(split.impressions) if rows is None else np.unique(rows)
    shared_rows = own_rows
    if SHARED_ROW in split.scalars:
        shared_rows = np.unique(split.scalars[SHARED_ROW][own_rows])
    for store in split.stores:
        rows_of_store = shared_rows if store.shared else own_rows
        for start in range(0, len(rows_of_store), _ROWS_PER_BLOCK):
            bags = store.gather(rows_of_store[start : start + _ROWS_PER_BLOCK])
            for name, part in zip(store.features, bags.slices(), strict=True):
                table = counts[table_of[name]]
                table += np.bincount(bags.values[part], minlength=len(table))
    return counts


def ids_of(split: MappedSplit, feature: str) -> np.ndarray:
    """Returns the id of a single-valued feature in each impression, int32 (N,); UNKNOWN_ROW if it
    is missing."""
    store = next(store for store in split.stores if feature in store.features)
    ids = np.maximum(store.ids_of(feature), UNKNOWN_ROW).astype(np.int32)
    return ids[split.scalars[SHARED_ROW]] if store.shared else ids


def without_ids(split: MappedSplit, known: Mapping[str, np.ndarray]) -> MappedSplit:
    """Returns a view of the split in which every id that is not known is the unknown one (row 0).

    Args:
        split: original split, which is neither changed nor copied.
        known: table → bool (rows of the table,).
    """
    row_of = {
        table: np.where(is_known, np.arange(len(is_known)), UNKNOWN_ROW).astype(np.int32)
        for table, is_known in known.items()
    }
    table_of = {feature.name: feature.table for feature in split.schema.id_features}

    def renumbered(store: MappedBags) -> MappedBags:
        rows = [row_of[table_of[name]] for name in store.features]
        if store.row_of is not None:
            rows = [after[before] for after, before in zip(rows, store.row_of, strict=True)]
        return replace(store, row_of=tuple(rows))

    bags = {name: tuple(map(renumbered, stores)) for name, stores in split.bags.items()}
    return replace(split, bags=bags)


def only_ids_of(split: MappedSplit, seen: MappedSplit, rows: np.ndarray | None) -> MappedSplit:
    """Returns a view of the split in which every id that some impressions lack is the unknown one.

    Args:
        split: original split.
        seen: split of the impressions whose ids are kept, with the same schema.
        rows: int (M,), row numbers of these impressions; None: all.
    """
    return without_ids(split, {name: n > 0 for name, n in count_ids(seen, rows).items()})


def sample_rows(split: MappedSplit, most: int) -> np.ndarray | None:
    """Returns about `most` rows, those of users sampled by hash; None if there are no more rows.

    Users are sampled rather than rows, so that metrics within a user remain valid.
    """
    if split.impressions <= most:
        return None
    return rows_between(split, 0.0, most / split.impressions, purpose="sample")
