"""Sharders for TorchRec's planner and DistributedModelParallel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist
from torchrec.distributed.types import (
    Awaitable,
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

OutputDist = Callable[[torch.Tensor, EmbeddingShardingContext | None], Awaitable[torch.Tensor]]


class AnyDeviceSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, extended on a CPU by row_wise and table_row_wise, which work there
    although TorchRec does not list them. Batches may be unequal."""

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Returns the sharded collection."""
        sharded = super().shard(module, params, env, device, module_fqn)
        if env.process_group is not None:
            _allow_unequal_batches(sharded, env.process_group)
        return sharded

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns the sharding types that the planner may choose from."""
        types = super().sharding_types(compute_device_type)
        if compute_device_type == "cpu":
            types += [ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value]
        return types


def sharders() -> list[ModuleSharder[nn.Module]]:
    """Returns the `sharders` argument of a planner and of DistributedModelParallel."""
    return [cast(ModuleSharder[nn.Module], AnyDeviceSharder())]


def _allow_unequal_batches(
    sharded: ShardedEmbeddingBagCollection, group: dist.ProcessGroup
) -> None:
    """Lets the number of bags differ between ranks in the row-wise tables of a sharded collection.

    Partial sums of pooled embeddings are reduce-scattered, so that each rank receives its own bags.
    TorchRec supports unequal numbers of bags only on NCCL; on gloo it fails with "allgather:
    invalid tensor size". Every rank knows all these numbers from the exchange of ids, so shorter
    batches are padded with zeros here, and the result is trimmed.
    """
    if dist.get_backend(group) != dist.Backend.GLOO:
        return
    # `_output_dists` is a plain list, so sharded.modules() does not include its modules.
    for module in sharded._output_dists:
        if isinstance(module, RwPooledEmbeddingDist | TwRwPooledEmbeddingDist):
            padded = _padded(module.forward, dist.get_rank(group))
            module.forward = padded  # pyright: ignore[reportAttributeAccessIssue]


def _padded(output_dist: OutputDist, rank: int) -> OutputDist:
    def forward(
        embeddings: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> Awaitable[torch.Tensor]:
        """(bags of all ranks, columns) → (bags of this rank, columns)."""
        sizes = [] if sharding_ctx is None else sharding_ctx.batch_size_per_rank
        if len(set(sizes)) < 2 or sharding_ctx is None or sharding_ctx.variable_batch_per_feature:
            return output_dist(embeddings, sharding_ctx)
        parts = nn.utils.rnn.pad_sequence(list(embeddings.split(sizes)), batch_first=True)
        equal = replace(sharding_ctx, batch_size_per_rank=[max(sizes)] * len(sizes))
        awaitable = output_dist(parts.flatten(0, 1), equal)
        awaitable.callbacks.append(lambda scattered: scattered[: sizes[rank]])
        return awaitable

    return forward
