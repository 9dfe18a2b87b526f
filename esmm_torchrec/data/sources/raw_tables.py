"""Tables of impressions as people have them: CSV, Parquet, DataFrame; read block by block.

Every kind gives the same thing, Arrow tables of the columns asked for, so that what follows need
not know where rows come from. A CSV has no types: all its columns are strings here, and
`data.encoding` reads the numbers in them, because only it knows which column should hold some and
only it can say which line does not.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from esmm_torchrec.errors import DataError

Frame = Path | str | pd.DataFrame | pa.Table
"""A path to a CSV or Parquet file, or rows in memory."""

ROWS_PER_BLOCK = 1 << 16
CSV_BYTES_PER_BLOCK = 1 << 23

CSV_NULLS = ("", "NaN", "nan", "NULL", "null")
"""Fields of a CSV that are missing values. "NA" is not among them: it is Namibia, too."""

_CSV_SUFFIXES = (".csv", ".csv.gz")
_PARQUET_SUFFIXES = (".parquet", ".pq")

EXAMPLES = 10
"""Bad rows that are named in the end."""


class BadRows:
    """Counts the rows that are skipped because something in them is broken.

    Args:
        limit: how many may be skipped; 0 stops at the first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.examples: list[str] = []

    def skip(self, rows: int) -> int:
        """Counts broken rows; how many of them may be skipped."""
        allowed = min(rows, self.limit - self.count)
        self.count += allowed
        return allowed

    def note(self, sentence: str) -> None:
        """Keeps a sentence on a skipped row, if it is among the first."""
        if len(self.examples) < EXAMPLES:
            self.examples.append(sentence)

    def error(self, sentence: str) -> DataError:
        """What to raise for a row that may not be skipped."""
        if self.limit:
            return DataError(
                f"there are more than {self.limit} bad rows (--max-bad-rows), the first one too "
                f"many: {sentence}"
            )
        return DataError(f"{sentence}; mend it, or skip up to N bad rows with --max-bad-rows N")


class RawTable(ABC):
    """One file or frame of rows.

    `name` is how sentences call it; `file_name` is what may be stored: no path of this machine.
    """

    name: str
    file_name: str
    column_names: Sequence[str]

    @property
    def is_text(self) -> bool:
        """Whether all columns are strings because the file has no types."""
        return False

    @abstractmethod
    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        """Arrow types of some columns."""

    @abstractmethod
    def blocks(self, columns: Sequence[str], bad_rows: BadRows | None = None) -> Iterator[pa.Table]:
        """The rows in order, `columns` alone, in blocks of bounded size.

        Args:
            columns: those to give, in this order.
            bad_rows: counts the lines of a CSV that have not as many fields as its header. They
                are no rows: `places` does not count them either. None allows none.

        Raises:
            DataError: the file cannot be read, or there is one bad line too many.
        """

    def places(self, rows: Sequence[int]) -> list[str]:
        """How a person finds some rows, given by number from 0, ascending."""
        return [f"{self.name}, row {row}" for row in rows]

    def check_columns(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Checks that columns are there, once each.

        Args:
            wanted: (what it is, column).

        Raises:
            DataError: names the column and the closest ones that are there.
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
        """Puts the name of the table before the sentence of a DataError."""
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


def open_raw_tables(given: Frame | Sequence[Frame], *, what: str) -> list[RawTable]:
    """Opens what a caller gave as one split.

    Args:
        given: one frame or several, in the order of their rows.
        what: how sentences call it ("train").

    Raises:
        DataError: nothing is given, or a file is missing, empty, broken or of unknown kind.
    """
    frames = list(given) if isinstance(given, (list, tuple)) else [given]
    if not frames:
        raise DataError(f"there is no {what} file; give at least one with --{what}")
    return [_open(frame, what) for frame in frames]


def _open(frame: Frame, what: str) -> RawTable:
    if isinstance(frame, pd.DataFrame):
        return _DataFrame(frame, f"the {what} DataFrame")
    if isinstance(frame, pa.Table):
        return _ArrowTable(frame, f"the {what} table")
    path = Path(frame)
    lower = path.name.lower()
    if not lower.endswith(_CSV_SUFFIXES + _PARQUET_SUFFIXES):
        kinds = ", ".join(_CSV_SUFFIXES + _PARQUET_SUFFIXES)
        raise DataError(f"{path} is of unknown kind; its name must end in one of {kinds}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the files in it")
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with a header and rows")
    return _CsvFile(path) if lower.endswith(_CSV_SUFFIXES) else _ParquetFile(path)


class _ArrowTable(RawTable):
    def __init__(self, table: pa.Table, name: str) -> None:
        self._table = table
        self.name, self.file_name = name, "Table"
        self.column_names = table.column_names

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        return {name: self._table.schema.field(name).type for name in columns}

    def blocks(
        self,
        columns: Sequence[str],
        bad_rows: BadRows | None = None,  # noqa: ARG002
    ) -> Iterator[pa.Table]:
        table = self._table.select(list(columns))
        for start in range(0, len(table), ROWS_PER_BLOCK):
            yield table.slice(start, ROWS_PER_BLOCK)


class _DataFrame(RawTable):
    def __init__(self, frame: pd.DataFrame, name: str) -> None:
        self._frame = frame
        self.name, self.file_name = name, "DataFrame"
        self.column_names = [str(label) for label in frame.columns]
        self._arrow: dict[str, pa.Array | pa.ChunkedArray] = {}

    def _column(self, name: str) -> Any:
        # Converted once, and only what is used: another column may hold what Arrow has no type for.
        if name not in self._arrow:
            values = self._frame.iloc[:, list(self.column_names).index(name)]
            try:
                self._arrow[name] = pa.Array.from_pandas(values)
            except (pa.ArrowException, TypeError, OverflowError) as error:
                reason = str(error).partition("\n")[0]
                raise DataError(
                    f"{self.name}, column {name!r}: its values are not of one type ({reason}); "
                    "convert the column"
                ) from None
        return self._arrow[name]

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        return {name: self._column(name).type for name in columns}

    def blocks(
        self,
        columns: Sequence[str],
        bad_rows: BadRows | None = None,  # noqa: ARG002
    ) -> Iterator[pa.Table]:
        for start in range(0, len(self._frame), ROWS_PER_BLOCK):
            yield pa.table(
                {name: self._column(name).slice(start, ROWS_PER_BLOCK) for name in columns}
            )


class _ParquetFile(RawTable):
    def __init__(self, path: Path) -> None:
        self._path = path
        self.name, self.file_name = str(path), path.name
        try:
            self._schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(error) from None
        self.column_names = self._schema.names

    def _broken(self, error: Exception) -> DataError:
        reason = str(error).partition("\n")[0].rstrip(".")
        return DataError(f"{self.name} is no Parquet file, or is broken or cut short ({reason})")

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        return {name: self._schema.field(name).type for name in columns}

    def blocks(
        self,
        columns: Sequence[str],
        bad_rows: BadRows | None = None,  # noqa: ARG002
    ) -> Iterator[pa.Table]:
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(ROWS_PER_BLOCK, columns=list(columns)):
                    # A name with a dot may bring a column along that nobody asked for.
                    yield pa.Table.from_batches([batch]).select(list(columns))
        except (pa.ArrowException, OSError) as error:
            raise self._broken(error) from None


class _CsvFile(RawTable):
    def __init__(self, path: Path) -> None:
        self._path = path
        self.name, self.file_name = str(path), path.name
        try:
            _, self.column_names = next(self._records())
        except StopIteration:
            raise DataError(f"{path} has no header; give a file with a header and rows") from None
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise self._broken(error) from None

    @property
    def is_text(self) -> bool:
        return True

    def _broken(self, error: Exception) -> DataError:
        reason = str(error).partition("\n")[0].rstrip(".")
        return DataError(f"{self.name} cannot be read as CSV in UTF-8 ({reason})")

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(number of its last line, fields) of the header and of every row, blank lines left out,
        as pyarrow leaves them out. Slow: for the header and to find lines that are at fault."""
        with pa.input_stream(str(self._path)) as stream:
            reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            for fields in reader:
                if fields:
                    yield reader.line_num, fields

    def places(self, rows: Sequence[int]) -> list[str]:
        width, records = len(self.column_names), itertools.islice(self._records(), 1, None)
        lines = (line for line, fields in records if len(fields) == width)
        found, position = [], 0
        for row in rows:
            found.append(next(itertools.islice(lines, row - position, None), "?"))
            position = row + 1
        return [f"{self.name}, line {line}" for line in found]

    def _misfits(self, first: int, past: int) -> list[str]:
        """Sentences on some of the lines that have not as many fields as the header."""
        width, records = len(self.column_names), itertools.islice(self._records(), 1, None)
        sentences = (
            f"{self.name}, line {line}: {len(fields)} fields where the header has {width}"
            for line, fields in records
            if len(fields) != width
        )
        return list(itertools.islice(sentences, first, past))

    def types(self, columns: Iterable[str]) -> dict[str, pa.DataType]:
        return {name: pa.string() for name in columns}

    def blocks(self, columns: Sequence[str], bad_rows: BadRows | None = None) -> Iterator[pa.Table]:
        skipped, refused = 0, False

        def handle(_: pa_csv.InvalidRow) -> str:
            nonlocal skipped, refused
            if bad_rows is not None and bad_rows.skip(1):
                skipped += 1
                return "skip"
            refused = True
            return "error"

        try:
            reader = pa_csv.open_csv(
                self._path,
                read_options=pa_csv.ReadOptions(block_size=CSV_BYTES_PER_BLOCK),
                parse_options=pa_csv.ParseOptions(
                    newlines_in_values=True, invalid_row_handler=handle
                ),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=list(columns),
                    column_types=dict.fromkeys(columns, pa.string()),
                    strings_can_be_null=True,
                    null_values=list(CSV_NULLS),
                ),
            )
            with reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            if not refused:
                raise self._broken(error) from None
            (sentence,) = self._misfits(skipped, skipped + 1)
            raise (bad_rows.error(sentence) if bad_rows else DataError(sentence)) from None
        if bad_rows is not None and skipped:
            for sentence in self._misfits(0, min(skipped, EXAMPLES)):
                bad_rows.note(sentence)
