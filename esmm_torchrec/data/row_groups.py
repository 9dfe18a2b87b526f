"""Reads rows of a prepared split on demand, by position in a sequence of row groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import PREPARE_AGAIN, Part, SplitName
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import SHARED_ROW


class _Group(NamedTuple):
    part: Part
    number: int
    rows: int


class RowGroups:
    """The row groups of one split.

    Args:
        dataset: data set, in a folder or a store.
        split: the split.
    """

    def __init__(self, dataset: PreparedDataSet, split: SplitName) -> None:
        self._dataset = dataset
        of_split = dataset.splits[split]
        self._groups = _groups(of_split.impression_parts)
        self._shared = _groups(of_split.shared_parts)
        self._shared_ends = np.cumsum([group.rows for group in self._shared], dtype=np.int64)
        self._kept: dict[int, tuple[int, pa.Table]] = {}

    @property
    def rows(self) -> np.ndarray:
        """Number of rows of each row group in stored order, int64 (groups,)."""
        return np.array([group.rows for group in self._groups], np.int64)

    def impressions(
        self, order: np.ndarray, ends: np.ndarray, first: int, last: int, *, keeper: int
    ) -> list[pa.Table]:
        """Reads the rows [first, last) of a sequence of row groups.

        Args:
            order: int (groups,), the sequence.
            ends: int64 (groups,), number of rows up to and including each group.
            first: first row.
            last: end of the rows, exclusive.
            keeper: number of the caller. Its last row group is kept, because its next rows usually
                continue there.

        Raises:
            DataError: a file is missing, broken or cannot be read; the message names it.
        """
        tables: list[pa.Table] = []
        place = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            group = int(order[place])
            start = int(ends[place]) - self._groups[group].rows
            end = min(last, int(ends[place]))
            kept = self._kept.get(keeper)
            if kept is None or kept[0] != group:
                part, number, _ = self._groups[group]
                columns = self._dataset.impression_columns
                kept = self._kept[keeper] = group, self._dataset.read_group(part, number, columns)
            tables.append(kept[1].slice(first - start, end - first))
            first, place = end, place + 1
        return tables

    def columns(self, names: Sequence[str], first: int, last: int) -> dict[str, np.ndarray]:
        """Reads the rows [first, last), in stored order, of those columns in `names` that exist.

        Raises:
            DataError: a file is missing, broken or cannot be read.
        """
        columns = self._dataset.impression_columns
        found = [name for name in names if name in columns.names]
        tables = [pa.schema([columns.field(name) for name in found]).empty_table()]
        end = 0
        for part, number, rows in self._groups:
            start, end = end, end + rows
            low, high = max(first, start), min(last, end)
            if low < high:
                table = self._dataset.read_group(part, number, columns, only=found).select(found)
                tables.append(table.slice(low - start, high - low))
        together = pa.concat_tables(tables)
        return {name: together.column(name).to_numpy() for name in found}

    def shared(self, rows: np.ndarray) -> pa.Table:
        """Reads shared rows.

        Args:
            rows: int (n,), ascending, distinct, over all shared files of the split.

        Raises:
            DataError: a file is missing, broken or cannot be read, or there is no such row.
        """
        columns = self._dataset.shared_columns
        if len(rows) and (rows[0] < 0 or rows[-1] >= self._shared_ends[-1]):
            raise DataError(
                f"{self._dataset.root}: a {SHARED_ROW} is outside the {self._shared_ends[-1]} "
                f"shared rows of the split; {PREPARE_AGAIN}"
            )
        tables = [columns.empty_table()]
        group_of = np.searchsorted(self._shared_ends, rows, side="right")
        for place in np.unique(group_of).tolist():
            part, number, size = self._shared[place]
            start = int(self._shared_ends[place]) - size
            table = self._dataset.read_group(part, number, columns)
            tables.append(table.take(rows[group_of == place] - start).cast(columns))
        return pa.concat_tables(tables)


def _groups(parts: tuple[Part, ...]) -> list[_Group]:
    return [
        _Group(part, number, rows) for part in parts for number, rows in enumerate(part.row_groups)
    ]
