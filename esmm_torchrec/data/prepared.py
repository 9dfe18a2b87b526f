"""The prepared data set: the one form between raw logs and batches. Write it, open it, check it.

A folder:

    dataset.json                         what is in it, how it was made, a checksum of each file
    vocabulary/<table>.parquet           raw_id, row, count
    train/ test/ impressions-*.parquet   labels, ids, weights; one row an impression
    train/ test/ shared-*.parquet        features that many impressions share, one row for all

An impression's `shared_row` is a row over all shared files of its split, in the order of their
names. Ids are table rows, 0 (unknown) to num_embeddings - 1. A missing value of a single-valued
feature is null, of a multi-valued one the empty list. Weights are as in the raw data.

A data set is written beside its final name and renamed last: whatever opens is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    GROUP_ID,
    SAMPLE_ID,
    SHARED_ROW,
    TIMESTAMP,
    TRUE_CTR,
    TRUE_CVR,
    IdFeature,
    Schema,
    Table,
    weight_column,
)

FORMAT_VERSION = 1

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")

OPTIONAL_COLUMNS: dict[str, pa.DataType] = {
    GROUP_ID: pa.int64(),
    TIMESTAMP: pa.int64(),
    TRUE_CTR: pa.float32(),
    TRUE_CVR: pa.float32(),
}
"""Columns that only some data sets have, in the order they are stored."""

ROWS_PER_GROUP = {"impressions": 1 << 17, "shared": 1 << 13}
"""Rows of a Parquet row group. A shared row holds hundreds of ids, an impression a few dozen."""

ROW_GROUPS_PER_FILE = 16

_DESCRIPTION = "dataset.json"
_PREPARE_AGAIN = "prepare the data set again"


@dataclass(frozen=True)
class Split:
    """What one split holds; files are relative to the data set."""

    impressions: int
    clicks: int
    conversions: int
    shared_rows: int
    """0 where no feature is shared."""
    impression_files: tuple[str, ...]
    shared_files: tuple[str, ...]


@dataclass(frozen=True)
class DenseStatistics:
    """What a dense feature was standardised with: (value - mean) / std, over the training split."""

    mean: float
    std: float


@dataclass(frozen=True)
class Statistics:
    """Of the training split alone."""

    mean_values_per_bag: Mapping[str, float]
    """By id feature: ids per stored row (a shared row counts once), missing ones included."""
    impressions_per_shared_row: float | None
    """Impressions divided by the shared rows they use; None where no feature is shared."""
    dense: Mapping[str, DenseStatistics]


def _feature_fields(features: Iterable[IdFeature]) -> Iterator[pa.Field]:
    for feature in features:
        for name, kind in (
            (feature.name, pa.int32()),
            *([(weight_column(feature.name), pa.float32())] if feature.weighted else []),
        ):
            if feature.multi_valued:
                yield pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), False)
            else:
                yield pa.field(name, kind, nullable=True)


def impression_columns(schema: Schema, columns: Iterable[str] = ()) -> pa.Schema:
    """Arrow schema of the impression files; `columns` are the optional ones present."""
    present = set(columns)
    fields = [
        pa.field(CLICK, pa.int8(), False),
        pa.field(CONVERSION, pa.int8(), False),
        pa.field(SAMPLE_ID, pa.int64(), False),
        *([pa.field(SHARED_ROW, pa.int32(), False)] if schema.has_shared_features else []),
        *(
            pa.field(name, kind, False)
            for name, kind in OPTIONAL_COLUMNS.items()
            if name in present
        ),
        *_feature_fields(feature for feature in schema.id_features if not feature.shared),
        *(pa.field(name, pa.float32(), False) for name in schema.dense_features),
    ]
    return pa.schema(fields)


def shared_columns(schema: Schema) -> pa.Schema:
    """Arrow schema of the shared files."""
    return pa.schema(_feature_fields(feature for feature in schema.id_features if feature.shared))


def _same_columns(found: pa.Schema, expected: pa.Schema) -> str | None:
    """What is wrong with the names and types of `found`, or None. Parquet and its writers differ
    in how they name list items and mark nulls, so neither is compared."""
    if found.names != expected.names:
        missing = [name for name in expected.names if name not in found.names]
        if missing:
            return f"lacks the column {missing[0]!r}"
        foreign = [name for name in found.names if name not in expected.names]
        return (
            f"has the foreign column {foreign[0]!r}" if foreign else "has its columns in disorder"
        )
    for name in expected.names:
        is_kind, to_be = found.field(name).type, expected.field(name).type
        if pa.types.is_list(to_be):
            same = pa.types.is_list(is_kind) and is_kind.value_type == to_be.value_type
        else:
            same = is_kind == to_be
        if not same:
            return f"has {is_kind} in column {name!r} where {to_be} belongs"
    return None


def _first(mask: np.ndarray) -> int | None:
    place = int(mask.argmax()) if len(mask) else 0
    return place if len(mask) and mask[place] else None


def _check_values(table: pa.Table, schema: Schema, expected: pa.Schema, *, where: str) -> None:
    """Raises DataError for the first value that a prepared data set must not hold. Names and
    types are right already; `where` begins the sentence. Rows are counted from 0."""

    def fail(column: str, row: int, what: str) -> DataError:
        return DataError(f"{where}, column {column!r}, row {row}: {what}")

    for name in expected.names:
        column = table.column(name)
        if not expected.field(name).nullable and column.null_count:
            raise fail(name, _first(column.is_null().to_numpy()) or 0, "a value is missing")
        if pa.types.is_float32(column.type):
            bad = _first(~np.isfinite(column.fill_null(0).to_numpy()))
            if bad is not None:
                raise fail(name, bad, f"{column[bad].as_py()} is not a finite number")

    if CLICK in expected.names:
        click, conversion = table.column(CLICK).to_numpy(), table.column(CONVERSION).to_numpy()
        for name, labels in ((CLICK, click), (CONVERSION, conversion)):
            bad = _first((labels != 0) & (labels != 1))
            if bad is not None:
                raise fail(name, bad, f"the label {labels[bad]} is neither 0 nor 1")
        bad = _first(conversion > click)
        if bad is not None:
            raise fail(CONVERSION, bad, "a conversion without a click")
        for name in (TRUE_CTR, TRUE_CVR):
            if name in expected.names:
                truth = table.column(name).to_numpy()
                bad = _first((truth < 0) | (truth > 1))
                if bad is not None:
                    raise fail(name, bad, f"{truth[bad]} is not a probability")

    for feature in schema.id_features:
        if feature.name not in expected.names:
            continue
        num_embeddings = schema.table(feature.table).num_embeddings
        for chunk, weights, first_row in _chunks_beside(table, feature):
            values = chunk.flatten() if feature.multi_valued else chunk
            ids = values.fill_null(0) if values.null_count else values
            if values.null_count and feature.multi_valued:
                raise fail(feature.name, first_row, "a list holds a null")
            rows = ids.to_numpy()
            bad = _first((rows < 0) | (rows >= num_embeddings))
            if bad is not None:
                row = _list_of(chunk, bad) if feature.multi_valued else bad
                raise fail(
                    feature.name,
                    first_row + row,
                    f"id {rows[bad]} is outside table {feature.table!r} of {num_embeddings} rows",
                )
            if weights is None:
                continue
            column = weight_column(feature.name)
            if not feature.multi_valued:
                if not weights.is_null().equals(chunk.is_null()):
                    raise fail(column, first_row, "an id without a weight, or the reverse")
                continue
            if not np.array_equal(np.diff(weights.offsets), np.diff(chunk.offsets)):
                raise fail(column, first_row, f"not as many weights as ids in {feature.name!r}")
            flat = weights.flatten()
            if flat.null_count or not np.isfinite(flat.to_numpy()).all():
                raise fail(column, first_row, "a weight is not a finite number")


def _chunks_beside(
    table: pa.Table, feature: IdFeature
) -> Iterator[tuple[pa.Array, pa.Array | None, int]]:
    """Pieces of an id column, the weights beside each, and the piece's first row."""
    first_row = 0
    for chunk in table.column(feature.name).chunks:
        weights = None
        if feature.weighted:
            column = table.column(weight_column(feature.name))
            weights = column.slice(first_row, len(chunk)).combine_chunks()
        yield chunk, weights, first_row
        first_row += len(chunk)


def _list_of(lists: pa.ListArray, place: int) -> int:
    """Which list the flattened value at `place` is in."""
    offsets = lists.offsets.to_numpy()
    return int(np.searchsorted(offsets - offsets[0], place, side="right")) - 1


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class PreparedDataSet:
    """A prepared data set that has been opened: its description is valid, its files are there."""

    path: Path
    schema: Schema
    splits: Mapping[SplitName, Split]
    columns: frozenset[str]
    """Which of OPTIONAL_COLUMNS the impressions have."""
    statistics: Statistics
    source: Mapping[str, Any]
    """How it was made: the kind, the options, the names of the input files."""
    dropped: Mapping[SplitName, Mapping[str, int]]
    """Raw rows that did not become impressions, by reason."""
    dropped_rows: Mapping[SplitName, Sequence[str]]
    """A sentence on each of the first few of them that were broken."""
    min_count: int
    checksums: Mapping[str, str]
    """sha256 of each file, by its path in the data set."""
    fingerprint: str
    """sha256 of dataset.json; as that holds every checksum, it stands for the whole data set."""

    @classmethod
    def open(cls, path: Path | str, *, data_files: bool = True) -> PreparedDataSet:
        """Opens a data set after cheap checks: the description, and the presence, columns and
        number of rows of every file. `verify` reads the values.

        Args:
            path: the folder.
            data_files: False where the files of the splits need not be there, as in a copy of the
                description and the vocabularies alone (`data.encoding.copy_preprocessing`).

        Raises:
            DataError: `path` is no prepared data set, is of another format version, or a file is
                missing or is not what the description says.
        """
        path = Path(path)
        try:
            content = (path / _DESCRIPTION).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            hint = "make one with 'esmm-torchrec prepare'"
            if _partial(path).exists():
                hint = f"its preparation was interrupted: {_PREPARE_AGAIN}"
            raise DataError(
                f"{path} is no prepared data set, it has no {_DESCRIPTION}; {hint}"
            ) from None
        data_set = cls._from_json(path, content)
        data_set._check_vocabularies()
        if data_files:
            data_set._check_data_files()
        return data_set

    @classmethod
    def _from_json(cls, path: Path, content: bytes) -> PreparedDataSet:
        broken = f"{path / _DESCRIPTION} is broken"
        try:
            values = json.loads(content)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{broken}; {_PREPARE_AGAIN}") from None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} is a prepared data set of format version {version} and this is version "
                f"{FORMAT_VERSION} of the reader; {_PREPARE_AGAIN}"
            )
        try:
            statistics = values["statistics"]
            data_set = cls(
                path=path,
                schema=Schema.from_dict(values["schema"]),
                splits={name: _split_from_dict(values["splits"][name]) for name in SPLITS},
                columns=frozenset(name for name in OPTIONAL_COLUMNS if values["columns"][name]),
                statistics=Statistics(
                    mean_values_per_bag=dict(statistics["mean_values_per_bag"]),
                    impressions_per_shared_row=statistics["impressions_per_shared_row"],
                    dense={
                        name: DenseStatistics(**both) for name, both in statistics["dense"].items()
                    },
                ),
                source=dict(values["source"]),
                dropped={name: dict(values["dropped"][name]) for name in SPLITS},
                dropped_rows={name: tuple(values["dropped_rows"][name]) for name in SPLITS},
                min_count=int(values["min_count"]),
                checksums=dict(values["checksums"]),
                fingerprint=hashlib.sha256(content).hexdigest(),
            )
        except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
            raise DataError(f"{broken} ({error}); {_PREPARE_AGAIN}") from None
        return data_set

    def impression_files(self, split: SplitName) -> list[Path]:
        """Files of the impressions of a split, in the order of the source."""
        return [self.path / name for name in self.splits[split].impression_files]

    def shared_files(self, split: SplitName) -> list[Path]:
        """Files of the shared rows of a split; `shared_row` counts through them in this order."""
        return [self.path / name for name in self.splits[split].shared_files]

    def vocabulary(self, table: str) -> Vocabulary:
        """The vocabulary of a table; features that share a table share it.

        Raises:
            DataError: the file cannot be read.
        """
        return Vocabulary.read(self.path / _vocabulary_file(table))

    @property
    def impression_columns(self) -> pa.Schema:
        """Names and types of the columns of the impression files."""
        return impression_columns(self.schema, self.columns)

    @property
    def shared_columns(self) -> pa.Schema:
        """Names and types of the columns of the shared files."""
        return shared_columns(self.schema)

    def _check_vocabularies(self) -> None:
        for table in self.schema.tables:
            file = self.path / _vocabulary_file(table.name)
            rows = _parquet_rows(file, None)
            if rows != table.num_embeddings - 1:
                raise DataError(
                    f"{file} has {rows} ids where {_DESCRIPTION} says {table.num_embeddings - 1}; "
                    f"{_PREPARE_AGAIN}"
                )

    def _check_data_files(self) -> None:
        for name in SPLITS:
            split = self.splits[name]
            for kind, files, expected_rows, columns in (
                (
                    "impression",
                    self.impression_files(name),
                    split.impressions,
                    self.impression_columns,
                ),
                ("shared", self.shared_files(name), split.shared_rows, self.shared_columns),
            ):
                rows = sum(_parquet_rows(file, columns) for file in files)
                if rows != expected_rows:
                    raise DataError(
                        f"{self.path / name} has {rows} rows in its {kind} files where "
                        f"{_DESCRIPTION} says {expected_rows}; {_PREPARE_AGAIN}"
                    )

    def verify(self, *, progress: bool = False) -> None:
        """Reads every file: checksums, every id in its table's range, labels 0 or 1, no conversion
        without a click, `shared_row` in range, every weight and dense value finite.

        Args:
            progress: show a bar.

        Raises:
            DataError: names the file, the column and the row of the first thing that is wrong.
        """
        sizes = {name: (self.path / name).stat().st_size for name in self._checked_files()}
        with progress_bar("verify", sum(sizes.values()), "B", disable=not progress) as bar:
            for name, size in sizes.items():
                if sha256_of(self.path / name) != self.checksums[name]:
                    raise DataError(
                        f"{self.path / name} was changed after it was written (its checksum "
                        f"differs); {_PREPARE_AGAIN}"
                    )
                kind, expected = Path(name).name.partition("-")[0], None
                if kind == "impressions":
                    expected = self.impression_columns
                elif kind == "shared":
                    expected = self.shared_columns
                if expected is not None:
                    self._verify_values(name, expected)
                bar.update(size)
        for table in self.schema.tables:
            self.vocabulary(table.name)

    def _checked_files(self) -> list[str]:
        names = [_vocabulary_file(table.name) for table in self.schema.tables]
        for split in self.splits.values():
            names += [*split.impression_files, *split.shared_files]
        for name in names:
            if name not in self.checksums:
                raise DataError(f"{self.path / _DESCRIPTION} has no checksum of {name}")
        return names

    def _verify_values(self, name: str, expected: pa.Schema) -> None:
        shared_rows = sum(
            split.shared_rows for split in self.splits.values() if name in split.impression_files
        )
        with pq.ParquetFile(self.path / name) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                where = f"{self.path / name}, row group {group}"
                _check_values(table, self.schema, expected, where=where)
                if SHARED_ROW not in expected.names:
                    continue
                rows = table.column(SHARED_ROW).to_numpy()
                bad = _first((rows < 0) | (rows >= shared_rows))
                if bad is not None:
                    raise DataError(
                        f"{where}, column {SHARED_ROW!r}, row {bad}: {rows[bad]} is outside the "
                        f"{shared_rows} shared rows of the split"
                    )


def _split_from_dict(values: Mapping[str, Any]) -> Split:
    return Split(
        impressions=int(values["impressions"]),
        clicks=int(values["clicks"]),
        conversions=int(values["conversions"]),
        shared_rows=int(values["shared_rows"]),
        impression_files=tuple(map(str, values["impression_files"])),
        shared_files=tuple(map(str, values["shared_files"])),
    )


def _parquet_rows(file: Path, columns: pa.Schema | None) -> int:
    try:
        with pq.ParquetFile(file) as parquet:
            wrong = None if columns is None else _same_columns(parquet.schema_arrow, columns)
            rows = parquet.metadata.num_rows
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {_PREPARE_AGAIN}") from None
    except pa.ArrowException:
        raise DataError(f"{file} is broken or cut short; {_PREPARE_AGAIN}") from None
    if wrong:
        raise DataError(f"{file} {wrong}; {_PREPARE_AGAIN}")
    return rows


def _vocabulary_file(table: str) -> str:
    # Tables may be called after the columns of a stranger's file.
    return f"vocabulary/{quote(table, safe=' ')}.parquet"


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


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
    ) -> None:
        self.path = Path(path)
        self._root = _partial(self.path)
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
        file = _vocabulary_file(table)
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
        wrong = _same_columns(table.schema, expected)
        if wrong:
            raise DataError(f"{where} {wrong}")
        _check_values(table, self.schema, expected, where=where)
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
        (self._root / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")
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
                if count == 0:
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
