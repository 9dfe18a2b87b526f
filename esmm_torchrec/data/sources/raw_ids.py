"""Ids in raw columns, as int64 or string: single ones, lists, weights beside them, words of texts.

Values come with a `Fault` for the rows that cannot be used, as in `raw_values`; a missing id is
null. An id column is integers or text, and numbers are never text ids: 7 may have been written "7",
"007" or "7.0". So one value has one row, whatever kind of file it comes from.

In this file: n rows of a block.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.data.hashing import text_hashes
from esmm_torchrec.data.sources.raw_values import (
    MAX_INT64,
    Fault,
    describe_row,
    float32,
    floats,
    integers_in,
    is_null,
    is_number,
    is_text,
    one_array,
)
from esmm_torchrec.data.vocabulary import IdKind
from esmm_torchrec.errors import DataError

pc: Any = pyarrow.compute


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of lists. Views are none: pyarrow 26 casts them wrongly."""
    is_one = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in is_one)


def id_kind(kind: pa.DataType) -> IdKind | None:
    """Whether ids of an Arrow type, or in lists of it, are integers or text; None if all are null.

    Raises:
        TypeError: the type is neither.
    """
    kind = kind.value_type if is_list(kind) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_text(kind):
        return "text"
    if is_number(kind):
        return "integer"
    if pa.types.is_null(kind):
        return None
    raise TypeError(f"{kind} is not a type of ids")


def read_ids(
    column: pa.Array | pa.ChunkedArray,
    name: str,
    *,
    kind: IdKind,
    multi_valued: bool,
    weights: pa.Array | pa.ChunkedArray | None = None,
    weights_name: str | None = None,
    list_separator: str | None = None,
) -> tuple[pa.Array, pa.Array | None, list[Fault]]:
    """Ids and their weights.

    Args:
        column: n ids or n lists of ids. Nulls, in lists too, are missing; so is NaN.
        name: of the column.
        kind: integers become int64, also a text that spells one; text becomes string.
        multi_valued: whether the column holds lists.
        weights: beside the ids, numbers in the same form; None for none. Those of missing ids
            count for nothing, all others must be finite.
        weights_name: of their column.
        list_separator: separator of the values of a list that is written as text.

    Returns:
        Ids, int64 or string, n scalars with null for missing or n lists without nulls; weights,
        float32 in the same form; faults.

    Raises:
        DataError: a column is of a type that cannot hold ids, or weights, of this form.
    """
    raw = _form(column, name, multi_valued, list_separator)
    if weights is None:
        if multi_valued:
            return _list_ids(raw, name, kind)
        ids, failed = _ids(raw, name, kind)
        return ids, None, [Fault(name, failed, lambda row: _describe_id(raw, row))]
    assert weights_name is not None
    raw_weights = _form(weights, weights_name, multi_valued, list_separator)
    if multi_valued:
        return _weighted_lists(raw, name, kind, raw_weights, weights_name)
    ids, failed = _ids(raw, name, kind)
    missing = is_null(ids)
    values = float32(floats(raw_weights, weights_name))
    return (
        ids,
        pa.array(values, mask=missing),
        [
            Fault(name, failed, lambda row: _describe_id(raw, row)),
            Fault(
                weights_name,
                ~np.isfinite(values) & ~missing,
                lambda row: describe_row(raw_weights, row, "a finite weight"),
            ),
        ],
    )


def read_groups(
    column: pa.Array | pa.ChunkedArray, name: str, kind: IdKind
) -> tuple[np.ndarray, Fault, np.ndarray]:
    """Group ids, int64 (n,): integers as they are, a text as its pandas.util.hash_array (SipHash
    under a fixed key: the same on every machine and in every run), read as int64. Also the rows
    that cannot be used, and those without a group, bool (n,)."""
    ids, failed = _ids(one_array(column), name, kind)
    fault = Fault(name, failed, lambda row: describe_row(column, row, "a group id"))
    if kind == "integer":
        return ids.fill_null(0).to_numpy(), fault, is_null(ids)
    return text_hashes(ids.fill_null("")).view(np.int64), fault, is_null(ids)


def split_lists(texts: pa.Array, separator: str) -> pa.ListArray:
    """Lists of text out of texts in which a separator divides the values."""
    return pc.split_pattern(texts, separator)


def read_tokens(column: pa.Array | pa.ChunkedArray, name: str) -> pa.ListArray:
    """Lists of the words of texts, in lower case, without punctuation.

    Raises:
        DataError: the column does not hold text.
    """
    array = one_array(column)
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    if not is_text(array.type):
        raise DataError(f"column {name!r} holds {array.type} instead of text; convert it")
    words = pc.split_pattern_regex(pc.utf8_lower(array), r"[^\p{L}\p{M}\p{N}]+")
    lengths = _lengths(words)
    parents = np.repeat(np.arange(len(words)), lengths)
    values = words.flatten()
    is_word = pc.not_equal(values, "").to_numpy(zero_copy_only=False)
    lengths = np.bincount(parents[is_word], minlength=len(words))
    return pa.ListArray.from_arrays(_offsets(lengths), values.filter(pa.array(is_word)))


def _ids(array: pa.Array, name: str, kind: IdKind) -> tuple[pa.Array, np.ndarray]:
    """int64 or string, null if there is none; and a mask of values that are not ids."""
    if kind == "integer":
        try:
            return integers_in(array, name)
        except DataError:
            raise DataError(
                f"column {name!r} holds {array.type}, but ids must be integers or text; convert it"
            ) from None
    if is_text(array.type):
        return array, np.zeros(len(array), np.bool_)
    # A column without any value comes as nulls, or as floats from pandas.
    if array.null_count == len(array) or (
        pa.types.is_floating(array.type) and pc.all(pc.is_nan(array)).as_py()
    ):
        return pa.nulls(len(array), pa.string()), np.zeros(len(array), np.bool_)
    raise DataError(
        f"column {name!r} holds {array.type} but the ids are text; convert it to text, written "
        "as in the training data"
    )


def _describe_id(array: pa.Array, row: int) -> str:
    value = array[row].as_py()
    if isinstance(value, list):
        return "the list holds a value that is not an id as the column has them, integers or text"
    if isinstance(value, float) and value == math.floor(value):
        return f"the id {value} is a float too large to be exact; store such ids as integers"
    with contextlib.suppress(ValueError, OverflowError):
        if abs(int(value)) > MAX_INT64:
            return f"the id {value} is over {MAX_INT64}; store such ids as text"
    return describe_row(array, row, "an integer, as the ids of this column are")


def _form(
    column: pa.Array | pa.ChunkedArray, name: str, multi_valued: bool, list_separator: str | None
) -> pa.Array:
    """Single values, or lists of them."""
    array = one_array(column)
    if multi_valued and is_text(array.type) and list_separator is not None:
        array = split_lists(array, list_separator)
    if not pa.types.is_null(array.type) and is_list(array.type) != multi_valued:
        form = "lists" if multi_valued else "single values"
        raise DataError(
            f"column {name!r} holds {array.type} instead of {form}; give it the form it had "
            "when the data was prepared"
        )
    return array


def _lists(array: pa.Array) -> pa.ListArray:
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.list_(pa.string()))
    if pa.types.is_null(array.type.value_type):
        # pyarrow 26 loses values when it casts such lists.
        values = pa.nulls(int(_lengths(array).sum()), pa.string())
        return pa.ListArray.from_arrays(_offsets(_lengths(array)), values)
    return array.cast(pa.list_(array.type.value_type))


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _list_ids(raw: pa.Array, name: str, kind: IdKind) -> tuple[pa.Array, None, list[Fault]]:
    lists = _lists(raw)
    lengths = _lengths(lists)
    parents = np.repeat(np.arange(len(lists)), lengths)
    ids, failed = _ids(one_array(lists.flatten()), name, kind)
    bad = _any_of_rows(failed, parents, len(lists))
    if ids.null_count:
        lengths = np.bincount(parents[~is_null(ids)], minlength=len(lists))
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
    ids, failed = _ids(one_array(lists.flatten()), name, kind)
    values = float32(floats(weight_lists.flatten(), weights_name))
    there = ~is_null(ids)
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
