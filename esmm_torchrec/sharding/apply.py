"""Plan in, DistributedModelParallel out, with the weights that went in.

DistributedModelParallel discards the weights of an EmbeddingBagCollection on a CPU and draws new
ones, different on each rank count. Here a collection's weights are carried over; a collection on
the meta device, which never held any, is drawn block by block from a seed, so that its start
depends neither on the plan nor on the number of ranks and no rank ever holds a whole table.
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
"""Rows of a table drawn at once."""


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
        module: dense parts on the CPU, equal on all ranks; collections with weights or on "meta".
        plan: as `make_plan` or a plan file gives it.
        ranks: this process and its device.
        seed: of the weights of collections on the meta device.
        zero_row: row that starts at zero in every table, wherever the weights come from; None:
            no row does. This library's trainer passes `schema.UNKNOWN_ROW`: an unknown id that
            training never showed then adds nothing, like a missing one.

    Returns:
        the module on the device of `ranks`, its collections sharded, its weights those that went
        in. It must be gone before `process_group` ends.

    Raises:
        KeyError, ValueError: as TorchRec raises them, for a plan of other tables.

    The ids of each batch are checked against the rows of their tables, see `models.id_range`.
    """
    sources: dict[str, torch.Tensor | EmbeddingBagConfig] = {}
    tables = {}
    # These check ids themselves.
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
    """This rank's parts of a weight or of an optimiser's state, each with its first index in every
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
    """Fills rows [row, row + len(local)) of a table, block by block of the whole table."""
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
