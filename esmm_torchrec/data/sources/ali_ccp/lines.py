"""Parsing of blocks of raw Ali-CCP lines into columns.

Every byte is parsed once. Arrow's CSV reader splits a block of lines at commas, then its feature
lists, joined and with 0x01 turned into newlines, at 0x02. A stable sort by field number regroups
the features into one column per field.

A block that Arrow cannot read, or that has invalid values, is halved until the bad line is alone;
only then does Python inspect the line to explain the problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from esmm_torchrec.data.prepared_form import array_of
from esmm_torchrec.data.sources.ali_ccp.bad_lines import explain
from esmm_torchrec.data.sources.ali_ccp.fields import (
    FEATURE_LIST,
    FEATURE_NUM,
    HEX_DIGITS,
    INDEX,
    INDEX_DIGITS,
    PURCHASE,
    Layout,
)
from esmm_torchrec.schema import CLICK, CONVERSION, SAMPLE_ID, IdFeature, weight_column


class _MalformedError(Exception):
    """A block contains a malformed line, not yet known which."""


def _demand(condition: bool | np.bool_) -> None:
    if not condition:
        raise _MalformedError


def _read_csv(text: Any, *, delimiter: str, columns: Mapping[str, pa.DataType]) -> pa.Table:
    try:
        return pyarrow.csv.read_csv(
            pa.py_buffer(text),
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=len(text) + 1, column_names=list(columns)
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, quote_char=False, ignore_empty_lines=False
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict(columns), null_values=[], check_utf8=False
            ),
        ).combine_chunks()
    except pa.ArrowInvalid:
        raise _MalformedError from None


def _parse(text: bytes, layout: Layout) -> pa.Table:
    """Parses whole lines: labels and sample_id if present, the index as uint64, fields.

    Each field becomes a column of raw ids (int64, or lists of them), with its weights.

    Raises:
        _MalformedError: a line is bad in any way that `explain` can name.
    """
    lines = _read_csv(text, delimiter=",", columns=layout.columns)
    columns: dict[str, Any] = {}
    if SAMPLE_ID in layout.columns:
        click, purchase = array_of(lines, CLICK).to_numpy(), array_of(lines, PURCHASE).to_numpy()
        _demand(np.isin(click, (0, 1)).all() and np.isin(purchase, (0, 1)).all())
        _demand((array_of(lines, SAMPLE_ID).to_numpy() >= 0).all())
        columns |= {CLICK: click, CONVERSION: purchase, SAMPLE_ID: array_of(lines, SAMPLE_ID)}
    columns[INDEX] = _index_numbers(array_of(lines, INDEX))
    counts = array_of(lines, FEATURE_NUM).to_numpy().astype(np.int64)
    columns |= _parse_features(array_of(lines, FEATURE_LIST), counts, layout.features)
    return pa.table(columns)


def _index_numbers(index: pa.BinaryArray) -> np.ndarray:
    """Converts the 16 hex digits of each index to uint64."""
    _, offsets, data = index.buffers()
    ends = np.frombuffer(offsets, np.int32)[: len(index) + 1]
    _demand((np.diff(ends) == INDEX_DIGITS).all())
    digits = HEX_DIGITS[np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]]
    _demand((digits < 16).all())
    return (digits[0::2] << 4 | digits[1::2]).view(">u8").astype(np.uint64)


def _parse_features(
    lists: pa.BinaryArray, counts: np.ndarray, features: Sequence[IdFeature]
) -> dict[str, pa.Array]:
    """Returns columns of the features; `counts` is the expected number of features in each list."""
    lengths = np.diff(np.frombuffer(lists.buffers()[1], np.int32)[: len(lists) + 1])
    _demand((counts >= 0).all() and ((counts > 0) == (lengths > 0)).all())
    total = int(counts.sum())
    if total == 0:
        codes, ids, values = np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.float32)
    else:
        filled = lengths > 0
        text = _join(lists.filter(pa.array(filled)))
        # The separators between lists must be where the counts put them. So no list has more or
        # fewer features than its count, even if the sums agree.
        (separators,) = np.nonzero(text == 1)
        _demand(len(separators) == total - 1)
        between = np.cumsum(lengths[filled] + 1)[:-1] - 1
        _demand((separators[np.cumsum(counts[filled])[:-1] - 1] == between).all())
        _to_lines(text)
        kinds = {"field": pa.dictionary(pa.int32(), pa.binary()), "id": pa.int64()}
        parsed = _read_csv(text, delimiter="\x02", columns=kinds | {"value": pa.float32()})
        _demand(len(parsed) == total)
        field_names, ids = array_of(parsed, "field"), array_of(parsed, "id").to_numpy()
        values = array_of(parsed, "value").to_numpy()
        _demand(ids.min() >= 0 and np.isfinite(values).all())
        numbers = {feature.name.encode(): n for n, feature in enumerate(features)}
        found = field_names.dictionary.to_pylist()
        _demand(all(name in numbers for name in found))
        number_of = np.array([numbers[name] for name in found], np.uint8)
        codes = number_of[field_names.indices.to_numpy()]

    order = np.argsort(codes, kind="stable")
    row_of = np.repeat(np.arange(len(lists)), counts)
    ends = np.cumsum(np.bincount(codes, minlength=len(features)))
    columns: dict[str, pa.Array] = {}
    for feature, start, end in zip(features, [0, *ends[:-1]], ends, strict=True):
        places = order[start:end]
        given = {feature.name: ids[places]}
        if feature.weighted:
            given[weight_column(feature.name)] = values[places]
        make = _lists if feature.multi_valued else _scalars
        columns |= make(given, row_of[places], len(lists))
    return columns


def _join(lists: pa.BinaryArray) -> np.ndarray:
    whole = pa.ListArray.from_arrays(pa.array([0, len(lists)], pa.int32()), lists)
    joined = pc.call_function("binary_join", [whole, pa.scalar(b"\x01")])
    return np.frombuffer(joined[0].as_buffer(), np.uint8).copy()


def _to_lines(text: np.ndarray) -> None:
    """Replaces 0x01 by newline and 0x03 by 0x02, in place. Works in pieces, so that the masks stay
    in the cache, and with arithmetic, because `bytes.translate` is slower and blocks the other
    threads."""
    piece_bytes = 1 << 18
    for start in range(0, len(text), piece_bytes):
        piece = text[start : start + piece_bytes]
        piece -= (piece == 3).view(np.uint8)
        piece += (piece == 1).view(np.uint8) * np.uint8(ord("\n") - 1)


def _scalars(given: Mapping[str, np.ndarray], row_of: np.ndarray, rows: int) -> dict[str, pa.Array]:
    _demand((row_of[1:] != row_of[:-1]).all())
    if len(row_of) == rows:
        return {name: pa.array(values) for name, values in given.items()}
    missing = np.ones(rows, np.bool_)
    missing[row_of] = False
    columns = {}
    for name, values in given.items():
        spread = np.zeros(rows, values.dtype)
        spread[row_of] = values
        columns[name] = pa.array(spread, mask=missing)
    return columns


def _lists(given: Mapping[str, np.ndarray], row_of: np.ndarray, rows: int) -> dict[str, pa.Array]:
    offsets = np.zeros(rows + 1, np.int32)
    np.cumsum(np.bincount(row_of, minlength=rows), out=offsets[1:])
    return {
        name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
        for name, values in given.items()
    }


class BadRow(NamedTuple):
    """A raw line that is not used, and the reason."""

    line: int
    """Line number, counted from 1."""
    what: str


class Block(NamedTuple):
    """A stretch of a raw file."""

    first_line: int
    text: bytes
    """Whole lines, each with a newline at its end."""


class ParsedLines(NamedTuple):
    """Result of parsing the lines of a block."""

    table: pa.Table
    lines: np.ndarray
    """int64, the line from which each row comes."""
    bad: list[BadRow]
    """Bad lines in the order of the file."""


def parse_block(block: Block, layout: Layout, most_bad: int) -> ParsedLines:
    """Parses a block into its good and bad lines; gives up after `most_bad` + 1 bad lines."""
    tables: list[pa.Table] = []
    lines: list[np.ndarray] = []
    bad: list[BadRow] = []
    pieces = [block]
    while pieces and len(bad) <= most_bad:
        piece = pieces.pop()
        try:
            table = _parse(piece.text, layout)
            # Arrow treats a lone carriage return as the end of a line.
            num_lines = piece.text.count(b"\n")
            _demand(len(table) == num_lines)
        except _MalformedError:
            halves = _halve(piece)
            if halves is None:
                bad.append(BadRow(piece.first_line, explain(piece.text, layout)))
            else:
                pieces.extend(reversed(halves))
            continue
        tables.append(table)
        lines.append(np.arange(piece.first_line, piece.first_line + num_lines))
    if not tables:
        nothing = _parse_nothing(layout)
        return ParsedLines(nothing, np.zeros(0, np.int64), bad)
    return ParsedLines(pa.concat_tables(tables).combine_chunks(), np.concatenate(lines), bad)


def _parse_nothing(layout: Layout) -> pa.Table:
    columns: dict[str, Any] = {}
    if SAMPLE_ID in layout.columns:
        columns |= {CLICK: np.zeros(0, np.int8), CONVERSION: np.zeros(0, np.int8)}
        columns |= {SAMPLE_ID: np.zeros(0, np.int64)}
    columns[INDEX] = np.zeros(0, np.uint64)
    nothing = pa.array([], pa.binary())
    return pa.table(columns | _parse_features(nothing, np.zeros(0, np.int64), layout.features))


def _halve(block: Block) -> tuple[Block, Block] | None:
    """Returns two blocks of about half the bytes; None if the block is one line."""
    middle = len(block.text) // 2
    cut = block.text.rfind(b"\n", 0, middle) + 1 or block.text.find(b"\n", middle) + 1
    if cut == len(block.text):
        return None
    head = block.text[:cut]
    return (
        Block(block.first_line, head),
        Block(block.first_line + head.count(b"\n"), block.text[cut:]),
    )
