"""The values in raw columns: numbers out of texts, ids as int64 or string, lists and weights.

Everything here takes an Arrow column as somebody's file has it and gives the values with a `Fault`
for the rows that cannot be used, so that a caller may name them, skip them or stop. A missing id is
null; a missing number or label is a fault. What is wrong with a column as a whole is raised.

In this file: n rows of a block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas.util
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.errors import DataError

pc: Any = pyarrow.compute
"""Its functions are made when it is imported; type checkers know none of them."""

_hash_array: Any = pandas.util.hash_array

IdKind = Literal["integer", "text"]

_INTEGER_TEXT = r"^(0|-?[1-9][0-9]*)$"
_MAX_INT64 = 2**63 - 1


@dataclass(frozen=True)
class Fault:
    """Rows of a block that cannot be used, and why."""

    column: str
    rows: np.ndarray
    """bool (n,)."""
    describe: Callable[[int], str]
    """What is wrong with the value in a row: the end of a sentence."""


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of lists. Views are none: pyarrow 26 casts them wrongly."""
    is_one = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in is_one)


def id_kind(kind: pa.DataType) -> IdKind | None:
    """Whether ids of an Arrow type, or in lists of it, are integers or text; None where all are
    null.

    Raises:
        TypeError: the type is neither.
    """
    return _single_id_kind(kind.value_type if is_list(kind) else kind)


def _single_id_kind(kind: pa.DataType) -> IdKind | None:
    kind = _value_type(kind)
    if is_text(kind):
        return "text"
    # Integers with missing values come as floats from pandas, keys as decimals from data bases.
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    if any(is_number(kind) for is_number in numbers):
        return "integer"
    if pa.types.is_null(kind):
        return None
    raise TypeError(f"{kind} is no type for ids")


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_null(array: pa.Array) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


def _cast_what_can_be(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, np.ndarray]:
    """`array` as `kind`, null where a value has no place in it, and a mask of those values. Only
    stretches that hold one are cast piece by piece."""
    try:
        return array.cast(kind), np.zeros(len(array), np.bool_)
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, kind), np.ones(1, np.bool_)
    half = len(array) // 2
    low, low_failed = _cast_what_can_be(array[:half], kind)
    high, high_failed = _cast_what_can_be(array[half:], kind)
    return pa.concat_arrays([low, high]), np.concatenate([low_failed, high_failed])


def _plain_text(texts: pa.Array) -> pa.Array:
    """Spellings of numbers that Arrow does not read: spaces around, true and false."""
    texts = pc.utf8_trim_whitespace(texts)
    lower = pc.utf8_lower(texts)
    texts = pc.if_else(pc.equal(lower, "true"), "1", texts)
    return pc.if_else(pc.equal(lower, "false"), "0", texts)


def _floats(column: pa.Array | pa.ChunkedArray, name: str) -> np.ndarray:
    """float64 (n,), NaN where a value is missing or is no number."""
    array = _one_array(column)
    kind = array.type
    if is_text(kind):
        try:
            array = array.cast(pa.float64())
        except pa.ArrowInvalid:
            array, _ = _cast_what_can_be(_plain_text(array), pa.float64())
    elif pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    elif not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(f"column {name!r} holds {kind} where numbers belong; convert it")
    return array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _integer_texts(texts: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Integers as they are written, without spaces and zeros behind the point, and a mask of the
    texts that are one. 007 is none: as a number it would be one with 7."""
    plain = pc.replace_substring_regex(_plain_text(texts), r"\.0*$", "")
    return plain, pc.match_substring_regex(plain, _INTEGER_TEXT)


def holds_integers(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether all texts of a column of a CSV are integers, of any size, or missing. 7, 7.0, true
    and false are; 007 is not."""
    texts = _one_array(column)
    try:
        if texts.cast(pa.int64()).cast(pa.string()).equals(texts):
            return True
    except pa.ArrowInvalid:
        pass
    _, is_integer = _integer_texts(texts)
    return pc.all(is_integer).as_py() is not False


def _integers(array: pa.Array, name: str) -> tuple[pa.Array, np.ndarray]:
    """int64, null where a value is missing or is no integer; and a mask of the latter."""
    if is_text(array.type):
        texts = array.cast(pa.string())
        try:
            integers = texts.cast(pa.int64())
            if integers.cast(pa.string()).equals(texts):
                return integers, np.zeros(len(texts), np.bool_)
        except pa.ArrowInvalid:
            pass
        plain, is_integer = _integer_texts(texts)
        integers, failed = _cast_what_can_be(
            pc.if_else(is_integer, plain, pa.scalar(None, pa.string())), pa.int64()
        )
        not_one = pc.invert(is_integer).fill_null(False).to_numpy(zero_copy_only=False)
        return integers, failed | not_one
    try:
        _single_id_kind(array.type)
    except TypeError:
        raise DataError(
            f"column {name!r} holds {array.type} where integers belong; convert it"
        ) from None
    if not pa.types.is_floating(array.type):
        return _cast_what_can_be(array, pa.int64())
    floats = array.to_numpy(zero_copy_only=False)
    # Beyond it neighbours are one float: such ids were lost before they came here.
    exact = 2.0 ** (np.finfo(floats.dtype).nmant + 1)
    failed = (np.abs(floats) > exact) | (floats != np.floor(floats)) & ~np.isnan(floats)
    usable = ~failed & ~np.isnan(floats)
    return pa.array(np.where(usable, floats, 0).astype(np.int64), mask=~usable), failed


def _describe(array: pa.Array | pa.ChunkedArray, row: int, must_be: str) -> str:
    value = array[row].as_py()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"the value is missing and must be {must_be}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} is not {must_be}"


def read_labels(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, Fault]:
    """Labels, int8 (n,), from 0/1 as integers, floats, booleans or text; nothing else is one."""
    values = _floats(column, name)
    bad = (values != 0) & (values != 1)
    labels = np.where(bad, 0, values).astype(np.int8)
    return labels, Fault(name, bad, lambda row: _describe(column, row, "a label, 0 or 1"))


def read_numbers(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, Fault]:
    """float64 (n,) from numbers of any type or text; each must be there and finite."""
    values = _floats(column, name)
    bad = ~np.isfinite(values)
    return values, Fault(name, bad, lambda row: _describe(column, row, "a finite number"))


def read_probabilities(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, Fault]:
    """float64 (n,) as `read_numbers`; each must lie in [0, 1]."""
    values = _floats(column, name)
    bad = ~((values >= 0) & (values <= 1))
    return values, Fault(name, bad, lambda row: _describe(column, row, "a probability, 0 to 1"))


def read_integers(column: pa.Array | pa.ChunkedArray, name: str) -> tuple[np.ndarray, Fault]:
    """int64 (n,) from integers, floats without a fraction, or text; each must be there."""
    integers, failed = _integers(_one_array(column), name)
    bad = failed | _is_null(integers)
    return integers.fill_null(0).to_numpy(), Fault(
        name, bad, lambda row: _describe(column, row, "an integer of 64 bits")
    )


def read_groups(
    column: pa.Array | pa.ChunkedArray, name: str, kind: IdKind
) -> tuple[np.ndarray, Fault]:
    """Group ids, int64 (n,): integers as they are, a text as its pandas.util.hash_array (SipHash
    under a fixed key: the same on every machine and in every run), read as int64."""
    if kind == "integer":
        return read_integers(column, name)
    texts, failed = _ids(_one_array(column), name, kind)
    bad = failed | _is_null(texts)
    encoded = texts.fill_null("").dictionary_encode()
    distinct = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    hashes = np.asarray(_hash_array(distinct, categorize=False)).view(np.int64)
    return hashes[encoded.indices.to_numpy()], Fault(
        name, bad, lambda row: _describe(column, row, "a group id")
    )


def _texts(array: pa.Array, name: str) -> tuple[pa.Array, np.ndarray]:
    """string, and a mask of values that are none. Integers are written out: 7 is "7"."""
    if is_text(array.type):
        return array.cast(pa.string()), np.zeros(len(array), np.bool_)
    integers, failed = _integers(array, name)
    return integers.cast(pa.string()), failed


def _ids(array: pa.Array, name: str, kind: IdKind) -> tuple[pa.Array, np.ndarray]:
    try:
        return (_integers if kind == "integer" else _texts)(array, name)
    except DataError:
        raise DataError(
            f"column {name!r} holds {array.type}, and ids are integers or strings; convert it"
        ) from None


def _describe_id(array: pa.Array, row: int) -> str:
    value = array[row].as_py()
    if isinstance(value, list):
        return "the list holds a value that is not an id as the column has them, of int64 or string"
    if isinstance(value, float) and value == math.floor(value):
        return f"the id {value} is a float too large to be exact; store such ids as integers"
    with contextlib.suppress(ValueError, OverflowError):
        if abs(int(value)) > _MAX_INT64:
            return f"the id {value} is over {_MAX_INT64}; store such ids as strings"
    return _describe(array, row, "an integer, as the ids of this column are")


def read_ids(
    column: pa.Array | pa.ChunkedArray,
    name: str,
    *,
    kind: IdKind,
    multi_valued: bool,
    weights: pa.Array | pa.ChunkedArray | None = None,
    weights_name: str | None = None,
) -> tuple[pa.Array, pa.Array | None, list[Fault]]:
    """Ids and their weights.

    Args:
        column: n ids or n lists of ids. Nulls, in lists too, are missing; so is NaN.
        name: of the column.
        kind: integers become int64 (a text that spells one, too), text string ("7" for 7).
        multi_valued: whether the column holds lists.
        weights: beside the ids, numbers in the same form; None for none. Those of missing ids
            count for nothing, all others must be finite.
        weights_name: of their column.

    Returns:
        Ids, int64 or string, n scalars with null for missing or n lists without nulls; weights,
        float32 in the same form; faults.

    Raises:
        DataError: a column is of a type that holds no ids, or no weights, of this form.
    """
    raw = _one_array(column)
    _check_form(raw, name, multi_valued)
    if weights is None:
        if multi_valued:
            return _list_ids(raw, name, kind)
        ids, failed = _ids(raw, name, kind)
        return ids, None, [Fault(name, failed, lambda row: _describe_id(raw, row))]
    assert weights_name is not None
    raw_weights = _one_array(weights)
    _check_form(raw_weights, weights_name, multi_valued)
    if multi_valued:
        return _weighted_lists(raw, name, kind, raw_weights, weights_name)
    ids, failed = _ids(raw, name, kind)
    missing = _is_null(ids)
    values = _float32(_floats(raw_weights, weights_name))
    return (
        ids,
        pa.array(values, mask=missing),
        [
            Fault(name, failed, lambda row: _describe_id(raw, row)),
            Fault(
                weights_name,
                ~np.isfinite(values) & ~missing,
                lambda row: _describe(raw_weights, row, "a finite weight"),
            ),
        ],
    )


def _check_form(array: pa.Array, name: str, multi_valued: bool) -> None:
    if not pa.types.is_null(array.type) and is_list(array.type) != multi_valued:
        form = "lists" if multi_valued else "single values"
        raise DataError(
            f"column {name!r} holds {array.type} where {form} belong; give it the form it had "
            "when the data was prepared"
        )


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _lists(array: pa.Array) -> pa.ListArray:
    if pa.types.is_null(array.type):
        return array.cast(pa.list_(pa.null()))
    return array.cast(pa.list_(array.type.value_type))


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _list_ids(raw: pa.Array, name: str, kind: IdKind) -> tuple[pa.Array, None, list[Fault]]:
    lists = _lists(raw)
    lengths = _lengths(lists)
    parents = np.repeat(np.arange(len(lists)), lengths)
    ids, failed = _ids(_one_array(lists.flatten()), name, kind)
    bad = _any_of_rows(failed, parents, len(lists))
    if ids.null_count:
        lengths = np.bincount(parents[~_is_null(ids)], minlength=len(lists))
        ids = ids.drop_null()
    faults = [Fault(name, bad, lambda row: _describe_id(lists, row))]
    return pa.ListArray.from_arrays(_offsets(lengths), ids), None, faults


def _weighted_lists(
    raw: pa.Array, name: str, kind: IdKind, raw_weights: pa.Array, weights_name: str
) -> tuple[pa.Array, pa.Array, list[Fault]]:
    lists, weight_lists = _lists(raw), _lists(raw_weights)
    lengths, weight_lengths = _lengths(lists), _lengths(weight_lists)
    unequal = lengths != weight_lengths
    faults = [
        Fault(
            weights_name,
            unequal,
            lambda row: f"{weight_lengths[row]} weights beside {lengths[row]} ids in {name!r}",
        )
    ]
    if unequal.any():  # Without those rows, so that the rest lies side by side.
        equal = pa.array(np.arange(len(lists)), mask=unequal)
        lists, weight_lists = lists.take(equal), weight_lists.take(equal)
    kept_lengths = _lengths(lists)
    parents = np.repeat(np.arange(len(lists)), kept_lengths)
    ids, failed = _ids(_one_array(lists.flatten()), name, kind)
    values = _float32(_floats(weight_lists.flatten(), weights_name))
    there = ~_is_null(ids)
    infinite = ~np.isfinite(values) & there
    faults += [
        Fault(
            name,
            _any_of_rows(failed, parents, len(lists)),
            lambda row: _describe_id(lists, row),
        ),
        Fault(
            weights_name,
            _any_of_rows(infinite, parents, len(lists)),
            lambda _: "the list holds a weight that is missing or not finite",
        ),
    ]
    if not there.all():
        ids, values = ids.drop_null(), values[there]
        kept_lengths = np.bincount(parents[there], minlength=len(lists))
    offsets = _offsets(kept_lengths)
    return (
        pa.ListArray.from_arrays(offsets, ids),
        pa.ListArray.from_arrays(offsets, pa.array(values)),
        faults,
    )


def _any_of_rows(bad: np.ndarray, parents: np.ndarray, rows: int) -> np.ndarray:
    of_rows = np.zeros(rows, np.bool_)
    of_rows[parents[bad]] = True
    return of_rows
