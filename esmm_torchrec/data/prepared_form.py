"""The format of a prepared data set on disk: its files, their columns, and the values allowed.

`prepared` opens and checks a data set in this format, `prepared_writer` writes one.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.vocabulary import IdKind
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    CONVERSION_TIME,
    GROUP_ID,
    NEVER,
    SAMPLE_ID,
    SHARED_ROW,
    TIMESTAMP,
    TRUE_CTR,
    TRUE_CVR,
    WEIGHT,
    IdFeature,
    Schema,
    Table,
    missing_column,
    weight_column,
)
from esmm_torchrec.tasks import TaskChain

pc: Any = pyarrow.compute

FORMAT_VERSION = 3
"""Version 2 counts ids per impression, and clips dense columns or takes their logarithm. Version 3
counts each task of the chain per split, lists the content of each file, and may order impressions
by a hash of the user. Version 2 is still read."""

READABLE_VERSIONS = (2, FORMAT_VERSION)

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")

RowKind = Literal["impressions", "shared"]

Count = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

OPTIONAL_COLUMNS: dict[str, pa.DataType] = {
    GROUP_ID: pa.int64(),
    TIMESTAMP: pa.int64(),
    CONVERSION_TIME: pa.int64(),
    TRUE_CTR: pa.float32(),
    TRUE_CVR: pa.float32(),
    WEIGHT: pa.float32(),
}
"""Optional columns, in the order in which they are stored."""

DESCRIPTION = "dataset.json"
DAYS = "days"
MAX_FILE_NAME = 150
"""Maximum number of characters of a table's name in a file name; longer ones end in a hash."""
MAX_BAG_LENGTH = (1 << 16) - 1
"""Maximum number of ids of a multi-valued feature in one impression."""
PREPARE_AGAIN = "prepare the data set again"


@dataclass(frozen=True)
class Part:
    """One file of a split and a summary of its content."""

    file: str
    """Path relative to the data set."""
    row_groups: tuple[Count, ...]
    """Number of rows in each Parquet row group."""
    bytes: Count
    happened: Mapping[str, Count] = field(default_factory=dict)
    """Task name → number of impressions with this task and all earlier ones."""

    @property
    def rows(self) -> int:
        """Number of rows in the file."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class Split:
    """Files and counts of one split."""

    impressions: Count
    happened: Mapping[str, Count]
    """Task name → number of impressions with this task and all earlier ones."""
    shared_rows: Count
    """Number of shared rows; 0 if no feature is shared."""
    impression_parts: tuple[Part, ...]
    """Files of impressions, in row order."""
    shared_parts: tuple[Part, ...]
    """Files of shared rows, in row order; `shared_row` is a position across all of them."""


@dataclass(frozen=True)
class TableStatistics:
    """Statistics of the raw ids of an embedding table in the training rows."""

    kind: IdKind
    distinct_ids: Count
    """Number of distinct raw ids, rare ones included; 0 if ids are hashed."""
    hash_rows: int | None = None
    """Number of rows that ids are hashed to (`hashing.HashedIds`); None: there is a vocabulary."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of the values. Encoders are fitted on the training split only; shares are given
    for each split."""

    mean_values_per_bag: Mapping[str, float]
    """Id feature → mean number of ids per stored training row, counting a shared row once and rows
    without ids."""
    impressions_per_shared_row: float | None
    """Number of training impressions per shared row used; None if no feature is shared."""
    dense: Mapping[str, DenseTransform]
    """Raw dense column → its transform."""
    tables: Mapping[str, TableStatistics]
    missing: Mapping[str, Mapping[SplitName, Share]]
    """Id feature or dense column → share of the split's impressions without a value."""
    unknown: Mapping[str, Mapping[SplitName, Share]]
    """Id feature → share of the ids in the split's impressions that map to row 0."""


@dataclass(frozen=True)
class Description:
    """Content of dataset.json, without the format version."""

    source: Mapping[str, Any]
    """Origin of the data set: the kind of source, its options, and the names of the input files."""
    min_count: Count
    schema: Schema
    splits: Mapping[SplitName, Split]
    columns: frozenset[str]
    """Members of OPTIONAL_COLUMNS that the impressions have."""
    statistics: Statistics
    dropped: Mapping[SplitName, Mapping[str, Count]]
    """Number of raw rows that did not become impressions, by reason."""
    dropped_rows: Mapping[SplitName, tuple[str, ...]]
    """Messages about the first few bad rows among them."""
    checksums: Mapping[str, str]
    """SHA-256 of each file, by path in the data set."""
    days: tuple[str, ...] = ()
    """Names of the days that `prepare append` added, in order. Each is a folder below DAYS with a
    data set of its own; the vocabularies are those of the last day."""
    key: str | None = None
    """Raw column by whose 64-bit hash the impressions are ordered; None: they keep the source's
    order."""

    def __post_init__(self) -> None:
        for of_split in (self.splits, self.dropped, self.dropped_rows):
            if set(of_split) != set(SPLITS):
                raise ValueError(f"the splits are {' and '.join(SPLITS)}")
        tables = {table.name for table in self.schema.tables}
        if set(self.statistics.tables) != tables:
            raise ValueError("its statistics are of other tables than its schema")
        if sorted(dense_features(self.statistics.dense)) != sorted(self.schema.dense_features):
            raise ValueError("its statistics are of other dense features than its schema")
        if any(
            set(split.happened) != set(self.schema.tasks.names) for split in self.splits.values()
        ):
            raise ValueError("its splits count other tasks than its schema has")
        for name, split in self.splits.items():
            for kind, parts, expected in (
                ("impression", split.impression_parts, split.impressions),
                ("shared", split.shared_parts, split.shared_rows),
            ):
                rows = sum(part.rows for part in parts)
                if parts and rows != expected:
                    raise ValueError(
                        f"{name} has {rows} rows in its {kind} files and {expected} in all"
                    )

    @classmethod
    def decode(cls, content: bytes, part_of: Callable[[str], Part | None]) -> Description:
        """Decodes the output of `encode`, of this format version or an earlier one.

        Args:
            content: content of dataset.json.
            part_of: returns the summary of a file, for a version without it; None: not known.

        Raises:
            DataError, ValueError, KeyError, TypeError, AttributeError: the content is not in a
                readable format; the message names the place.
        """
        values = msgspec.json.decode(content, type=dict[str, Any])
        if "crc32" in values and values.pop("crc32") != _crc32(values):
            raise ValueError("its content does not match its checksum")
        if values["format_version"] == 2:
            _upgrade(values, part_of)
        return msgspec.convert(values, cls)

    @property
    def vocabulary_tables(self) -> list[str]:
        """Tables whose ids are not hashed."""
        tables = self.statistics.tables
        return [of.name for of in self.schema.tables if tables[of.name].hash_rows is None]

    def vocabulary_file(self, table: str) -> str:
        """Returns the path of a table's vocabulary, relative to the data set."""
        return self._of_last_day(vocabulary_file(table))

    def rare_file(self, table: str) -> str:
        """Returns the path of a table's ids without a row, relative to the data set."""
        return self._of_last_day(rare_file(table))

    def _of_last_day(self, file: str) -> str:
        return f"{DAYS}/{self.days[-1]}/{file}" if self.days else file

    def encode(self) -> bytes:
        """Encodes the description as indented JSON; equal values give equal bytes."""
        values = {"format_version": FORMAT_VERSION, **msgspec.to_builtins(self)}
        values["columns"] = [name for name in OPTIONAL_COLUMNS if name in self.columns]
        values["checksums"] = dict(sorted(self.checksums.items()))
        values["crc32"] = _crc32(values)
        return msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n"


def _crc32(values: dict[str, Any]) -> int:
    return zlib.crc32(msgspec.json.encode(values))


def _upgrade(values: dict[str, Any], part_of: Callable[[str], Part | None]) -> None:
    """Converts the content of a dataset.json from version 2 to version 3, in place."""
    for split in values["splits"].values():
        for kind in ("impression", "shared"):
            parts = map(part_of, split.pop(f"{kind}_files"))
            split[f"{kind}_parts"] = [msgspec.to_builtins(part) for part in parts if part]
        split["happened"] = {
            CLICK: split.pop("clicks"),
            CONVERSION: split.pop("conversions"),
        }


def dense_features(dense: Mapping[str, DenseTransform]) -> tuple[str, ...]:
    """Returns the names of the dense features made from raw dense columns."""
    return tuple(
        name
        for column, transform in dense.items()
        for name in (column, *([missing_column(column)] if transform.has_indicator else []))
    )


def schema_of(
    id_features: Sequence[IdFeature],
    num_embeddings: Mapping[str, int],
    dense: Mapping[str, DenseTransform],
    tasks: TaskChain,
) -> Schema:
    """Returns the schema of a data set.

    Args:
        id_features: id features in order; tables follow the order of their first feature.
        num_embeddings: number of rows of each table.
        dense: transform of each raw dense column, in order.
        tasks: the chain.
    """
    tables = dict.fromkeys(feature.table for feature in id_features)
    return Schema(
        tables=tuple(Table(name, num_embeddings[name]) for name in tables),
        id_features=tuple(id_features),
        dense_features=dense_features(dense),
        tasks=tasks,
    )


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
    """Returns the Arrow schema of the impression files; `columns` are the optional ones present."""
    present = set(columns)
    fields = [
        *(pa.field(label, pa.int8(), False) for label in schema.tasks.labels),
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
    """Returns the Arrow schema of the shared files."""
    return pa.schema(_feature_fields(feature for feature in schema.id_features if feature.shared))


def same_columns(found: pa.Schema, expected: pa.Schema) -> str | None:
    """Returns how the names or types of `found` differ from `expected`, or None. Names of list
    items and nullability depend on the Parquet writer, so they are not compared."""
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


def array_of(table: pa.Table, name: str) -> Any:
    """Returns a column as one array, without a copy if it has a single chunk."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def check_values(table: pa.Table, schema: Schema, expected: pa.Schema, *, where: str) -> None:
    """Raises DataError for the first value that is not allowed in a prepared data set. Names and
    types must have been checked. The message starts with `where`; rows are counted from 0."""
    for name in expected.names:
        column = table.column(name)
        if not expected.field(name).nullable and column.null_count:
            refuse(column.is_null().to_numpy(), "a value is missing", where=where, column=name)
        if pa.types.is_float32(column.type):
            values = column.fill_null(0).to_numpy()
            what = "{} is not a finite number"
            refuse(~np.isfinite(values), what, values, where=where, column=name)
    if SAMPLE_ID in expected.names:
        _check_numbers(table, schema.tasks, where)
    for feature in schema.id_features:
        if feature.name in expected.names:
            _check_ids(table, feature, schema.table(feature.table), where)


def refuse(
    bad: np.ndarray,
    what: str,
    values: np.ndarray | None = None,
    *,
    where: str,
    column: str,
    lists: pa.ListArray | None = None,
) -> None:
    """Raises DataError for the first bad row, if any.

    Args:
        bad: bool (n,).
        what: description of the error; "{}" in it is replaced by the value.
        values: (n,).
        where: start of the message.
        column: column named in the message.
        lists: rows of the column, if `bad` is about the n values in its lists.
    """
    if not bad.any():
        return
    row = place = int(bad.argmax())
    if lists is not None:
        offsets = lists.offsets.to_numpy()
        row = int(np.searchsorted(offsets - offsets[0], place, side="right")) - 1
    if values is not None:
        what = what.replace("{}", str(values[place]), 1)
    raise DataError(f"{where}, column {column!r}, row {row}: {what}")


def _check_numbers(table: pa.Table, tasks: TaskChain, where: str) -> None:
    names = (*tasks.labels, CONVERSION_TIME, TRUE_CTR, TRUE_CVR, WEIGHT)
    columns = {n: table.column(n).to_numpy() for n in names if n in table.column_names}

    def check(name: str, bad: np.ndarray, what: str) -> None:
        refuse(bad, what, columns[name], where=where, column=name)

    for label in tasks.labels:
        values = columns[label]
        check(label, (values != 0) & (values != 1), "the label {} is neither 0 nor 1")
    for task, before in tasks.links:
        bad = columns[task.label] > columns[before.label]
        check(task.label, bad, f"{task.name} without {before.name}")
    if CONVERSION_TIME in columns:
        bad = (columns[tasks[-1].label] == 1) != (columns[CONVERSION_TIME] != NEVER)
        check(CONVERSION_TIME, bad, "a time without a conversion, or the reverse")
    for name in (TRUE_CTR, TRUE_CVR):
        if name in columns:
            check(name, (columns[name] < 0) | (columns[name] > 1), "{} is not a probability")
    if WEIGHT in columns:
        check(WEIGHT, columns[WEIGHT] < 0, "the weight {} is negative")


def _check_ids(table: pa.Table, feature: IdFeature, of: Table, where: str) -> None:
    stored = array_of(table, feature.name)
    lists = stored if feature.multi_valued else None
    ids = stored if lists is None else lists.flatten()
    if lists is not None:
        nulls = ids.is_null().to_numpy(zero_copy_only=False)
        refuse(nulls, "a list holds a null", where=where, column=feature.name, lists=lists)
    rows = ids.fill_null(0).to_numpy()
    outside = (rows < 0) | (rows >= of.num_embeddings)
    what = f"id {{}} is outside table {of.name!r} of {of.num_embeddings} rows"
    refuse(outside, what, rows, where=where, column=feature.name, lists=lists)
    if not feature.weighted:
        return
    column = weight_column(feature.name)
    weights = array_of(table, column)
    if lists is None:
        unpaired = pc.xor(weights.is_null(), stored.is_null()).to_numpy(zero_copy_only=False)
        refuse(unpaired, "an id without a weight, or the reverse", where=where, column=column)
        return
    differ = np.diff(weights.offsets) != np.diff(lists.offsets)
    refuse(differ, f"not as many weights as ids in {feature.name!r}", where=where, column=column)
    bad = ~np.isfinite(weights.flatten().fill_null(np.nan).to_numpy())
    refuse(bad, "a weight is not a finite number", where=where, column=column, lists=weights)


def vocabulary_file(table: str) -> str:
    """Returns the path of a table's vocabulary, relative to a data set without days."""
    return f"vocabulary/{_file_name(table)}.parquet"


def rare_file(table: str) -> str:
    """Returns the path of a table's ids without a row, relative to a data set without days."""
    return f"rare/{_file_name(table)}.parquet"


def _file_name(table: str) -> str:
    # Tables may be named after a user's columns, whose names may be long and in any script.
    name = quote(table, safe=" ")
    if len(name) > MAX_FILE_NAME:
        name = f"{name[:MAX_FILE_NAME]}-{hashlib.sha256(table.encode()).hexdigest()[:16]}"
    return name


def partial_folder(path: Path) -> Path:
    """Returns the folder that a data set is written to until it is complete."""
    return path.with_name(f"{path.name}.partial")
