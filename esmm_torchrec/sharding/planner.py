"""Asks TorchRec's planner for a sharding plan for training on the ranks at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.planners import PlannerError
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.sharding.sharders import AnyDeviceSharder

ShardingOption = Literal[
    "auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"
]
"""What `--sharding` takes. grid_shard is not among them: it ignores the pooling type on one host
and fails on two."""

KernelOption = Literal["fused", "dense"]
"""fused: the optimiser runs inside the backward pass. dense: gradients reach an optimiser of
torch's, whatever rows were touched."""

KERNEL_DIM_MULTIPLE = 4


@dataclass(frozen=True)
class Workload:
    """What the planner should expect of the data."""

    batch_size: int
    """Impressions per rank and step."""
    mean_values_per_bag: Mapping[str, float] = field(default_factory=dict)
    """Feature → mean number of ids per bag; 1 where not given."""
    shared_features_once: bool = False
    """Whether batches carry shared features once (TorchRec's variable batch per feature)."""


def embedding_bag_collections_of(module: nn.Module) -> dict[str, EmbeddingBagCollection]:
    """Path → every unsharded EmbeddingBagCollection below a module."""
    return {
        path: child
        for path, child in module.named_modules()
        if isinstance(child, EmbeddingBagCollection)
    }


def check_sharding(
    sharding: ShardingOption, *, kernel: KernelOption, workload: Workload
) -> tuple[ShardingOption, ...]:
    """The sharding types the planner may use for a request.

    Raises:
        PlanError: the request cannot work with this kernel or this form of the data.
    """
    if sharding == "auto":
        # With shared features carried once or a fused optimiser, data_parallel fails or does not
        # exist; column_wise would keep a row's Adagrad momentum once per column shard.
        return ("table_wise", "row_wise")
    if sharding == "data_parallel" and kernel == "fused":
        raise PlanError(
            "--sharding data_parallel has no fused optimiser in TorchRec; "
            "use --sparse-kernel dense or another sharding"
        )
    if workload.shared_features_once and kernel == "dense":
        raise PlanError(
            "the dense kernel cannot pool features that impressions share once per batch; "
            "use --shared-features expanded or --sparse-kernel fused"
        )
    if sharding not in get_args(ShardingOption):
        raise PlanError(f"--sharding {sharding} is not one of {', '.join(get_args(ShardingOption))}")
    return (sharding,)


def make_plan(
    module: nn.Module,
    *,
    ranks: Ranks,
    sharding: ShardingOption,
    kernel: KernelOption,
    workload: Workload,
) -> ShardingPlan:
    """Plans every EmbeddingBagCollection of a module; the same plan on every rank.

    Raises:
        PlanError: the request cannot work, or the tables do not fit.
    """
    types = check_sharding(sharding, kernel=kernel, workload=workload)
    kernels = [EmbeddingComputeKernel(kernel).value]
    constraints: dict[str, ParameterConstraints] = {}
    for collection in embedding_bag_collections_of(module).values():
        for config in collection.embedding_bag_configs():
            column_shards = config.embedding_dim // KERNEL_DIM_MULTIPLE
            shards = max(n for n in range(1, ranks.world_size + 1) if column_shards % n == 0)
            constraints[config.name] = ParameterConstraints(
                sharding_types=[ShardingType(name).value for name in types],
                compute_kernels=kernels,
                min_partition=config.embedding_dim // shards,
                pooling_factors=[
                    workload.mean_values_per_bag.get(name, 1.0) for name in config.feature_names
                ],
                is_weighted=collection.is_weighted(),
            )
    planner = EmbeddingShardingPlanner(
        topology=_topology(ranks),
        batch_size=workload.batch_size,
        constraints=constraints,
        storage_reservation=HeuristicalStorageReservation(percentage=0.15),
        debug=False,
    )
    try:
        plan = planner.collective_plan(
            module, [AnyDeviceSharder()], torch.distributed.GroupMember.WORLD
        )
    except PlannerError as error:
        reason = " ".join(str(error).split())
        raise PlanError(
            f"no plan for --sharding {sharding} fits the memory of {ranks.world_size} ranks; "
            f"use more ranks, a smaller --embedding-dim or another sharding ({reason[:300]})"
        ) from error
    return plan


def _topology(ranks: Ranks):  # noqa: ANN202
    """Memory as it is on this machine; bandwidths as TorchRec assumes them."""
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_gpu = ranks.device.type == "cuda"
    hbm = torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else None
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=ranks.world_size, local_world_size=ranks.local_world_size
        ),
        hardware_config=HardwareConfig(
            hbm_cap_bytes=hbm, ddr_cap_bytes=host_bytes // ranks.local_world_size
        ),
        kernel_config=KernelConfig(compute_device=ranks.device.type),
    )
