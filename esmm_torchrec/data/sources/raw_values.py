"""Values in raw columns: text, numbers, labels.

The functions take an Arrow column as a file contains it and return its values with a `Fault` for
the rows that cannot be used, so that a caller may report them, skip them or stop. A missing number
is NaN. A problem of a whole column raises an error.

A value reads the same from every kind of file. Text follows CSV: NULL_TEXTS are missing values, in
Parquet too.

In shapes, n is the number of rows of a block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas.util
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.errors import DataError

pc: Any = pyarrow.compute
"""pyarrow creates these functions on import, so type checkers know none of them."""

_hash_array: Any = pandas.util.hash_array

NULL_TEXTS = ("", "NaN", "nan", "NULL", "null")
"""Texts that mean a missing value. "NA" is not among them: it is also the code of Namibia."""

_INTEGER_TEXT = r"^(0|-?[1-9][0-9]*)$"
MAX_INT64 = 2**63 - 1


@dataclass(frozen=True)
class Fault:
    """Rows of a block that cannot be used, and why."""

    column: str
    rows: np.ndarray
    """bool (n,), the rows that cannot be used."""
    describe: Callable[[int], str]
    """Function from a row to the problem of its value, as the end of a sentence."""

    @classmethod
    def of(
        cls, column: str, rows: np.ndarray, values: pa.Array | pa.ChunkedArray, must_be: str
    ) -> Fault:
        """Creates the fault of those `values` (n,) that are not `must_be`, such as "a finite
        number"."""
        return cls(column, rows, lambda row: describe(values[row].as_py(), must_be))


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a string type."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def is_number(kind: pa.DataType) -> bool:
    """Whether an Arrow type is numeric or boolean."""
    types = pa.types
    # pandas stores integers with missing values as floats; databases export keys as decimals.
    numbers = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean)
    return any(is_one(kind) for is_one in numbers)


def one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Returns a column without chunks or a dictionary; text as string, with null for NULL_TEXTS."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not is_text(array.type):
        return array
    array = array.cast(pa.string())
    is_null = pc.is_in(array, value_set=pa.array(NULL_TEXTS))
    return pc.if_else(is_null, pa.scalar(None, pa.string()), array)


def is_null(array: pa.Array) -> np.ndarray:
    """Returns which values are null, bool (n,)."""
    return array.is_null().to_numpy(zero_copy_only=False)


def is_missing(array: pa.Array) -> np.ndarray:
    """Returns which values are null or NaN, bool (n,)."""
    return array.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)


def cast_what_can_be(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """Casts an array to `kind`, null if a value does not fit, and returns a mask of such values.
    Only stretches with such a value are cast piece by piece."""
    try:
        return array.cast(kind), np.zeros(len(array), np.bool_)
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, kind), np.ones(1, np.bool_)
    half = len(array) // 2
    low, low_failed = cast_what_can_be(array[:half], kind)
    high, high_failed = cast_what_can_be(array[half:], kind)
    return pa.concat_arrays([low, high]), np.concatenate([low_failed, high_failed])


def _plain_text(texts: pa.Array) -> pa.Array:
    """Rewrites spellings of numbers that Arrow cannot read: surrounding spaces, true and false."""
    texts = pc.utf8_trim_whitespace(texts)
    lower = pc.utf8_lower(texts)
    texts = pc.if_else(pc.equal(lower, "true"), "1", texts)
    return pc.if_else(pc.equal(lower, "false"), "0", texts)


def _numbers_in(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Parses texts to float64, and returns a mask of texts that are not numbers."""
    try:
        return texts.cast(pa.float64()), np.zeros(len(texts), np.bool_)
    except pa.ArrowInvalid:
        return cast_what_can_be(_plain_text(texts), pa.float64())


def floats(column: pa.Array | pa.ChunkedArray, name: str) -> np.ndarray:
    """Converts a column to float64 (n,), NaN if a value is missing or is not a number."""
    array = one_array(column)
    kind = array.type
    if is_text(kind):
        array, _ = _numbers_in(array)
    elif pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    elif not (is_number(kind) or pa.types.is_null(kind)):
        raise DataError(f"column {name!r} holds {kind} instead of numbers; convert it")
    return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _integer_texts(texts: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Returns integers as text, without spaces and without zeros after the point, and a mask of the
    texts that are integers. 007 is not: as a number it would equal 7."""
    plain = pc.replace_substring_regex(_plain_text(texts), r"\.0*$", "")
    return plain, pc.match_substring_regex(plain, _INTEGER_TEXT)


def holds_integers(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether all texts of a column of a text file are 64-bit integers or missing. 7, 7.0, true and
    false are integers; 007 is not."""
    _, failed = integers_in(one_array(column), "")
    return not failed.any()


def holds_text(column: pa.Array | pa.ChunkedArray, part: str) -> bool:
    """Whether any text of a column contains `part`."""
    array = one_array(column)
    return is_text(array.type) and bool(pc.any(pc.match_substring(array, part)).as_py())


def integers_in(array: pa.Array, name: str) -> tuple[pa.Array, np.ndarray]:
    """Converts to int64, null if a value is missing or is not an integer; also returns a mask of
    the latter."""
    if is_text(array.type):
        with contextlib.suppress(pa.ArrowInvalid):
            integers = array.cast(pa.int64())
            if integers.cast(pa.string()).equals(array):
                return integers, np.zeros(len(array), np.bool_)
        plain, is_integer = _integer_texts(array)
        integers, failed = cast_what_can_be(
            pc.if_else(is_integer, plain, pa.scalar(None, pa.string())), pa.int64()
        )
        return integers, failed | ~is_integer.fill_null(True).to_numpy(zero_copy_only=False)
    if not (is_number(array.type) or pa.types.is_null(array.type)):
        raise DataError(f"column {name!r} holds {array.type} instead of integers; convert it")
    if not pa.types.is_floating(array.type):
        return cast_what_can_be(array, pa.int64())
    floats = array.to_numpy(zero_copy_only=False)
    # Beyond this, neighbouring integers share a float: the exact id is already lost.
    exact = 2.0 ** (np.finfo(floats.dtype).nmant + 1)
    failed = (np.abs(floats) > exact) | (floats != np.floor(floats)) & ~np.isnan(floats)
    usable = ~failed & ~np.isnan(floats)
    return pa.array(np.where(usable, floats, 0).astype(np.int64), mask=~usable), failed


def describe(value: object, must_be: str) -> str:
    """Returns the end of a sentence about a value that cannot be used."""
    if value is None or value in NULL_TEXTS or (isinstance(value, float) and math.isnan(value)):
        return f"the value is missing and must be {must_be}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} is not {must_be}"


class LabelReader:
    """Reads one label column: 0 and 1, -1 and 1, or words such as yes and no.

    Both 0 and -1 may mean no, but not in the same column: if both occur, one of them means
    something else, perhaps "unknown".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._no: set[float] = set()

    def read(self, column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, Fault, np.ndarray]:
        """Reads labels, int8 (n,), the fault of rows without one, and missing labels, bool (n,).

        Raises:
            DataError: the column contains both 0 and -1, or has a type that cannot hold labels.
        """
        array = one_array(column)
        if is_text(array.type):
            words = pc.utf8_lower(pc.utf8_trim_whitespace(array))
            place = pc.index_in(words, value_set=pa.array(LABEL_WORDS))
            digit = pc.take(pa.array(["0", "1"] * (len(LABEL_WORDS) // 2)), place)
            array = pc.coalesce(digit, array)
        values = floats(array, self.name)
        self._no |= {no for no in (0.0, -1.0) if (values == no).any()}
        if len(self._no) > 1:
            raise DataError(
                f"column {self.name!r} holds both 0 and -1, and only one of them can mean no; "
                "leave the other one empty or remove its rows"
            )
        bad = ~np.isin(values, (0, 1, -1))
        fault = Fault.of(self.name, bad, column, "a label, 0 or 1, no or yes")
        return (values == 1).astype(np.int8), fault, is_missing(array)


LABEL_WORDS = ("no", "yes", "false", "true", "n", "y", "f", "t")
"""Texts that mean 0 and 1, alternately."""


def read_numbers(
    column: pa.Array | pa.ChunkedArray, name: str, *, may_be_missing: bool = False
) -> tuple[np.ndarray, Fault]:
    """Reads numbers of any type or text, float64 (n,), NaN if missing; each must be finite or, with
    `may_be_missing`, missing."""
    values = floats(column, name)
    bad = ~np.isfinite(values)
    if may_be_missing and bad.any():
        bad &= ~is_missing(one_array(column))
    return values, Fault.of(name, bad, column, "a finite number")


def read_weights(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, Fault]:
    """Reads weights of impressions, float32 (n,); each must be finite and 0 or more."""
    values = float32(floats(column, name))
    bad = ~((values >= 0) & np.isfinite(values))
    return values, Fault.of(name, bad, column, "a weight, 0 or more")


def read_probabilities(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, Fault]:
    """Reads probabilities as `read_numbers` does, float64 (n,); each must be in [0, 1]."""
    values = floats(column, name)
    bad = ~((values >= 0) & (values <= 1))
    return values, Fault.of(name, bad, column, "a probability, 0 to 1")


def read_integers(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, Fault]:
    """Reads integers, floats without a fraction, or text, int64 (n,); none may be missing."""
    integers, failed = integers_in(one_array(column), name)
    fault = Fault.of(name, failed | is_null(integers), column, "an integer of 64 bits")
    return integers.fill_null(0).to_numpy(), fault


def row_hashes(numbers: np.ndarray) -> np.ndarray:
    """Hashes int64 numbers (n,) to uint64 (n,), well mixed, the same on every machine."""
    return np.asarray(_hash_array(numbers, categorize=False))


def float32(values: np.ndarray) -> np.ndarray:
    """Converts float64 (n,) to float32 (n,); values that are too large become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
