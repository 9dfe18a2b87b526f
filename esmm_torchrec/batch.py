"""ImpressionBatch, the one form in which impressions reach a model.

Shapes in this file: B impressions, U distinct shared rows (U <= B), D dense features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(frozen=True)
class ImpressionBatch(Pipelineable):
    """B impressions with their labels, ready for TorchRec's pipelines.

    Features that many impressions share (a user's history) are carried once per distinct row and
    pooled once; `shared_index` says which row each impression uses.

    A row of weight 0 is padding: all its bags are empty.

    Example::

        batch = ImpressionBatch(
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=["item"], values=torch.tensor([3, 1, 4]), lengths=torch.tensor([1, 1, 1])
            ),
            click=torch.tensor([1.0, 1.0, 0.0]),
            conversion=torch.tensor([1.0, 0.0, 0.0]),
        )
    """

    click: torch.Tensor
    """float32 (B,), 0 or 1."""
    conversion: torch.Tensor
    """float32 (B,), 0 or 1; 1 only where click is 1."""
    sparse_features: KeyedJaggedTensor | None = None
    """B bags a key, ids int32 or int64."""
    weighted_sparse_features: KeyedJaggedTensor | None = None
    """B bags a key, with float32 weights."""
    shared_sparse_features: KeyedJaggedTensor | None = None
    """U bags a key."""
    shared_weighted_sparse_features: KeyedJaggedTensor | None = None
    """U bags a key, with float32 weights."""
    shared_index: torch.Tensor | None = None
    """int64 (B,), the shared bag of each impression; None: U is B and bag i is impression i's."""
    dense_features: torch.Tensor | None = None
    """float32 (B, D)."""
    weight: torch.Tensor | None = None
    """float32 (B,), weight of each impression in the loss; None: all 1."""
    mean_weight: torch.Tensor | None = None
    """float32 (), sum of `weight` over all ranks of this step divided by the number of ranks.
    None: this rank's own sum, right where there is one rank."""
    mean_click_weight: torch.Tensor | None = None
    """float32 (), the same sum over the clicked impressions alone."""
    sample_id: torch.Tensor | None = None
    """int64 (B,)."""
    group_id: torch.Tensor | None = None
    """int64 (B,)."""
    true_ctr: torch.Tensor | None = None
    """float32 (B,), the probability of a click, where the data knows it."""
    true_cvr: torch.Tensor | None = None
    """float32 (B,), the probability of a conversion given a click, where the data knows it."""

    def _each(
        self, change: Callable[[torch.Tensor | KeyedJaggedTensor], torch.Tensor | KeyedJaggedTensor]
    ) -> ImpressionBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: change(value) for name, value in values.items() if value is not None}
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> ImpressionBatch:
        """The batch on `device`; itself where it is there already."""
        if self.click.device == device:
            return self
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImpressionBatch:
        """The batch in page-locked memory, from which copies to a GPU do not block."""
        return self._each(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses this batch's memory."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value.record_stream(stream)
