"""Bad rows of raw data: raised, or skipped, counted and described up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from esmm_torchrec.data.sources.raw_values import Fault
from esmm_torchrec.errors import DataError

MAX_EXAMPLES = 10
"""Maximum number of bad rows that are described in the result."""


class BadRows:
    """Counts the bad rows that are skipped.

    Args:
        limit: maximum number of skipped rows; 0 raises at the first.
        by_option: whether `max_bad_rows` sets the limit; errors then mention it.
    """

    def __init__(self, limit: int, *, by_option: bool = True) -> None:
        self.limit = limit
        self._by_option = by_option
        self.count = 0
        self.examples: list[str] = []

    def skip(self, rows: int, sentence: Callable[[int], str]) -> None:
        """Counts bad rows.

        Args:
            rows: number of bad rows.
            sentence: function from n, counted from 0, to the problem of the n-th bad row.

        Raises:
            DataError: the limit is exceeded.
        """
        allowed = min(rows, self.limit - self.count)
        if allowed < rows:
            raise self._error(sentence(allowed))
        self.count += rows
        for row in range(min(rows, MAX_EXAMPLES - len(self.examples))):
            self.examples.append(sentence(row))

    def leave_out(self, faults: Sequence[Fault], place: Callable[[int], str]) -> np.ndarray:
        """Skips the rows with a fault and returns a mask of the others, bool (n,).

        Args:
            faults: faults of n rows; not empty.
            place: function from a row to its human-readable location.

        Raises:
            DataError: the limit is exceeded.
        """
        bad = np.zeros_like(faults[0].rows)
        for fault in faults:
            bad |= fault.rows
        rows = np.flatnonzero(bad).tolist()

        def sentence(number: int) -> str:
            row = rows[number]
            fault = next(fault for fault in faults if fault.rows[row])
            return f"{place(row)}, column {fault.column!r}: {fault.describe(row)}"

        self.skip(len(rows), sentence)
        return ~bad

    def _error(self, sentence: str) -> DataError:
        if not self._by_option:
            return DataError(sentence)
        if self.limit:
            return DataError(
                f"there are more than {self.limit} bad rows (`max_bad_rows`), the first one too "
                f"many: {sentence}"
            )
        return DataError(f"{sentence}; fix it, or skip up to N bad rows with `max_bad_rows` N")
