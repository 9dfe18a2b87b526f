"""The sharders that TorchRec's planner and DistributedModelParallel are given."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.sharding.unequal_batches import allow_unequal_batches


class AnyDeviceSharder(EmbeddingBagCollectionSharder):
    """TorchRec's own sharder, which on a CPU also offers what works there but is not listed:
    row_wise and table_row_wise sharding, with unequal batches, too."""

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """The sharded collection."""
        sharded = super().shard(module, params, env, device, module_fqn)
        if env.process_group is not None:
            allow_unequal_batches(sharded, env.process_group)
        return sharded

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types that the planner may choose from."""
        types = super().sharding_types(compute_device_type)
        if compute_device_type == "cpu":
            types += [ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value]
        return types


def sharders() -> list[ModuleSharder[nn.Module]]:
    """What a planner and DistributedModelParallel take as `sharders`."""
    return [cast(ModuleSharder[nn.Module], AnyDeviceSharder())]
