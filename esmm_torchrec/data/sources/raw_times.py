"""Times in raw columns: typed, ISO 8601 text or integers; also their hours and weekdays.

In shapes, n is the number of rows of a block.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.data.sources.raw_values import (
    Fault,
    cast_what_can_be,
    integers_in,
    is_null,
    is_text,
    one_array,
)
from esmm_torchrec.errors import DataError

pc: Any = pyarrow.compute

TimePart = Literal["hour", "weekday"]
TIME_PARTS: tuple[TimePart, ...] = ("hour", "weekday")

_ZONE = r":[0-9.]*(Z|[+-][0-9]{2}:?[0-9]{2})$"
_INTEGER = r"^\s*-?[0-9]+(\.0*)?\s*$"

_UNITS = ((1, 1e8, 7.26e9), (1_000, 1e11, 7.26e12), (10**6, 1e14, 7.26e15), (10**9, 1e17, 7.26e18))
"""(ticks per second, lower bound, upper bound) of integers that are times between 1973 and 2200."""


class _Times(NamedTuple):
    values: pa.Array
    """int64 (n,), null without a time."""
    are_integers: np.ndarray
    """bool (n,), integers, which stay unchanged; other times are in seconds."""
    failed: np.ndarray
    """bool (n,), values that are not missing and not times."""


def read_times(
    column: pa.Array | pa.ChunkedArray, name: str, *, may_be_missing: bool = True
) -> tuple[np.ndarray, np.ndarray, Fault]:
    """Reads times, int64 (n,).

    Typed times and ISO 8601 text become seconds since 1970-01-01 UTC; times without a zone are in
    UTC. Integers stay unchanged.

    Returns:
        The times; a mask of the rows that have one, bool (n,); the fault of rows with another value
        or, unless `may_be_missing`, without a value.

    Raises:
        DataError: the column has a type that cannot hold times.
    """
    array = one_array(column)
    times = _read(array, name)
    missing = is_null(times.values)
    failed = times.failed if may_be_missing else missing
    fault = Fault.of(name, failed, array, "a time in ISO 8601 (2026-01-31 09:30) or an integer")
    return times.values.fill_null(0).to_numpy(), ~missing, fault


def read_time_part(
    column: pa.Array | pa.ChunkedArray, name: str, part: TimePart
) -> tuple[pa.Array, Fault]:
    """Reads the hour (0 to 23) or weekday (1 for Monday to 7) in UTC, int64 (n,), null if missing.

    Integers are seconds, milliseconds, microseconds or nanoseconds since 1970-01-01 UTC: the unit
    is the one that yields a time between 1973 and 2200.
    """
    array = one_array(column)
    times = _read(array, name)
    values, missing = times.values.fill_null(0).to_numpy(), is_null(times.values)
    fits = [(values >= low) & (values < high) for _, low, high in _UNITS]
    scaled = np.select(fits, [values // per_second for per_second, _, _ in _UNITS], 0)
    seconds = np.where(times.are_integers, scaled, values)
    failed = times.failed | (times.are_integers & ~missing & ~np.any(fits, axis=0))
    value = seconds // 3600 % 24 if part == "hour" else (seconds // 86400 + 3) % 7 + 1
    fault = Fault.of(name, failed, array, "a time in ISO 8601 or since 1970")
    return pa.array(value, mask=missing), fault


def are_integers(texts: pa.Array) -> pa.Array:
    """Returns which texts are integers rather than times, bool (n,)."""
    return pc.match_substring_regex(texts, _INTEGER)


def _read(array: pa.Array, name: str) -> _Times:
    kind, no_row = array.type, np.zeros(len(array), np.bool_)
    if pa.types.is_date(kind):
        array = array.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(array.type):
        return _Times(_seconds(array), no_row, no_row)
    if is_text(kind):
        integer = are_integers(array).fill_null(False)
        integers, failed = integers_in(pc.if_else(integer, array, None), name)
        seconds, not_times = _seconds_in(pc.if_else(integer, None, array))
        is_integer = integer.to_numpy(zero_copy_only=False)
        return _Times(pc.coalesce(integers, seconds), is_integer, failed | not_times)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise DataError(f"column {name!r} holds {kind} instead of times; convert it")
    integers, failed = integers_in(array, name)
    return _Times(integers, ~no_row, failed)


def _seconds_in(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Parses ISO 8601 texts to seconds, int64, and returns a mask of other texts."""
    plain = pc.utf8_trim_whitespace(texts)
    plain = pc.replace_substring_regex(plain, r"(\.[0-9]{6})[0-9]+", r"\1")
    # Arrow requires a zone in all texts or in none, and rejects one after a bare date.
    no_zone = pc.if_else(pc.equal(pc.binary_length(plain), 10), " 00:00Z", "Z")
    suffix = pc.if_else(pc.match_substring_regex(plain, _ZONE), "", no_zone)
    zoned = pc.binary_join_element_wise(plain, suffix, "")
    times, failed = cast_what_can_be(zoned, pa.timestamp("us", "UTC"))
    return _seconds(times), failed


def _seconds(times: pa.Array) -> pa.Array:
    """Converts typed times to whole seconds, int64 (n,)."""
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[times.type.unit]
    ticks = times.view(pa.int64())
    seconds = np.floor_divide(ticks.fill_null(0).to_numpy(), per_second)
    return pa.array(seconds, mask=is_null(ticks))
