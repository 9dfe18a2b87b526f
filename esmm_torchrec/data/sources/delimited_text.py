"""CSV, TSV and other delimited text: divided into records here, parsed by pyarrow.

pyarrow parses fast but accepts malformed text: an unclosed quote swallows the rest of the file, and
a closing quote followed by other text joins two records. So quotes are checked here first, a whole
block of bytes at a time, and the rows that pyarrow returns are counted against the records of the
block. This also yields the line number of every row.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from esmm_torchrec.errors import DataError, OptionError

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""Codec of each file name suffix."""

BYTES_PER_BLOCK = 1 << 23
MAX_RECORD_BYTES = 1 << 26

SEPARATORS = (",", "\t", ";", "|")
"""Candidates for separator detection."""

_SEPARATOR_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}

_LF, _CR = 10, 13


@dataclass(frozen=True)
class TextFormat:
    """Format of delimited text.

    Raises:
        OptionError: a separator or a quote is not one ASCII character, both are the same, or Python
            does not know the encoding.
    """

    separator: str | None = None
    """Field separator; None detects it in the header: comma, tab, semicolon or vertical bar."""
    encoding: str | None = None
    """Encoding name that Python knows; None means UTF-8, or UTF-16 if the file begins with its byte
    order mark."""
    quote: str | None = '"'
    """Quote around fields that contain separators or line ends; doubled, it means itself. None: the
    file has no quoting."""

    def __post_init__(self) -> None:
        for name, value in (("separator", self.separator), ("quote", self.quote)):
            if value is not None and (len(value) != 1 or not value.isascii() or value in "\r\n"):
                raise OptionError(f"`{name}` must be one ASCII character, not {value!r}")
        if self.separator is not None and self.separator == self.quote:
            raise OptionError(f"`separator` and `quote` are both {self.quote!r}; choose two")
        if self.encoding is not None:
            try:
                known = codecs.lookup(self.encoding)._is_text_encoding  # type: ignore[attr-defined]
            except LookupError:
                known = False
            if not known:
                raise OptionError(f"`encoding` {self.encoding!r} is not an encoding Python knows")


class Fields(NamedTuple):
    """Fields of a block of records."""

    table: pa.Table
    """Strings; an empty field is ''."""
    lines: np.ndarray
    """int64, the line in which each record begins, counted from 1."""


class Misfit(NamedTuple):
    """A record whose number of fields differs from the header's."""

    line: int
    fields: int


class _Records(NamedTuple):
    data: bytes
    starts: np.ndarray
    """Offsets of the records that are not blank."""
    lines: np.ndarray


class DelimitedText:
    """A file of delimited text with a header.

    Args:
        path: path of the file; a suffix such as .gz or .zst determines its compression.
        format: format of the text.

    Raises:
        DataError: the file cannot be read or has no header.
    """

    def __init__(self, path: Path, format: TextFormat) -> None:
        self.path = path
        self._quote = format.quote
        self.encoding = format.encoding or self._detect_encoding()
        self.separator = format.separator or self._detect_separator()
        first = next(self._records(), None)
        if first is None:
            raise DataError(f"{path} has no header; give a file with a header and rows")
        self._header_line = int(first.lines[0])
        header = first.data[first.starts[0] : first.starts[1] if len(first.starts) > 1 else None]
        self.column_names: Sequence[str] = pa_csv.read_csv(
            pa.BufferReader(header),
            read_options=pa_csv.ReadOptions(block_size=len(header) + 1, use_threads=False),
            parse_options=self._parse_options(),
        ).column_names

    @property
    def form(self) -> str:
        """Human-readable separator and encoding."""
        separator = _SEPARATOR_NAMES.get(self.separator, repr(self.separator))
        return f"separator {separator}, encoding {self._encoding_name}"

    @property
    def _encoding_name(self) -> str:
        # Python calls UTF-8 with an optional byte order mark utf-8-sig.
        return self.encoding.upper().removesuffix("-SIG")

    def blocks(self, columns: Sequence[str]) -> Iterator[tuple[Fields, list[Misfit]]]:
        """Reads the records after the header, in order, in blocks of bounded size.

        Args:
            columns: columns to read, in this order.

        Yields:
            The records of a block, and separately those whose number of fields differs from the
            header's.

        Raises:
            DataError: the file cannot be read, is not in its encoding, or a quote is not closed.
        """
        for records in self._records():
            starts, lines = records.starts, records.lines
            if lines[0] == self._header_line:
                starts, lines = starts[1:], lines[1:]
            if len(starts):
                yield self._parsed(records.data[starts[0] :], lines, columns)

    def _parse_options(self, handle: object = None) -> pa_csv.ParseOptions:
        return pa_csv.ParseOptions(
            delimiter=self.separator,
            quote_char=self._quote or False,
            newlines_in_values=self._quote is not None,
            invalid_row_handler=handle,
        )

    def _parsed(
        self, data: bytes, lines: np.ndarray, columns: Sequence[str]
    ) -> tuple[Fields, list[Misfit]]:
        misfits: list[Misfit] = []
        is_row = np.ones(len(lines), np.bool_)

        def skip(row: pa_csv.InvalidRow) -> str:
            is_row[row.number - 1] = False
            misfits.append(Misfit(int(lines[row.number - 1]), row.actual_columns))
            return "skip"

        try:
            table = pa_csv.read_csv(
                pa.BufferReader(data),
                read_options=pa_csv.ReadOptions(
                    column_names=self.column_names, block_size=len(data) + 1, use_threads=False
                ),
                parse_options=self._parse_options(skip),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=columns,
                    column_types=dict.fromkeys(columns, pa.string()),
                ),
            )
        except pa.ArrowException as error:
            if len(misfits) < len(lines):
                raise self._broken(error) from None
            table = pa.table({name: pa.array([], pa.string()) for name in columns})
        if len(table) + len(misfits) != len(lines):
            raise DataError(
                f"{self.path}, lines {lines[0]} to {lines[-1]}: {len(lines)} records and "
                f"{len(table)} rows read; check the quotes there"
            )
        return Fields(table, lines[is_row]), misfits

    def _broken(self, error: Exception) -> DataError:
        reason = str(error).partition("\n")[0].rstrip(".")
        return DataError(f"{self.path} cannot be read ({reason}); check the file")

    def _open(self) -> pa.NativeFile:
        codec = COMPRESSIONS.get(self.path.suffix.lower())
        return pa.input_stream(str(self.path), compression=codec or "detect")

    def _detect_encoding(self) -> str:
        try:
            with self._open() as stream:
                mark = stream.read(2)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(error) from None
        return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"

    def _detect_separator(self) -> str:
        head = next((line for data in self._texts() for line in data.splitlines() if line), b"")
        if self._quote:
            quote = re.escape(self._quote.encode())
            head = re.sub(quote + b"[^" + quote + b"]*" + quote, b"", head)
        return max(SEPARATORS, key=lambda separator: head.count(separator.encode()))

    def _texts(self) -> Iterator[bytes]:
        """Yields the file in UTF-8, in pieces that begin and end at any character."""
        line = 1
        try:
            with self._open() as stream:
                data = stream.read(BYTES_PER_BLOCK)
                decoder = codecs.getincrementaldecoder(self.encoding)()
                while data:
                    text = decoder.decode(data)
                    yield text.encode()
                    line += text.count("\n")
                    data = stream.read(BYTES_PER_BLOCK)
                yield decoder.decode(b"", final=True).encode()
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(error.encoding, "ignore")
            raise DataError(
                f"{self.path}, line {line + before.count(chr(_LF))}: the text is not "
                f"{self._encoding_name}; name the encoding of the file with `encoding`, "
                "cp1252 for example"
            ) from None
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise self._broken(error) from None

    def _records(self) -> Iterator[_Records]:
        """Yields whole records, at least one in each piece, and checks their quotes."""
        line, rest = 1, b""
        for text in chain(self._texts(), [None]):
            data = rest + (text or b"")
            if text is None and not data.endswith((b"\n", b"\r")):
                data += b"\n"
            cut, line, found = self._cut(data, line, is_last=text is None)
            if found is not None:
                yield found
            rest = data[cut:]
            if len(rest) > MAX_RECORD_BYTES:
                raise DataError(
                    f"{self.path}, line {line}: a record of more than {MAX_RECORD_BYTES >> 20} MiB "
                    "begins here; close its quote"
                )

    def _cut(self, data: bytes, line: int, *, is_last: bool) -> tuple[int, int, _Records | None]:
        """Finds the whole records in `data`, which begins with a record in line `line`.

        Returns:
            Number of bytes of the whole records, the line in which the next record begins, the
            records.
        """
        values = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(values == _LF)
        if b"\r" in data:
            returns = np.flatnonzero(values == _CR)
            following = np.append(values, _LF if not is_last else 0)[returns + 1]
            ends = np.sort(np.concatenate([ends, returns[following != _LF]]))
        quotes = np.zeros(0, np.int64)
        record_ends = ends
        if self._quote is not None and self._quote.encode() in data:
            quotes = np.flatnonzero(values == ord(self._quote))
            record_ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
        cut = int(record_ends[-1]) + 1 if len(record_ends) else 0
        whole = quotes if is_last else quotes[: np.searchsorted(quotes, cut)]
        self._check_quotes(values, whole, ends, line)
        if not cut:
            return 0, line, None
        starts = np.concatenate([[0], record_ends[:-1] + 1])
        lengths = record_ends - starts
        is_blank = (lengths == 0) | ((lengths == 1) & (values[starts] == _CR))
        starts = starts[~is_blank]
        lines = line + np.searchsorted(ends, starts)
        next_line = line + int(np.searchsorted(ends, cut))
        return cut, next_line, _Records(data[:cut], starts, lines) if len(starts) else None

    def _check_quotes(
        self, values: np.ndarray, quotes: np.ndarray, ends: np.ndarray, line: int
    ) -> None:
        """Checks that quotes alternately open and close a field, or are doubled."""
        if not len(quotes):
            return
        padded = np.concatenate([[_LF], values, [_LF]])
        borders = np.array([ord(self.separator), _LF, _CR, ord(self._quote or '"')])
        wrong = ~np.isin(padded[quotes[::2]], borders)
        closes_well = np.isin(padded[quotes[1::2] + 2], borders)
        wrong[: len(closes_well)] |= ~closes_well
        if len(quotes) % 2:
            wrong[-1] = True
        if wrong.any():
            opening = int(quotes[2 * int(wrong.argmax())])
            place = line + int(np.searchsorted(ends, opening))
            raise DataError(
                f"{self.path}, line {place}: the quote {self._quote} is not closed at the end of "
                "its field, or is inside a field; close it or double it, or read the file "
                "without quoting with `quote` none"
            )
