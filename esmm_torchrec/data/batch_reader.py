"""What readers have in common: a position, batches made ahead of time, and what ranks tell each
other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import check_positive
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import Schema

READ_AHEAD = 3
"""Batches made before they are asked for."""


class Exchange(Protocol):
    """How ranks combine small arrays; every rank calls the same method with the same shape."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64, the sums over all ranks."""
        ...

    def max(self, values: np.ndarray) -> np.ndarray:
        """float64, the maxima over all ranks."""
        ...


class Block(NamedTuple):
    """Some consecutive steps of one rank."""

    counts: np.ndarray
    """float64 (steps, 2 + labels), `BatchMaker.counts` of each."""
    batch: Callable[[int, np.ndarray], ImpressionBatch]
    """From the number of a step in the block, and the counts over all ranks, to its batch."""


class BatchReader(ABC):
    """Reads impressions as batches, for one rank of several.

    Iterating gives the rest of the current epoch. `advance` moves the position after a step was
    taken, and not when a batch is handed out, because pipelines ask for batches ahead of time.

    Args:
        num_rows: rows of an epoch, over all ranks; the others are those of `ImpressionReader`.
        exchange: what the ranks combine their counts with; None: blocks have those of all ranks.

    Raises:
        OptionError: an argument is not positive, or there is no row to read.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        num_rows: int,
        batch_size: int,
        rank: int,
        world_size: int,
        rows_per_step: int | None,
        exchange: Exchange | None,
    ) -> None:
        check_positive(batch_size=batch_size)
        self.schema = schema
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.global_batch_size = batch_size * world_size if rows_per_step is None else rows_per_step
        """S: rows of one step over all ranks."""
        if not 0 < self.global_batch_size <= batch_size * world_size:
            raise OptionError(
                f"rows_per_step {rows_per_step} does not fit into {world_size} batches of "
                f"{batch_size}; choose 1 to {batch_size * world_size}"
            )
        if num_rows == 0:
            raise OptionError("there are no impressions to read; select at least one")
        self._exchange = exchange
        self._epoch = 0
        self._row = 0

    @abstractmethod
    def _next_row(self, row: int) -> int | None:
        """The position after the step at `row`; None at the end of the epoch."""

    @abstractmethod
    def _steps_from(self, row: int) -> int:
        """Steps from a position to the end of the epoch."""

    @abstractmethod
    def _blocks(self) -> Iterator[Block]:
        """The blocks of the rest of the epoch; each is made in a thread of its own, one ahead."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return self._steps_from(0)

    @property
    def epoch(self) -> int:
        """Epoch of the next step, counted from 0."""
        return self._epoch

    @property
    def steps_left(self) -> int:
        """Steps until the end of the current epoch."""
        return self._steps_from(self._row)

    @property
    def rows_done(self) -> int:
        """Rows of all ranks up to the position, over all epochs, padding not counted."""
        return self._epoch * self.num_rows + min(self._row, self.num_rows)

    def advance(self) -> None:
        """Moves the position past one step."""
        following = self._next_row(self._row)
        if following is None:
            self._epoch, self._row = self._epoch + 1, 0
        else:
            self._row = following

    def state_dict(self) -> dict[str, Any]:
        """The position: an epoch and a number of rows over all ranks, so that any number of
        ranks can resume from it."""
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position of `state_dict`.

        Raises:
            DataError: there are not so many rows.
        """
        if state["row"] and self._steps_from(state["row"]) <= 0:
            raise DataError(
                f"the position to resume from, row {state['row']:,} of a pass, is beyond the "
                f"{self.num_rows:,} rows of this one; train again"
            )
        self._epoch, self._row = state["epoch"], state["row"]

    def __iter__(self) -> Iterator[ImpressionBatch]:
        preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader-blocks")
        making = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader-batches")
        pending: deque[Future[ImpressionBatch]] = deque()
        try:
            blocks = self._blocks()
            upcoming = preparing.submit(next, blocks, None)
            while (block := upcoming.result()) is not None:
                upcoming = preparing.submit(next, blocks, None)
                # Here, and not in a thread, so that ranks do it in the same order as everything
                # else that they do together.
                totals = self._totals(block.counts)
                for step in range(len(block.counts)):
                    pending.append(making.submit(block.batch, step, totals[step]))
                    if len(pending) > READ_AHEAD:
                        yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for executor in (preparing, making):
                executor.shutdown(wait=True, cancel_futures=True)

    def _totals(self, counts: np.ndarray) -> np.ndarray:
        if self._exchange is None:
            return counts
        sums = self._exchange.sum(counts[:, :-1])
        return np.concatenate([sums, self._exchange.max(counts[:, -1:])], axis=1)
