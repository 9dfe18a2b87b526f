"""The base class of readers: position, batches made ahead of time, exchange between ranks."""

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
"""Number of batches prepared ahead of the one in use."""


class Exchange(Protocol):
    """Combines small arrays across ranks; all ranks call the same method with the same shape."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Returns the sums over all ranks, float64."""
        ...

    def max(self, values: np.ndarray) -> np.ndarray:
        """Returns the maxima over all ranks, float64."""
        ...


class Block(NamedTuple):
    """Consecutive steps of one rank."""

    counts: np.ndarray
    """`BatchMaker.counts` of each step, float64 (steps, 2 + labels)."""
    batch: Callable[[int, np.ndarray], ImpressionBatch]
    """Makes the batch of a step, from its index in the block and its counts over all ranks."""


class BatchReader(ABC):
    """Reads impressions as batches, for one rank of several.

    Iterating yields the rest of the current epoch. The position moves when `advance` is called
    after a step, and not when a batch is yielded, because pipelines fetch batches ahead of time.

    Args:
        num_rows: rows of an epoch, over all ranks. For other arguments see `ImpressionReader`.
        exchange: combines the counts of the ranks; None: `Block.counts` is over all ranks already.

    Raises:
        OptionError: an argument is not positive, or there are no rows to read.
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
        """S, the rows of one step over all ranks."""
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
        """Returns the position after the step at `row`, or None at the end of the epoch."""

    @abstractmethod
    def _steps_from(self, row: int) -> int:
        """Returns the number of steps from a position to the end of the epoch."""

    @abstractmethod
    def _blocks(self) -> Iterator[Block]:
        """Yields the blocks of the rest of the epoch; a separate thread makes them, one ahead."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in a full epoch, the same on every rank."""
        return self._steps_from(0)

    @property
    def epoch(self) -> int:
        """Epoch of the next step, starting at 0."""
        return self._epoch

    @property
    def steps_left(self) -> int:
        """Number of steps until the end of the current epoch."""
        return self._steps_from(self._row)

    @property
    def rows_done(self) -> int:
        """Rows read so far by all ranks, over all epochs, without padding."""
        return self._epoch * self.num_rows + min(self._row, self.num_rows)

    def advance(self) -> None:
        """Moves the position by one step."""
        following = self._next_row(self._row)
        if following is None:
            self._epoch, self._row = self._epoch + 1, 0
        else:
            self._row = following

    def state_dict(self) -> dict[str, Any]:
        """Returns the position as an epoch and a row over all ranks, so that a run can be resumed
        on any number of ranks."""
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position that `state_dict` returned.

        Raises:
            DataError: the position is beyond the last row.
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
                # On the calling thread, so that this collective keeps the same order relative to
                # the other collectives on every rank.
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
