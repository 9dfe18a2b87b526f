"""Writes the impressions and the shared rows of one split, and checks and counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.counting import IdCounts, SharedRowUse
from esmm_torchrec.data.prepared_form import (
    Part,
    RowKind,
    SplitName,
    array_of,
    check_values,
    impression_columns,
    same_columns,
    shared_columns,
)
from esmm_torchrec.data.storage import HashedOutput, Location
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import SHARED_ROW, Schema, weight_column
from esmm_torchrec.tasks import Task

ROWS_PER_GROUP = {"impressions": 1 << 17, "shared": 1 << 13}
"""Number of rows in a Parquet row group. A shared row has hundreds of ids, an impression a few
dozen."""

ROW_GROUPS_PER_FILE = 16


class _PartWriter:
    """Writes one file, row group by row group, and counts and hashes its rows.

    A file belongs to the data set only once the description, which is written last, lists it. A
    repeated task writes another file, and the first one is ignored.
    """

    def __init__(
        self, root: Location, name: str, columns: pa.Schema, tasks: Sequence[Task]
    ) -> None:
        self._name = name
        self._tasks = tasks
        self._happened = {task.name: 0 for task in tasks}
        self._file = HashedOutput(root / name)
        self._writer = pq.ParquetWriter(
            self._file, columns, compression="zstd", write_page_checksum=True, **_encodings(columns)
        )
        self.row_groups: list[int] = []

    def write_group(self, rows: pa.Table) -> None:
        """Writes `rows` as one row group."""
        self._writer.write_table(rows.combine_chunks(), row_group_size=len(rows))
        self.row_groups.append(len(rows))
        for task in self._tasks:
            labels = rows.column(task.label).to_numpy()
            self._happened[task.name] += int(np.count_nonzero(labels))

    def close(self) -> tuple[Part, str]:
        """Closes the file; returns its summary, and its SHA-256 in hex."""
        self._writer.close()
        self._file.close()
        part = Part(self._name, tuple(self.row_groups), self._file.bytes, self._happened)
        return part, self._file.checksum


class _Files:
    """The files of one split and kind. Row groups and files have a fixed number of rows, so their
    bytes do not depend on the blocks appended. The SHA-256 of each is added to `checksums`."""

    def __init__(
        self,
        root: Location,
        stem: str,
        columns: pa.Schema,
        rows_per_group: int,
        tasks: Iterable[Task],
        checksums: dict[str, str],
        *,
        random_names: bool,
    ) -> None:
        self._root = root
        self._random_names = random_names
        self._tasks = tuple(tasks)
        self._stem = stem
        self._columns = columns
        self._rows_per_group = rows_per_group
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._writer: _PartWriter | None = None
        self._checksums = checksums
        self.parts: list[Part] = []

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
            self._writer = _PartWriter(self._root, name, self._columns, self._tasks)
        self._writer.write_group(group)
        if len(self._writer.row_groups) == ROW_GROUPS_PER_FILE:
            self.close()

    def finish(self) -> None:
        """Writes the rows still waiting, and closes the file."""
        if self._waiting_rows:
            self._write_group(pa.concat_tables(self._waiting))
            self._waiting, self._waiting_rows = [], 0
        self.close()

    def close(self) -> None:
        """Closes the current file, if any."""
        if self._writer is not None:
            part, checksum = self._writer.close()
            self.parts.append(part)
            self._checksums[part.file] = checksum
            self._writer = None


@dataclass
class SplitCounts:
    """Counts over the rows of a split."""

    ids: dict[str, IdCounts]
    """Feature → counts of its ids."""
    shared_row_use: SharedRowUse = field(default_factory=SharedRowUse)
    missing_dense: Counter[str] = field(default_factory=Counter)

    def add(self, other: SplitCounts) -> None:
        """Adds the counts of further rows, which use no shared rows."""
        self.missing_dense.update(other.missing_dense)
        for feature, counts in other.ids.items():
            self.ids[feature].merge(counts)


class WrittenSplit(NamedTuple):
    """Files and counts of a finished `SplitWriter`."""

    parts: tuple[Part, ...]
    """Files of impressions."""
    checksums: dict[str, str]
    """SHA-256 of each file, in hex."""
    counts: SplitCounts


class SplitWriter:
    """Writes the files of a split.

    Args:
        root: folder of the data set.
        split: the split.
        schema: schema of the data set.
        columns: members of OPTIONAL_COLUMNS that the impressions have.
        random_names: whether others may write files of this split at the same time. In a store,
            files always have random names.
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
        self.checksums: dict[str, str] = {}
        """SHA-256 of the files written so far, in hex."""
        # In a store, a file must not replace one of an earlier or a parallel preparation.
        self._files: dict[RowKind, _Files] = {
            kind: _Files(
                root,
                f"{split}/{kind}",
                self._columns[kind],
                ROWS_PER_GROUP[kind],
                schema.tasks if kind == "impressions" else (),
                self.checksums,
                random_names=random_names or root.local is None,
            )
            for kind in ("impressions", "shared")
        }
        self.counts = SplitCounts({feature.name: IdCounts() for feature in schema.id_features})

    def write_impressions(self, table: pa.Table) -> None:
        """Appends impressions with the columns of `impression_columns`, in order.

        Raises:
            DataError: a column or a value is not allowed.
        """
        self.append("impressions", self.count_impressions(table))

    def count_impressions(self, table: pa.Table) -> pa.Table:
        """Checks and counts impressions to be appended later; returns them in the exact types.

        Raises:
            DataError: a column or a value is not allowed.
        """
        table = self._checked("impressions", table)
        for feature in self._schema.id_features:
            if not feature.shared:
                self.counts.ids[feature.name].add(array_of(table, feature.name))
        if len(table) and SHARED_ROW in table.column_names:
            rows = table.column(SHARED_ROW).to_numpy()
            if rows.min() < 0:
                raise DataError(f"{self._split}: a shared row is below 0")
            self.counts.shared_row_use.add(rows)
        return table

    def write_shared(self, table: pa.Table) -> None:
        """Appends shared rows with the columns of `shared_columns`, in order.

        Raises:
            DataError: a column or a value is not allowed.
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
        return table.cast(expected)

    def add(self, written: WrittenSplit) -> None:
        """Adds the files and counts of another writer of this split."""
        self._files["impressions"].parts += written.parts
        self.checksums.update(written.checksums)
        self.counts.add(written.counts)

    def finish(self) -> WrittenSplit:
        """Writes the rows still waiting, and closes the files."""
        for files in self._files.values():
            files.finish()
        return WrittenSplit(self.parts("impressions"), self.checksums, self.counts)

    def close(self) -> None:
        """Closes the files after an error, without the rows still waiting."""
        with suppress(OSError):  # of a full disk or a store, which is being reported already
            for files in self._files.values():
                files.close()

    def parts(self, kind: RowKind) -> tuple[Part, ...]:
        """Returns the files written so far."""
        return tuple(self._files[kind].parts)


def _encodings(columns: pa.Schema) -> dict[str, Any]:
    # Weights repeat and suit a dictionary. Ids use few of their four bytes: one byte plane after
    # another they are half as fast again to write, and smaller, than with a dictionary.
    leaves = {
        f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name: column
        for column in columns
    }
    dictionary = [
        leaf
        for leaf, column in leaves.items()
        if pa.types.is_int8(column.type) or column.name.endswith(weight_column(""))
    ]
    byte_planes = [leaf for leaf in leaves if leaf not in dictionary]
    return {
        "use_dictionary": dictionary,
        "column_encoding": dict.fromkeys(byte_planes, "BYTE_STREAM_SPLIT"),
    }
