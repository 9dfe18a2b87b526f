"""Division of one table into training and test rows: by time, by group or at random.

The rule decides on each row separately, so both splits are read from the same files in bounded
memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.choices import check_choices
from esmm_torchrec.data.hashing import text_hashes
from esmm_torchrec.data.sources.raw_tables import RawRows, RawTable
from esmm_torchrec.data.sources.raw_times import read_times
from esmm_torchrec.data.sources.raw_values import (
    Fault,
    integers_in,
    is_null,
    is_number,
    is_text,
    one_array,
    row_hashes,
)
from esmm_torchrec.data.vocabulary import IdCounter
from esmm_torchrec.errors import DataError, OptionError

pc: Any = pyarrow.compute

SplitKind = Literal["time", "share", "group"]


@dataclass(frozen=True)
class RowSplit:
    """Rule that divides the rows of a table into training and test rows.

    Raises:
        OptionError: the share is not between 0 and 1, or a column is missing or superfluous.
    """

    kind: SplitKind
    """Basis of the division: time trains on the earliest rows, group divides whole groups by a
    hash, share divides rows by a hash of their number."""
    column: str | None
    share: float
    """Approximate share of the training rows; for "time", a lower bound."""

    def __post_init__(self) -> None:
        check_choices(self)
        if (self.column is None) != (self.kind == "share"):
            raise OptionError("`split` must be time:COL:0.8, group:COL:0.8 or share:0.8")
        if not 0 < self.share < 1:
            raise OptionError(f"`split` needs a training share between 0 and 1, not {self.share}")

    @classmethod
    def parse(cls, text: str) -> RowSplit:
        """Parses time:COL:0.8, group:COL:0.8 or share:0.8; the name of the column may contain
        colons."""
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

    def faults(self, block: pa.Table) -> list[Fault]:
        """Returns the fault of rows without a time to split by. They count as training rows."""
        if self.kind != "time":
            return []
        assert self.column is not None
        return [read_times(block.column(self.column), self.column, may_be_missing=False)[2]]

    def is_train(
        self, block: pa.Table, numbers: np.ndarray, last_train_time: int | None
    ) -> np.ndarray:
        """Returns which rows of a block are training rows, bool (n,).

        Args:
            block: rows with the column.
            numbers: int64 (n,), numbers of the rows over all files.
            last_train_time: result of `last_train_time`, for "time".
        """
        if self.kind == "time":
            assert self.column is not None
            assert last_train_time is not None
            times, there, _ = read_times(block.column(self.column), self.column)
            return ~there | (times <= last_train_time)
        hashes = row_hashes(numbers)
        if self.kind == "group":
            assert self.column is not None
            groups = _groups(block.column(self.column), self.column)
            hashes = np.where(is_null(groups), hashes, text_hashes(groups.fill_null("")))
        return hashes / 2.0**64 < self.share

    def last_train_time(self, blocks: Iterable[tuple[RawTable, RawRows]]) -> int:
        """Returns the time up to which rows are training rows, for "time".

        Args:
            blocks: all rows, with the column.

        Raises:
            DataError: all rows have the same time, or none has a time.
        """
        assert self.column is not None
        counter = IdCounter()
        first_fault = None
        for table, rows in blocks:
            times, there, fault = read_times(rows.table.column(self.column), self.column)
            counter.add(times[there])
            if first_fault is None and fault.rows.any():
                row = int(fault.rows.argmax())
                place = table.place(int(rows.numbers[row]))
                first_fault = f"{place}, column {self.column!r}: {fault.describe(row)}"
        distinct, counts = counter.counts()
        times = distinct.to_numpy()
        order = np.argsort(times)
        times, counts = times[order], counts[order]
        if not len(times) and first_fault is not None:
            raise DataError(f"{first_fault}; rewrite the times")
        if len(times) < 2:
            raise DataError(
                f"column {self.column!r} holds {len(times)} different times, but `split` needs at "
                "least two; name another column"
            )
        reached = np.cumsum(counts) >= self.share * counts.sum()
        # Rows of the same time stay together, and the latest rows are always test rows.
        return int(times[min(int(reached.argmax()), len(times) - 2)])


def _groups(column: pa.ChunkedArray, name: str) -> pa.Array:
    """Returns groups as text, null if missing.

    An integer has one spelling, whatever the type of its column, so that the rows of a group stay
    together; see `raw_ids`.

    Raises:
        DataError: the column has a type that cannot name groups.
    """
    array = one_array(column)
    kind = array.type
    if not (is_text(kind) or is_number(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"column {name!r} holds {kind}, by which rows cannot be split; name a column of "
            "integers or text"
        )
    encoded = array.dictionary_encode()
    distinct = encoded.dictionary
    integers, _ = integers_in(distinct, name)
    if pa.types.is_floating(kind):
        distinct = pc.if_else(pc.is_nan(distinct), pa.scalar(None, kind), distinct)
    spelled = pc.coalesce(integers.cast(pa.string()), distinct.cast(pa.string()))
    return spelled.take(encoded.indices)
