"""The raw Ali-CCP files → blocks of lines → columns, every byte parsed once.

Raw, for each split: `sample_skeleton_<split>.csv` (an impression a line) and
`common_features_<split>.csv` (what many impressions share), or one `sample_<split>.tar.gz` that
holds both. Lines are comma-separated; their last column is a list of features,
`field 0x02 id 0x03 value` joined by 0x01.

A block of lines goes through Arrow's CSV reader twice: once by commas, then its feature lists,
joined and with 0x01 turned into newlines, once more by 0x02. The features are regrouped into one
column a field with a stable sort of their field numbers.

A block that Arrow cannot read, or whose values cannot be, is halved until the bad line stands
alone; only then does Python look at it, to say what is wrong.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from esmm_torchrec.data.prepared_form import SplitName
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import CLICK, CONVERSION, SAMPLE_ID, IdFeature, weight_column

USER = "101"
"""Field of the user id."""


def _common(name: str, *, multi_valued: bool = False, weighted: bool = False) -> IdFeature:
    return IdFeature(name, name, multi_valued=multi_valued, weighted=weighted, shared=True)


def _skeleton(name: str, *, multi_valued: bool = False, weighted: bool = False) -> IdFeature:
    return IdFeature(name, name, multi_valued=multi_valued, weighted=weighted)


FIELDS: tuple[IdFeature, ...] = (
    _common(USER),
    _common("109_14", multi_valued=True, weighted=True),  # categories in the user's history
    _common("110_14", multi_valued=True, weighted=True),  # shops in the history
    _common("127_14", multi_valued=True, weighted=True),  # brands in the history
    _common("150_14", multi_valued=True, weighted=True),  # intention nodes in the history
    _common("121"),  # profile
    _common("122"),  # profile
    _common("124"),  # gender
    _common("125"),  # age
    _common("126"),  # consumption level I
    _common("127"),  # consumption level II
    _common("128"),  # works or not
    _common("129"),  # geography
    _skeleton("205"),  # item
    _skeleton("206"),  # category
    _skeleton("207"),  # shop
    _skeleton("210", multi_valued=True),  # intention nodes of the item
    _skeleton("216"),  # brand
    _skeleton("508", weighted=True),  # 109_14 x 206
    _skeleton("509", weighted=True),  # 110_14 x 207
    _skeleton("702", weighted=True),  # 127_14 x 216
    _skeleton("853", multi_valued=True, weighted=True),  # 150_14 x 210
    _skeleton("301"),  # context
)
"""Every field of the raw data, a feature with a table of its own; shared: it comes from the common
features. The order is the one in which a batch carries them."""

_LONGEST_LINE = 256 << 20
"""Bytes after which a file without a newline is not read further."""

INDEX = "common_feature_index"
_FEATURE_NUM = "feature_num"
_FEATURE_LIST = "feature_list"

_HIGHEST_FLOAT32 = float(np.finfo(np.float32).max)
_INDEX_DIGITS = 16
_HEX = np.full(256, 255, np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_HEX[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


@dataclass(frozen=True)
class Layout:
    """The columns of one kind of raw file and the fields its feature lists hold."""

    columns: Mapping[str, pa.DataType]
    features: tuple[IdFeature, ...]
    reason: str
    """What its bad rows are called in the report."""


COMMON = Layout(
    columns={INDEX: pa.binary(), _FEATURE_NUM: pa.int32(), _FEATURE_LIST: pa.binary()},
    features=tuple(feature for feature in FIELDS if feature.shared),
    reason="bad common rows",
)
SKELETON = Layout(
    columns={
        SAMPLE_ID: pa.int64(),
        CLICK: pa.int8(),
        "purchase": pa.int8(),
        INDEX: pa.binary(),
        _FEATURE_NUM: pa.int32(),
        _FEATURE_LIST: pa.binary(),
    },
    features=tuple(feature for feature in FIELDS if not feature.shared),
    reason="bad skeleton rows",
)


# Text → columns


class _MalformedError(Exception):
    """Something in a block of lines is not as it should be; which line is not known yet."""


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


def array_of(table: pa.Table, name: str) -> Any:
    """A column as one array; not copied where it is in one piece."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def with_values(lists: pa.ListArray, values: pa.Array) -> pa.ListArray:
    """Lists of the same lengths that hold `values`."""
    offsets = lists.offsets.to_numpy()
    return pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), values)


def _parse(text: bytes, layout: Layout) -> pa.Table:
    """Columns of whole lines: labels and sample_id where there are any, the index as uint64, and
    each field's raw ids (int64, or a list of them) with its weights.

    Raises:
        _MalformedError: a line is bad in any way that `_explain` can name.
    """
    lines = _read_csv(text, delimiter=",", columns=layout.columns)
    columns: dict[str, Any] = {}
    if SAMPLE_ID in layout.columns:
        click, purchase = array_of(lines, CLICK).to_numpy(), array_of(lines, "purchase").to_numpy()
        _demand(np.isin(click, (0, 1)).all() and np.isin(purchase, (0, 1)).all())
        _demand((array_of(lines, SAMPLE_ID).to_numpy() >= 0).all())
        columns |= {CLICK: click, CONVERSION: purchase, SAMPLE_ID: array_of(lines, SAMPLE_ID)}
    columns[INDEX] = _index_numbers(array_of(lines, INDEX))
    counts = array_of(lines, _FEATURE_NUM).to_numpy().astype(np.int64)
    columns |= _parse_features(array_of(lines, _FEATURE_LIST), counts, layout.features)
    return pa.table(columns)


def _index_numbers(index: pa.BinaryArray) -> np.ndarray:
    """The 16 hex digits of each index as uint64."""
    _, offsets, data = index.buffers()
    ends = np.frombuffer(offsets, np.int32)[: len(index) + 1]
    _demand((np.diff(ends) == _INDEX_DIGITS).all())
    digits = _HEX[np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]]
    _demand((digits < 16).all())
    return (digits[0::2] << 4 | digits[1::2]).view(">u8").astype(np.uint64)


def _parse_features(
    lists: pa.BinaryArray, counts: np.ndarray, features: Sequence[IdFeature]
) -> dict[str, pa.Array]:
    """Columns of the features; `counts` is the number of features each list should hold."""
    lengths = np.diff(np.frombuffer(lists.buffers()[1], np.int32)[: len(lists) + 1])
    _demand((counts >= 0).all() and ((counts > 0) == (lengths > 0)).all())
    total = int(counts.sum())
    if total == 0:
        codes, ids, values = np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.float32)
    else:
        filled = lengths > 0
        text = _join(lists.filter(pa.array(filled)))
        # Of the separators, the ones between lists must be where the counts put them: no list
        # holds a feature more or less than its count, in whatever way the sums agree.
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
    """0x01 → newline, 0x03 → 0x02, in place. In pieces, so that the masks stay in the cache; with
    arithmetic, because `bytes.translate` is slower and keeps the other threads waiting."""
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


# Bad lines


class BadRow(NamedTuple):
    """A raw line that is not used, and why."""

    line: int
    """Counted from 1."""
    what: str


class Block(NamedTuple):
    """A stretch of a raw file."""

    first_line: int
    text: bytes
    """Whole lines, a newline after each."""


class ParsedLines(NamedTuple):
    """What the lines of a block say."""

    table: pa.Table
    lines: np.ndarray
    """int64, the line each row comes from."""
    bad: list[BadRow]
    """In the order of the file."""


def parse_block(block: Block, layout: Layout, most_bad: int) -> ParsedLines:
    """The good lines of a block and the bad ones; gives up after `most_bad` + 1 of these."""
    tables: list[pa.Table] = []
    lines: list[np.ndarray] = []
    bad: list[BadRow] = []
    pieces = [block]
    while pieces and len(bad) <= most_bad:
        piece = pieces.pop()
        try:
            table = _parse(piece.text, layout)
            # Arrow takes a lone carriage return for the end of a line.
            num_lines = piece.text.count(b"\n")
            _demand(len(table) == num_lines)
        except _MalformedError:
            halves = _halve(piece)
            if halves is None:
                bad.append(BadRow(piece.first_line, _explain(piece.text, layout)))
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
    """Two blocks of about half the bytes; None where the block is one line."""
    middle = len(block.text) // 2
    cut = block.text.rfind(b"\n", 0, middle) + 1 or block.text.find(b"\n", middle) + 1
    if cut == len(block.text):
        return None
    head = block.text[:cut]
    return (
        Block(block.first_line, head),
        Block(block.first_line + head.count(b"\n"), block.text[cut:]),
    )


def _shown(text: bytes) -> str:
    shown = text.decode("utf-8", errors="backslashreplace")
    return repr(shown if len(shown) <= 40 else f"{shown[:37]}...")


def _as_integer(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.removeprefix(b"-").isdigit() else None


def _explain(line: bytes, layout: Layout) -> str:
    """What is wrong with one line, in words that continue 'line 3: '."""
    cells = line.rstrip(b"\r\n").split(b",")
    if cells == [b""]:
        return "the line is empty"
    if len(cells) != len(layout.columns):
        return f"{len(cells)} columns where {len(layout.columns)} belong"
    of = dict(zip(layout.columns, cells, strict=True))
    if SAMPLE_ID in of:
        number = _as_integer(of[SAMPLE_ID])
        if number is None or not 0 <= number < 2**63:
            return f"sample_id {_shown(of[SAMPLE_ID])} is not a whole number below 2^63"
        for label in (CLICK, "purchase"):
            if of[label].strip() not in (b"0", b"1"):
                return f"{label} {_shown(of[label])} is neither 0 nor 1"
    digits = np.frombuffer(of[INDEX], np.uint8)
    if len(digits) != _INDEX_DIGITS or (_HEX[digits] > 15).any():
        return f"{INDEX} {_shown(of[INDEX])} is not {_INDEX_DIGITS} hex digits"
    count = _as_integer(of[_FEATURE_NUM])
    if count is None or count < 0:
        return f"feature_num {_shown(of[_FEATURE_NUM])} is not a whole number"
    features = of[_FEATURE_LIST].split(b"\x01") if of[_FEATURE_LIST] else []
    if len(features) != count:
        return f"feature_num is {count} and feature_list holds {len(features)} features"
    return _explain_features(features, layout) or "not in the form of this file"


def _explain_features(features: Sequence[bytes], layout: Layout) -> str | None:
    known = {feature.name: feature for feature in layout.features}
    seen: set[str] = set()
    for feature in features:
        parts = feature.replace(b"\x03", b"\x02").split(b"\x02")
        if len(parts) != 3:
            return f"the feature {_shown(feature)} is not a field, an id and a value"
        name, number = parts[0].decode(errors="backslashreplace"), _as_integer(parts[1])
        if name not in known:
            if any(name == other.name for other in FIELDS):
                return f"field {_shown(parts[0])} belongs in the other file"
            return f"field {_shown(parts[0])} is unknown"
        if name in seen and not known[name].multi_valued:
            return f"field {_shown(parts[0])} has two values and takes one"
        seen.add(name)
        if number is None:
            return f"id {_shown(parts[1])} of field {name} is not a whole number"
        if not 0 <= number < 2**63:
            return f"id {number} of field {name} is not between 0 and 2^63 - 1"
        try:
            value = float(parts[2])
        except ValueError:
            return f"value {_shown(parts[2])} of field {name} is not a number"
        if not math.isfinite(value) or abs(value) > _HIGHEST_FLOAT32:
            return f"value {_shown(parts[2])} of field {name} is not a finite float32"
    return None


# Files → blocks


class RawFile(NamedTuple):
    """A raw file that is open, by itself or within its archive."""

    name: str
    """After that of the archive where it is in one."""
    path: str
    """The same, and where it is."""
    size: int
    stream: IO[bytes]


class Folder:
    """Raw files as they are."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    @property
    def names(self) -> list[str]:
        """The files, as progress and errors call them."""
        return [path.name for path in self._files.values()]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[RawFile]:
        """One of the raw files, by its name at the source."""
        path = self._files[name]
        with path.open("rb", buffering=0) as stream:
            yield RawFile(path.name, str(path), path.stat().st_size, stream)

    def close(self) -> None:
        """Nothing stays open between files."""


class Archive:
    """Raw files inside a tar.gz, read as a stream: forward while the next member lies ahead, from
    the beginning again where it lies behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._gzip: gzip.GzipFile | None = None
        self._tar: tarfile.TarFile | None = None

    @property
    def names(self) -> list[str]:
        return [self._path.name]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[RawFile]:
        try:
            member = self._find(name)
            assert self._tar is not None
            stream = self._tar.extractfile(member)
            if stream is None:
                raise DataError(f"{name} in {self._path} is no file; download the archive again")
            with stream:
                label = f"{self._path.name}: {name}"
                yield RawFile(label, str(self._path.with_name(label)), member.size, stream)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error):
            raise DataError(f"{self._path} is cut short or broken; download it again") from None

    def _find(self, name: str) -> tarfile.TarInfo:
        started_here = self._tar is None
        if self._tar is None:
            self._gzip = gzip.GzipFile(self._path)
            self._tar = tarfile.TarFile.open(fileobj=self._gzip, mode="r|", bufsize=1 << 20)
        while (member := self._tar.next()) is not None:
            if member.isfile() and Path(member.name).name == name:
                return member
        self.close()
        if started_here:
            raise DataError(f"{self._path} holds no {name}; download it again")
        return self._find(name)

    def close(self) -> None:
        if self._tar is not None and self._gzip is not None:
            self._tar.close()
            self._gzip.close()
        self._tar = self._gzip = None


def skeleton_file(split: SplitName) -> str:
    """Name of the file of a split's impressions."""
    return f"sample_skeleton_{split}.csv"


def common_file(split: SplitName) -> str:
    """Name of the file of the features that a split's impressions share."""
    return f"common_features_{split}.csv"


def locate(raw: Path, split: SplitName) -> Folder | Archive:
    """The raw files of a split: the two csv files, else the archive."""
    wanted = (common_file(split), skeleton_file(split))
    found: dict[str, Path] = {}
    for name in wanted:
        for path in (raw / name, *sorted(raw.glob(f"*/{name}"))):
            if path.is_file():
                found.setdefault(name, path)
    archive = raw / f"sample_{split}.tar.gz"
    if len(found) < len(wanted):
        if archive.is_file():
            return Archive(archive)
        missing = [name for name in wanted if name not in found]
        if len(missing) == 1:
            raise DataError(f"{raw / missing[0]} is missing; put it beside the other raw files")
        raise DataError(
            f"{raw} holds neither {wanted[1]} and {wanted[0]} nor {archive.name}; download "
            f"Ali-CCP, or make such data with 'esmm-torchrec generate {raw} --impressions 100000'"
        )
    for path in found.values():
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; download it again")
    return Folder(found)


def read_blocks(file: RawFile, block_bytes: int) -> Iterator[Block]:
    """Whole lines, about `block_bytes` at a time."""
    line, rest = 1, b""
    while data := file.stream.read(block_bytes):
        cut = data.rfind(b"\n") + 1
        if cut == 0:
            rest += data
            if len(rest) > _LONGEST_LINE:
                raise DataError(
                    f"{file.path}, line {line}: longer than {_LONGEST_LINE} bytes; this is no "
                    "Ali-CCP file"
                )
            continue
        text, rest = rest + data[:cut], data[cut:]
        yield Block(line, text)
        line += text.count(b"\n")
    if rest:
        yield Block(line, rest + b"\n")
    elif line == 1:
        raise DataError(f"{file.path} is empty; download it again")
