"""Raw id → row of an embedding table, and the counting that decides which ids get a row.

Row 0 is never listed: it is for ids that are rare or not seen in training. The other rows are
ordered by descending count, ties by ascending raw id, so a vocabulary depends on the counts of ids
and not on the order of the impressions.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esmm_torchrec.data.storage import HashedOutput, Location, reading
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import UNKNOWN_ROW

_DENSE_SPAN = 1 << 23
"""Widest range of integer ids (highest - lowest) that is counted in one array (64 MiB)."""

_MERGE_ROWS = 1 << 20
"""Minimum number of waiting ids before they are merged."""

_LOOKUP_SLOTS_PER_ID = 16
"""Maximum number of slots per id of an array over the range of integer ids; beyond it, look-ups use
binary search."""

_MAX_HASHED = 1 << 15
"""Maximum size of a vocabulary of texts that is hashed again for each block of ids to look up. A
larger one is sorted once and searched."""

MAX_IDS = 2**31 - 2
"""Maximum number of ids of one table. Rows are int32, and row 0 is the unknown id."""

# 32-bit offsets hold 2 GiB of characters, which are 59 million ids of 36 characters.
_TEXT = pa.large_string()

_RARE = pa.schema([("raw_id", pa.int64()), ("count", pa.int64())])

IdKind = Literal["integer", "text"]


def _kind(ids: pa.DataType) -> IdKind:
    return "text" if ids == _TEXT else "integer"


def check_kind(ids: pa.Array, kind: IdKind) -> None:
    """Raises DataError if `ids`, the result of `id_array`, are not of a kind."""
    if _kind(ids.type) != kind:
        raise DataError(
            f"{_kind(ids.type)} ids cannot be looked up among {kind} ids; give the column the type "
            "it had when the data set was prepared"
        )


def id_array(raw_ids: pa.Array | pa.ChunkedArray | np.ndarray) -> pa.Array:
    """Returns raw ids as one Arrow array of int64 or large_string; nulls stay null.

    Raises:
        DataError: the ids are neither integers nor strings, or an integer is over 2^63 - 1.
    """
    ids: Any = pa.array(raw_ids) if isinstance(raw_ids, np.ndarray) else raw_ids
    kind = ids.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        target = pa.int64()
    elif (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    ):
        target = _TEXT
    else:
        raise DataError(f"ids must be integers or strings, not {kind}; convert the column")
    try:
        # The cast comes first: chunks of strings may be too long for one array together.
        ids = ids if ids.type == target else ids.cast(target)
        return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    except pa.ArrowInvalid:
        raise DataError("an id is over 9223372036854775807; store such ids as strings") from None


class Vocabulary:
    """Mapping from the raw ids of one table to its rows.

    `raw_ids` (int64 or large_string) and `counts` (int64) are in row order; the first has row 1.
    Create one with `from_counts` or `IdCounter.vocabulary`.
    """

    def __init__(
        self, raw_ids: pa.Array, counts: np.ndarray, *, rare: pa.Table | None = None
    ) -> None:
        assert len(raw_ids) == len(counts)
        self.raw_ids = raw_ids
        self.counts = counts
        self.rare = _RARE.empty_table() if rare is None else rare
        """raw_id and count of ids that are too rare for a row."""

    @classmethod
    def from_counts(
        cls,
        raw_ids: pa.Array | np.ndarray,
        counts: np.ndarray,
        min_count: int,
    ) -> Vocabulary:
        """Returns the vocabulary of the ids that occur `min_count` times or more.

        Args:
            raw_ids: distinct ids, integers or strings, in any order, none null.
            counts: int64, count of each.
            min_count: minimum count of an id with a row.

        Raises:
            DataError: more than MAX_IDS ids get a row.
        """
        counted = pa.table({"raw_id": id_array(raw_ids), "count": pa.array(counts, pa.int64())})
        table = counted.filter(pc.field("count") >= min_count)
        table = table.sort_by([("count", "descending"), ("raw_id", "ascending")])
        check_number_of_ids(len(table), min_count)
        return cls(
            table.column("raw_id").combine_chunks(),
            table.column("count").to_numpy(),
            rare=counted.filter(pc.field("count") < min_count),
        )

    def grown(
        self, raw_ids: pa.Array | np.ndarray, counts: np.ndarray, min_count: int
    ) -> Vocabulary:
        """Returns this vocabulary after more impressions: ids with a row keep it, and ids that
        reach `min_count` get the next rows, ordered as in `from_counts`.

        Args:
            raw_ids: distinct ids, none null, of the added impressions and of `rare`.
            counts: int64, number of added impressions with each, plus its count in `rare`.
            min_count: same as in `from_counts`.

        Raises:
            DataError: same as `from_counts` and `encode`.
        """
        ids = id_array(raw_ids)
        rows = self.encode(ids)
        known = rows != UNKNOWN_ROW
        totals = self.counts.copy()
        totals[rows[known] - 1] += counts[known]
        further = Vocabulary.from_counts(ids.filter(pa.array(~known)), counts[~known], min_count)
        if len(self.raw_ids) == 0:
            return further
        check_number_of_ids(len(self.raw_ids) + len(further.raw_ids), min_count)
        return Vocabulary(
            pa.concat_arrays([self.raw_ids, further.raw_ids]),
            np.concatenate([totals, further.counts]),
            rare=further.rare,
        )

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the table, including row 0."""
        return len(self.raw_ids) + 1

    @property
    def distinct_ids(self) -> int:
        """Number of ids counted, including those too rare for a row."""
        return len(self.raw_ids) + len(self.rare)

    @property
    def kind(self) -> IdKind:
        """Kind of the raw ids."""
        return _kind(self.raw_ids.type)

    def encode(self, raw_ids: pa.Array | pa.ChunkedArray | np.ndarray) -> np.ndarray:
        """Returns the rows of `raw_ids`, int32 of the same length.

        Ids that are not in the vocabulary map to row 0. So do nulls, although a missing id has no
        row: keep their mask, or drop them before.

        Raises:
            DataError: the ids are strings and those of the vocabulary integers, or the reverse.
        """
        ids = id_array(raw_ids)
        if len(ids) == 0 or len(self.raw_ids) == 0 or ids.null_count == len(ids):
            return np.full(len(ids), UNKNOWN_ROW, np.int32)
        check_kind(ids, self.kind)
        if ids.type == _TEXT:
            encoded = ids.dictionary_encode()
            rows = np.append(self._encode_texts(encoded.dictionary), np.int32(UNKNOWN_ROW))
            return rows[encoded.indices.fill_null(-1).to_numpy()]
        if ids.null_count:
            mask = ids.is_valid().to_numpy(zero_copy_only=False)
            return np.where(mask, self.rows_of(ids.fill_null(0).to_numpy()), UNKNOWN_ROW)
        return self.rows_of(ids.to_numpy())

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Returns the rows of integer ids, int32 (n,) from int64 (n,); ids must be integers."""
        if len(self.raw_ids) == 0:
            return np.full(len(ids), UNKNOWN_ROW, np.int32)
        first, slots = self._slots
        if slots is not None:
            # The outermost slots contain row 0, and a difference that overflows is clipped to one.
            return slots.take(ids - first, mode="clip")
        # Each distinct id once and in order: consecutive searches end near each other.
        distinct, inverse = np.unique(ids, return_inverse=True)
        ordered, rows = self._sorted
        places = np.minimum(np.searchsorted(ordered, distinct), len(ordered) - 1)
        found = np.where(ordered[places] == distinct, rows[places], np.int32(UNKNOWN_ROW))
        return found[inverse]

    def _encode_texts(self, texts: pa.Array) -> np.ndarray:
        if len(self.raw_ids) <= _MAX_HASHED:
            known = pc.SetLookupOptions(value_set=self.raw_ids)
            places = pc.call_function("index_in", [texts], known).fill_null(-1).to_numpy()
            return (places + 1).astype(np.int32)
        ordered, rows = self._sorted_texts
        # In order, as above.
        order = pc.call_function("array_sort_indices", [texts]).to_numpy()
        wanted = texts.take(pa.array(order))
        places = pc.call_function("search_sorted", [ordered, wanted]).to_numpy()
        places = np.minimum(places, len(ordered) - 1)
        is_there = pc.call_function("equal", [ordered.take(pa.array(places)), wanted])
        found = np.empty(len(texts), np.int32)
        found[order] = np.where(is_there.to_numpy(False), rows[places], np.int32(UNKNOWN_ROW))
        return found

    @cached_property
    def _sorted_texts(self) -> tuple[pa.Array, np.ndarray]:
        order = pc.call_function("array_sort_indices", [self.raw_ids])
        return self.raw_ids.take(order), (order.to_numpy() + 1).astype(np.int32)

    @cached_property
    def _slots(self) -> tuple[int, np.ndarray | None]:
        ids = self.raw_ids.to_numpy()
        first, last = int(ids.min()) - 1, int(ids.max()) + 1
        too_wide = last - first > max(_LOOKUP_SLOTS_PER_ID * len(ids), 1 << 16)
        if too_wide or first < -(2**63):
            return first, None
        slots = np.full(last - first + 1, UNKNOWN_ROW, np.int32)
        slots[ids - first] = np.arange(1, len(ids) + 1, dtype=np.int32)
        return first, slots

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        ids = self.raw_ids.to_numpy()
        order = np.argsort(ids)
        return ids[order], (order + 1).astype(np.int32)

    def write(self, file: Path | HashedOutput) -> None:
        """Writes raw_id, row (int32) and count (int64) as Parquet, in row order."""
        rows = pa.array(np.arange(1, self.num_embeddings, dtype=np.int32))
        table = pa.table(
            {"raw_id": self.raw_ids, "row": rows, "count": pa.array(self.counts, pa.int64())}
        )
        pq.write_table(table, file, compression="zstd")

    @classmethod
    def read(cls, path: Path | Location) -> Vocabulary:
        """Reads a vocabulary written by `write`.

        Raises:
            DataError: the file is missing, cannot be read, or is not a vocabulary.
        """
        table = _read(path)
        kinds = table.schema.types
        if (
            table.column_names != ["raw_id", "row", "count"]
            or kinds[0] not in (pa.int64(), _TEXT)
            or kinds[1:] != [pa.int32(), pa.int64()]
            or any(column.null_count for column in table.columns)
            or not np.array_equal(table.column("row").to_numpy(), np.arange(1, len(table) + 1))
        ):
            raise DataError(f"{path} is not a vocabulary; prepare the data set again")
        raw_ids = table.column("raw_id").combine_chunks()
        return cls(raw_ids, table.column("count").to_numpy())

    def write_rare(self, file: Path | HashedOutput) -> None:
        """Writes `rare` as Parquet, in the order of the ids."""
        pq.write_table(self.rare.sort_by("raw_id"), file, compression="zstd")

    @staticmethod
    def read_rare(path: Path | Location) -> pa.Table:
        """Reads the table written by `write_rare`.

        Raises:
            DataError: the file is missing or cannot be read.
        """
        return _read(path)


def _read(path: Path | Location) -> pa.Table:
    location = Location.of(path)
    with reading(location, "prepare the data set again"), location.open_input() as file:
        return location.retried(lambda: pq.ParquetFile(file).read())


def check_number_of_ids(number: int, min_count: int) -> None:
    """Raises DataError if the ids are more than a table can have."""
    if number > MAX_IDS:
        raise DataError(
            f"{number} ids occur {min_count} times or more, but a table holds at most {MAX_IDS}; "
            "give a higher minimum count"
        )


class IdCounter:
    """Counts ids block by block, in memory bounded by the number of distinct ids.

    Integers in a narrow range are counted in one array; other integers, and strings, in lists of
    (id, count) that are merged whenever they have doubled.

    Args:
        kind: kind of the ids; None: that of the first ones added.
    """

    def __init__(self, kind: IdKind | None = None) -> None:
        self._type = None if kind is None else {"integer": pa.int64(), "text": _TEXT}[kind]
        self._low = 0
        self._dense = np.zeros(0, np.int64)
        self._lists: list[pa.Table] = []
        """Tables of raw_id and count; after a merge, the first one has each id once."""
        self._merged = 0
        """Number of ids in the first table; 0 before the first merge."""
        self._waiting = 0
        """Number of ids in the other tables."""

    def add(
        self,
        raw_ids: pa.Array | pa.ChunkedArray | np.ndarray,
        impressions: np.ndarray | None = None,
    ) -> None:
        """Counts the ids of a block, except nulls.

        Args:
            raw_ids: n ids.
            impressions: int (n,), number of impressions in which each occurs, since a shared row is
                stored once; None: one each.

        Raises:
            DataError: strings were added after integers, or the reverse.
        """
        ids = id_array(raw_ids)
        if ids.null_count:
            if impressions is not None:
                impressions = impressions[ids.is_valid().to_numpy(zero_copy_only=False)]
            ids = ids.drop_null()
        if len(ids) == 0:
            return
        if self._type is not None and self._type != ids.type:
            raise DataError(
                f"{_kind(ids.type)} ids occur together with {_kind(self._type)} ids of the same "
                "table; use the same type for both"
            )
        self._type = ids.type
        if pa.types.is_int64(ids.type) and not self._lists:
            values = ids.to_numpy()
            if self._make_room(int(values.min()), int(values.max())):
                counts = _bincount(values - self._low, impressions)
                self._dense[: len(counts)] += counts
                return
        self._append(*_distinct(ids, impressions))

    def _make_room(self, low: int, high: int) -> bool:
        """Widens the array to [low, high]; if that is too wide, its counts move to the lists."""
        size = len(self._dense)
        if size:
            if self._low <= low and high < self._low + size:
                return True
            low, high = min(low, self._low), max(high, self._low + size - 1)
        if high - low >= _DENSE_SPAN:
            if size:
                self._append(*self._dense_counts())
                self._dense = np.zeros(0, np.int64)
            return False
        # Room to grow above, or every block with a new highest id would copy the array.
        widened = np.zeros(min(_DENSE_SPAN, (high - low + 1) * 5 // 4), np.int64)
        if size:
            widened[self._low - low : self._low - low + size] = self._dense
        self._low, self._dense = low, widened
        return True

    def _dense_counts(self) -> tuple[pa.Array, pa.Array]:
        (places,) = np.nonzero(self._dense)
        return pa.array(places + self._low), pa.array(self._dense[places])

    def _append(self, ids: pa.Array, counts: pa.Array) -> None:
        self._lists.append(pa.table({"raw_id": ids, "count": counts}))
        self._waiting += len(ids)
        if self._waiting > max(_MERGE_ROWS, self._merged):
            self._merge()

    def _merge(self) -> None:
        table = pa.concat_tables(self._lists)
        ids, counts = _distinct(id_array(table["raw_id"]), table["count"].to_numpy())
        self._lists = [pa.table({"raw_id": ids, "count": counts})]
        self._merged, self._waiting = len(ids), 0

    def counts(self) -> tuple[pa.Array, np.ndarray]:
        """Returns the distinct ids counted so far, and the count of each, int64."""
        if not self._lists:
            ids, counts = self._dense_counts()
            return ids.cast(_TEXT) if self._type == _TEXT else ids, counts.to_numpy()
        if self._waiting:
            self._merge()
        (merged,) = self._lists
        return id_array(merged["raw_id"]), merged["count"].to_numpy()

    def vocabulary(self, min_count: int) -> Vocabulary:
        """Returns the vocabulary of the ids that occurred `min_count` times or more so far."""
        return Vocabulary.from_counts(*self.counts(), min_count)


def _distinct(ids: pa.Array, counts: np.ndarray | None) -> tuple[pa.Array, pa.Array]:
    """Returns the distinct ids, with the number of occurrences or the sum of `counts` of each."""
    encoded = ids.dictionary_encode()
    summed = _bincount(encoded.indices.to_numpy(), counts)
    return encoded.dictionary, pa.array(summed, pa.int64())


def _bincount(values: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    # NumPy sums in float64, which is exact below 2^53.
    return np.bincount(values, weights=counts).astype(np.int64, copy=False)
