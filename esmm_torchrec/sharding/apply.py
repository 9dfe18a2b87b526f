"""Shards a module by a plan without losing its weights.

DistributedModelParallel discards the weights of an EmbeddingBagCollection on a CPU and draws new
ones, which differ with the number of ranks. `shard` copies the weights instead. A collection on the
meta device has none: its weights are drawn block by block from a seed, so they depend neither on
the plan nor on the number of ranks, and no rank ever holds a whole table.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from esmm_torchrec.models.embeddings import PooledFeatures
from esmm_torchrec.models.id_range import check_ids, looked_up
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.sharding.search import embedding_bag_collections_of
from esmm_torchrec.sharding.sharders import sharders

DRAWN_ROWS = 1 << 18
"""Number of rows of a table that are drawn at a time."""


def shard(
    module: nn.Module,
    *,
    plan: ShardingPlan,
    ranks: Ranks,
    seed: int = 0,
    zero_row: int | None = None,
) -> DistributedModelParallel:
    """Shards every EmbeddingBagCollection of a module by a plan.

    Args:
        module: its dense parts are on the CPU and equal on all ranks; its collections have weights
            or are on "meta".
        plan: the result of `make_plan` or of `PlanFile.to_sharding_plan`.
        ranks: this process and its device.
        seed: seed of the weights of collections on the meta device.
        zero_row: row that is set to zero in every table, wherever its weights come from; None: no
            row is. This library's trainer passes `schema.UNKNOWN_ROW`: unknown ids, if training
            saw none, then contribute nothing, like missing ones.

    Returns:
        the module on the device of `ranks`, with sharded collections and unchanged weights. No
        reference to it may remain when `process_group` ends.

    Raises:
        KeyError, ValueError: raised by TorchRec if the plan is for other tables.

    The ids of each batch are checked against the number of rows of their tables; see
    `models.id_range`.
    """
    sources: dict[str, torch.Tensor | EmbeddingBagConfig] = {}
    tables = {}
    # PooledFeatures checks its ids itself.
    own = {path for path, child in module.named_modules() if isinstance(child, PooledFeatures)}
    for path, collection in embedding_bag_collections_of(module).items():
        configs = collection.embedding_bag_configs()
        for config in configs:
            weight = collection.embedding_bags.get_parameter(f"{config.name}.weight")
            key = f"{path}.embedding_bags.{config.name}.weight"
            sources[key] = config if weight.is_meta else weight.detach()
        if path.rpartition(".")[0] not in own:
            tables[path] = looked_up(configs)
    parallel = DistributedModelParallel(module, device=ranks.device, plan=plan, sharders=sharders())
    state = parallel.state_dict()
    with torch.no_grad():
        for key, source in sources.items():
            for local, (row, column) in local_shards(state[key]):
                rows, columns = local.shape
                if isinstance(source, torch.Tensor):
                    local.copy_(source[row : row + rows, column : column + columns])
                else:
                    _draw(local, row, column, config=source, seed=seed)
                if zero_row is not None and row <= zero_row < row + rows:
                    local[zero_row - row] = 0
    for path, of_features in tables.items():
        collection = get_unwrapped_module(parallel).get_submodule(path)
        collection.register_forward_pre_hook(
            lambda _, inputs, of_features=of_features: check_ids(inputs[0], of_features)
        )
    return parallel


def local_shards(value: torch.Tensor) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
    """Yields this rank's parts of a weight or of an optimiser state, each with its offset in every
    dimension."""
    if isinstance(value, ShardedTensor):
        for part in value.local_shards():
            yield part.tensor, tuple(part.metadata.shard_offsets)
    else:
        assert not isinstance(value, DTensor), "TorchRec shards over a one-dimensional group"
        yield value, (0,) * value.dim()


def _draw(
    local: torch.Tensor, row: int, column: int, *, config: EmbeddingBagConfig, seed: int
) -> None:
    """Draws the shard that starts at (row, column) of a table, by blocks of the whole table."""
    assert config.init_fn is not None
    rows, columns = local.shape
    for block in range(row // DRAWN_ROWS, (row + rows - 1) // DRAWN_ROWS + 1 if rows else 0):
        first = block * DRAWN_ROWS
        size = min(DRAWN_ROWS, config.num_embeddings - first)
        digest = blake2b(f"{seed} {config.name} {block}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest) >> 1)
            drawn = torch.empty(size, config.embedding_dim)
            config.init_fn(drawn)
        start, end = max(first, row), min(first + size, row + rows)
        local[start - row : end - row].copy_(
            drawn[start - first : end - first, column : column + columns]
        )
