"""Makes the sharding plan of a training run, from the options of its tables and the memory of its
ranks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.planners import to_sharding_plan
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan, ShardingType

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.errors import PlanError
from esmm_torchrec.models.embeddings import DIM_MULTIPLE
from esmm_torchrec.sharding.host import usable_memory
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.sharding.search import (
    NoPlanError,
    TableOptions,
    Workload,
    embedding_bag_collections_of,
    search,
)
from esmm_torchrec.sharding.table_placement import every_part_has_a_row

ShardingOption = Literal[
    "auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"
]
"""Values of `--sharding`. grid_shard is left out: it ignores the pooling type on one host and fails
on two."""

KernelOption = Literal["fused", "dense"]
"""fused: the optimiser runs inside the backward pass. dense: one of torch's optimisers updates all
rows, whether the batch looked them up or not."""

SparseOptimizerOption = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
"""Optimisers of the embedding tables."""

STORAGE_MARGIN = 0.15
"""Share of memory reserved for everything that the planner does not count."""


def kernel_has(kernel: str, optimizer: SparseOptimizerOption, device: str) -> bool:
    """Whether a kernel supports an optimiser of the tables on a device, "cuda" or "cpu". Row-wise
    Adagrad exists only in fused form, and fbgemm has no fused Adam for a CPU."""
    if kernel == EmbeddingComputeKernel.DENSE.value:
        return optimizer != "rowwise_adagrad"
    return optimizer != "adam" or device != "cpu"


def choose_kernel(
    optimizer: SparseOptimizerOption, *, sharding: ShardingOption, device: torch.device
) -> KernelOption:
    """Returns the kernel for an optimiser: fused if TorchRec has it, else dense.

    Raises:
        PlanError: no kernel supports it.
    """
    if sharding != "data_parallel":
        return "fused" if kernel_has("fused", optimizer, device.type) else "dense"
    if not kernel_has("dense", optimizer, device.type):
        raise PlanError(
            "`sharding` data_parallel cannot be used with `sparse_optimizer` rowwise_adagrad, "
            "which TorchRec provides only in fused form; use adagrad or another sharding"
        )
    return "dense"


def sharding_types(
    sharding: str, *, rows: int, world_size: int, local_world_size: int, device: str
) -> tuple[str, ...]:
    """Returns the sharding types that a table of `rows` rows may have under `sharding`.

    "auto" allows table_wise, row_wise and, on several hosts, table_row_wise. It leaves out
    data_parallel, which has no fused optimiser, and column_wise and grid_shard, which keep a row's
    Adagrad momentum once per column shard. On one rank every table stays whole.
    """
    table_wise = ShardingType.TABLE_WISE.value
    if world_size == 1 and sharding != ShardingType.DATA_PARALLEL.value:
        return (table_wise,)
    types = (sharding,)
    if sharding == "auto":
        types = (table_wise, ShardingType.ROW_WISE.value)
        if 1 < local_world_size < world_size:
            types += (ShardingType.TABLE_ROW_WISE.value,)
    if device != "cpu":
        return types
    parts = {
        ShardingType.ROW_WISE.value: world_size,
        ShardingType.TABLE_ROW_WISE.value: local_world_size,
    }
    # fbgemm's CPU kernels need at least one row of every table on every rank.
    return tuple(t for t in types if every_part_has_a_row(rows, parts.get(t, 1))) or (table_wise,)


@checks_choices
def make_plan(
    module: nn.Module,
    *,
    ranks: Ranks,
    sharding: ShardingOption,
    kernel: KernelOption,
    workload: Workload,
) -> ShardingPlan:
    """Plans the sharding of every EmbeddingBagCollection of a module, equally on all ranks.

    On a CPU, a table with too few rows to give each rank one stays whole, whatever the sharding.

    Args:
        module: a module whose collections are not sharded yet, on any device, "meta" included.
        ranks: this process among the others of a process group.
        sharding: sharding type of all tables; with "auto", TorchRec chooses for each table between
            table_wise, row_wise and, on several hosts, table_row_wise.
        kernel: "fused", or "dense" if the optimiser of the tables has no fused form.
        workload: expected rows, bags and ids of a batch.

    Returns:
        the plan, an argument of `shard`.

    Raises:
        PlanError: the tables do not fit.
    """

    def plan_on_first_rank() -> ShardingPlan:
        topology = _topology(ranks)
        try:
            selected = search(
                module,
                _table_options(module, sharding, kernel, ranks),
                topology=topology,
                workload=workload,
            )
        except NoPlanError as error:
            raise PlanError(
                f"no plan for `sharding` {sharding} on {ranks.world_size} ranks: {error}; use more "
                "ranks, a smaller `embedding_dim` or another sharding"
            ) from None
        return to_sharding_plan(selected, topology)

    return ranks.from_first(plan_on_first_rank)


def _table_options(
    module: nn.Module, sharding: ShardingOption, kernel: KernelOption, ranks: Ranks
) -> dict[str, TableOptions]:
    options: dict[str, TableOptions] = {}
    for collection in embedding_bag_collections_of(module).values():
        for config in collection.embedding_bag_configs():
            columns = config.embedding_dim // DIM_MULTIPLE
            shards = max(n for n in range(1, ranks.world_size + 1) if columns % n == 0)
            options[config.name] = TableOptions(
                sharding_types=sharding_types(
                    sharding,
                    rows=config.num_embeddings,
                    world_size=ranks.world_size,
                    local_world_size=ranks.local_world_size,
                    device=ranks.device.type,
                ),
                compute_kernels=(EmbeddingComputeKernel(kernel).value,),
                min_shard_width=config.embedding_dim // shards,
            )
    return options


def _topology(ranks: Ranks) -> Topology:
    """This machine: its memory less a margin, and the bandwidths that TorchRec assumes."""
    share = 1 - STORAGE_MARGIN
    hbm = None
    if ranks.device.type == "cuda":
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        hbm = int(total * share)
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=ranks.world_size, local_world_size=ranks.local_world_size
        ),
        hardware_config=HardwareConfig(
            hbm_cap_bytes=hbm, ddr_cap_bytes=int(usable_memory() * share / ranks.local_world_size)
        ),
        kernel_config=KernelConfig(compute_device=ranks.device.type),
    )
