"""Writes a prepared data set: checked as it is written, whole or not there at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.prepared_form import (
    DESCRIPTION,
    FORMAT_VERSION,
    OPTIONAL_COLUMNS,
    SPLITS,
    DenseStatistics,
    Split,
    SplitName,
    Statistics,
    check_values,
    impression_columns,
    partial_folder,
    same_columns,
    sha256_of,
    shared_columns,
    vocabulary_file,
)
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    SHARED_ROW,
    IdFeature,
    Schema,
    Table,
    weight_column,
)

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
    impressions: int = 0
    clicks: int = 0
    conversions: int = 0
    highest_shared_row: int = -1
    shared_row_is_used: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bool_))
    ids: dict[str, int] = field(default_factory=dict)


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
        dense_features: in the order they are stored and carried in a batch.
        columns: which of OPTIONAL_COLUMNS the impressions have.
        source: how the data set is made, for dataset.json. No paths of this machine, no times.
        min_count: the least count of an id in the vocabularies.
        has_conversions: False if clicks alone are known, so that conversion is 0 everywhere.

    Raises:
        DataError: `path` exists already; a table written is not as declared; in the end a split
            is empty, or training has no click or no conversion. The sentence names the split.
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
        has_conversions: bool = True,
    ) -> None:
        self.path = Path(path)
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
        self._counts = {name: _Counts() for name in SPLITS}
        self._dense: dict[str, DenseStatistics] = {}
        self._dropped: dict[SplitName, dict[str, int]] = {name: {} for name in SPLITS}
        self._dropped_rows: dict[SplitName, list[str]] = {name: [] for name in SPLITS}
        self._checksums: dict[str, str] = {}

    def __enter__(self) -> PreparedWriter:
        if self.path.exists():
            raise DataError(f"{self.path} exists already; remove it or choose another folder")
        if self._root.exists():
            shutil.rmtree(self._root)
        (self._root / "vocabulary").mkdir(parents=True)
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
        """The schema; there once the vocabulary of every table is written."""
        if self._schema is None:
            names = dict.fromkeys(feature.table for feature in self._id_features)
            self._schema = Schema(
                tables=tuple(Table(name, self._num_embeddings[name]) for name in names),
                id_features=self._id_features,
                dense_features=self._dense_features,
            )
        return self._schema

    def write_vocabulary(self, table: str, vocabulary: Vocabulary) -> None:
        """Writes the vocabulary of a table, which fixes its number of rows."""
        file = vocabulary_file(table)
        vocabulary.write(self._root / file)
        self._checksums[file] = sha256_of(self._root / file)
        self._num_embeddings[table] = vocabulary.num_embeddings

    def write_impressions(self, split: SplitName, table: pa.Table) -> None:
        """Appends impressions: the columns `impression_columns` of the schema gives, in order.

        Raises:
            DataError: a column or a value that does not belong there.
        """
        expected = impression_columns(self.schema, self.columns)
        table = self._write(split, "impressions", table, expected)
        counts = self._counts[split]
        counts.impressions += len(table)
        counts.clicks += int(table.column(CLICK).to_numpy().sum(dtype=np.int64))
        counts.conversions += int(table.column(CONVERSION).to_numpy().sum(dtype=np.int64))
        if len(table) and SHARED_ROW in expected.names:
            rows = table.column(SHARED_ROW).to_numpy()
            if rows.min() < 0:
                raise DataError(f"{split}: a shared row is below 0")
            counts.highest_shared_row = max(counts.highest_shared_row, int(rows.max()))
            used = counts.shared_row_is_used
            if len(used) <= counts.highest_shared_row:
                size = max(2 * len(used), counts.highest_shared_row + 1)
                used = np.concatenate([used, np.zeros(size - len(used), np.bool_)])
                counts.shared_row_is_used = used
            used[rows] = True

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
                counts[feature.name] = counts.get(feature.name, 0) + ids
        return table

    def record_dense(self, feature: str, *, mean: float, std: float) -> None:
        """Notes what a dense feature was standardised with."""
        self._dense[feature] = DenseStatistics(mean=float(mean), std=float(std))

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
        description = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "min_count": self._min_count,
            "schema": self.schema.to_dict(),
            "splits": {name: asdict(self._split(name)) for name in SPLITS},
            "columns": {name: name in self.columns for name in OPTIONAL_COLUMNS},
            "statistics": asdict(self._statistics()),
            "dropped": self._dropped,
            "dropped_rows": self._dropped_rows,
            "checksums": dict(sorted(self._checksums.items())),
        }
        text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False)
        (self._root / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        self._root.rename(self.path)

    def _names(self, split: SplitName, kind: Literal["impressions", "shared"]) -> tuple[str, ...]:
        files = self._files.get((split, kind))
        return tuple(files.names) if files else ()

    def _split(self, name: SplitName) -> Split:
        counts, shared = self._counts[name], self._files.get((name, "shared"))
        return Split(
            impressions=counts.impressions,
            clicks=counts.clicks,
            conversions=counts.conversions,
            shared_rows=shared.rows if shared else 0,
            impression_files=self._names(name, "impressions"),
            shared_files=self._names(name, "shared"),
        )

    def _check_split(self, name: SplitName) -> None:
        split, highest = self._split(name), self._counts[name].highest_shared_row
        if split.impressions == 0:
            raise DataError(f"the {name} split holds no impression; check its input files")
        if highest >= split.shared_rows:
            raise DataError(
                f"{name}: an impression points to shared row {highest} and there are "
                f"{split.shared_rows}"
            )
        if name == "train":
            for what, count in (("click", split.clicks), ("conversion", split.conversions)):
                if count == 0 and (what == "click" or self._has_conversions):
                    raise DataError(
                        f"the train split holds {split.impressions} impressions and no {what}, "
                        f"nothing to learn from; check the {what} column or take more data"
                    )

    def _statistics(self) -> Statistics:
        train, counts = self._split("train"), self._counts["train"]
        means = {
            feature.name: counts.ids.get(feature.name, 0)
            / max(1, train.shared_rows if feature.shared else train.impressions)
            for feature in self._id_features
        }
        used = int(counts.shared_row_is_used.sum())
        ratio = train.impressions / used if used else None
        assert all(math.isfinite(mean) for mean in means.values())
        return Statistics(means, ratio, dict(self._dense))
