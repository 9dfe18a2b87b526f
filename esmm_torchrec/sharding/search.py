"""The search for a sharding plan, for training and for estimates. TorchRec's planner chooses from
the options of each table, given the content of a batch and the machines.

Tables may be on the meta device. Nothing is allocated, and no process group is needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torchrec.optim as torchrec_optim
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.planners import PlannerError
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.shard_estimators import (
    EmbeddingPerfEstimator,
    EmbeddingStorageEstimator,
)
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    Enumerator,
    Proposer,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.types import CacheParams, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.types import DataType

from esmm_torchrec.sharding.sharders import sharders

GIB = 2**30

MAX_IMBALANCE = 1.25
"""Imbalance of the ranks' times with whole tables on a CPU above which tables may be divided."""

MAX_GREEDY_SHARDS = 4096
"""Product of tables and ranks up to which TorchRec's greedy search runs in addition."""

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
_DENSE = EmbeddingComputeKernel.DENSE.value
_FUSED = EmbeddingComputeKernel.FUSED.value
_IN_HOST_MEMORY = (
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
)


@dataclass(frozen=True)
class Workload:
    """Content of a batch that the planner should expect."""

    rows_per_rank: int
    """Number of impressions in a rank's batch."""
    mean_ids_per_bag: Mapping[str, float] = field(default_factory=dict)
    """Feature → mean number of ids per bag; 1 for features not listed."""
    bags_per_rank: Mapping[str, int] = field(default_factory=dict)
    """Feature → number of its bags in a rank's batch; `rows_per_rank` for features not listed. A
    shared feature is pooled once per distinct shared row."""


def distinct_shared_rows(
    rows_per_rank: int, *, impressions: int, shared_rows: int, shuffle_chunk: int
) -> int:
    """Returns the expected number of distinct shared rows in a rank's batch.

    Args:
        rows_per_rank: number of impressions in the batch.
        impressions: number of impressions in the whole split.
        shared_rows: number of shared rows in the whole split.
        shuffle_chunk: maximum number of impressions of one shared row that stay together when rows
            are shuffled.
    """
    # A chunk never extends beyond the impressions of its shared row.
    chunk = min(shuffle_chunk, max(1.0, impressions / shared_rows))
    distinct = expected_distinct(max(1.0, rows_per_rank / chunk), shared_rows)
    return max(1, min(rows_per_rank, round(distinct)))


def expected_distinct(draws: float, rows: int) -> float:
    """Returns the expected number of distinct rows in `draws` draws from `rows` equally likely
    rows."""
    return -rows * math.expm1(draws * math.log1p(-1 / rows)) if rows > 1 else 1.0


@dataclass(frozen=True)
class TableOptions:
    """Choices of the planner for one table."""

    sharding_types: tuple[str, ...]
    compute_kernels: tuple[str, ...]
    """If dense is one of several, it is for data_parallel, which has no other kernel."""
    min_shard_width: int
    """Minimum number of columns of a shard under column_wise and grid_shard."""
    cache: CacheParams | None = None
    """Cache of fused_uvm_caching."""


class NoPlanError(Exception):
    """Raised if tables do not fit. The message is a clause that names what does not fit where."""

    def __init__(self, message: str, tables: Sequence[str] = (), *, alone: bool = False) -> None:
        super().__init__(message)
        self.tables = tuple(tables)
        """Tables with a shard that exceeds a rank's memory; all tables if there are none."""
        self.alone = alone
        """Whether each of `tables` is too large by itself."""


def search(
    module: nn.Module,
    options: Mapping[str, TableOptions],
    *,
    topology: Topology,
    workload: Workload,
) -> list[ShardingOption]:
    """Lets TorchRec choose and place an option for every table.

    Args:
        module: a module with EmbeddingBagCollections. The optimiser state is counted if
            `apply_optimizer_in_backward` has assigned optimisers to its parameters.
        options: table name → the choices for it.
        topology: the ranks, with the memory available to tables.
        workload: the content of a batch.

    Returns:
        one option per table, in TorchRec's order. Its shards have ranks, times and memory.

    Raises:
        NoPlanError: the tables do not fit.
    """
    whole_only = {
        name: replace(option, sharding_types=(ShardingType.TABLE_WISE.value,))
        if ShardingType.TABLE_WISE.value in option.sharding_types
        else option
        for name, option in options.items()
    }
    if topology.compute_device == "cpu" and whole_only != options:
        # With equal work, ranks on a CPU train a tenth faster with whole tables
        # (benchmarks/two_ranks.py), which the planner does not know.
        try:
            selected = _plan(module, whole_only, topology, workload)
        except NoPlanError:
            pass
        else:
            if imbalance(rank_times(selected, topology.world_size)) <= MAX_IMBALANCE:
                return selected
    return _plan(module, options, topology, workload)


def rank_times(selected: Sequence[ShardingOption], world_size: int) -> list[float]:
    """Returns the estimated milliseconds per step of each rank."""
    times = [0.0] * world_size
    for option in selected:
        for shard in option.shards:
            assert shard.perf is not None
            assert shard.rank is not None
            times[shard.rank] += shard.perf.total
    return times


def imbalance(values: Sequence[float]) -> float:
    """Returns the largest value divided by the mean; 1 is perfectly even."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def _plan(
    module: nn.Module,
    options: Mapping[str, TableOptions],
    topology: Topology,
    workload: Workload,
) -> list[ShardingOption]:
    constraints = _constraints(module, options, workload)
    dense = {name for name, option in options.items() if option.compute_kernels == (_DENSE,)}
    enumerator = EmbeddingEnumerator(
        topology,
        batch_size=workload.rows_per_rank,
        constraints=constraints,
        estimator=[
            _PerShape(EmbeddingPerfEstimator(topology, constraints)),
            _TrainingStorageEstimator(topology, constraints, dense=dense),
        ],
    )
    proposers: list[Proposer] = [_UniformWithExceptions(topology)]
    if len(options) * topology.world_size <= MAX_GREEDY_SHARDS:
        proposers.append(GreedyProposer(threshold=50))
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=workload.rows_per_rank,
        enumerator=enumerator,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        proposer=proposers,
        stats=NoopEmbeddingStats(),
        debug=False,
    )
    with _planner_log_off():
        try:
            planner.plan(module, sharders())
        except PlannerError as error:
            last = " ".join(str(error).partition("Last planner error:")[2].split())
            raise NoPlanError(
                "TorchRec's planner cannot place every table, although all of them together "
                f"are small enough ({last[:200]})",
                list(options),
            ) from None
    # The accessor is public from TorchRec 1.9 on.
    accessor: Callable[[], list[ShardingOption]] | None = getattr(
        planner, "get_selected_options", None
    )
    selected = accessor() if accessor is not None else planner._best_plan
    assert selected is not None
    for option in selected:
        if option.name in dense:
            option.compute_kernel = _DENSE
    return selected


def embedding_bag_collections_of(module: nn.Module) -> dict[str, EmbeddingBagCollection]:
    """Returns path → unsharded EmbeddingBagCollection, for all of them inside a module."""
    return {
        path: child
        for path, child in module.named_modules()
        if isinstance(child, EmbeddingBagCollection)
    }


@contextmanager
def _planner_log_off() -> Iterator[None]:
    """Silences the long log of TorchRec's planner; `NoPlanError` says the same in a sentence."""
    logger = logging.getLogger("torchrec")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _constraints(
    module: nn.Module, options: Mapping[str, TableOptions], workload: Workload
) -> dict[str, ParameterConstraints]:
    constraints: dict[str, ParameterConstraints] = {}
    for collection in embedding_bag_collections_of(module).values():
        for config in collection.embedding_bag_configs():
            option, features = options[config.name], config.feature_names
            kernels = option.compute_kernels
            if kernels == (_DENSE,) and option.sharding_types != (_DATA_PARALLEL,):
                # TorchRec's planner refuses dense for other types, although they train correctly.
                kernels = (_FUSED,)
            constraints[config.name] = ParameterConstraints(
                sharding_types=list(option.sharding_types),
                compute_kernels=list(kernels),
                min_partition=option.min_shard_width,
                pooling_factors=[workload.mean_ids_per_bag.get(f, 1.0) for f in features],
                num_poolings=[1.0] * len(features),
                batch_sizes=[
                    workload.bags_per_rank.get(f, workload.rows_per_rank) for f in features
                ],
                is_weighted=collection.is_weighted(),
                # fbgemm pools into float32, whatever the data type of the rows.
                output_dtype=DataType.FP32,
                cache_params=option.cache,
            )
    return constraints


class _PerShape(ShardEstimator):
    """Calls another estimator once per distinct shape of a table's shards. TorchRec estimates every
    shard: 25,600 for 200 row_wise tables on 128 ranks, which is most of the planning time."""

    def __init__(self, estimator: ShardEstimator) -> None:
        self._estimator = estimator

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap
    ) -> None:
        all_shards = [option.shards for option in sharding_options]
        for option in sharding_options:
            option.shards = list({tuple(shard.size): shard for shard in option.shards}.values())
        self._estimator.estimate(sharding_options, sharder_data_map)
        for option, shards in zip(sharding_options, all_shards, strict=True):
            perf = {tuple(shard.size): shard.perf for shard in option.shards}
            option.shards = shards
            for shard in shards:
                shard.perf = perf[tuple(shard.size)]


class _TrainingStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimator, plus memory that fbgemm or torch allocates and TorchRec does not count:
    row-wise Adagrad's momentum per row *and column shard*, the gradient of a dense kernel (as large
    as the table), and the float32 state of fused optimisers for 16-bit rows."""

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints],
        *,
        dense: set[str],
    ) -> None:
        super().__init__(topology=topology, constraints=constraints)
        self._dense = dense

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap
    ) -> None:
        super().estimate(sharding_options, sharder_data_map)
        on_gpu = self._topology.compute_device == "cuda"
        for option in sharding_options:
            dense = option.name in self._dense or option.compute_kernel == _DENSE
            for shard in option.shards:
                assert shard.storage is not None
                missing = _uncounted_bytes(option.tensor, shard.size, dense=dense)
                on_device, on_host = missing, 0
                if option.compute_kernel in _IN_HOST_MEMORY:
                    on_device, on_host = missing * (option.cache_load_factor or 0.0), missing
                shard.storage += Storage(
                    hbm=math.ceil(on_device) if on_gpu else 0,
                    ddr=math.ceil(on_host if on_gpu else on_device + on_host),
                )


def _uncounted_bytes(table: torch.Tensor, size: Sequence[int], *, dense: bool) -> float:
    """Returns the bytes needed to train one shard that TorchRec does not count."""
    rows, columns = size
    values, value_bytes = rows * columns, table.element_size()
    if dense:
        return values * value_bytes
    optimizer: Any = getattr(table, "_optimizer_classes", [None])[0]
    if optimizer is torchrec_optim.RowWiseAdagrad:
        return 4 * rows - values * value_bytes / table.shape[1]
    states = {None: 0, torchrec_optim.SGD: 0, torch.optim.SGD: 0, torchrec_optim.Adam: 2}
    return states.get(optimizer, 1) * values * (4 - value_bytes)


class _UniformWithExceptions(Proposer):
    """Proposes one plan per sharding type: every table that can have the type gets it, every other
    table the option whose largest shard is smallest. In the last plan all tables get the latter.

    TorchRec's UniformProposer drops a type as soon as one table cannot have it, and its
    GreedyProposer changes one table per proposal: for 200 tables on 128 ranks it takes 400
    proposals and four minutes, and its plan is a fifth slower than what three proposals find here.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._waiting: list[list[ShardingOption]] = []

    def load(
        self,
        search_space: list[ShardingOption],
        enumerator: Enumerator | None = None,  # noqa: ARG002
    ) -> None:
        # TorchRec intersects sets of names, whose order differs between processes.
        search_space.sort(key=lambda o: (o.name, o.sharding_type, o.compute_kernel))
        by_table: dict[str, list[ShardingOption]] = {}
        for option in search_space:
            by_table.setdefault(option.name, []).append(option)
        misfit = _misfit(by_table, self._topology)
        if misfit is not None:
            raise misfit
        capacity = self._topology.devices[0].storage
        smallest = {name: min(options, key=largest_shard) for name, options in by_table.items()}
        proposals = [
            [
                min(
                    (
                        option
                        for option in options
                        if option.sharding_type == kind and largest_shard(option).fits_in(capacity)
                    ),
                    key=lambda option: max(
                        shard.perf.total for shard in option.shards if shard.perf
                    ),
                    default=smallest[name],
                )
                for name, options in by_table.items()
            ]
            for kind in dict.fromkeys(option.sharding_type for option in search_space)
        ]
        proposals.append(list(smallest.values()))
        different = {tuple(map(id, proposal)): proposal for proposal in proposals}
        self._waiting = list(different.values())

    def propose(self) -> list[ShardingOption] | None:
        return self._waiting[0] if self._waiting else None

    def feedback(
        self,
        partitionable: bool,  # noqa: ARG002
        plan: list[ShardingOption] | None = None,  # noqa: ARG002
        perf_rating: float | None = None,  # noqa: ARG002
        storage_constraint: Topology | None = None,  # noqa: ARG002
    ) -> None:
        del self._waiting[0]


def largest_shard(option: ShardingOption) -> Storage:
    """Returns the maximum memory of each kind that one shard of an option takes."""
    storages = [shard.storage for shard in option.shards if shard.storage is not None]
    return Storage(max(s.hbm for s in storages), max(s.ddr for s in storages))


def _misfit(
    by_table: Mapping[str, Sequence[ShardingOption]], topology: Topology
) -> NoPlanError | None:
    """Returns the error if even the options with the smallest shards do not fit, else None."""
    on_gpu = topology.compute_device == "cuda"
    capacity = topology.devices[0].storage
    fitting = {
        name: [option for option in options if largest_shard(option).fits_in(capacity)]
        for name, options in by_table.items()
    }
    for kind, where in (
        ("hbm", "GPU"),
        ("ddr", "GPU's share of host memory" if on_gpu else "rank"),
    ):
        have = getattr(capacity, kind)
        too_large = [
            option
            for name, options in by_table.items()
            if not fitting[name]
            and getattr(largest_shard(option := min(options, key=largest_shard)), kind) > have
        ]
        if too_large:
            option = max(too_large, key=lambda o: getattr(largest_shard(o), kind))
            need = getattr(largest_shard(option), kind)
            others = f" (nor do {len(too_large) - 1} others)" if len(too_large) > 1 else ""
            return NoPlanError(
                f"table {option.name!r} does not fit{others}: {option.sharding_type} puts "
                f"{gib(need)} of it on one {where}, which has {gib(have)} for tables, "
                f"{gib(need - have)} too little",
                [option.name for option in too_large],
                alone=True,
            )
        total = sum(
            min((getattr(o.total_storage, kind) for o in options), default=0)
            for options in fitting.values()
        )
        if total > have * topology.world_size:
            return NoPlanError(
                f"all tables together need {gib(total)} and the {topology.world_size} "
                f"{'GPUs' if on_gpu else 'ranks'} have {gib(have * topology.world_size)} for them",
                list(by_table),
            )
    return None


def gib(nbytes: float) -> str:
    """Formats a number of bytes in GiB."""
    amount = nbytes / GIB
    digits = 0 if amount >= 100 else 1 if amount >= 1 else 3
    return f"{amount:,.{digits}f} GiB"
