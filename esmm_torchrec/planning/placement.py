"""Placement of the tables of a scenario by TorchRec's planner."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import nn
from torchrec import optim as torchrec_optim
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import CacheParams, CacheStatistics, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from esmm_torchrec.errors import PlanError
from esmm_torchrec.planning.scenario import Scenario, Strategy
from esmm_torchrec.planning.table_list import PlannedTable, TableList
from esmm_torchrec.sharding.planner import SparseOptimizerOption, kernel_has, sharding_types
from esmm_torchrec.sharding.search import (
    NoPlanError,
    TableOptions,
    expected_distinct,
    gib,
    search,
)
from esmm_torchrec.sharding.sharders import AnyDeviceSharder

_DENSE = EmbeddingComputeKernel.DENSE.value
_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_OPTIMIZERS = {
    "rowwise_adagrad": torchrec_optim.RowWiseAdagrad,
    "adagrad": torchrec_optim.Adagrad,
    "sgd": torchrec_optim.SGD,
    "adam": torchrec_optim.Adam,
}


def place(scenario: Scenario, strategy: Strategy, world_size: int) -> list[ShardingOption]:
    """Lets TorchRec place the tables.

    Args:
        scenario: the tables and the machines.
        strategy: strategy for tables without a constraint.
        world_size: number of ranks.

    Returns:
        the chosen option of each table, with ranks for its shards.

    Raises:
        OptionError: the ranks do not fill their last host.
        PlanError: the strategy is not supported, whatever the memory.
        NoPlanError: the memory is too small.
    """
    capacity = scenario.capacity(world_size)
    if capacity.for_tables <= 0:
        raise NoPlanError(
            f"the towers and their activations alone need {gib(capacity.towers)} of the "
            f"{gib(capacity.total - capacity.reserved)} of a rank"
        )
    tables = scenario.tables.tables
    options = {t.name: _table_options(scenario, strategy, world_size, t) for t in tables}
    for table in tables:
        _check_trainable(scenario, table, options[table.name])
    return search(
        _module(scenario.tables, scenario.sparse_optimizer),
        options,
        topology=scenario.topology(world_size),
        workload=scenario.tables.workload(scenario.batch_size),
    )


@lru_cache(maxsize=2)
def _module(tables: TableList, sparse_optimizer: SparseOptimizerOption) -> nn.Module:
    """Returns the tables with their optimiser. The result is cached, because many placements of one
    scenario are tried and creating 363 tables takes longer than placing them."""
    module = tables.to_module()
    # The planner reads the optimiser's class from the parameter. Each call gets a new dict, because
    # it modifies its argument.
    for parameter in module.parameters():
        apply_optimizer_in_backward(_OPTIMIZERS[sparse_optimizer], [parameter], {"lr": 0.01})
    return module


def _table_options(
    scenario: Scenario, strategy: Strategy, world_size: int, table: PlannedTable
) -> TableOptions:
    """Returns the choices for a table. Constraints take precedence over strategy and kernels."""
    hardware = scenario.hardware
    kinds: tuple[str, ...] = (strategy,)
    kernels: tuple[str, ...] = ()
    share = scenario.cache_load_factor
    for constraint in scenario.constraints:
        if fnmatchcase(table.name, constraint.pattern):
            kinds = constraint.sharding_types or kinds
            kernels = constraint.kernels or kernels
            share = constraint.cache_load_factor or share
    types = dict.fromkeys(
        name
        for kind in kinds
        for name in sharding_types(
            kind,
            rows=table.num_embeddings,
            world_size=world_size,
            local_world_size=hardware.local_world_size(world_size),
            device=hardware.device,
        )
    )
    named, kernels = bool(kernels), _existing(scenario, kernels or scenario.kernels)
    if not named and ShardingType.DATA_PARALLEL.value in types:
        # data_parallel has no other kernel, so users need not name it.
        kernels = (_DENSE,) if len(types) == 1 else tuple(dict.fromkeys((*kernels, _DENSE)))
    return TableOptions(
        sharding_types=tuple(types),
        compute_kernels=kernels,
        min_shard_width=scenario.column_width,
        cache=_cache(scenario, world_size, table, share) if _CACHING in kernels else None,
    )


def _existing(scenario: Scenario, kernels: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the kernels in which the optimiser exists; all if it exists in none. dense is never
    mixed with others: the planner treats it as fused, with the memory of its gradient added."""
    optimizer, device = scenario.sparse_optimizer, scenario.hardware.device
    existing = tuple(kernel for kernel in kernels if kernel_has(kernel, optimizer, device))
    return tuple(kernel for kernel in existing if kernel != _DENSE) or existing or kernels


def _cache(
    scenario: Scenario, world_size: int, table: PlannedTable, share: float | None
) -> CacheParams:
    return CacheParams(
        load_factor=share or UVM_CACHING_RATIO,
        # Rows are fetched into the cache before the look-up. Without this TorchRec counts the
        # transfer from the host twice, in the look-up and in the prefetch.
        prefetch_pipeline=True,
        stats=EvenLookups(_distinct_rows(scenario, table, world_size)),
    )


def _distinct_rows(scenario: Scenario, table: PlannedTable, world_size: int) -> float:
    """Returns the expected number of distinct rows of a table in the batches of one step, if all
    rows are equally likely."""
    bags = world_size * scenario.batch_size / table.shared_by
    lookups = bags * sum(feature.pooling_factor for feature in table.features)
    return expected_distinct(lookups, table.num_embeddings)


@dataclass(frozen=True)
class EvenLookups(CacheStatistics):
    """Cache statistics of look-ups spread evenly over the rows of a table: the worst case for a
    cache, assumed because the popularity of ids is unknown. Without statistics TorchRec's planner
    assumes that the prefetch takes no time."""

    distinct_rows: float
    """Number of distinct rows looked up in a step, on all ranks together."""

    @property
    def expected_lookups(self) -> float:
        """Distinct rows looked up in a step."""
        return self.distinct_rows

    def expected_miss_rate(self, clf: float) -> float:
        """Returns the share of rows outside a cache that contains a share `clf` of them."""
        return 1 - clf

    @property
    def cacheability(self) -> float:
        """Mean miss rate over all cache sizes."""
        return 0.5


def _check_trainable(scenario: Scenario, table: PlannedTable, options: TableOptions) -> None:
    """Raises PlanError if a table cannot be trained with these options, whatever the memory."""
    device, optimizer = scenario.hardware.device, scenario.sparse_optimizer
    device_name = "GPU" if device == "cuda" else "CPU"
    sharder = AnyDeviceSharder()
    for name in options.sharding_types:
        if name not in sharder.sharding_types(device):
            raise PlanError(f"TorchRec has no {name} on a {device_name}")
        kernels = {*sharder.compute_kernels(name, device), _DENSE}
        if not kernels & set(options.compute_kernels):
            raise PlanError(
                f"table {table.name!r}: TorchRec has no {name} with the kernel "
                f"{' or '.join(options.compute_kernels)} on a {device_name}"
            )
        if name == ShardingType.GRID_SHARD.value and table.pooling == "mean":
            raise PlanError(
                f"table {table.name!r} has mean pooling, which TorchRec's grid_shard computes "
                "wrongly"
            )
    for kernel in options.compute_kernels:
        if kernel_has(kernel, optimizer, device):
            continue
        if kernel == _DENSE:
            raise PlanError(
                f"table {table.name!r} would need the dense kernel, for which rowwise_adagrad does "
                "not exist; use `sparse_optimizer` adagrad, sgd or adam"
            )
        raise PlanError(
            "adam does not exist in the fused kernel on a CPU; use `kernels` dense or another "
            "`sparse_optimizer`"
        )
