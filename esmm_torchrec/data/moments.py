"""Mean and standard deviation of columns that come in blocks."""

from __future__ import annotations

import numpy as np

from esmm_torchrec.data.prepared_form import DenseStatistics

ROWS_PER_STRETCH = 1 << 16


class Moments:
    """Mean and standard deviation of the columns of a matrix whose rows come in blocks.

    Rows are taken in stretches of fixed length (Chan, Golub, LeVeque 1979), so that the result
    depends on the rows alone and not on the blocks they came in.
    """

    def __init__(self, columns: int) -> None:
        self._waiting = np.empty((0, columns))
        self._rows = 0
        self._mean = np.zeros(columns)
        self._squares = np.zeros(columns)
        self._low = np.full(columns, np.inf)
        self._high = np.full(columns, -np.inf)

    def add(self, values: np.ndarray) -> None:
        """Takes float64 (rows, columns)."""
        waiting = np.concatenate([self._waiting, values])
        whole = len(waiting) - len(waiting) % ROWS_PER_STRETCH
        for start in range(0, whole, ROWS_PER_STRETCH):
            self._merge(waiting[start : start + ROWS_PER_STRETCH])
        self._waiting = waiting[whole:].copy()

    def _merge(self, values: np.ndarray) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            mean = values.mean(axis=0)
            shift, rows = mean - self._mean, self._rows + len(values)
            self._squares += np.square(values - mean).sum(axis=0)
            self._squares += np.square(shift) * (self._rows * len(values) / rows)
            self._mean += shift * (len(values) / rows)
        self._rows = rows
        self._low = np.minimum(self._low, values.min(axis=0))
        self._high = np.maximum(self._high, values.max(axis=0))

    def statistics(self) -> list[DenseStatistics]:
        """Of each column; a constant one has std 1, which standardises it to 0."""
        if len(self._waiting):
            self._merge(self._waiting)
            self._waiting = self._waiting[:0]
        std = np.sqrt(self._squares / max(1, self._rows))
        constant = self._low >= self._high
        mean = np.where(constant & (self._rows > 0), self._low, self._mean)
        std[constant] = 1.0
        return [DenseStatistics(float(m), float(s)) for m, s in zip(mean, std, strict=True)]
