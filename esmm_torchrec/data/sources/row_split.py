"""One table → training and test rows: by time, by group or at random.

The rule looks at each row alone, so both halves are read from the same files in bounded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pandas.util
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.choices import check_choices
from esmm_torchrec.data.sources.raw_times import read_times
from esmm_torchrec.data.sources.raw_values import (
    Fault,
    integers_in,
    is_number,
    is_text,
    one_array,
    row_hashes,
)
from esmm_torchrec.data.vocabulary import IdCounter
from esmm_torchrec.errors import DataError, OptionError

pc: Any = pyarrow.compute
_hash_array: Any = pandas.util.hash_array

SplitKind = Literal["time", "share", "group"]

RawBlockOfTimes = tuple[pa.Table, Callable[[int], str]]
"""Rows that hold the column, and how a person finds each."""


@dataclass(frozen=True)
class RowSplit:
    """How rows are divided.

    Raises:
        OptionError: the share is not between 0 and 1, or a column is missing or superfluous.
    """

    kind: SplitKind
    """time: the earliest rows are training; group: whole groups, by a hash; share: rows, by a
    hash of their number."""
    column: str | None
    share: float
    """Of the training rows; about this much, and for "time" no less."""

    def __post_init__(self) -> None:
        check_choices(self)
        if (self.column is None) != (self.kind == "share"):
            raise OptionError("`split` must be time:COL:0.8, group:COL:0.8 or share:0.8")
        if not 0 < self.share < 1:
            raise OptionError(f"`split` needs a training share between 0 and 1, not {self.share}")

    @classmethod
    def parse(cls, text: str) -> RowSplit:
        """The rule in time:COL:0.8, group:COL:0.8 or share:0.8; a column may hold colons."""
        kind, _, rest = text.partition(":")
        column, _, share = rest.rpartition(":")
        try:
            number = float(share)
            if kind not in get_args(SplitKind):
                raise ValueError(kind)
        except ValueError:
            raise OptionError(
                f"`split` {text!r} is not of the form time:COL:0.8, group:COL:0.8 or share:0.8"
            ) from None
        return cls(kind, column or None, number)  # type: ignore[arg-type]

    def fault(self, block: pa.Table) -> Fault | None:
        """Rows that have no time to be split by. They count as training rows."""
        if self.kind != "time":
            return None
        assert self.column is not None
        column = block.column(self.column)
        _, there, fault = read_times(column, self.column)
        missing = ~there & ~fault.rows
        return Fault(
            self.column,
            ~there,
            lambda row: (
                "the time is missing, which the split needs"
                if missing[row]
                else fault.describe(row)
            ),
        )

    def is_train(
        self, block: pa.Table, numbers: np.ndarray, last_train_time: int | None
    ) -> np.ndarray:
        """Which rows of a block are training, bool (n,).

        Args:
            block: rows that hold the column.
            numbers: int64 (n,), of the rows in all files.
            last_train_time: what `last_train_time` gave, for "time".
        """
        if self.kind == "time":
            assert self.column is not None
            assert last_train_time is not None
            times, there, _ = read_times(block.column(self.column), self.column)
            return ~there | (times <= last_train_time)
        hashes = row_hashes(numbers)
        if self.kind == "group":
            assert self.column is not None
            encoded = _values(block.column(self.column), self.column).dictionary_encode()
            groups = _spelled_alike(encoded.dictionary)
            # The last one is that of rows without a group.
            distinct = np.asarray([*groups.to_pylist(), None], dtype=object)
            numbered = encoded.indices.fill_null(len(groups)).to_numpy()
            there = (~pd.isna(distinct))[numbered]
            of_rows = _hash_array(distinct, categorize=False)[numbered]
            # A row without a group is a group of its own.
            hashes = np.where(there, of_rows, hashes)
        return hashes / 2.0**64 < self.share

    def last_train_time(self, blocks: Iterable[RawBlockOfTimes]) -> int:
        """The time up to which rows are training, for "time".

        Raises:
            DataError: all rows have one time, or none has one.
        """
        assert self.column is not None
        counter = IdCounter()
        first_fault = None
        for block, place in blocks:
            times, there, fault = read_times(block.column(self.column), self.column)
            counter.add(times[there])
            if first_fault is None and fault.rows.any():
                row = int(fault.rows.argmax())
                first_fault = f"{place(row)}, column {self.column!r}: {fault.describe(row)}"
        counted = counter.vocabulary(1)
        times = np.asarray(counted.raw_ids)
        order = np.argsort(times)
        times, counts = times[order], counted.counts[order]
        if not len(times) and first_fault is not None:
            raise DataError(f"{first_fault}; rewrite the times")
        if len(times) < 2:
            raise DataError(
                f"column {self.column!r} holds {len(times)} different times, but `split` needs at "
                "least two; name another column"
            )
        reached = np.cumsum(counts) >= self.share * counts.sum()
        # Rows of one time stay together, and the last ones are always test.
        return int(times[min(int(reached.argmax()), len(times) - 2)])


def _values(column: pa.ChunkedArray, name: str) -> pa.Array:
    """The values that name groups.

    Raises:
        DataError: the column is of a type that cannot.
    """
    array = one_array(column)
    if pa.types.is_null(array.type):
        return array.cast(pa.string())
    if not (is_text(array.type) or is_number(array.type)):
        raise DataError(
            f"column {name!r} holds {array.type}, by which rows cannot be split; name a column of "
            "integers or text"
        )
    return array


def _spelled_alike(groups: pa.Array) -> pa.Array:
    """Groups as text, null if there is none. An integer has one spelling, whatever kind of column
    it comes from, so that the rows of a group stay together; see `raw_ids`."""
    integers, _ = integers_in(groups, "")
    if pa.types.is_floating(groups.type):
        groups = pc.if_else(pc.is_nan(groups), pa.scalar(None, groups.type), groups)
    return pc.coalesce(integers.cast(pa.string()), groups.cast(pa.string()))
