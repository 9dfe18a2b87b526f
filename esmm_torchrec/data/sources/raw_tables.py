"""Tables of impressions in common forms: delimited text, Parquet, Arrow, DataFrames.

Each form yields blocks of Arrow columns with the number of every row, so that later steps need not
know where rows come from. Delimited text has no types: its columns are all strings here.
`raw_values` reads the numbers in them, because only there is it known which columns are numeric.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import glob
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.delimited_text import COMPRESSIONS, DelimitedText, TextFormat
from esmm_torchrec.data.storage import Location, is_uri
from esmm_torchrec.errors import DataError, OptionError

Frame = Path | str | pd.DataFrame | pa.Table
"""Path of a file, folder or pattern, such a URI of Parquet files, or rows in memory."""

ROWS_PER_BLOCK = 1 << 16

_TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_ARROW_SUFFIXES = (".arrow", ".feather")
_COMPRESSED = tuple(text + suffix for text in _TEXT_SUFFIXES for suffix in COMPRESSIONS)
_SUFFIXES = (*_TEXT_SUFFIXES, *_COMPRESSED, *_PARQUET_SUFFIXES, *_ARROW_SUFFIXES)


class RawRows(NamedTuple):
    """A block of rows."""

    table: pa.Table
    numbers: np.ndarray
    """int64, number of each row, as `RawTable.place` takes it."""


class RawTable(ABC):
    """A file or frame of rows.

    `name` identifies the table in messages; `file_name` may be stored: it has no path of this
    machine.
    """

    name: str
    file_name: str
    absolute: str | None = None
    """Name of the file, however it was given; None for rows in memory."""
    column_names: Sequence[str]
    is_text = False
    """Whether all columns are strings because the file has no types."""
    form = ""
    """Human-readable format of a text file; empty for other tables."""

    @abstractmethod
    def type_of(self, column: str) -> pa.DataType:
        """Returns the Arrow type of a column."""

    @abstractmethod
    def blocks(self, columns: Sequence[str], bad_rows: BadRows | None = None) -> Iterator[RawRows]:
        """Yields the rows in order, with only `columns`, in blocks of bounded size.

        Args:
            columns: columns to read, in this order.
            bad_rows: counts the records of a text file whose number of fields differs from the
                header's; they are left out. None allows no such record.

        Raises:
            DataError: the file cannot be read, or the limit of bad rows is exceeded.
        """

    def place(self, number: int) -> str:
        """Returns the human-readable location of a row; numbers count from 0."""
        return f"{self.name}, row {number}"

    def pieces(self) -> list[tuple[RawTable, int]]:
        """Returns parts that processes can read independently, in order, with their row counts.

        Messages locate a row in the whole table.

        Raises:
            OptionError: tables of this kind cannot be divided.
        """
        raise OptionError(
            f"{self.name} cannot be divided among the tasks of Spark, which read Parquet files; "
            "convert it, or prepare it without Spark"
        )

    def check_columns(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Checks that each column exists exactly once.

        Args:
            wanted: (role, column) pairs.

        Raises:
            DataError: a column is missing or repeated; names it and the closest existing columns.
        """
        for role, column in wanted:
            times = Counter(self.column_names)[column]
            if times > 1:
                raise DataError(f"{self.name} has the column {column!r} {times} times; rename one")
            if times == 0:
                raise DataError(
                    f"{self.name} has no column {column!r} ({role}); {self._closest(column)}"
                )

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Puts the name of the table before the message of a DataError."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None

    def _closest(self, column: str) -> str:
        if not self.column_names:
            return "it has no columns at all"
        lower = {name.lower().strip(): name for name in self.column_names}
        close = difflib.get_close_matches(column.lower().strip(), lower, n=3, cutoff=0.5)
        if close:
            return "did you mean " + " or ".join(repr(lower[name]) for name in close) + "?"
        shown = ", ".join(map(repr, self.column_names[:8]))
        return f"it has {shown}" + (", …" if len(self.column_names) > 8 else "")


def open_raw_tables(
    given: Frame | Sequence[Frame], *, what: str, text_format: TextFormat | None = None
) -> list[RawTable]:
    """Opens the tables of one split.

    Args:
        given: one frame or several, in the order of their rows. The files of a folder or a pattern
            are sorted by name.
        what: name of the split in messages ("train").
        text_format: format of text files.

    Raises:
        DataError: nothing is given, or a file is given twice, missing, empty, broken or of an
            unknown type.
    """
    frames = list(given) if isinstance(given, (list, tuple)) else [given]
    if not frames:
        raise DataError(f"there is no {what} file; give at least one")
    tables: list[RawTable] = []
    for frame in frames:
        if isinstance(frame, (pd.DataFrame, pa.Table)):
            tables.append(_InMemory(frame, what))
        elif isinstance(frame, str) and is_uri(frame):
            tables += [_ParquetFile(file) for file in _files_in_store(frame)]
        elif isinstance(frame, (Path, str)):
            files = files_of(Path(frame))
            tables += [_open_file(path, text_format or TextFormat()) for path in files]
        else:
            raise DataError(
                f"a {type(frame).__name__} is not a table; give paths, DataFrames or Arrow tables"
            )
    for absolute, times in Counter(table.absolute for table in tables).items():
        if absolute is not None and times > 1:
            name = next(table.name for table in reversed(tables) if table.absolute == absolute)
            raise DataError(f"{name} is given twice as a {what} file; give it once")
    return tables


def files_of(path: Path) -> list[Path]:
    """Returns the file, the files of the folder, or the files that match the pattern. Leaves out
    hidden files: programs use such names for incomplete files."""
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and file.name.lower().endswith(_SUFFIXES)
        )
        if not files:
            raise DataError(
                f"{path} is a folder without any {', '.join(_TEXT_SUFFIXES)} or "
                f"{', '.join(_PARQUET_SUFFIXES + _ARROW_SUFFIXES)} file"
            )
        return files
    if glob.has_magic(str(path)) and not path.exists():
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise DataError(f"no file matches {path}; check the pattern")
        files = [file for one in matches for file in (files_of(one) if one.is_dir() else [one])]
        return list({file.resolve(): file for file in files}.values())
    return [path]


def _files_in_store(uri: str) -> list[Location]:
    """Returns the Parquet files that a URI names, sorted by name: one file, those of a folder, or
    those that match a pattern."""
    given = Location.of(uri)
    parts = given.path.split("/")
    if "**" in parts:
        raise DataError(f"{given} has **, which URIs do not support; use one * per folder")
    fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if fixed == len(parts) and given.size() is not None:
        if not given.path.lower().endswith(_PARQUET_SUFFIXES):
            raise DataError(
                f"{given} is not a Parquet file, as files in a store must be; copy it to a disk"
            )
        return [given]
    base, scheme = "/".join(parts[:fixed]), given.name.removesuffix(given.path)
    found = []
    for file in Location(given.filesystem, base, scheme + base).files_below():
        own = file.path.split("/")
        if any(name.startswith(".") for name in own[fixed:]):
            continue
        # A matching file, or a file in a matching folder, as on a disk.
        matches = len(parts) <= len(own) <= len(parts) + 1 and all(
            fnmatch.fnmatchcase(name, part) for name, part in zip(own, parts, strict=False)
        )
        if matches and own[-1].lower().endswith(_PARQUET_SUFFIXES):
            found.append(file)
    if not found:
        raise DataError(f"there is no Parquet file at {given}; check the URI")
    return found


def _open_file(path: Path, text_format: TextFormat) -> RawTable:
    name = path.name.lower()
    if not name.endswith(_SUFFIXES):
        kinds = ", ".join(_TEXT_SUFFIXES + _PARQUET_SUFFIXES + _ARROW_SUFFIXES)
        raise DataError(
            f"{path} has an unknown file type; its name must end in one of {kinds}; text may be "
            f"compressed ({', '.join(COMPRESSIONS)})"
        )
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with a header and rows")
    if name.endswith(_PARQUET_SUFFIXES):
        return _ParquetFile(path)
    if name.endswith(_ARROW_SUFFIXES):
        return _ArrowFile(path)
    return _TextFile(path, text_format)


class _InMemory(RawTable):
    """An Arrow table or a DataFrame."""

    def __init__(self, rows: pa.Table | pd.DataFrame, what: str) -> None:
        self._rows = rows
        is_arrow = isinstance(rows, pa.Table)
        self.name = f"the {what} {'table' if is_arrow else 'DataFrame'}"
        self.file_name = "Table" if is_arrow else "DataFrame"
        names = rows.column_names if is_arrow else rows.columns
        self.column_names = [str(name) for name in names]
        self._arrow: dict[str, pa.Array | pa.ChunkedArray] = {}

    def _column(self, name: str) -> Any:
        # Only columns in use are converted, once: Arrow may have no type for the others.
        if isinstance(self._rows, pa.Table):
            return self._rows.column(name)
        if name not in self._arrow:
            values = self._rows.iloc[:, list(self.column_names).index(name)]
            try:
                self._arrow[name] = pa.Array.from_pandas(values)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                reason = str(error).partition("\n")[0]
                raise DataError(
                    f"{self.name}, column {name!r}: its values are not of one type ({reason}); "
                    "convert the column"
                ) from None
        return self._arrow[name]

    def type_of(self, column: str) -> pa.DataType:
        return self._column(column).type

    def blocks(
        self,
        columns: Sequence[str],
        bad_rows: BadRows | None = None,  # noqa: ARG002
    ) -> Iterator[RawRows]:
        for start in range(0, len(self._rows), ROWS_PER_BLOCK):
            block = {name: self._column(name).slice(start, ROWS_PER_BLOCK) for name in columns}
            yield _numbered(pa.table(block), start)


class _TypedFile(RawTable):
    """A file that defines the types of its columns and stores rows in batches."""

    def __init__(self, path: Path | Location) -> None:
        self._file = Location.of(path)
        self.name, self.file_name = str(path), self._file.path.rpartition("/")[2]
        self.absolute = self._file.absolute
        with self._damage_named():
            self._schema = self._read_schema()
        self.column_names = self._schema.names

    @abstractmethod
    def _read_schema(self) -> pa.Schema: ...

    @abstractmethod
    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yields batches of at most ROWS_PER_BLOCK rows."""

    kind: ClassVar[str]
    """File type with its article."""
    _first_row = 0

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise DataError(
                f"{self.name} is not {self.kind} file, or is damaged or cut short ({reason})"
            ) from None

    def type_of(self, column: str) -> pa.DataType:
        return self._schema.field(column).type

    def blocks(
        self,
        columns: Sequence[str],
        bad_rows: BadRows | None = None,  # noqa: ARG002
    ) -> Iterator[RawRows]:
        rows = self._first_row
        with self._damage_named():
            for batch in self._batches(list(columns)):
                # A name with a dot may also select a field of a nested column.
                table = pa.Table.from_batches([batch]).select(list(columns))
                table.validate(full=True)
                yield _numbered(table, rows)
                rows += len(table)


class _ParquetFile(_TypedFile):
    kind = "a Parquet"
    _row_groups: list[int] | None = None
    """Row groups to read; None reads all."""

    def _read_schema(self) -> pa.Schema:
        with self._open() as file:
            return file.schema_arrow

    def _open(self) -> pq.ParquetFile:
        file = self._file
        source = file.open_input() if file.local is None else file.path
        return pq.ParquetFile(
            source, pre_buffer=file.local is None, page_checksum_verification=True
        )

    def pieces(self) -> list[tuple[RawTable, int]]:
        pieces: list[tuple[RawTable, int]] = []
        with self._damage_named(), self._open() as file:
            rows = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        for group, (size, end) in enumerate(zip(rows, np.cumsum(rows).tolist(), strict=True)):
            piece = copy.copy(self)
            if self._file.local is not None:  # tasks have other working directories
                piece._file = Location.of(self._file.local.absolute())
            piece._row_groups, piece._first_row = [group], end - size
            pieces.append((piece, size))
        return pieces

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        rows = 0
        with self._open() as file:
            groups = self._row_groups
            for batch in file.iter_batches(ROWS_PER_BLOCK, row_groups=groups, columns=columns):
                yield batch
                rows += len(batch)
            groups = range(file.num_row_groups) if groups is None else groups
            expected = sum(file.metadata.row_group(group).num_rows for group in groups)
        if rows != expected:
            raise DataError(f"{self.name} has {rows} rows, but its footer says {expected}")


class _ArrowFile(_TypedFile):
    kind = "an Arrow"

    def _read_schema(self) -> pa.Schema:
        with pa.memory_map(self._file.path) as source:
            return pa.ipc.open_file(source).schema

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:  # noqa: ARG002
        with pa.memory_map(self._file.path) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                for start in range(0, len(batch), ROWS_PER_BLOCK):
                    yield batch.slice(start, ROWS_PER_BLOCK)


class _TextFile(RawTable):
    is_text = True

    def __init__(self, path: Path, text_format: TextFormat) -> None:
        self.name, self.file_name = str(path), path.name
        self.absolute = str(path.resolve())
        self._text = DelimitedText(path, text_format)
        self.column_names = self._text.column_names
        self.form = self._text.form

    def place(self, number: int) -> str:
        return f"{self.name}, line {number}"

    def type_of(self, column: str) -> pa.DataType:  # noqa: ARG002
        return pa.string()

    def blocks(self, columns: Sequence[str], bad_rows: BadRows | None = None) -> Iterator[RawRows]:
        bad_rows = bad_rows or BadRows(0, by_option=False)
        for fields, misfits in self._text.blocks(columns):
            sentences = [
                f"{self.place(misfit.line)}: {misfit.fields} fields, but the header has "
                f"{len(self.column_names)}"
                for misfit in misfits
            ]
            bad_rows.skip(len(misfits), sentences.__getitem__)
            yield RawRows(fields.table, fields.lines)


def _numbered(table: pa.Table, first: int) -> RawRows:
    for place, column in enumerate(table.schema):
        if column.type == pa.string_view():  # pyarrow 26 cannot take rows of this type
            text = table.column(place).cast(pa.string())
            table = table.set_column(place, column.name, text)
    return RawRows(table, np.arange(first, first + len(table)))
