"""Writes the impressions and the shared rows of one split, checked and counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.counting import IdCounts, SharedRowUse
from esmm_torchrec.data.part_writer import ROW_GROUPS_PER_FILE, ROWS_PER_GROUP, PartWriter
from esmm_torchrec.data.prepared_form import (
    Part,
    SplitName,
    check_values,
    impression_columns,
    same_columns,
    shared_columns,
)
from esmm_torchrec.data.storage import Location
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import SHARED_ROW, Schema
from esmm_torchrec.tasks import TaskChain

RowKind = Literal["impressions", "shared"]


class _Files:
    """The files of one split and kind: row groups and files of a fixed number of rows, so that
    the bytes do not depend on how the rows were handed in."""

    def __init__(
        self,
        root: Location,
        stem: str,
        columns: pa.Schema,
        rows_per_group: int,
        tasks: TaskChain | None,
        *,
        random_names: bool,
    ) -> None:
        self._root = root
        self._random_names = random_names
        self._tasks = tasks
        self._stem = stem
        self._columns = columns
        self._rows_per_group = rows_per_group
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._writer: PartWriter | None = None
        self.parts: list[Part] = []
        self.checksums: dict[str, str] = {}

    def append(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._waiting_rows += len(table)
        if self._waiting_rows < self._rows_per_group:
            return
        waiting = pa.concat_tables(self._waiting)
        cut = len(waiting) - len(waiting) % self._rows_per_group
        for start in range(0, cut, self._rows_per_group):
            self._write_group(waiting.slice(start, self._rows_per_group))
        # A copy, or the few rows that are left would keep the whole block in memory.
        rest = waiting.slice(cut).take(np.arange(len(waiting) - cut))
        self._waiting, self._waiting_rows = [rest], len(rest)

    def _write_group(self, group: pa.Table) -> None:
        if self._writer is None:
            number = uuid4().hex if self._random_names else f"{len(self.parts):05d}"
            name = f"{self._stem}-{number}.parquet"
            self._writer = PartWriter(self._root, name, self._columns, tasks=self._tasks)
        self._writer.write_group(group)
        if self._writer.num_row_groups == ROW_GROUPS_PER_FILE:
            self.close()

    def finish(self) -> None:
        """Writes what waits and closes."""
        if self._waiting_rows:
            self._write_group(pa.concat_tables(self._waiting))
            self._waiting, self._waiting_rows = [], 0
        self.close()

    def close(self) -> None:
        """Closes the file that is open."""
        if self._writer is not None:
            written = self._writer.close()
            self.parts.append(written.part)
            self.checksums[written.part.file] = written.checksum
            self._writer = None


@dataclass
class SplitCounts:
    """What the rows of a split hold."""

    ids: dict[str, IdCounts]
    """By feature."""
    impressions: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    """By name of the task."""
    shared_row_use: SharedRowUse = field(default_factory=SharedRowUse)
    missing_dense: Counter[str] = field(default_factory=Counter)

    def add(self, other: SplitCounts) -> None:
        """Adds what further rows hold, which point to no shared rows."""
        self.impressions += other.impressions
        self.happened.update(other.happened)
        self.missing_dense.update(other.missing_dense)
        for feature, counts in other.ids.items():
            self.ids[feature].merge(counts)


class WrittenSplit(NamedTuple):
    """What a `SplitWriter` wrote."""

    parts: tuple[Part, ...]
    """Of impressions."""
    checksums: dict[str, str]
    """sha256 of each, in hex."""
    counts: SplitCounts


class SplitWriter:
    """Writes the files of a split.

    Args:
        root: of the data set.
        split: which one.
        schema: of the data set.
        columns: which of OPTIONAL_COLUMNS the impressions have.
        random_names: whether others may write files of this split at the same time. In a store,
            files have random names in any case.
    """

    def __init__(
        self,
        root: Location,
        split: SplitName,
        schema: Schema,
        columns: Sequence[str],
        *,
        random_names: bool = False,
    ) -> None:
        self._split = split
        self._schema = schema
        self._columns = {
            "impressions": impression_columns(schema, columns),
            "shared": shared_columns(schema),
        }
        # In a store, a file must not replace one of an earlier or a parallel preparation.
        self._files: dict[RowKind, _Files] = {
            kind: _Files(
                root,
                f"{split}/{kind}",
                self._columns[kind],
                ROWS_PER_GROUP[kind],
                schema.tasks if kind == "impressions" else None,
                random_names=random_names or root.local is None,
            )
            for kind in ("impressions", "shared")
        }
        self.counts = SplitCounts({feature.name: IdCounts() for feature in schema.id_features})

    def write_impressions(self, table: pa.Table) -> None:
        """Appends impressions: the columns `impression_columns` of the schema gives, in order.

        Raises:
            DataError: a column or a value that does not belong there.
        """
        self.append("impressions", self.count_impressions(table))

    def count_impressions(self, table: pa.Table) -> pa.Table:
        """Checks and counts impressions that are appended later; gives them in the exact types.

        Raises:
            DataError: a column or a value that does not belong there.
        """
        table = self._checked("impressions", table)
        counts = self.counts
        counts.impressions += len(table)
        for task in self._schema.tasks:
            counts.happened[task.name] += int(np.count_nonzero(table.column(task.label).to_numpy()))
        if len(table) and SHARED_ROW in table.column_names:
            rows = table.column(SHARED_ROW).to_numpy()
            if rows.min() < 0:
                raise DataError(f"{self._split}: a shared row is below 0")
            counts.shared_row_use.add(rows)
        return table

    def write_shared(self, table: pa.Table) -> None:
        """Appends shared rows: the columns `shared_columns` of the schema gives, in order.

        Raises:
            DataError: a column or a value that does not belong there.
        """
        self.append("shared", self._checked("shared", table))

    def append(self, kind: RowKind, table: pa.Table) -> None:
        """Appends rows that have been checked and counted."""
        self._files[kind].append(table)

    def _checked(self, kind: RowKind, table: pa.Table) -> pa.Table:
        where, expected = f"{self._split}/{kind}", self._columns[kind]
        wrong = same_columns(table.schema, expected)
        if wrong:
            raise DataError(f"{where} {wrong}")
        check_values(table, self._schema, expected, where=where)
        table = table.cast(expected)
        counts = self.counts.ids
        for feature in self._schema.id_features:
            if feature.name in expected.names:
                column = table.column(feature.name)
                ids = len(column) - column.null_count
                if feature.multi_valued:
                    ids = sum(len(chunk.flatten()) for chunk in column.chunks)
                counts[feature.name].stored_ids += ids
                if kind == "impressions":
                    counts[feature.name].add(column, None)
        return table

    def add(self, written: WrittenSplit) -> None:
        """Takes over what another writer of this split wrote."""
        self._files["impressions"].parts += written.parts
        self._files["impressions"].checksums.update(written.checksums)
        self.counts.add(written.counts)

    def finish(self) -> WrittenSplit:
        """Writes what waits and closes the files."""
        for files in self._files.values():
            files.finish()
        return WrittenSplit(self.parts("impressions"), self.checksums, self.counts)

    def close(self) -> None:
        """Closes the files after an error, whatever waits."""
        with suppress(OSError):  # of a full disk or a store, which is being reported already
            for files in self._files.values():
                files.close()

    def parts(self, kind: RowKind) -> tuple[Part, ...]:
        """The files written so far."""
        return tuple(self._files[kind].parts)

    @property
    def checksums(self) -> dict[str, str]:
        """sha256 of the files written so far, in hex."""
        return {
            file: checksum
            for files in self._files.values()
            for file, checksum in files.checksums.items()
        }
