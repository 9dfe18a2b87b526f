"""Ids in raw columns, as int64 or string: single ids, lists, their weights, words of texts.

Values come with a `Fault` for the rows that cannot be used, as in `raw_values`; a missing id is
null. An id column contains integers or text, and numbers never become text ids: 7 may have been
written "7", "007" or "7.0". So a value has one row, whatever kind of file contains it.

In shapes, n is the number of rows of a block.
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
    describe,
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
    """Whether an Arrow type is a list type. List views do not count: pyarrow 26 casts them
    wrongly."""
    is_one = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in is_one)


def id_kind(kind: pa.DataType) -> IdKind | None:
    """Returns the kind of ids of an Arrow type, or of lists of it; None for the null type.

    Raises:
        TypeError: values of this type cannot be ids.
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
    weights_name: str = "",
    list_separator: str | None = None,
) -> tuple[pa.Array, pa.Array | None, list[Fault]]:
    """Reads ids and their weights.

    Args:
        column: n ids or n lists of ids. Nulls, also within lists, are missing; so is NaN.
        name: name of the column.
        kind: integers become int64, including texts that spell an integer; text becomes string.
        multi_valued: whether the column contains lists.
        weights: weights of the ids, numbers in the same form; None if there are none. Weights of
            missing ids are ignored; all others must be finite.
        weights_name: name of the column of weights.
        list_separator: separator of the values in lists that are written as text.

    Returns:
        Ids, int64 or string: n scalars, null if missing, or n lists without nulls; weights, float32
        in the same form, or None; faults.

    Raises:
        DataError: a column has a type that cannot hold ids, or weights, in this form.
    """
    raw = _form(column, name, multi_valued, list_separator)
    faults: list[Fault] = []
    raw_weights = None
    if weights is not None:
        raw_weights = _form(weights, weights_name, multi_valued, list_separator)
        if multi_valued:
            raw, raw_weights, unequal = _side_by_side(raw, name, raw_weights, weights_name)
            faults.append(unequal)
    flat = one_array(raw.flatten()) if multi_valued else raw
    ids, failed = _ids(flat, name, kind)
    offsets = _offsets(raw) if multi_valued else None
    faults.append(Fault(name, _rows_with(failed, offsets), lambda row: _describe_id(raw, row)))
    there = ~is_null(ids)
    values = None
    if raw_weights is not None:
        flat_weights = raw_weights.flatten() if multi_valued else raw_weights
        values = float32(floats(flat_weights, weights_name))
        infinite = _rows_with(~np.isfinite(values) & there, offsets)
        if multi_valued:
            sentence = "the list holds a weight that is missing or not finite"
            faults.append(Fault(weights_name, infinite, lambda _: sentence))
        else:
            faults.append(Fault.of(weights_name, infinite, raw_weights, "a finite weight"))
    if offsets is None:
        return ids, None if values is None else pa.array(values, mask=~there), faults
    if not there.all():
        offsets, ids = _before(there, offsets), ids.drop_null()
        values = None if values is None else values[there]
    return _bags(offsets, ids), None if values is None else _bags(offsets, values), faults


def read_groups(
    column: pa.Array | pa.ChunkedArray, name: str, kind: IdKind
) -> tuple[np.ndarray, Fault, np.ndarray]:
    """Reads group ids, int64 (n,): integers unchanged, a text as its pandas.util.hash_array
    (SipHash under a fixed key: the same on every machine and in every run), viewed as int64. Also
    returns the rows that cannot be used, and a mask of those without a group, bool (n,)."""
    ids, failed = _ids(one_array(column), name, kind)
    fault = Fault.of(name, failed, column, "a group id")
    if kind == "integer":
        return ids.fill_null(0).to_numpy(), fault, is_null(ids)
    return text_hashes(ids.fill_null("")).view(np.int64), fault, is_null(ids)


def split_lists(texts: pa.Array, separator: str) -> pa.ListArray:
    """Splits texts at a separator into lists of texts."""
    return pc.split_pattern(texts, separator)


def read_tokens(column: pa.Array | pa.ChunkedArray, name: str) -> pa.ListArray:
    """Splits texts into lists of their words, in lower case, without punctuation.

    Raises:
        DataError: the column does not contain text.
    """
    array = one_array(column)
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    if not is_text(array.type):
        raise DataError(f"column {name!r} holds {array.type} instead of text; convert it")
    words = pc.split_pattern_regex(pc.utf8_lower(array), r"[^\p{L}\p{M}\p{N}]+")
    values = words.flatten()
    is_word = pc.not_equal(values, "")
    offsets = _before(is_word.to_numpy(zero_copy_only=False), _offsets(words))
    return _bags(offsets, values.filter(is_word))


def _ids(array: pa.Array, name: str, kind: IdKind) -> tuple[pa.Array, np.ndarray]:
    """Returns ids, int64 or string, null if missing, and a mask of values that are not ids."""
    if kind == "integer":
        try:
            return integers_in(array, name)
        except DataError:
            raise DataError(
                f"column {name!r} holds {array.type}, but ids must be integers or text; convert it"
            ) from None
    if is_text(array.type):
        return array, np.zeros(len(array), np.bool_)
    # A column without any value consists of nulls or, from pandas, of floats.
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
    return describe(value, "an integer, as the ids of this column are")


def _form(
    column: pa.Array | pa.ChunkedArray, name: str, multi_valued: bool, list_separator: str | None
) -> pa.Array:
    """Returns single values, or lists of them as `pa.list_`."""
    array = one_array(column)
    if multi_valued and is_text(array.type) and list_separator is not None:
        array = split_lists(array, list_separator)
    if not pa.types.is_null(array.type) and is_list(array.type) != multi_valued:
        form = "lists" if multi_valued else "single values"
        raise DataError(
            f"column {name!r} holds {array.type} instead of {form}; give it the form it had "
            "when the data was prepared"
        )
    if not multi_valued:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.list_(pa.string()))
    if pa.types.is_null(array.type.value_type):
        # pyarrow 26 loses values when it casts such lists.
        offsets = _offsets(array)
        return _bags(offsets, pa.nulls(offsets[-1], pa.string()))
    return array.cast(pa.list_(array.type.value_type))


def _side_by_side(
    lists: pa.ListArray, name: str, weights: pa.ListArray, weights_name: str
) -> tuple[pa.ListArray, pa.ListArray, Fault]:
    """Returns lists and weights, null in the rows in which their lengths differ, and these rows."""
    of_ids, of_weights = np.diff(_offsets(lists)), np.diff(_offsets(weights))
    unequal = of_ids != of_weights
    fault = Fault(
        weights_name,
        unequal,
        lambda row: f"{of_weights[row]} weights beside {of_ids[row]} ids in {name!r}",
    )
    if unequal.any():
        equal = pa.array(np.arange(len(lists)), mask=unequal)
        lists, weights = lists.take(equal), weights.take(equal)
    return lists, weights, fault


def _bags(offsets: np.ndarray, values: pa.Array | np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _offsets(lists: pa.Array) -> np.ndarray:
    """Returns offsets of n lists into their joined values, int64 (n + 1,); a null has no values."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _before(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns the number of flags that are set before each offset, int64 (n + 1,)."""
    return np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])[offsets]


def _rows_with(flags: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """Returns the lists in which a flag is set, bool (n,); without offsets, each flag is a row."""
    return flags if offsets is None else np.diff(_before(flags, offsets)) > 0
