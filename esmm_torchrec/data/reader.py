"""Reads ImpressionBatches from a mapped split: per rank, shuffled, resumable, read ahead.

(seed, epoch) defines one order of all rows. Step g takes its rows [g·S, (g+1)·S) and rank r the
r-th slice of B of them, so the union over ranks is the same whatever their number. A rank that has
fewer rows than B (in the last step, or if the ranks do not divide S) is padded with rows of weight
0 and empty bags. Nothing is dropped: every rank takes the same number of steps of the same size. A
rank looks up only its own rows and receives the weights of the others.

Shapes: B rows per rank and step, S rows per step over W ranks, U distinct
shared rows, F features, D dense features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import check_positive, checks_choices
from esmm_torchrec.data.batch_reader import BatchReader, Block, Exchange
from esmm_torchrec.data.batches import BatchMaker, SharedFeatures, StepRows
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.schema import SHARED_ROW

STEPS_PER_BLOCK = 32
"""Number of steps whose counts the ranks exchange at once."""


@dataclass(frozen=True)
class Selection:
    """Rows of a split to read, and their weights in the loss."""

    rows: np.ndarray
    """int (M,), row numbers; a row may occur more than once."""
    weights: np.ndarray | None = None
    """float32 (M,), None for all 1."""
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Label → (M,), which replaces or adds to those of the split."""
    periods: np.ndarray | None = None
    """int (M,), not negative; periods are read one after the other, each shuffled separately."""


class ImpressionReader(BatchReader):
    """Reads a mapped split as batches; see `BatchReader`.

    Args:
        split: split to read from.
        batch_size: B, rows per rank and step.
        rank: r.
        world_size: W.
        rows_per_step: S, at most B·W; None: B·W.
        seed: seed of the order.
        shuffle: False keeps the order of the data.
        shuffle_chunk: up to this many consecutive impressions of one shared row stay together
            when the rows are shuffled; more pool less, 1 shuffles row by row.
        selection: rows to read; None reads all.
        shared_features: how a batch carries shared features.
        pin_memory: whether batches are in page-locked memory, which allows asynchronous copies to a
            GPU.
        exchange: how ranks exchange the weights of their rows; None: each rank looks up the rows
            of all ranks, whose cost grows with the number of ranks.

    Raises:
        OptionError: an argument is not positive, or there is no row to read.
    """

    @checks_choices
    def __init__(
        self,
        split: MappedSplit,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        rows_per_step: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_chunk: int = 1,
        selection: Selection | None = None,
        shared_features: SharedFeatures = "once",
        pin_memory: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(
            split.schema,
            num_rows=split.impressions if selection is None else len(selection.rows),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            rows_per_step=rows_per_step,
            exchange=exchange,
        )
        check_positive(shuffle_chunk=shuffle_chunk)
        self.split = split
        self.seed = seed
        self.shuffle = shuffle
        self.shuffle_chunk = shuffle_chunk
        self.selection = selection
        self._maker = BatchMaker(
            split,
            batch_size=batch_size,
            shared_features=shared_features,
            pin_memory=pin_memory,
        )

    def _next_row(self, row: int) -> int | None:
        following = row + self.global_batch_size
        return following if following < self.num_rows else None

    def _steps_from(self, row: int) -> int:
        return -(-(self.num_rows - row) // self.global_batch_size)

    def _order(self, epoch: int) -> np.ndarray | None:
        """int (M,): positions in the selection, in the order of an epoch; None: as they are."""
        if not self.shuffle:
            return None
        rng = np.random.default_rng([self.seed, epoch])
        shared = self.split.scalars.get(SHARED_ROW)
        periods = None if self.selection is None else self.selection.periods
        if periods is not None:
            order = rng.permutation(self.num_rows)
            return order[np.argsort(periods[order], kind="stable")]
        if self.shuffle_chunk == 1 or shared is None:
            kind = np.int32 if self.num_rows < 1 << 31 else np.int64
            return rng.permutation(np.arange(self.num_rows, dtype=kind))
        owner = shared if self.selection is None else shared[self.selection.rows]
        return shuffled_chunks(owner, self.shuffle_chunk, rng)

    def rows_left(self) -> np.ndarray:
        """Returns the row numbers of all ranks in the rest of the epoch, in order, int (M,). Step g
        takes B·W of them, and rank r the r-th slice of B of those."""
        order = self._order(self._epoch)
        positions = np.arange(self._row, self.num_rows) if order is None else order[self._row :]
        return positions if self.selection is None else self.selection.rows[positions]

    def _blocks(self) -> Iterator[Block]:
        order = self._order(self._epoch)
        starts = range(self._row, self.num_rows, self.global_batch_size)
        for first in range(0, len(starts), STEPS_PER_BLOCK):
            yield self._block(order, starts[first : first + STEPS_PER_BLOCK])

    def _block(self, order: np.ndarray | None, starts: range) -> Block:
        def batch(step: int, totals: np.ndarray) -> ImpressionBatch:
            rows = self._rows(order, starts[step], self.rank)
            return self._maker.make(rows, totals=totals, world_size=self.world_size)

        def counts(start: int, rank: int) -> np.ndarray:
            return self._maker.counts(self._rows(order, start, rank))

        ranks = range(self.world_size) if self._exchange is None else [self.rank]
        by_rank = np.stack([[counts(start, rank) for start in starts] for rank in ranks])
        totals = by_rank.sum(axis=0)
        totals[:, -1] = by_rank[:, :, -1].max(axis=0)
        return Block(totals, batch)

    def _rows(self, order: np.ndarray | None, start: int, rank: int) -> StepRows:
        """Returns the rows of a rank in the step that starts at a position."""
        end = min(start + self.global_batch_size, self.num_rows)
        first = min(start + rank * self.batch_size, end)
        last = min(first + self.batch_size, end)
        positions = np.arange(first, last) if order is None else order[first:last]
        if self.selection is None:
            return StepRows(positions, np.ones(len(positions), np.float32))
        weights = self.selection.weights
        return StepRows(
            self.selection.rows[positions],
            np.ones(len(positions), np.float32) if weights is None else weights[positions],
            {label: values[positions] for label, values in self.selection.labels.items()},
        )


def shuffled_chunks(owner: np.ndarray, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random order of chunks: runs of equal owners, split after `longest` rows."""
    num_rows = len(owner)
    first_of_run = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    run_lengths = np.diff(np.r_[first_of_run, num_rows])
    in_run = np.arange(num_rows) - np.repeat(first_of_run, run_lengths)
    starts = np.flatnonzero(in_run % longest == 0)
    lengths = np.diff(np.r_[starts, num_rows])
    chosen = rng.permutation(len(starts))
    starts, lengths = starts[chosen], lengths[chosen]
    ends = np.cumsum(lengths)
    order = np.repeat(starts - ends + lengths, lengths) + np.arange(num_rows)
    return order.astype(np.int32 if num_rows < 1 << 31 else np.int64)
