"""Writes a prepared data set: checked as it is written, whole or not there at all."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.counting import IdCounts, SharedRowUse
from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.durable import publish
from esmm_torchrec.data.prepared_form import (
    DESCRIPTION,
    OPTIONAL_COLUMNS,
    SPLITS,
    Description,
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
    sha256_of,
    shared_columns,
    vocabulary_file,
)
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import (
    SHARED_ROW,
    IdFeature,
    Schema,
    Table,
    weight_column,
)
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain

ROWS_PER_GROUP = {"impressions": 1 << 17, "shared": 1 << 13}
"""Rows of a Parquet row group. A shared row holds hundreds of ids, an impression a few dozen."""

ROW_GROUPS_PER_FILE = 16


class _Files:
    """The files of one split and kind: row groups and files of a fixed number of rows, so that
    the bytes do not depend on how the rows were handed in."""

    def __init__(self, root: Path, stem: str, columns: pa.Schema, rows_per_group: int) -> None:
        self._root = root
        self._stem = stem
        self._columns = columns
        self._rows_per_group = rows_per_group
        # Weights repeat and suit a dictionary. Ids use few of their four bytes: one byte plane
        # after another they are half as fast again to write, and smaller, than with a dictionary.
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
        self._encodings: dict[str, Any] = {
            "use_dictionary": dictionary,
            "column_encoding": dict.fromkeys(byte_planes, "BYTE_STREAM_SPLIT"),
        }
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._groups = 0
        self.names: list[str] = []
        self.checksums: dict[str, str] = {}
        self.rows = 0

    def append(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._waiting_rows += len(table)
        self.rows += len(table)
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
            self.names.append(f"{self._stem}-{len(self.names):05d}.parquet")
            path = self._root / self.names[-1]
            path.parent.mkdir(exist_ok=True)
            self._writer = pq.ParquetWriter(
                path,
                self._columns,
                compression="zstd",
                **self._encodings,
            )
        self._writer.write_table(group.combine_chunks(), row_group_size=len(group))
        self._groups += 1
        if self._groups == ROW_GROUPS_PER_FILE:
            self.close()

    def finish(self) -> None:
        """Writes what waits and closes."""
        if self._waiting_rows:
            self._write_group(pa.concat_tables(self._waiting))
            self._waiting, self._waiting_rows = [], 0
        self.close()

    def close(self) -> None:
        """Closes the file that is open, and takes its checksum."""
        if self._writer is not None:
            self._writer.close()
            self._writer, self._groups = None, 0
            self.checksums[self.names[-1]] = sha256_of(self._root / self.names[-1])


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
    """Writes a prepared data set; nothing is at `path` before the `with` block ends well.

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
        path: the folder to make; it must not exist.
        id_features: in the order they are stored and carried in a batch.
        dense_features: raw dense columns, in the order they are stored and carried in a batch. An
            indicator of missing values, if there is one, follows its column.
        columns: which of OPTIONAL_COLUMNS the impressions have.
        source: how the data set is made, for dataset.json. No paths of this machine, no times.
        min_count: the least count of an id in the vocabularies.
        tasks: the chain, whose labels are the first columns.
        has_conversions: False if the first task alone is known and the others are 0 everywhere.

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
    ) -> None:
        self.path = Path(path)
        self._tasks = tasks
        self._has_conversions = has_conversions
        self._root = partial_folder(self.path)
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
        if self.path.exists():
            raise DataError(f"{self.path} exists already; remove it or choose another folder")
        if self._root.exists():
            shutil.rmtree(self._root)
        for folder in ("vocabulary", "rare"):
            (self._root / folder).mkdir(parents=True)
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
                for files in self._files.values():
                    files.close()
                shutil.rmtree(self._root, ignore_errors=True)

    @property
    def scratch(self) -> Path:
        """A folder for files of the preparation itself; it is gone when the block ends."""
        folder = self._root / "scratch"
        folder.mkdir(exist_ok=True)
        return folder

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
        vocabulary.write(self._root / vocabulary_file(table))
        vocabulary.write_rare(self._root / rare_file(table))
        for file in (vocabulary_file(table), rare_file(table)):
            self._checksums[file] = sha256_of(self._root / file)
        self._num_embeddings[table] = vocabulary.num_embeddings
        self._tables[table] = TableStatistics(vocabulary.kind, vocabulary.distinct_ids)

    def write_impressions(self, split: SplitName, table: pa.Table) -> None:
        """Appends impressions: the columns `impression_columns` of the schema gives, in order.

        Raises:
            DataError: a column or a value that does not belong there.
        """
        expected = impression_columns(self.schema, self.columns)
        table = self._write(split, "impressions", table, expected)
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
        self._write(split, "shared", table, shared_columns(self.schema))

    def _write(
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
        if (split, kind) not in self._files:
            self._files[split, kind] = _Files(
                self._root, f"{split}/{kind}", expected, ROWS_PER_GROUP[kind]
            )
        self._files[split, kind].append(table)
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
        for files in self._files.values():
            files.finish()
            self._checksums.update(files.checksums)
        for name in SPLITS:
            self._check_split(name)
        shutil.rmtree(self._root / "scratch", ignore_errors=True)
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
        )
        (self._root / DESCRIPTION).write_bytes(description.encode())
        publish(self._root, self.path)

    def _names(self, split: SplitName, kind: Literal["impressions", "shared"]) -> tuple[str, ...]:
        files = self._files.get((split, kind))
        return tuple(files.names) if files else ()

    def _split(self, name: SplitName) -> Split:
        counts, shared = self._counts[name], self._files.get((name, "shared"))
        return Split(
            impressions=counts.impressions,
            happened={name: counts.happened[name] for name in self._tasks.names},
            shared_rows=shared.rows if shared else 0,
            impression_files=self._names(name, "impressions"),
            shared_files=self._names(name, "shared"),
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
        for name in self._names(split, "shared"):
            with pq.ParquetFile(self._root / name) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    times = impressions[first : first + len(table)]
                    first += len(table)
                    for feature in self._id_features:
                        if feature.shared:
                            counts.ids[feature.name].add(table.column(feature.name), times)
