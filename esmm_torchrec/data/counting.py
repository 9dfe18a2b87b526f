"""Counts the ids of a split per impression, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.vocabulary import IdCounter
from esmm_torchrec.schema import UNKNOWN_ROW, IdFeature


def count_raw_ids(
    counters: Mapping[str, IdCounter],
    features: Sequence[IdFeature],
    ids: Mapping[str, pa.Array],
    impressions: np.ndarray | None = None,
) -> None:
    """Adds the raw ids of a block of n rows to the counter of each table that has one.

    Args:
        counters: table → counter.
        features: features to count.
        ids: feature → ids, n scalars or lists.
        impressions: number of impressions that use each row, int (n,); None: one each.
    """
    for feature in features:
        if feature.table in counters:
            column, times = ids[feature.name], impressions
            if feature.multi_valued:
                if times is not None:
                    times = np.repeat(times, column.value_lengths().to_numpy())
                column = column.flatten()
            counters[feature.table].add(column, times)


class SharedRowUse:
    """Counts the impressions that use each shared row, block by block."""

    def __init__(self) -> None:
        self._impressions = np.zeros(0, np.int64)
        self.highest = -1

    def add(self, rows: np.ndarray) -> None:
        """Adds the shared row of each impression of a block, int (n,), non-negative."""
        if len(rows) == 0:
            return
        lowest = int(rows.min())
        counts = np.bincount(rows - lowest)
        end = lowest + len(counts)
        self.highest = max(self.highest, end - 1)
        if end > len(self._impressions):
            size = max(2 * len(self._impressions), end)
            self._impressions = np.pad(self._impressions, (0, size - len(self._impressions)))
        self._impressions[lowest:end] += counts

    def impressions(self, rows: int) -> np.ndarray:
        """Returns the number of impressions of the first `rows` shared rows, int64 (rows,)."""
        return np.pad(self._impressions, (0, max(0, rows - len(self._impressions))))[:rows]


@dataclass
class IdCounts:
    """Counts of one id feature in a split."""

    stored_ids: int = 0
    """Ids as stored: those of a shared row count once."""
    ids: int = 0
    """Ids over all impressions; like the fields below, counts a shared row once per impression."""
    unknown_ids: int = 0
    missing: int = 0
    """Impressions without an id."""

    def merge(self, other: IdCounts) -> None:
        """Adds the counts of other rows."""
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add(self, rows: pa.Array, impressions: np.ndarray | None = None) -> None:
        """Counts the ids of stored rows, each weighted by `impressions`; None: by 1."""
        if pa.types.is_list(rows.type):
            lengths, ids = np.diff(rows.offsets.to_numpy()), rows.flatten().to_numpy()
        else:
            lengths = rows.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
            ids = rows.drop_null().to_numpy()
        self.stored_ids += len(ids)
        unknown, missing = ids == UNKNOWN_ROW, lengths == 0
        if impressions is None:
            self.ids += len(ids)
            self.unknown_ids += int(np.count_nonzero(unknown))
            self.missing += int(np.count_nonzero(missing))
        else:
            times_of_id = np.repeat(impressions, lengths)
            self.ids += int(times_of_id.sum())
            self.unknown_ids += int(times_of_id[unknown].sum())
            self.missing += int(impressions[missing].sum())
