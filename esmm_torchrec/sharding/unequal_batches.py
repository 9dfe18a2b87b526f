"""Row-wise sharding over gloo with another number of bags on each rank.

A row-wise table sums parts of pooled embeddings over ranks and scatters them, each rank getting the
bags that it asked for. With unequal numbers of bags TorchRec can do that on NCCL alone; on gloo it
fails with "allgather: invalid tensor size". Every rank knows the numbers of all from the exchange
of ids, so shorter batches are filled up with zeros here, and the result is cut to size.

Shapes: b bags of a rank, W ranks, E columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

OutputDist = Callable[[torch.Tensor, EmbeddingShardingContext | None], Awaitable[torch.Tensor]]


def allow_unequal_batches(sharded: ShardedEmbeddingBagCollection, group: dist.ProcessGroup) -> None:
    """Lets the row-wise tables of a sharded collection take unequal batches.

    Args:
        sharded: the collection, just made.
        group: of its ranks. Nothing is changed if it is not a gloo group.
    """
    if dist.get_backend(group) != dist.Backend.GLOO:
        return
    # A list, which sharded.modules() does not enter.
    for module in sharded._output_dists:
        if isinstance(module, RwPooledEmbeddingDist | TwRwPooledEmbeddingDist):
            padded = _padded(module.forward, dist.get_rank(group))
            module.forward = padded  # pyright: ignore[reportAttributeAccessIssue]


def _padded(output_dist: OutputDist, rank: int) -> OutputDist:
    def forward(
        embeddings: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """(sum of b over ranks, E) → (b of this rank, E)."""
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        if len(set(sizes)) < 2 or sharding_ctx is None or sharding_ctx.variable_batch_per_feature:
            return output_dist(embeddings, sharding_ctx)
        parts = nn.utils.rnn.pad_sequence(list(embeddings.split(sizes)), batch_first=True)
        equal = replace(sharding_ctx, batch_size_per_rank=[max(sizes)] * len(sizes))
        awaitable = output_dist(parts.flatten(0, 1), equal)
        awaitable.callbacks.append(lambda scattered: scattered[: sizes[rank]])
        return awaitable

    return forward
