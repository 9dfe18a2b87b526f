"""Makes ImpressionBatches from the rows of a mapped split.

Shapes: B rows of a batch, n <= B of them not padding, U distinct shared rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.data.mapped import Bags, MappedSplit
from esmm_torchrec.schema import COLLECTIONS, SHARED_ROW

SharedFeatures = Literal["once", "expanded"]
"""once: a batch contains each distinct shared row once, with an index. expanded: shared features
are repeated for every impression."""


class StepRows(NamedTuple):
    """The n rows of one rank in one step."""

    numbers: np.ndarray
    """Row numbers, int (n,)."""
    weights: np.ndarray
    """Weights in the loss, float32 (n,)."""
    labels: Mapping[str, np.ndarray] = {}
    """Label → values (n,); these replace or extend the labels of the split."""


class BatchMaker:
    """Makes batches of a fixed size from the rows of a split.

    Each rank needs only a few sums and one maximum per step from the other ranks: see `counts`.

    Args:
        split: split to take the rows from.
        batch_size: B.
        shared_features: how a batch stores shared features.
        pin_memory: whether batches are in page-locked memory.
    """

    def __init__(
        self,
        split: MappedSplit,
        *,
        batch_size: int,
        shared_features: SharedFeatures,
        pin_memory: bool,
    ) -> None:
        self._split = split
        self._batch_size = batch_size
        self._once = shared_features == "once" and SHARED_ROW in split.scalars
        self._pin_memory = pin_memory
        self._tasks = split.schema.tasks
        self._given = list(dict.fromkeys(before.label for _, before in self._tasks.links))
        """Labels that other tasks are conditional on."""

    def _labels(self, rows: StepRows) -> dict[str, np.ndarray]:
        labels = {label: self._split.scalars[label][rows.numbers] for label in self._tasks.labels}
        return labels | dict(rows.labels)

    def counts(self, rows: StepRows) -> np.ndarray:
        """Returns the counts that ranks combine, float64 (2 + labels,).

        They are the sum of the weights; for each label that other tasks are conditional on, the sum
        over rows with that label; and the number of bags of shared features: U, or U + 1 if there
        is padding. Across ranks, the last is combined by maximum and the others by sum.
        """
        labels = self._labels(rows)
        sums = [rows.weights.sum(dtype=np.float64)]
        sums += [rows.weights @ labels[label].astype(np.float64) for label in self._given]
        bags = 0
        if self._once:
            owners = self._split.scalars[SHARED_ROW][rows.numbers]
            bags = len(np.unique(owners)) + (len(owners) < self._batch_size)
        return np.array([*sums, bags], np.float64)

    def make(self, rows: StepRows, *, totals: np.ndarray, world_size: int) -> ImpressionBatch:
        """Makes the batch of some rows, padded to B.

        Args:
            rows: rows of this rank.
            totals: `counts` combined over all ranks.
            world_size: number of ranks.
        """
        means = torch.from_numpy((totals[:-1] / world_size).astype(np.float32))
        labels = {
            label: torch.from_numpy(self._padded(values.astype(np.float32)))
            for label, values in self._labels(rows).items()
        }
        dense = None
        if self._split.dense.shape[1]:
            dense = torch.from_numpy(self._padded(self._split.dense[rows.numbers]))
        batch = ImpressionBatch(
            labels=labels,
            **self._sparse(rows.numbers, max(1, int(totals[-1]))),
            dense_features=dense,
            weight=torch.from_numpy(self._padded(rows.weights)),
            mean_weight=means[0],
            mean_label_weight=dict(zip(self._given, means[1:], strict=True)),
        )
        return batch.pin_memory() if self._pin_memory else batch

    def _padded(self, values: np.ndarray) -> np.ndarray:
        """Pads `values` with zeros to B rows."""
        missing = self._batch_size - len(values)
        if missing == 0:
            return values
        return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])

    def _sparse(self, rows: np.ndarray, most_distinct: int) -> dict[str, Any]:
        """Returns the KeyedJaggedTensor of each collection, and shared_index."""
        owners = self._split.scalars.get(SHARED_ROW)
        own_owners = rows if owners is None else owners[rows]
        distinct, num_distinct, index = own_owners, self._batch_size, None
        if self._once and owners is not None:
            distinct, inverse = np.unique(own_owners, return_inverse=True)
            num_distinct = most_distinct
            # Padding points to an empty bag, one past the distinct rows of this rank.
            index = np.full(self._batch_size, len(distinct), np.int64)
            index[: len(rows)] = inverse
        features: dict[str, Any] = {}
        for collection, stores in self._split.bags.items():
            pooled_once = COLLECTIONS[collection].shared
            bags = [
                store.gather(distinct if pooled_once else own_owners if store.shared else rows)
                for store in stores
            ]
            features[collection] = _keyed_jagged_tensor(
                [key for store in stores for key in store.features],
                bags,
                num_bags=num_distinct if pooled_once else self._batch_size,
            )
        if index is not None:
            features["shared_index"] = torch.from_numpy(index)
        return features


def _keyed_jagged_tensor(
    keys: list[str], parts: Sequence[Bags], *, num_bags: int
) -> KeyedJaggedTensor:
    """Joins features of several stores in one KeyedJaggedTensor, padded with empty bags."""
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
