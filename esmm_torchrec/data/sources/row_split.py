"""One table → training and test rows: by time, by group or at random.

The rule looks at each row alone, so both halves are read from the same files in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas.util
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.choices import check_choices
from esmm_torchrec.data.sources.raw_times import read_times
from esmm_torchrec.data.sources.raw_values import Fault, one_array, row_hashes
from esmm_torchrec.data.vocabulary import IdCounter
from esmm_torchrec.errors import DataError, OptionError

pc: Any = pyarrow.compute
_hash_array: Any = pandas.util.hash_array

SplitKind = Literal["time", "share", "group"]


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
            groups = one_array(block.column(self.column)).cast(pa.string())
            encoded = groups.dictionary_encode()
            distinct = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
            of_groups = np.append(_hash_array(distinct, categorize=False), np.uint64(0))
            there = groups.is_valid().to_numpy(zero_copy_only=False)
            of_rows = of_groups[encoded.indices.fill_null(len(distinct)).to_numpy()]
            # A row without a group is a group of its own.
            hashes = np.where(there, of_rows, hashes)
        return hashes / 2.0**64 < self.share

    def last_train_time(self, blocks: Iterable[pa.Table]) -> int:
        """The time up to which rows are training, for "time".

        Raises:
            DataError: all rows have one time, or none has one.
        """
        assert self.column is not None
        counter = IdCounter()
        for block in blocks:
            times, there, _ = read_times(block.column(self.column), self.column)
            counter.add(times[there])
        counted = counter.vocabulary(1)
        times = np.asarray(counted.raw_ids)
        order = np.argsort(times)
        times, counts = times[order], counted.counts[order]
        if len(times) < 2:
            raise DataError(
                f"column {self.column!r} holds {len(times)} different times, but `split` needs at "
                "least two; name another column"
            )
        reached = np.cumsum(counts) >= self.share * counts.sum()
        # Rows of one time stay together, and the last ones are always test.
        return int(times[min(int(reached.argmax()), len(times) - 2)])
