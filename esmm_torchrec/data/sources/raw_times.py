"""Times in raw columns: typed, ISO 8601 text or integers; and the hour and weekday in them.

In this file: n rows of a block.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.data.sources.raw_tables import BadRows, RawTable
from esmm_torchrec.data.sources.raw_values import (
    Fault,
    cast_what_can_be,
    describe,
    is_number,
    is_text,
    one_array,
    read_integers,
)
from esmm_torchrec.errors import DataError

pc: Any = pyarrow.compute

TimePart = Literal["hour", "weekday"]
TIME_PARTS: tuple[TimePart, ...] = ("hour", "weekday")

_ZONE = r"[0-9](Z|[+-][0-9]{2}:?[0-9]{2})$"
_INTEGER = r"^\s*-?[0-9]+(\.0*)?\s*$"

_UNITS = ((1, 1e8, 7.26e9), (1_000, 1e11, 7.26e12), (10**6, 1e14, 7.26e15), (10**9, 1e17, 7.26e18))
"""(per second, lowest, highest) of integers that are times between 1973 and 2200."""


def time_form(table: RawTable, column: str) -> Literal["times", "integers"] | None:
    """What the times of a raw table are, by the type of the column or by its first value; None if
    that says nothing."""
    kind = table.types([column])[column]
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "times"
    if not is_text(kind):
        return "integers" if is_number(kind) else None
    for rows in table.blocks([column], BadRows(sys.maxsize)):
        values = one_array(rows.table.column(column)).drop_null()
        if len(values):
            is_integer = pc.match_substring_regex(values[:1], _INTEGER)[0].as_py()
            return "integers" if is_integer else "times"
    return None


def read_times(
    column: pa.Array | pa.ChunkedArray, name: str
) -> tuple[np.ndarray, np.ndarray, Fault]:
    """Times, int64 (n,).

    Typed times and ISO 8601 text become seconds since 1970-01-01 UTC; without a zone they are in
    UTC. Integers stay as they are.

    Returns:
        The times; which rows hold one, bool (n,); rows whose value is there and not a time.

    Raises:
        DataError: the column is of a type that cannot hold times.
    """
    array = one_array(column)
    kind = array.type
    if pa.types.is_null(kind):
        return _result(pa.nulls(len(array), pa.int64()), np.zeros(len(array), np.bool_), name)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        if pa.types.is_date(kind):
            array = array.cast(pa.timestamp("ms"))
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[array.type.unit]
        ticks = array.view(pa.int64())
        seconds = np.floor_divide(ticks.fill_null(0).to_numpy(), per_second)
        return _result(
            pa.array(seconds, mask=ticks.is_null().to_numpy(zero_copy_only=False)),
            np.zeros(len(array), np.bool_),
            name,
        )
    if not is_text(kind):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(f"column {name!r} holds {kind} instead of times; convert it")
        values, fault = read_integers(array, name)
        missing = array.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
        return _result(
            pa.array(values, mask=fault.rows), fault.rows & ~missing, name, lambda row: array[row]
        )
    is_integer = pc.match_substring_regex(array, _INTEGER).fill_null(False)
    integers, fault = read_integers(pc.if_else(is_integer, array, None), name)
    seconds, failed = _seconds_in(pc.if_else(is_integer, None, array))
    there = is_integer.to_numpy(zero_copy_only=False)
    merged = pc.coalesce(pa.array(integers, mask=fault.rows), seconds)
    return _result(merged, failed | (there & fault.rows), name, lambda row: array[row])


def _result(
    times: pa.Array, failed: np.ndarray, name: str, value: Any = None
) -> tuple[np.ndarray, np.ndarray, Fault]:
    there = times.is_valid().to_numpy(zero_copy_only=False)
    fault = Fault(
        name,
        failed,
        lambda row: describe(
            value(row).as_py(), "a time in ISO 8601 (2026-01-31 09:30) or an integer"
        ),
    )
    return times.fill_null(0).to_numpy(), there, fault


def _seconds_in(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Seconds in ISO 8601 texts, and a mask of the others."""
    plain = pc.utf8_trim_whitespace(texts)
    plain = pc.replace_substring_regex(plain, r"(\.[0-9]{6})[0-9]+", r"\1")
    has_zone = pc.match_substring_regex(plain, r":[0-9.]*" + _ZONE).fill_null(False)
    seconds, failed = [], np.zeros(len(texts), np.bool_)
    for zoned, kind in ((False, pa.timestamp("us")), (True, pa.timestamp("us", "UTC"))):
        mine = has_zone if zoned else pc.invert(has_zone)
        if not pc.any(mine).as_py():
            continue
        times, missed = cast_what_can_be(pc.if_else(mine, plain, None), kind)
        ticks = times.view(pa.int64())
        floor = np.floor_divide(ticks.fill_null(0).to_numpy(), 10**6)
        seconds.append(pa.array(floor, mask=ticks.is_null().to_numpy(zero_copy_only=False)))
        failed |= missed
    return (pc.coalesce(*seconds) if seconds else pa.nulls(len(texts), pa.int64())), failed


def read_time_part(
    column: pa.Array | pa.ChunkedArray, name: str, part: TimePart
) -> tuple[pa.Array, Fault]:
    """Hour (0 to 23) or weekday (1 for Monday to 7) in UTC, int64 (n,), null for missing.

    Integers are seconds, milliseconds, microseconds or nanoseconds since 1970-01-01 UTC, whichever
    gives a time between 1973 and 2200.
    """
    times, there, fault = read_times(column, name)
    seconds, rows = times, fault.rows
    kind = one_array(column).type
    if not (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        is_integer = there.copy()
        if is_text(kind):
            is_integer &= (
                pc.match_substring_regex(one_array(column), _INTEGER)
                .fill_null(False)
                .to_numpy(zero_copy_only=False)
            )
        fits = [(times >= low) & (times < high) for _, low, high in _UNITS]
        scaled = np.select(fits, [times // per_second for per_second, _, _ in _UNITS], 0)
        seconds = np.where(is_integer, scaled, times)
        rows = rows | (is_integer & ~np.any(fits, axis=0))
    value = seconds // 3600 % 24 if part == "hour" else (seconds // 86400 + 3) % 7 + 1
    array = one_array(column)
    return pa.array(value, mask=~there), Fault(
        name,
        rows,
        lambda row: describe(array[row].as_py(), "a time in ISO 8601 or since 1970"),
    )
