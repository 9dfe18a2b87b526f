"""Sums and maxima over ranks of small arrays on the CPU."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


class RankExchange:
    """Combines arrays of all ranks, which make it together and call its methods in the same order
    with the same shapes."""

    def __init__(self) -> None:
        # TorchRec's evaluation pipeline asks for batches in a thread of its own, where collectives
        # of the default group would mix with those of the model.
        self._group = dist.new_group(backend="gloo")

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64, the sums over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: np.ndarray) -> np.ndarray:
        """float64, the maxima over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: np.ndarray, operation: dist.ReduceOp.RedOpType) -> np.ndarray:
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, operation, group=self._group)
        return reduced.numpy()
