"""From a mapped split to ImpressionBatches: per rank, shuffled, resumable, read ahead.

(seed, epoch) defines one order of all rows. Step g takes its rows [g·S, (g+1)·S) and rank r the
r-th slice of B of them, so the union over ranks is the same whatever their number. A rank that has
fewer rows than B (in the last step, or if the ranks do not divide S) is padded with rows of weight
0 and empty bags; nothing is dropped: every rank takes the same number of steps at the same size,
and everything a rank must know of the others follows from the order, without communication.

Shapes: B rows per rank and step, S rows per step over W ranks, U distinct
shared rows, F features, D dense features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.data.mapped import Bags, MappedSplit
from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import COLLECTIONS, SHARED_ROW

SharedFeatures = Literal["once", "expanded"]
"""once: a batch carries each distinct shared row once, with an index. expanded: it is written out
for every impression."""

READ_AHEAD = 3
"""Batches made before they are asked for."""


@dataclass(frozen=True)
class Selection:
    """Which rows of a split are read, and with which weight in the loss."""

    rows: np.ndarray
    """int (M,), row numbers; a row may occur more than once."""
    weights: np.ndarray | None = None
    """float32 (M,), None for all 1."""


class ImpressionReader:
    """Reads a split as batches of `ImpressionBatch`.

    Iterating gives the rest of the current epoch. `advance` moves the position after a step was
    taken, and not when a batch is handed out, because pipelines ask for batches ahead of time.

    Args:
        split: where the rows are.
        batch_size: B, rows per rank and step.
        rank: r.
        world_size: W.
        rows_per_step: S, at most B·W; None: B·W.
        seed: of the order.
        shuffle: False keeps the order of the data.
        shuffle_chunk: up to this many consecutive impressions of one shared row stay together
            when the rows are shuffled; more pool less, 1 shuffles row by row.
        selection: rows to read; None reads all.
        shared_features: how a batch carries shared features.
        pin_memory: whether batches lie in page-locked memory, which a GPU copies from without
            anybody waiting.

    Raises:
        OptionError: an argument is not positive, or there is no row to read.
    """

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
    ) -> None:
        for name, value in (("batch_size", batch_size), ("shuffle_chunk", shuffle_chunk)):
            if value < 1:
                raise OptionError(f"{name} {value} is not positive; give at least 1")
        self.split = split
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
        self.seed = seed
        self.shuffle = shuffle
        self.shuffle_chunk = shuffle_chunk
        self.selection = selection
        self.pin_memory = pin_memory
        self.num_rows = split.impressions if selection is None else len(selection.rows)
        if self.num_rows == 0:
            raise OptionError("there is no impression to read; select at least one")
        self._once = shared_features == "once" and SHARED_ROW in split.scalars
        self._epoch = 0
        self._row = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch, the same on every rank."""
        return -(-self.num_rows // self.global_batch_size)

    @property
    def epoch(self) -> int:
        """Epoch of the next step, counted from 0."""
        return self._epoch

    @property
    def steps_left(self) -> int:
        """Steps until the end of the current epoch."""
        return -(-(self.num_rows - self._row) // self.global_batch_size)

    @property
    def rows_done(self) -> int:
        """Rows of all ranks up to the position, over all epochs, padding not counted."""
        return self._epoch * self.num_rows + self._row

    def advance(self) -> None:
        """Moves the position past one step."""
        self._row += self.global_batch_size
        if self._row >= self.num_rows:
            self._epoch, self._row = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position: an epoch and a number of rows over all ranks, so that any number of
        ranks can go on from it."""
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position of `state_dict`."""
        self._epoch, self._row = state["epoch"], state["row"]

    def __iter__(self) -> Iterator[ImpressionBatch]:
        order = self._order(self._epoch)
        steps = range(self._row, self.num_rows, self.global_batch_size)
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        pending: deque[Future[ImpressionBatch]] = deque()
        try:
            for start in steps:
                pending.append(executor.submit(self._batch, order, start))
                if len(pending) > READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _order(self, epoch: int) -> np.ndarray | None:
        """int (M,): positions in the selection, in the order of an epoch; None: as they are."""
        if not self.shuffle:
            return None
        rng = np.random.default_rng([self.seed, epoch])
        shared = self.split.scalars.get(SHARED_ROW)
        if self.shuffle_chunk == 1 or shared is None:
            kind = np.int32 if self.num_rows < 1 << 31 else np.int64
            return rng.permutation(np.arange(self.num_rows, dtype=kind))
        owner = shared if self.selection is None else shared[self.selection.rows]
        return _shuffled_chunks(owner, self.shuffle_chunk, rng)

    def rows_left(self) -> np.ndarray:
        """int (M,): the row numbers of all ranks that the rest of the epoch goes through, in
        order. Step g takes B·W of them, rank r the r-th slice of B of those."""
        order = self._order(self._epoch)
        positions = np.arange(self._row, self.num_rows) if order is None else order[self._row :]
        return positions if self.selection is None else self.selection.rows[positions]

    def _batch(self, order: np.ndarray | None, start: int) -> ImpressionBatch:
        stop = min(start + self.global_batch_size, self.num_rows)
        positions = np.arange(start, stop) if order is None else order[start:stop]
        rows = positions if self.selection is None else self.selection.rows[positions]
        weights = np.ones(len(rows), np.float32)
        if self.selection is not None and self.selection.weights is not None:
            weights = self.selection.weights[positions]
        columns, tasks = self.split.scalars, self.split.schema.tasks
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        own_rows = rows[own]
        mean_weight = weights.sum(dtype=np.float64) / self.world_size
        mean_label_weight = {
            label: torch.tensor(
                weights @ columns[label][rows].astype(np.float64) / self.world_size,
                dtype=torch.float32,
            )
            for label in dict.fromkeys(before.label for _, before in tasks.links)
        }
        labels = {
            label: torch.from_numpy(self._padded(columns[label][own_rows].astype(np.float32)))
            for label in tasks.labels
        }
        dense = self.split.dense
        batch = ImpressionBatch(
            labels=labels,
            **self._sparse(rows, own_rows),
            dense_features=torch.from_numpy(self._padded(dense[own_rows]))
            if dense.shape[1]
            else None,
            weight=torch.from_numpy(self._padded(weights[own])),
            mean_weight=torch.tensor(mean_weight, dtype=torch.float32),
            mean_label_weight=mean_label_weight,
        )
        return batch.pin_memory() if self.pin_memory else batch

    def _padded(self, values: np.ndarray) -> np.ndarray:
        """`values` with zeros up to B rows."""
        missing = self.batch_size - len(values)
        if missing == 0:
            return values
        return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])

    def _sparse(self, rows: np.ndarray, own_rows: np.ndarray) -> dict[str, Any]:
        """The KeyedJaggedTensor of each collection, and shared_index."""
        owners = self.split.scalars.get(SHARED_ROW)
        own_owners = own_rows if owners is None else owners[own_rows]
        distinct, num_distinct, index = own_owners, self.batch_size, None
        if self._once and owners is not None:
            distinct, inverse = np.unique(own_owners, return_inverse=True)
            num_distinct = self._most_distinct(owners[rows])
            # Padding points at a bag that is empty on this rank, one past its distinct rows.
            index = np.full(self.batch_size, len(distinct), np.int64)
            index[: len(own_rows)] = inverse
        features: dict[str, Any] = {}
        for collection, stores in self.split.bags.items():
            pooled_once = COLLECTIONS[collection].shared
            bags = [
                store.gather(distinct if pooled_once else own_owners if store.shared else own_rows)
                for store in stores
            ]
            features[collection] = _keyed_jagged_tensor(
                [key for store in stores for key in store.features],
                bags,
                num_bags=num_distinct if pooled_once else self.batch_size,
            )
        if index is not None:
            features["shared_index"] = torch.from_numpy(index)
        return features

    def _most_distinct(self, owners: np.ndarray) -> int:
        """U: distinct shared rows of the rank that has most, one more where a rank is padded."""
        most = 1
        for rank in range(self.world_size):
            of_rank = owners[rank * self.batch_size : (rank + 1) * self.batch_size]
            distinct = len(np.unique(of_rank))
            most = max(most, distinct + (len(of_rank) < self.batch_size))
        return most


def _keyed_jagged_tensor(
    keys: list[str], parts: Sequence[Bags], *, num_bags: int
) -> KeyedJaggedTensor:
    """One KeyedJaggedTensor of features from several stores, padded with empty bags."""
    lengths = [
        np.pad(part.lengths, ((0, 0), (0, num_bags - part.lengths.shape[1]))).ravel()
        for part in parts
    ]
    weights = [part.weights for part in parts if part.weights is not None]
    return KeyedJaggedTensor(
        keys,
        torch.from_numpy(_concatenated([part.values for part in parts])),
        weights=torch.from_numpy(_concatenated(weights)) if weights else None,
        lengths=torch.from_numpy(_concatenated(lengths)),
    )


def _concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _shuffled_chunks(owner: np.ndarray, longest: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of chunks: runs of equal owners, cut to at most `longest` rows."""
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
