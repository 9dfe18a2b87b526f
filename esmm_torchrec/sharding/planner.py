"""Asks TorchRec's planner for a sharding plan for training on the ranks at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.planners import PlannerError
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.host import usable_memory
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.sharding.sharders import sharders
from esmm_torchrec.sharding.table_placement import every_part_has_a_row

ShardingOption = Literal[
    "auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"
]
"""What `--sharding` takes. grid_shard is not among them: it ignores the pooling type on one host
and fails on two."""

KernelOption = Literal["fused", "dense"]
"""fused: the optimiser runs inside the backward pass. dense: gradients reach an optimiser of
torch's, whatever rows were touched."""

SparseOptimizerOption = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
"""Optimisers of the embedding tables."""

KERNEL_DIM_MULTIPLE = 4
MOST_IMBALANCE = 1.25
"""Of whole tables where `auto` may cut them."""
STORAGE_MARGIN = 0.15
"""Share of memory left to everything the planner does not count."""


@dataclass(frozen=True)
class Workload:
    """What the planner should expect of the data."""

    batch_size: int
    """Impressions per rank and step."""
    mean_values_per_bag: Mapping[str, float] = field(default_factory=dict)
    """Feature → mean number of ids per bag; 1 where not given."""


def embedding_bag_collections_of(module: nn.Module) -> dict[str, EmbeddingBagCollection]:
    """Path → every unsharded EmbeddingBagCollection below a module."""
    return {
        path: child
        for path, child in module.named_modules()
        if isinstance(child, EmbeddingBagCollection)
    }


def choose_kernel(
    optimizer: SparseOptimizerOption, *, sharding: ShardingOption, device: torch.device
) -> KernelOption:
    """The kernel that serves an optimiser: fused wherever TorchRec has it.

    Raises:
        PlanError: no kernel does.
    """
    if sharding == "data_parallel":
        if optimizer == "rowwise_adagrad":
            raise PlanError(
                "--sharding data_parallel does not exist with --sparse-optimizer rowwise_adagrad, "
                "which TorchRec has in fused form only; use adagrad or another sharding"
            )
        return "dense"
    return "dense" if optimizer == "adam" and device.type == "cpu" else "fused"


def _alternatives(sharding: ShardingOption, ranks: Ranks) -> list[tuple[ShardingOption, ...]]:
    """What every table may be; later ones where the tables do not fit as the earlier ones say, or
    leave one rank with most of the work."""
    if sharding != "auto":
        return [(sharding,)]
    # data_parallel has no fused optimiser; column_wise keeps a row's Adagrad momentum once per
    # column shard. Neither is chosen unasked.
    whole: tuple[ShardingOption, ...] = ("table_wise",)
    if ranks.world_size == 1:
        return [whole]
    # Ranks on a CPU that have as much to do train a tenth faster with whole tables
    # (benchmarks/two_ranks.py); the planner does not see it, as it assumes the links of GPUs.
    either: tuple[ShardingOption, ...] = ("table_wise", "row_wise")
    return [whole, either] if ranks.device.type == "cpu" else [either]


def _gives_each_rank_a_row(sharding: ShardingOption, rows: int, ranks: Ranks) -> bool:
    among = {"row_wise": ranks.world_size, "table_row_wise": ranks.local_world_size}
    return every_part_has_a_row(rows, among.get(sharding, 1))


def make_plan(
    module: nn.Module,
    *,
    ranks: Ranks,
    sharding: ShardingOption,
    kernel: KernelOption,
    workload: Workload,
) -> ShardingPlan:
    """Plans every EmbeddingBagCollection of a module; the same plan on every rank.

    A table of too few rows for each rank to get one is placed whole, whatever the sharding.

    Args:
        module: with collections that are not sharded yet, on any device, "meta" included.
        ranks: this process among the others, in a process group.
        sharding: one for all tables; "auto" leaves it to TorchRec, between table_wise and row_wise.
        kernel: "fused", or "dense" where the optimiser of the tables is none of the fused ones.
        workload: batch size and bag lengths to reckon with.

    Returns:
        the plan that `shard` takes.

    Raises:
        PlanError: the tables do not fit.
    """
    # The planner knows the dense kernel with data_parallel only, though it is right with all.
    dense_after = kernel == "dense" and sharding != "data_parallel"
    kernels = [EmbeddingComputeKernel("fused" if dense_after else kernel).value]

    def plan_on_first_rank() -> ShardingPlan:
        reason, alternatives = "", _alternatives(sharding, ranks)
        for types in alternatives:
            planner = EmbeddingShardingPlanner(
                topology=_topology(ranks),
                batch_size=workload.batch_size,
                constraints=_constraints(module, types, kernels, ranks, workload),
                storage_reservation=FixedPercentageStorageReservation(STORAGE_MARGIN),
                debug=False,
            )
            try:
                plan = planner.plan(module, sharders())
            except PlannerError as error:
                reason = " ".join(str(error).split())
            else:
                if types is alternatives[-1] or _imbalance(planner, ranks) <= MOST_IMBALANCE:
                    return plan
        raise PlanError(
            f"TorchRec finds no plan for --sharding {sharding} on {ranks.world_size} ranks; where "
            "memory is short, use more ranks or a smaller --embedding-dim, else another sharding "
            f"({reason[:300]})"
        )

    plan = ranks.from_first(plan_on_first_rank)
    if dense_after:
        for module_plan in plan.plan.values():
            assert isinstance(module_plan, EmbeddingModuleShardingPlan)
            for parameter in module_plan.values():
                parameter.compute_kernel = EmbeddingComputeKernel.DENSE.value
    return plan


def _constraints(
    module: nn.Module,
    types: tuple[ShardingOption, ...],
    kernels: list[str],
    ranks: Ranks,
    workload: Workload,
) -> dict[str, ParameterConstraints]:
    """What the planner may do with each table."""
    constraints: dict[str, ParameterConstraints] = {}
    for collection in embedding_bag_collections_of(module).values():
        for config in collection.embedding_bag_configs():
            column_shards = config.embedding_dim // KERNEL_DIM_MULTIPLE
            shards = max(n for n in range(1, ranks.world_size + 1) if column_shards % n == 0)
            possible = [
                name for name in types if _gives_each_rank_a_row(name, config.num_embeddings, ranks)
            ]
            constraints[config.name] = ParameterConstraints(
                sharding_types=[ShardingType(name).value for name in possible or ["table_wise"]],
                compute_kernels=kernels,
                min_partition=config.embedding_dim // shards,
                pooling_factors=[
                    workload.mean_values_per_bag.get(name, 1.0) for name in config.feature_names
                ],
                is_weighted=collection.is_weighted(),
            )
    return constraints


def _imbalance(planner: EmbeddingShardingPlanner, ranks: Ranks) -> float:
    """Estimated time of the busiest rank over the mean, in the plan that was just made."""
    times = [0.0] * ranks.world_size
    assert planner._best_plan
    for option in planner._best_plan:
        for shard in option.shards:
            assert shard.perf is not None
            assert shard.rank is not None
            times[shard.rank] += shard.perf.total
    return max(times) * ranks.world_size / sum(times)


def _topology(ranks: Ranks) -> Topology:
    """Memory as it is on this machine; bandwidths as TorchRec assumes them."""
    on_gpu = ranks.device.type == "cuda"
    hbm = torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else None
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=ranks.world_size, local_world_size=ranks.local_world_size
        ),
        hardware_config=HardwareConfig(
            hbm_cap_bytes=hbm, ddr_cap_bytes=usable_memory() // ranks.local_world_size
        ),
        kernel_config=KernelConfig(compute_device=ranks.device.type),
    )
