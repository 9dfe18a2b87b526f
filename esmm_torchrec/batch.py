"""ImpressionBatch, the form in which impressions reach every model.

Shapes in this file: B impressions, U distinct shared rows (U <= B), D dense features.

Features that many impressions share (such as a user's history) are stored once per distinct row
and pooled once; `shared_index` maps each impression to its row:

    shared bags     0: [7, 2]   1: [5]                 U = 2 users
    shared_index    [0, 0, 1, 0]                       B = 4 impressions: three of user 0, one of 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from esmm_torchrec.errors import OptionError
from esmm_torchrec.tasks import DEFAULT_TASKS

_CLICK, _CONVERSION = DEFAULT_TASKS.labels


class NamedTensors(dict[str, torch.Tensor]):
    """Tensors by name, also available as attributes: `logits["click"]` is `logits.click`."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"there is no {name!r}, only {', '.join(self) or 'nothing'}"
            ) from None


class BatchFeatures(NamedTuple):
    """Features of B impressions, the input of a model's `forward`. Any field may be None."""

    sparse_features: KeyedJaggedTensor | None = None
    """B bags per key, ids int32 or int64."""
    weighted_sparse_features: KeyedJaggedTensor | None = None
    """B bags per key, with float32 weights."""
    shared_sparse_features: KeyedJaggedTensor | None = None
    """U bags per key."""
    shared_weighted_sparse_features: KeyedJaggedTensor | None = None
    """U bags per key, with float32 weights."""
    shared_index: torch.Tensor | None = None
    """int64 (B,), index of each impression's shared bags; None: U is B, bag i is impression i's."""
    dense_features: torch.Tensor | None = None
    """float32 (B, D)."""


class ImpressionBatch(Pipelineable):
    """B impressions with their labels, ready for TorchRec's pipelines.

    A row of weight 0 is padding and all its bags are empty. Arguments not listed here are
    documented in `BatchFeatures`.

    Args:
        click: float32 (B,), 0 or 1.
        conversion: float32 (B,), 0 or 1; 1 only where click is 1.
        labels: label → float32 (B,), in place of click and conversion, for other chains of tasks.
        weight: float32 (B,), weight of each impression in the loss; None: all 1.
        mean_weight: float32 (), the sum of `weight` over all ranks of this step divided by the
            number of ranks. None: this rank's own sum, which is correct on a single rank.
        mean_label_weight: label → float32 (), the same mean over the impressions with that label.

    Raises:
        OptionError: labels are missing or given twice, or a tensor does not have the shape (B,) or
            (B, D), B bags per key, or the right dtype.

    Example::

        batch = ImpressionBatch(
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=["item"], values=torch.tensor([3, 1, 4]), lengths=torch.tensor([1, 1, 1])
            ),
            #        item 3      item 1      item 4
            click=torch.tensor([1.0, 1.0, 0.0]),
            conversion=torch.tensor([1.0, 0.0, 0.0]),
        )
    """

    def __init__(
        self,
        *,
        sparse_features: KeyedJaggedTensor | None = None,
        weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_sparse_features: KeyedJaggedTensor | None = None,
        shared_weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_index: torch.Tensor | None = None,
        dense_features: torch.Tensor | None = None,
        click: torch.Tensor | None = None,
        conversion: torch.Tensor | None = None,
        labels: Mapping[str, torch.Tensor] | None = None,
        weight: torch.Tensor | None = None,
        mean_weight: torch.Tensor | None = None,
        mean_label_weight: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if labels is None:
            given = {_CLICK: click, _CONVERSION: conversion}
            labels = {name: label for name, label in given.items() if label is not None}
        elif click is not None or conversion is not None:
            raise OptionError("give either labels or click and conversion, not both")
        self.features = BatchFeatures(
            sparse_features,
            weighted_sparse_features,
            shared_sparse_features,
            shared_weighted_sparse_features,
            shared_index,
            dense_features,
        )
        self.labels = NamedTensors(labels)
        self.weight = weight
        self.mean_weight = mean_weight
        self.mean_label_weight = NamedTensors(mean_label_weight or {})
        self._check()

    @property
    def click(self) -> torch.Tensor:
        """Label of the default chain's first task, float32 (B,)."""
        return self.labels[_CLICK]

    @property
    def conversion(self) -> torch.Tensor:
        """Label of the default chain's second task, float32 (B,)."""
        return self.labels[_CONVERSION]

    @property
    def batch_size(self) -> int:
        """Number of impressions, B."""
        return len(next(iter(self.labels.values())))

    def _check(self) -> None:
        """Checks shapes and dtypes only, which takes microseconds. A label or weight of shape
        (B, 1) would broadcast to (B, B) and silently change the loss."""
        if not self.labels:
            raise OptionError("a batch needs its labels: click and conversion, or labels")
        first = next(iter(self.labels.values()))
        size = first.shape[0] if first.ndim else 0
        columns: dict[str, torch.Tensor | None] = {**self.labels, "weight": self.weight}
        for name, column in columns.items():
            if column is None:
                continue
            if tuple(column.shape) != (size,):
                raise OptionError(
                    f"{name} has shape {tuple(column.shape)}, not ({size},): one value per "
                    "impression"
                )
            if not column.is_floating_point():
                raise OptionError(f"{name} is {column.dtype}, not float32; use {name}.float()")
        features = self.features
        dense, index = features.dense_features, features.shared_index
        if dense is not None and (dense.ndim != 2 or dense.shape[0] != size):
            raise OptionError(
                f"dense_features has shape {tuple(dense.shape)}, not ({size}, D): one row per "
                "impression"
            )
        if index is not None and tuple(index.shape) != (size,):
            raise OptionError(
                f"shared_index has shape {tuple(index.shape)}, not ({size},): one bag per "
                "impression"
            )
        shared = size if index is None else None
        for name, bags, expected in (
            ("sparse_features", features.sparse_features, size),
            ("weighted_sparse_features", features.weighted_sparse_features, size),
            ("shared_sparse_features", features.shared_sparse_features, shared),
            ("shared_weighted_sparse_features", features.shared_weighted_sparse_features, shared),
        ):
            if bags is not None and expected is not None and bags.stride() != expected:
                raise OptionError(
                    f"{name} has {bags.stride()} bags per key, not {expected}: one per impression"
                )

    def _each(self, change: Callable[[Any], Any]) -> ImpressionBatch:
        """Applies `change` to every tensor and returns the resulting batch."""

        def changed(value: Any) -> Any:
            return None if value is None else change(value)

        other = ImpressionBatch.__new__(ImpressionBatch)
        features: tuple[Any, ...] = tuple(map(changed, self.features))
        other.features = BatchFeatures(*features)
        other.labels = NamedTensors({name: change(v) for name, v in self.labels.items()})
        other.weight = changed(self.weight)
        other.mean_weight = changed(self.mean_weight)
        other.mean_label_weight = NamedTensors(
            {name: change(v) for name, v in self.mean_label_weight.items()}
        )
        return other

    def to(self, device: torch.device, non_blocking: bool = False) -> ImpressionBatch:
        """Returns the batch on `device`, or the batch itself if it is already there."""
        if next(iter(self.labels.values())).device == device:
            return self
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImpressionBatch:
        """Returns the batch in page-locked memory, from which copies to a GPU do not block."""
        return self._each(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses this batch's memory."""

        def record(value: Any) -> Any:
            value.record_stream(stream)
            return value

        self._each(record)
