"""Reads ImpressionBatches from row groups without a mapped copy, for data sets of any size.

The row groups of a split, permuted by (seed, epoch), form one sequence of rows. It is divided into
L lanes of equal length, and each lane into windows of M rows. The rows of a window are permuted by
(seed, epoch, lane, window). A step takes the next S / L rows of every lane, and rank r of W reads
the lanes [rL/W, (r+1)L/W):

    lane 0   | window 0        | window 1        | …      rank 0
    lane 1   | window 0        | window 1        | …      rank 0
    lane 2   | window 0        | window 1        | …      rank 1
    lane 3   | window 0        | window 1        | …      rank 1
              ^ step 0: S / 4 rows of each

So the rows of a step depend on the data set, the seed, L and M, and not on the number of ranks. A
rank keeps two windows of each of its lanes. Shuffling within a window is as good as a full shuffle
if the data set is stored by a hash of the user (`prepare table --key`), because a window is then a
random sample of users.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import check_choices, check_positive, checks_choices
from esmm_torchrec.data.batch_reader import BatchReader, Block, Exchange
from esmm_torchrec.data.batches import BatchMaker, SharedFeatures, StepRows
from esmm_torchrec.data.mapped import HistoryWeights, MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SplitName
from esmm_torchrec.data.reader import shuffled_chunks
from esmm_torchrec.data.row_groups import RowGroups
from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import SHARED_ROW, WEIGHT, Schema

ORDERED_WINDOW = 1 << 16
"""Number of rows of a rank laid out at a time when nothing is shuffled."""


@dataclass(frozen=True)
class StreamedSplit:
    """A split that is read window by window, from disk or from an object store."""

    dataset: PreparedDataSet
    name: SplitName
    lanes: int
    """L, the number of lanes; fixed for a run and a multiple of the number of ranks."""
    window: int
    """M, the number of rows of a lane that are shuffled together."""
    history_weights: HistoryWeights = "normalised"
    """How the weights of multi-valued features are treated."""
    cache: Path | None = None
    """Folder in which windows are laid out; None: the system's folder for temporary files."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(lanes=self.lanes, window=self.window)

    @property
    def schema(self) -> Schema:
        """Schema of the impressions."""
        return self.dataset.schema

    @property
    def impressions(self) -> int:
        """Number of impressions."""
        return self.dataset.splits[self.name].impressions

    @property
    def mean_values_per_bag(self) -> Mapping[str, float]:
        """Id feature → mean number of ids per stored row of the training split."""
        return self.dataset.statistics.mean_values_per_bag

    def stretch(self, lane: int) -> tuple[int, int]:
        """Returns the rows [first, last) of a lane in stored order."""
        return _bounds(self.impressions, self.lanes, lane)

    def columns(
        self, names: Sequence[str], first: int = 0, last: int | None = None
    ) -> dict[str, np.ndarray]:
        """Reads the rows [first, last) of columns in stored order; absent `names` are left out.

        Raises:
            DataError: a file is missing, broken or cannot be read.
        """
        last = self.impressions if last is None else last
        return RowGroups(self.dataset, self.name).columns(names, first, last)


Split = MappedSplit | StreamedSplit
"""A split in either of its readable forms."""


def open_in_order(
    dataset: PreparedDataSet,
    name: SplitName,
    *,
    ranks: int,
    history_weights: HistoryWeights,
) -> Split:
    """Opens a split to read it once in stored order: the mapped copy if the data set is on disk,
    else a streamed split.

    Raises:
        DataError: a file is missing, broken or not what the description says.
    """
    if dataset.root.local is not None:
        return MappedSplit.open(dataset, name, history_weights=history_weights)
    return stream_in_order(dataset, name, ranks=ranks, history_weights=history_weights)


def stream_in_order(
    dataset: PreparedDataSet, name: SplitName, *, ranks: int, history_weights: HistoryWeights
) -> StreamedSplit:
    """Returns a split to stream once in stored order; each rank reads one stretch of it."""
    return StreamedSplit(
        dataset, name, lanes=ranks, window=ORDERED_WINDOW, history_weights=history_weights
    )


class StreamReader(BatchReader):
    """Reads a split as batches, window by window; see `BatchReader`.

    Args:
        split: split to read.
        rows_per_step: S, a multiple of L.
        rank: r.
        world_size: W, a divisor of L.
        seed: seed of the order.
        shuffle: False keeps the stored order within each lane.
        shuffle_chunk: as in `ImpressionReader`, within a window.
        shared_features: how a batch stores shared features.
        pin_memory: whether batches are in page-locked memory.
        exchange: combines the counts of the ranks; required if W > 1.

    Raises:
        OptionError: W does not divide L, or L does not divide S.
        DataError: while iterating, a file is missing, broken or cannot be read; the position is
            kept.
    """

    @checks_choices
    def __init__(
        self,
        split: StreamedSplit,
        *,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_chunk: int = 1,
        shared_features: SharedFeatures = "once",
        pin_memory: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        lanes = split.lanes
        if lanes % world_size:
            raise OptionError(
                f"{lanes} lanes cannot be divided among {world_size} ranks; start a number of "
                "ranks that divides them, or a new run with another number of lanes"
            )
        if rows_per_step % lanes:
            raise OptionError(
                f"a `batch_size` of {rows_per_step} is not a multiple of {lanes} lanes; choose one "
                "that is"
            )
        super().__init__(
            split.schema,
            num_rows=split.impressions,
            batch_size=rows_per_step // world_size,
            rank=rank,
            world_size=world_size,
            rows_per_step=rows_per_step,
            exchange=exchange,
        )
        assert exchange is not None or world_size == 1
        self.split = split
        self.seed = seed
        self._shuffle = shuffle
        self._shuffle_chunk = shuffle_chunk
        self._shared_features: SharedFeatures = shared_features
        self._pin_memory = pin_memory
        self._groups = RowGroups(split.dataset, split.name)
        self._own_lanes = range(lanes * rank // world_size, lanes * (rank + 1) // world_size)
        self._rows_per_lane = -(-self.num_rows // lanes)
        self._step = rows_per_step // lanes
        """Number of rows of a lane in a step."""

    def _next_row(self, row: int) -> int | None:
        following = self._end_of_step(row // self.split.lanes)
        return following * self.split.lanes if following < self._rows_per_lane else None

    def _end_of_step(self, place: int) -> int:
        """Returns the end, within a lane, of the step at `place`; steps do not cross windows."""
        window = self.split.window
        return min(place + self._step, (place // window + 1) * window)

    def _steps(self, place: int, last: int) -> Iterator[tuple[int, int]]:
        """Yields the start and end, within a lane, of each step before `last`."""
        while place < last:
            end = self._end_of_step(place)
            yield place, end
            place = end

    def _steps_from(self, row: int) -> int:
        place, window = row // self.split.lanes, self.split.window
        if place >= self._rows_per_lane:
            return 0
        end = min((place // window + 1) * window, self._rows_per_lane)
        whole, rest = divmod(self._rows_per_lane - end, window)
        return (
            -(-(end - place) // self._step)
            + whole * -(-window // self._step)
            + -(-rest // self._step)
        )

    def own_rows(self) -> list[int]:
        """Returns the number of rows of this rank, without padding, in each step of an epoch."""
        bounds = (_bounds(self.num_rows, self.split.lanes, lane) for lane in self._own_lanes)
        rows = [last - first for first, last in bounds]
        return [
            sum(max(0, min(end, of_lane) - place) for of_lane in rows)
            for place, end in self._steps(0, self._rows_per_lane)
        ]

    def _blocks(self) -> Iterator[Block]:
        epoch, rows = self._epoch, self._groups.rows
        order = np.arange(len(rows))
        if self._shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(rows))
        ends = np.cumsum(rows[order])
        place = self._row // self.split.lanes
        while place < self._rows_per_lane:
            number = place // self.split.window
            yield self._window(epoch, order, ends, number, place)
            place = (number + 1) * self.split.window

    def _window(
        self, epoch: int, order: np.ndarray, ends: np.ndarray, number: int, place: int
    ) -> Block:
        """Returns the steps from `place` on in one window of all lanes of this rank."""
        first = number * self.split.window
        tables: list[pa.Table] = []
        orders: list[np.ndarray] = []
        base = 0
        for lane in self._own_lanes:
            of_lane = self._rows_of(order, ends, lane, first)
            rng = np.random.default_rng([self.seed, epoch, lane, number])
            orders.append(base + self._order(of_lane, rng))
            tables += of_lane
            base += len(orders[-1])
        split = self._laid_out(tables)
        maker = BatchMaker(
            split,
            batch_size=self.batch_size,
            shared_features=self._shared_features,
            pin_memory=self._pin_memory,
        )
        last = min(first + self.split.window, self._rows_per_lane)
        steps = [
            np.concatenate([rows[begin - first : end - first] for rows in orders])
            for begin, end in self._steps(place, last)
        ]
        weight = split.scalars.get(WEIGHT)

        def weighted(rows: np.ndarray) -> StepRows:
            return StepRows(
                rows, np.ones(len(rows), np.float32) if weight is None else weight[rows]
            )

        def batch(step: int, totals: np.ndarray) -> ImpressionBatch:
            return maker.make(weighted(steps[step]), totals=totals, world_size=self.world_size)

        return Block(np.stack([maker.counts(weighted(rows)) for rows in steps]), batch)

    def _rows_of(
        self, order: np.ndarray, ends: np.ndarray, lane: int, first: int
    ) -> list[pa.Table]:
        """Reads the rows of a lane in the window that starts at its row `first`."""
        begin, end = _bounds(self.num_rows, self.split.lanes, lane)
        low = min(begin + first, end)
        high = min(low + self.split.window, end)
        return self._groups.impressions(order, ends, low, high, keeper=lane)

    def _order(self, tables: list[pa.Table], rng: np.random.Generator) -> np.ndarray:
        rows = sum(map(len, tables))
        if not self._shuffle:
            return np.arange(rows)
        if self._shuffle_chunk == 1 or not tables or SHARED_ROW not in tables[0].column_names:
            return rng.permutation(rows)
        owner = np.concatenate([table.column(SHARED_ROW).to_numpy() for table in tables])
        return shuffled_chunks(owner, self._shuffle_chunk, rng)

    def _laid_out(self, tables: list[pa.Table]) -> MappedSplit:
        """Lays out a window as a small mapped split; its files go with the last reference."""
        data_set = self.split.dataset
        shared: list[pa.RecordBatch] = []
        if self.schema.has_shared_features:
            used = [table.column(SHARED_ROW).to_numpy() for table in tables]
            distinct = np.unique(np.concatenate(used)) if used else np.zeros(0, np.int64)
            shared = _batches([self._groups.shared(distinct)], data_set.shared_columns)
            tables = [
                table.set_column(
                    table.column_names.index(SHARED_ROW),
                    SHARED_ROW,
                    pa.array(np.searchsorted(distinct, rows).astype(np.int32)),
                )
                for table, rows in zip(tables, used, strict=True)
            ]
        if self.split.cache is not None:
            self.split.cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="esmm_torchrec-window-", dir=self.split.cache))
        try:
            return MappedSplit.write(
                folder / "window",
                schema=self.schema,
                impressions=_batches(tables, data_set.impression_columns),
                shared=shared,
                history_weights=self.split.history_weights,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _bounds(rows: int, lanes: int, lane: int) -> tuple[int, int]:
    """Returns the start and end of a lane in the sequence of all rows."""
    return rows * lane // lanes, rows * (lane + 1) // lanes


def _batches(tables: list[pa.Table], columns: pa.Schema) -> list[pa.RecordBatch]:
    """Returns the rows of some tables as record batches; one empty batch if there are none."""
    batches = [batch for table in tables for batch in table.combine_chunks().to_batches()]
    return batches or [pa.RecordBatch.from_pylist([], schema=columns)]
