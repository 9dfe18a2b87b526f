"""The sharders that TorchRec's planner and DistributedModelParallel are given."""

from __future__ import annotations

from typing import cast

from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder, ShardingType


class AnyDeviceSharder(EmbeddingBagCollectionSharder):
    """TorchRec's own sharder, which on a CPU also offers what works there but is not listed:
    row_wise and table_row_wise sharding."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types that the planner may choose from."""
        types = super().sharding_types(compute_device_type)
        if compute_device_type == "cpu":
            types += [ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value]
        return types


def sharders() -> list[ModuleSharder[nn.Module]]:
    """What a planner and DistributedModelParallel take as `sharders`."""
    return [cast(ModuleSharder[nn.Module], AnyDeviceSharder())]
