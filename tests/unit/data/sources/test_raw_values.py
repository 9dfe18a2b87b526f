"""Values of raw columns in all types that files use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from esmm_torchrec.data.sources.raw_ids import read_ids
from esmm_torchrec.data.sources.raw_values import (
    Fault,
    LabelReader,
    holds_integers,
    is_text,
    read_integers,
    read_numbers,
)
from esmm_torchrec.errors import DataError


def faulty(*faults: Fault) -> list[int]:
    """Returns the rows with a fault."""
    return np.flatnonzero(np.any([fault.rows for fault in faults], axis=0)).tolist()


DECIMALS = pa.array(["7", "-3", None]).cast(pa.decimal128(20, 2))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([7, -3, None], pa.int8()),
        pa.array([7, -3, None], pa.int64()),
        pa.array([7.0, -3.0, None], pa.float32()),
        pa.array([7.0, -3.0, np.nan], pa.float64()),
        DECIMALS,
        pa.array(["7", "-3", None]),
        pa.array(["7.0", " -3 ", None], pa.large_string()),
        pa.array(["7", "-3.", None], pa.string_view()),
        pa.array(["7", "-3", None]).dictionary_encode(),
        pa.array([7, -3, None]).dictionary_encode(),
        pa.chunked_array(
            [
                pa.array(["7"]).dictionary_encode(),
                pa.array(["-3", None])[:0].dictionary_encode(),
                pa.array(["-3", None]).dictionary_encode(),
            ]
        ),
    ],
    ids=lambda column: str(column.type),
)
def test_integers_of_every_type(column: Any) -> None:
    ids, weights, faults = read_ids(column, "x", kind="integer", multi_valued=False)
    assert ids.to_pylist() == [7, -3, None]
    assert weights is None
    assert faulty(*faults) == []
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if is_text(kind):
        texts, _, _ = read_ids(column, "x", kind="text", multi_valued=False)
        assert texts.to_pylist() == column.to_pylist()
    else:
        with pytest.raises(DataError, match="but the ids are text; convert it to text"):
            read_ids(column, "x", kind="text", multi_valued=False)
    integers, fault = read_integers(column, "x")
    assert integers[:2].tolist() == [7, -3]
    assert faulty(fault) == [2]


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        (pa.array([1.5, 2.0, np.inf, -np.inf, 2.0**53, 2.0**53 + 2]), [0, 2, 3, 5]),
        (pa.array([1.0, 2.0**24, 2.0**25], pa.float32()), [2]),
        (pa.array([1, 2**63 - 1, 2**63], pa.uint64()), [2]),
        (pa.array(["1", "007", "+5", "1e3", "0x1F", "1.50", "-0", "x", "", str(2**63)]),
         [1, 2, 3, 4, 5, 6, 7, 9]),
        (pa.array([str(-(2**63)), str(2**63 - 1), str(-(2**63) - 1)]), [2]),
    ],
)  # fmt: skip
def test_what_is_no_integer_of_64_bits_is_a_fault(values: pa.Array, bad: list[int]) -> None:
    ids, _, faults = read_ids(values, "x", kind="integer", multi_valued=False)
    assert faulty(*faults) == bad
    for row in range(len(values)):
        if row not in bad:
            value = values[row].as_py()
            assert ids[row].as_py() == (None if value == "" else int(value))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", None, "-2", "3.00", "true", "", str(2**63 - 1)], True),
        (["1", str(2**63)], False),
        ([None, None], True),
        ([], True),
        (["1", "007"], False),
        (["1", "2.5"], False),
    ],
)
def test_whether_texts_are_integers(texts: list[str | None], expected: bool) -> None:
    assert holds_integers(pa.array(texts, pa.string())) is expected


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 1, 2, None], pa.int64()),
        pa.array([-1, 1, 2, None], pa.int8()),
        pa.array([0.0, 1.0, 0.5, np.nan]),
        pa.array(["0", "1.0", "2", None]),
        pa.array(["-1", " 1", "-2", ""]),
        pa.array(["false", "TRUE", "maybe", ""]),
        pa.array(["No", " yes ", "yess", "NULL"]).dictionary_encode(),
        pa.array(["n", "Y", "0.0.", "nan"], pa.large_string()),
        pa.array(["0", "1", "2", None]).cast(pa.decimal128(10, 1)),
    ],
)
def test_labels_of_every_form(column: pa.Array) -> None:
    labels, fault, missing = LabelReader("x").read(column)
    assert labels.dtype == np.int8
    assert labels[:2].tolist() == [0, 1]
    assert faulty(fault) == [2, 3]
    if not pa.types.is_floating(column.type):
        assert missing.tolist() == [False, False, False, True]


def test_0_and_minus_1_do_not_both_mean_no() -> None:
    reader = LabelReader("x")
    reader.read(pa.array([-1, 1]))
    with pytest.raises(DataError, match="'x' holds both 0 and -1"):
        reader.read(pa.array([0, 1]))


def test_booleans_are_labels_and_ids() -> None:
    column = pa.array([False, True, None])
    assert LabelReader("x").read(column)[0][:2].tolist() == [0, 1]
    ids, _, faults = read_ids(column, "x", kind="integer", multi_valued=False)
    assert ids.to_pylist() == [0, 1, None]
    assert faulty(*faults) == []


def test_numbers_in_texts_are_read_to_the_last_digit() -> None:
    random = np.random.default_rng(0)
    numbers = random.normal(size=1000) * 10.0 ** random.integers(-30, 30, 1000)
    texts = [repr(float(number)) for number in numbers]
    values, fault = read_numbers(pa.array(texts), "x")
    np.testing.assert_array_equal(values, numbers)
    assert faulty(fault) == []
    texts[17], texts[900], texts[3] = "abc", None, " 1.5 "
    values, fault = read_numbers(pa.array(texts), "x")
    assert faulty(fault) == [17, 900]
    assert values[3] == 1.5
    np.testing.assert_array_equal(np.delete(values, [3, 17, 900]), np.delete(numbers, [3, 17, 900]))


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.int64(), 2),
        pa.list_(pa.string()),
    ],
    ids=str,
)
def test_lists_of_every_type_lose_their_nulls_and_what_belongs_to_them(kind: pa.DataType) -> None:
    raw = pa.array([[0, 0], [5, None], None, [None, 7], [8, 9]])
    weights = pa.array([[0.0, 0.0], [0.5, np.nan], None, [None, 0.25], [2.0, 3.0]])
    lists = raw.cast(pa.list_(pa.string())) if kind == pa.list_(pa.string()) else raw.cast(kind)
    ids, found, faults = read_ids(
        lists[1:],  # A slice, so that offsets do not begin at 0.
        "x",
        kind="integer",
        multi_valued=True,
        weights=weights[1:],
        weights_name="w",
    )
    assert faulty(*faults) == []
    assert ids.to_pylist() == [[5], [], [7], [8, 9]]
    assert found is not None
    assert found.to_pylist() == [[0.5], [], [0.25], [2.0, 3.0]]
    ids, _, _ = read_ids(lists[1:], "x", kind="integer", multi_valued=True)
    assert ids.to_pylist() == [[5], [], [7], [8, 9]]


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.null()),
        pa.large_list(pa.null()),
        pa.list_(pa.null(), 2),
        pa.list_(pa.int64()),
        pa.null(),
    ],
    ids=str,
)
def test_lists_that_hold_nulls_alone_are_empty_bags(kind: pa.DataType, rows: int) -> None:
    lists = pa.nulls(rows) if pa.types.is_null(kind) else pa.array([[None, None]] * rows, kind)
    for id_kind in ("integer", "text"):
        ids, weights, faults = read_ids(
            lists, "x", kind=id_kind, multi_valued=True, weights=lists, weights_name="w"
        )
        assert faulty(*faults) == []
        assert ids.to_pylist() == [[]] * rows
        assert weights is not None
        assert weights.to_pylist() == [[]] * rows
        assert read_ids(lists, "x", kind=id_kind, multi_valued=True)[0].to_pylist() == [[]] * rows
    weights = pa.array([[0.5, 2.0]] * rows)
    if not pa.types.is_null(kind):
        _, found, faults = read_ids(
            lists, "x", kind="integer", multi_valued=True, weights=weights, weights_name="w"
        )
        assert faulty(*faults) == []
        assert found is not None
        assert found.to_pylist() == [[]] * rows


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[[1]]]),
        pa.array([{"a": 1}]),
        pa.array([b"1"]),
        pa.array([[1]], pa.list_view(pa.int64())),
        pa.array([0], pa.timestamp("s")),
    ],
    ids=lambda column: str(column.type),
)
def test_a_type_that_holds_no_ids_is_refused(column: pa.Array) -> None:
    multi_valued = pa.types.is_list(column.type)
    for kind in ("integer", "text"):
        with pytest.raises(DataError, match=r"column 'x' holds .*convert it"):
            read_ids(column, "x", kind=kind, multi_valued=multi_valued)
