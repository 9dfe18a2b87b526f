"""Writes a prepared data set, checked as it is written, completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.key_order import KeyOrder
from esmm_torchrec.data.prepared_form import (
    DESCRIPTION,
    OPTIONAL_COLUMNS,
    SPLITS,
    Description,
    Split,
    SplitName,
    Statistics,
    TableStatistics,
    array_of,
    partial_folder,
    rare_file,
    schema_of,
    vocabulary_file,
)
from esmm_torchrec.data.split_writer import SplitWriter
from esmm_torchrec.data.storage import HashedOutput, Location
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.durable import publish
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import IdFeature, Schema
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


class PreparedWriter:
    """Writes a prepared data set, which can be opened only after the `with` block has succeeded. On
    a disk, it is written under a temporary name and then renamed. In a store, dataset.json is
    written last, and the other files are deleted if the block fails.

    Write the vocabularies first: rows are checked against them.

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
        path: folder to create, or its URI; it must not exist.
        id_features: id features, in the order of storage and of batches.
        dense_features: raw dense columns, in the order of storage and of batches. An indicator of
            missing values, if any, follows its column.
        columns: members of OPTIONAL_COLUMNS that the impressions have.
        source: origin of the data set, for dataset.json; it must not contain local paths or times.
        min_count: minimum count of an id in the vocabularies.
        tasks: the chain, whose labels are the first columns.
        key: raw column by whose hash the impressions are ordered, so that they can be streamed;
            None: they keep the order of writing. Not possible with shared features.

    Raises:
        DataError: `path` already exists; a table does not match its declaration; or, at the end, a
            split is empty or the training split has no row of the first task. The message names
            the split.
    """

    def __init__(
        self,
        path: Location | Path | str,
        *,
        id_features: Sequence[IdFeature],
        dense_features: Sequence[str] = (),
        columns: Iterable[str] = (),
        source: Mapping[str, Any],
        min_count: int,
        tasks: TaskChain = DEFAULT_TASKS,
        key: str | None = None,
    ) -> None:
        self._final = Location.of(path)
        self._tasks = tasks
        self.key = key
        self._key_orders: dict[SplitName, KeyOrder] = {}
        local = self._final.local
        self.root = self._final if local is None else Location.of(partial_folder(local))
        """Folder that files are written to until the block ends."""
        self._scratch: Path | None = None
        self._id_features = tuple(id_features)
        self._dense_features = tuple(dense_features)
        self.columns = [name for name in OPTIONAL_COLUMNS if name in set(columns)]
        self.source = dict(source)
        """Origin of the data set; entries may be added until the block ends."""
        self._min_count = min_count
        self._num_embeddings: dict[str, int] = {}
        self._schema: Schema | None = None
        self._splits: dict[SplitName, SplitWriter] = {}
        self._dense: dict[str, DenseTransform] = {}
        self._tables: dict[str, TableStatistics] = {}
        self._dropped: dict[SplitName, dict[str, int]] = {name: {} for name in SPLITS}
        self._dropped_rows: dict[SplitName, list[str]] = {name: [] for name in SPLITS}
        self._checksums: dict[str, str] = {}

    def __enter__(self) -> PreparedWriter:
        refuse_existing(self._final)
        if self.root.local is not None:
            if self.root.local.exists():
                shutil.rmtree(self.root.local)
            self.root.local.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as on_error:
            on_error.callback(self._discard)
            if kind is None:
                self._finish()
                on_error.pop_all()

    def _discard(self) -> None:
        """Deletes all files written so far."""
        for order in self._key_orders.values():
            order.close()
        for writer in self._splits.values():
            writer.close()
        self._remove_scratch()
        if self.root.local is not None:
            shutil.rmtree(self.root.local, ignore_errors=True)
            return
        with suppress(OSError):
            for writer in self._splits.values():
                self._checksums.update(writer.checksums)
            for name in self._checksums:
                (self.root / name).delete()

    @property
    def scratch(self) -> Path:
        """Folder for temporary files, which is deleted when the block ends."""
        if self._scratch is None:
            self._scratch = Path(mkdtemp(prefix="esmm_torchrec-", dir=self.root.local))
        return self._scratch

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def schema(self) -> Schema:
        """The schema, available once all vocabularies are written and dense columns recorded."""
        if self._schema is None:
            dense = {column: self._dense[column] for column in self._dense_features}
            self._schema = schema_of(self._id_features, self._num_embeddings, dense, self._tasks)
        return self._schema

    def write_vocabulary(self, table: str, vocabulary: Vocabulary | HashedIds) -> None:
        """Records the number of rows of a table; writes its vocabulary unless ids are hashed."""
        self._num_embeddings[table] = vocabulary.num_embeddings
        hash_rows = vocabulary.rows if isinstance(vocabulary, HashedIds) else None
        self._tables[table] = TableStatistics(vocabulary.kind, vocabulary.distinct_ids, hash_rows)
        if isinstance(vocabulary, HashedIds):
            return
        for name, write in (
            (vocabulary_file(table), vocabulary.write),
            (rare_file(table), vocabulary.write_rare),
        ):
            with closing(HashedOutput(self.root / name)) as file:
                write(file)
            self._checksums[name] = file.checksum

    def write_impressions(
        self, split: SplitName, table: pa.Table, *, key: np.ndarray | None = None
    ) -> None:
        """Appends impressions with the columns of `impression_columns`, in order.

        Args:
            split: the split.
            table: the impressions.
            key: uint64 (n,), hash of each impression's user, if the data set is ordered by it;
                None: the impressions are already in order.

        Raises:
            DataError: a column or a value is not allowed.
        """
        writer = self.split_writer(split)
        table = writer.count_impressions(table)
        if self.key is None or key is None:
            writer.append("impressions", table)
        else:
            if split not in self._key_orders:
                self._key_orders[split] = KeyOrder(self.scratch / f"{split}-by-key", table.schema)
            self._key_orders[split].append(table, key)

    def write_shared(self, split: SplitName, table: pa.Table) -> None:
        """Appends shared rows with the columns of `shared_columns`, in order.

        Raises:
            DataError: a column or a value is not allowed.
        """
        assert self.key is None, "shared rows are written in the order that impressions use them"
        self.split_writer(split).write_shared(table)

    def split_writer(self, split: SplitName) -> SplitWriter:
        """Returns the writer of a split's files. All vocabularies must be written, and all dense
        columns recorded."""
        if split not in self._splits:
            self._splits[split] = SplitWriter(self.root, split, self.schema, self.columns)
        return self._splits[split]

    def record_dense(self, column: str, transform: DenseTransform) -> None:
        """Records the transform of a dense column, before any values are written."""
        self._dense[column] = transform

    def record_missing_dense(self, split: SplitName, column: str, count: int) -> None:
        """Records impressions, already written or not, that have no value of a dense column."""
        self.split_writer(split).counts.missing_dense[column] += count

    def record_dropped(
        self, split: SplitName, reason: str, count: int, examples: Sequence[str] = ()
    ) -> None:
        """Records raw rows that did not become impressions, with messages about some of them."""
        dropped = self._dropped[split]
        dropped[reason] = dropped.get(reason, 0) + count
        self._dropped_rows[split].extend(examples)

    def _finish(self) -> None:
        for split, order in self._key_orders.items():
            for table in order.sorted():
                self.split_writer(split).append("impressions", table)
        splits: dict[SplitName, Split] = {name: self._finish_split(name) for name in SPLITS}
        self._remove_scratch()
        description = Description(
            source=self.source,
            min_count=self._min_count,
            schema=self.schema,
            splits=splits,
            columns=frozenset(self.columns),
            statistics=self._statistics(splits),
            dropped=self._dropped,
            dropped_rows={name: tuple(self._dropped_rows[name]) for name in SPLITS},
            checksums=self._checksums,
            key=self.key,
        )
        (self.root / DESCRIPTION).write_bytes(description.encode())
        if self.root.local is not None and self._final.local is not None:
            publish(self.root.local, self._final.local)

    def _finish_split(self, name: SplitName) -> Split:
        writer = self.split_writer(name)
        self._checksums.update(writer.finish().checksums)
        parts, shared_parts = writer.parts("impressions"), writer.parts("shared")
        tasks = self._tasks.names
        split = Split(
            impressions=sum(part.rows for part in parts),
            happened={task: sum(part.happened[task] for part in parts) for task in tasks},
            shared_rows=sum(part.rows for part in shared_parts),
            impression_parts=parts,
            shared_parts=shared_parts,
        )
        if split.impressions == 0:
            raise DataError(f"the {name} split has no impressions; check its input files")
        highest = writer.counts.shared_row_use.highest
        if highest >= split.shared_rows:
            raise DataError(
                f"{name}: an impression points to shared row {highest}, but there are "
                f"{split.shared_rows}"
            )
        first = tasks[0]
        if name == "train" and not split.happened[first]:
            raise DataError(
                f"the train split has {split.impressions} impressions but no {first} to learn "
                f"from; check the {first} column or use more data"
            )
        return split

    def _statistics(self, splits: Mapping[SplitName, Split]) -> Statistics:
        missing: dict[str, dict[SplitName, float]] = {}
        unknown: dict[str, dict[SplitName, float]] = {}
        for name, split in splits.items():
            self._count_shared_ids(name, split)
            counts = self.split_writer(name).counts
            for feature, ids in counts.ids.items():
                missing.setdefault(feature, {})[name] = ids.missing / split.impressions
                unknown.setdefault(feature, {})[name] = ids.unknown_ids / max(1, ids.ids)
            for column in self._dense_features:
                share = counts.missing_dense[column] / split.impressions
                missing.setdefault(column, {})[name] = share
        train, counts = splits["train"], self.split_writer("train").counts
        means = {
            feature.name: counts.ids[feature.name].stored_ids
            / max(1, train.shared_rows if feature.shared else train.impressions)
            for feature in self._id_features
        }
        used = int(np.count_nonzero(counts.shared_row_use.impressions(train.shared_rows)))
        return Statistics(
            mean_values_per_bag=means,
            impressions_per_shared_row=train.impressions / used if used else None,
            dense=self._dense,
            tables=self._tables,
            missing=missing,
            unknown=unknown,
        )

    def _count_shared_ids(self, name: SplitName, split: Split) -> None:
        """Counts the ids of shared rows, reading them back: now the uses of each row are known."""
        counts, first = self.split_writer(name).counts, 0
        impressions = counts.shared_row_use.impressions(split.shared_rows)
        for part in split.shared_parts:
            with (self.root / part.file).open_input() as source, pq.ParquetFile(source) as parquet:
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group)
                    times = impressions[first : first + len(table)]
                    first += len(table)
                    for feature in self._id_features:
                        if feature.shared:
                            counts.ids[feature.name].add(array_of(table, feature.name), times)


def refuse_existing(root: Location) -> None:
    """Raises DataError if the place of a new data set is taken."""
    there = root.local.exists() if root.local else (root / DESCRIPTION).size() is not None
    if there:
        raise DataError(f"{root} already exists; remove it or choose another folder")
