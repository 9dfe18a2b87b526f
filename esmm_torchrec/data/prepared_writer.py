"""Writes a prepared data set: checked as it is written, whole or not there at all."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.counting import IdCounts, SharedRowUse
from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.durable import publish
from esmm_torchrec.data.key_order import KeyOrder
from esmm_torchrec.data.part_writer import ROW_GROUPS_PER_FILE, ROWS_PER_GROUP, PartWriter
from esmm_torchrec.data.prepared_form import (
    DESCRIPTION,
    OPTIONAL_COLUMNS,
    SPLITS,
    Description,
    Part,
    Split,
    SplitName,
    Statistics,
    TableStatistics,
    check_values,
    dense_features,
    impression_columns,
    partial_folder,
    rare_file,
    same_columns,
    shared_columns,
    vocabulary_file,
)
from esmm_torchrec.data.storage import HashedOutput, Location
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import (
    SHARED_ROW,
    IdFeature,
    Schema,
    Table,
)
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


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
    ) -> None:
        self._root = root
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
            # In a store, a file must not replace one of an earlier or a parallel preparation.
            number = f"{len(self.parts):05d}" if self._root.local is not None else uuid4().hex
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
class _Counts:
    """Of one split."""

    ids: dict[str, IdCounts]
    """By feature."""
    impressions: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    """By name of the task."""
    shared_row_use: SharedRowUse = field(default_factory=SharedRowUse)
    missing_dense: Counter[str] = field(default_factory=Counter)


class PreparedWriter:
    """Writes a prepared data set; nothing opens at `path` before the `with` block ends well. On a
    disk it is written beside its final name and renamed. In a store, dataset.json is written last,
    and what was written before it is deleted if the block fails.

    Vocabularies come first: what is written next is checked against them. Impressions and shared
    rows may then be written by a thread each.

    Example::

        with PreparedWriter(
            out,
            id_features=[IdFeature("item", table="item")],
            columns=["group_id"],
            source={"kind": "table", "files": ["clicks.csv"]},
            min_count=10,
        ) as writer:
            writer.write_vocabulary("item", vocabulary)
            writer.write_impressions("train", impressions)  # any number of times, in source order
            writer.write_impressions("test", test_impressions)

    Args:
        path: the folder to make, or its URI; it must not exist.
        id_features: in the order they are stored and carried in a batch.
        dense_features: raw dense columns, in the order they are stored and carried in a batch. An
            indicator of missing values, if there is one, follows its column.
        columns: which of OPTIONAL_COLUMNS the impressions have.
        source: how the data set is made, for dataset.json. No paths of this machine, no times.
        min_count: the least count of an id in the vocabularies.
        tasks: the chain, whose labels are the first columns.
        has_conversions: False if the first task alone is known and the others are 0 everywhere.
        key: the raw column by a hash of which the impressions are stored, so that they can be
            streamed; None: in the order in which they are written. Not with shared features.

    Raises:
        DataError: `path` exists already; a table written is not as declared; in the end a split
            is empty, or training lacks a task. The sentence names the split.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        id_features: Sequence[IdFeature],
        dense_features: Sequence[str] = (),
        columns: Iterable[str] = (),
        source: Mapping[str, Any],
        min_count: int,
        tasks: TaskChain = DEFAULT_TASKS,
        has_conversions: bool = True,
        key: str | None = None,
    ) -> None:
        self._final = Location.of(path)
        self._tasks = tasks
        self._has_conversions = has_conversions
        self._key = key
        self._key_orders: dict[SplitName, KeyOrder] = {}
        local = self._final.local
        self._root = self._final if local is None else Location.of(partial_folder(local))
        self._scratch: Path | None = None
        self._id_features = tuple(id_features)
        self._dense_features = tuple(dense_features)
        self.columns = [name for name in OPTIONAL_COLUMNS if name in set(columns)]
        self.source = dict(source)
        """May be added to until the block ends."""
        self._min_count = min_count
        self._num_embeddings: dict[str, int] = {}
        self._schema: Schema | None = None
        self._files: dict[tuple[SplitName, str], _Files] = {}
        self._counts = {
            split: _Counts({feature.name: IdCounts() for feature in self._id_features})
            for split in SPLITS
        }
        self._dense: dict[str, DenseTransform] = {}
        self._tables: dict[str, TableStatistics] = {}
        self._dropped: dict[SplitName, dict[str, int]] = {name: {} for name in SPLITS}
        self._dropped_rows: dict[SplitName, list[str]] = {name: [] for name in SPLITS}
        self._checksums: dict[str, str] = {}

    def __enter__(self) -> PreparedWriter:
        refuse_existing(self._final)
        if self._root.local is not None:
            if self._root.local.exists():
                shutil.rmtree(self._root.local)
            self._root.local.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        finished = False
        try:
            if kind is None:
                self._finish()
                finished = True
        finally:
            if not finished:
                self._discard()
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _discard(self) -> None:
        """Deletes what was written."""
        for order in self._key_orders.values():
            order.close()
        with suppress(OSError):  # of a full disk or a store, which is being reported already
            for files in self._files.values():
                files.close()
        if self._root.local is not None:
            shutil.rmtree(self._root.local, ignore_errors=True)
            return
        with suppress(OSError):
            for files in self._files.values():
                self._checksums.update(files.checksums)
            for name in self._checksums:
                (self._root / name).delete()

    @property
    def scratch(self) -> Path:
        """A folder for files of the preparation itself; it is gone when the block ends."""
        if self._scratch is None:
            if self._root.local is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="esmm_torchrec-"))
            else:
                self._scratch = self._root.local / "scratch"
                self._scratch.mkdir()
        return self._scratch

    @property
    def schema(self) -> Schema:
        """The schema; complete once every vocabulary is written and every dense column recorded."""
        if self._schema is None:
            names = dict.fromkeys(feature.table for feature in self._id_features)
            self._schema = Schema(
                tables=tuple(Table(name, self._num_embeddings[name]) for name in names),
                id_features=self._id_features,
                dense_features=tuple(
                    name
                    for column in self._dense_features
                    for name in dense_features(column, self._dense[column])
                ),
                tasks=self._tasks,
            )
        return self._schema

    def write_vocabulary(self, table: str, vocabulary: Vocabulary) -> None:
        """Writes the vocabulary of a table, which fixes its number of rows."""
        for name, write in (
            (vocabulary_file(table), vocabulary.write),
            (rare_file(table), vocabulary.write_rare),
        ):
            file = HashedOutput(self._root / name)
            try:
                write(file)
            finally:
                file.close()
            self._checksums[name] = file.checksum
        self._num_embeddings[table] = vocabulary.num_embeddings
        self._tables[table] = TableStatistics(vocabulary.kind, vocabulary.distinct_ids)

    def write_impressions(
        self, split: SplitName, table: pa.Table, *, key: np.ndarray | None = None
    ) -> None:
        """Appends impressions: the columns `impression_columns` of the schema gives, in order.

        Args:
            split: which one.
            table: the impressions.
            key: uint64 (n,), a hash of the user of each, if the data set is stored by it; None:
                they are given in its order.

        Raises:
            DataError: a column or a value that does not belong there.
        """
        expected = impression_columns(self.schema, self.columns)
        table = self._checked(split, "impressions", table, expected)
        if self._key is None or key is None:
            self._append(split, "impressions", table)
        else:
            if split not in self._key_orders:
                self._key_orders[split] = KeyOrder(self.scratch / f"{split}-by-key", expected)
            self._key_orders[split].append(table, key)
        counts = self._counts[split]
        counts.impressions += len(table)
        for task in self._tasks:
            counts.happened[task.name] += int(np.count_nonzero(table.column(task.label).to_numpy()))
        if len(table) and SHARED_ROW in expected.names:
            rows = table.column(SHARED_ROW).to_numpy()
            if rows.min() < 0:
                raise DataError(f"{split}: a shared row is below 0")
            counts.shared_row_use.add(rows)

    def write_shared(self, split: SplitName, table: pa.Table) -> None:
        """Appends shared rows: the columns `shared_columns` of the schema gives, in order.

        Raises:
            DataError: a column or a value that does not belong there.
        """
        assert self._key is None, "shared rows are written in the order that impressions use them"
        self._append(
            split,
            "shared",
            self._checked(split, "shared", table, shared_columns(self.schema)),
        )

    def _append(
        self, split: SplitName, kind: Literal["impressions", "shared"], table: pa.Table
    ) -> None:
        if (split, kind) not in self._files:
            self._files[split, kind] = _Files(
                self._root,
                f"{split}/{kind}",
                table.schema,
                ROWS_PER_GROUP[kind],
                self._tasks if kind == "impressions" else None,
            )
        self._files[split, kind].append(table)

    def _checked(
        self,
        split: SplitName,
        kind: Literal["impressions", "shared"],
        table: pa.Table,
        expected: pa.Schema,
    ) -> pa.Table:
        where = f"{split}/{kind}"
        wrong = same_columns(table.schema, expected)
        if wrong:
            raise DataError(f"{where} {wrong}")
        check_values(table, self.schema, expected, where=where)
        table = table.cast(expected)
        counts = self._counts[split].ids
        for feature in self._id_features:
            if feature.name in expected.names:
                column = table.column(feature.name)
                ids = len(column) - column.null_count
                if feature.multi_valued:
                    ids = sum(len(chunk.flatten()) for chunk in column.chunks)
                counts[feature.name].stored_ids += ids
                if kind == "impressions":
                    counts[feature.name].add(column, None)
        return table

    def record_dense(self, column: str, transform: DenseTransform) -> None:
        """Notes what the values of a dense column are encoded with, before any are written."""
        self._dense[column] = transform

    def record_missing_dense(self, split: SplitName, column: str, count: int) -> None:
        """Notes impressions, written or to be written, that lack the value of a dense column."""
        self._counts[split].missing_dense[column] += count

    def record_dropped(
        self, split: SplitName, reason: str, count: int, examples: Sequence[str] = ()
    ) -> None:
        """Notes raw rows that did not become impressions, with a sentence on some of them."""
        dropped = self._dropped[split]
        dropped[reason] = dropped.get(reason, 0) + count
        self._dropped_rows[split].extend(examples)

    def _finish(self) -> None:
        for split, order in self._key_orders.items():
            for table in order.sorted():
                self._append(split, "impressions", table)
        for files in self._files.values():
            files.finish()
            self._checksums.update(files.checksums)
        for name in SPLITS:
            self._check_split(name)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        description = Description(
            source=self.source,
            min_count=self._min_count,
            schema=self.schema,
            splits={name: self._split(name) for name in SPLITS},
            columns=frozenset(self.columns),
            statistics=self._statistics(),
            dropped=self._dropped,
            dropped_rows={name: tuple(self._dropped_rows[name]) for name in SPLITS},
            checksums=self._checksums,
            key=self._key,
        )
        (self._root / DESCRIPTION).write_bytes(description.encode())
        if self._root.local is not None and self._final.local is not None:
            publish(self._root.local, self._final.local)

    def _parts(self, split: SplitName, kind: Literal["impressions", "shared"]) -> tuple[Part, ...]:
        files = self._files.get((split, kind))
        return tuple(files.parts) if files else ()

    def _split(self, name: SplitName) -> Split:
        counts, shared_parts = self._counts[name], self._parts(name, "shared")
        return Split(
            impressions=counts.impressions,
            happened={name: counts.happened[name] for name in self._tasks.names},
            shared_rows=sum(part.rows for part in shared_parts),
            impression_parts=self._parts(name, "impressions"),
            shared_parts=shared_parts,
        )

    def _check_split(self, name: SplitName) -> None:
        split, highest = self._split(name), self._counts[name].shared_row_use.highest
        if split.impressions == 0:
            raise DataError(f"the {name} split holds no impression; check its input files")
        if highest >= split.shared_rows:
            raise DataError(
                f"{name}: an impression points to shared row {highest} and there are "
                f"{split.shared_rows}"
            )
        if name == "train":
            for what, count in split.happened.items():
                if count == 0 and (what == self._tasks[0].name or self._has_conversions):
                    raise DataError(
                        f"the train split holds {split.impressions} impressions and no {what}, "
                        f"nothing to learn from; check the {what} column or take more data"
                    )

    def _statistics(self) -> Statistics:
        for split in SPLITS:
            self._count_shared_ids(split)
        train, counts = self._split("train"), self._counts["train"]
        means = {
            feature.name: counts.ids[feature.name].stored_ids
            / max(1, train.shared_rows if feature.shared else train.impressions)
            for feature in self._id_features
        }
        used = int(np.count_nonzero(counts.shared_row_use.impressions(train.shared_rows)))
        missing: dict[str, dict[SplitName, float]] = {}
        unknown: dict[str, dict[SplitName, float]] = {}
        for split in SPLITS:
            of_split = self._counts[split]
            for name, of_feature in of_split.ids.items():
                missing.setdefault(name, {})[split] = of_feature.missing / of_split.impressions
                share = of_feature.unknown_ids / max(1, of_feature.ids)
                unknown.setdefault(name, {})[split] = share
            for name in self._dense_features:
                share = of_split.missing_dense[name] / of_split.impressions
                missing.setdefault(name, {})[split] = share
        return Statistics(
            mean_values_per_bag=means,
            impressions_per_shared_row=train.impressions / used if used else None,
            dense=self._dense,
            tables=self._tables,
            missing=missing,
            unknown=unknown,
        )

    def _count_shared_ids(self, split: SplitName) -> None:
        """Reads the shared rows back: only now is it known how many impressions use each."""
        counts, first = self._counts[split], 0
        impressions = counts.shared_row_use.impressions(self._split(split).shared_rows)
        for part in self._parts(split, "shared"):
            with (self._root / part.file).open_input() as source, pq.ParquetFile(source) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    times = impressions[first : first + len(table)]
                    first += len(table)
                    for feature in self._id_features:
                        if feature.shared:
                            counts.ids[feature.name].add(table.column(feature.name), times)


def refuse_existing(root: Location) -> None:
    """Raises DataError if something is where a data set is to be made."""
    there = root.local.exists() if root.local else (root / DESCRIPTION).size() is not None
    if there:
        raise DataError(f"{root} exists already; remove it or choose another folder")
