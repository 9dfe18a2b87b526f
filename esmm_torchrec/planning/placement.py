"""Where TorchRec's planner puts the tables of a scenario, or why it finds no place.

Tables are on the meta device; nothing is allocated and no process group is needed. The search is
EmbeddingShardingPlanner's own parts in its own order, without its grid search and dynamic
programming, which do not end in minutes at a hundred ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torchrec import optim as torchrec_optim
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.config import EmbeddingPerfEstimatorConfig
from torchrec.distributed.planner.estimator.estimator import (
    get_embedding_perf_sharding_evaluator,
)
from torchrec.distributed.planner.estimator.types import ShardPerfContext
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, Proposer
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    PartitionByType,
    Perf,
    PlannerError,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.types import CacheParams, CacheStatistics, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.types import DataType

from esmm_torchrec.planning.hardware import GIB
from esmm_torchrec.planning.scenario import Scenario, Strategy
from esmm_torchrec.planning.table_list import PlannedTable
from esmm_torchrec.sharding.planner import SparseOptimizerOption
from esmm_torchrec.sharding.sharders import AnyDeviceSharder, sharders
from esmm_torchrec.sharding.table_placement import every_part_has_a_row

_DENSE = EmbeddingComputeKernel.DENSE.value
_UVM = EmbeddingComputeKernel.FUSED_UVM.value
_CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
_ROW_WISE = ShardingType.ROW_WISE.value
_TABLE_ROW_WISE = ShardingType.TABLE_ROW_WISE.value
_OPTIMIZERS: Mapping[SparseOptimizerOption, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": torchrec_optim.RowWiseAdagrad,
    "adagrad": torchrec_optim.Adagrad,
    "sgd": torchrec_optim.SGD,
    "adam": torchrec_optim.Adam,
}


@dataclass(frozen=True)
class Misfit:
    """Why there is no placement."""

    sentence: str
    """Which table does not fit where and by how much, or what forbids the strategy."""
    tables: tuple[str, ...] = ()
    """Tables of which one shard alone exceeds a rank's memory; all, where only the sum does;
    none, where memory is not the reason."""
    alone: bool = False
    """Whether `tables` are too large alone."""
    towers: bool = False
    """Whether the towers alone are too large."""


@dataclass(frozen=True)
class Placement:
    """Every table's chosen option, its shards with ranks."""

    options: Sequence[ShardingOption]
    topology: Topology


def place(
    scenario: Scenario, strategy: Strategy, world_size: int, *, memory_only: bool = False
) -> Placement | Misfit:
    """Lets TorchRec place the tables.

    Args:
        scenario: what is to be trained.
        strategy: for tables without a constraint.
        world_size: number of ranks.
        memory_only: stop at the first placement that fits and estimate no time.

    Raises:
        OptionError: the ranks do not fill their hosts.
    """
    capacity = scenario.capacity(world_size)
    if capacity.for_tables <= 0:
        return Misfit(
            f"the towers and their activations alone need {gib(capacity.towers)} of the "
            f"{gib(capacity.total - capacity.reserved)} of a rank",
            towers=True,
        )
    choices = {
        table.name: _choice(scenario, strategy, world_size, table)
        for table in scenario.tables.tables
    }
    for table in scenario.tables.tables:
        refused = _refusal(scenario, table, choices[table.name])
        if refused is not None:
            return Misfit(refused)
    constraints = {
        table.name: _constraints(scenario, world_size, table, choices[table.name])
        for table in scenario.tables.tables
    }
    topology = scenario.hardware.topology(
        world_size,
        memory_bytes=capacity.for_tables,
        host_memory_bytes=capacity.host_for_tables,
    )
    with _planner_log_off():
        enumerator = EmbeddingEnumerator(
            topology,
            batch_size=scenario.batch_size,
            constraints=constraints,
            estimator=[
                _NoTime() if memory_only else _Time(topology, constraints),
                _StorageEstimator(scenario, topology, constraints=constraints),
            ],
        )
        space = [
            option
            for option in enumerator.enumerate(_module(scenario), sharders())
            if option.compute_kernel in choices[option.name].kernels[option.sharding_type]
        ]
        # TorchRec intersects sets of names, whose order changes from run to run.
        space.sort(key=lambda option: (option.name, option.sharding_type, option.compute_kernel))
        return _search(scenario, space, topology, first=memory_only)


def fits(scenario: Scenario, strategy: Strategy, world_size: int) -> bool:
    """Whether the planner finds a place for every table."""
    return isinstance(place(scenario, strategy, world_size, memory_only=True), Placement)


@contextmanager
def _planner_log_off() -> Iterator[None]:
    """TorchRec's planner logs what `_explain` says in a sentence."""
    logger = logging.getLogger("torchrec")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _module(scenario: Scenario) -> torch.nn.Module:
    module = scenario.tables.to_module()
    # The storage estimator reads the optimiser's class from the parameter. A new dict for each,
    # since this changes the one it is given.
    for parameter in module.parameters():
        apply_optimizer_in_backward(
            _OPTIMIZERS[scenario.sparse_optimizer], [parameter], {"lr": 0.01}
        )
    return module


@dataclass(frozen=True)
class _Choice:
    """What the planner may choose from for a table."""

    kernels: Mapping[str, tuple[str, ...]]
    """Sharding type → the kernels for it."""
    cache_load_factor: float | None


def _choice(
    scenario: Scenario, strategy: Strategy, world_size: int, table: PlannedTable
) -> _Choice:
    """By the strategy and --kernels, and before these by the constraints."""
    types = _strategy_types(scenario, strategy, world_size, table)
    named: tuple[str, ...] = ()
    cache = scenario.cache_load_factor
    for constraint in scenario.constraints:
        if fnmatchcase(table.name, constraint.pattern):
            types = constraint.sharding_types or types
            named = constraint.kernels or named
            cache = constraint.cache_load_factor or cache
    if scenario.hardware.device == "cpu":
        parts = {_ROW_WISE: world_size}
        parts[_TABLE_ROW_WISE] = scenario.hardware.local_world_size(world_size)
        rows = table.num_embeddings
        with_rows = [kind for kind in types if every_part_has_a_row(rows, parts.get(kind, 1))]
        types = tuple(with_rows) or (ShardingType.TABLE_WISE.value,)
    return _Choice(
        # data_parallel has no other kernel than dense, which nobody need say.
        {
            kind: (_DENSE,)
            if kind == ShardingType.DATA_PARALLEL.value and not named
            else _existing(scenario, named or scenario.kernels)
            for kind in types
        },
        cache,
    )


def _existing(scenario: Scenario, kernels: tuple[str, ...]) -> tuple[str, ...]:
    """Those in which the optimiser exists; all where it exists in none."""
    if scenario.sparse_optimizer == "rowwise_adagrad":
        return tuple(kernel for kernel in kernels if kernel != _DENSE) or kernels
    if scenario.sparse_optimizer == "adam" and scenario.hardware.device == "cpu":
        return tuple(kernel for kernel in kernels if kernel == _DENSE) or kernels
    return kernels


def _constraints(
    scenario: Scenario, world_size: int, table: PlannedTable, choice: _Choice
) -> ParameterConstraints:
    kernels = list(dict.fromkeys(kernel for some in choice.kernels.values() for kernel in some))
    return ParameterConstraints(
        sharding_types=list(choice.kernels),
        compute_kernels=kernels,
        min_partition=scenario.column_width,
        pooling_factors=[feature.pooling_factor for feature in table.features],
        num_poolings=[1.0] * len(table.features),
        batch_sizes=[_bags(scenario, table)] * len(table.features),
        is_weighted=table.weighted,
        # Whatever the type of the rows, fbgemm pools into float32.
        output_dtype=DataType.FP32,
        cache_params=(
            CacheParams(
                load_factor=choice.cache_load_factor or UVM_CACHING_RATIO,
                # Rows are brought into the cache before they are looked up. Without this TorchRec
                # charges a look-up the way to the host, too, which it charges the prefetch.
                prefetch_pipeline=True,
                stats=EvenLookups(_distinct_rows(scenario, table, world_size)),
            )
            if _CACHING in kernels
            else None
        ),
    )


def _bags(scenario: Scenario, table: PlannedTable) -> int:
    """Bags of a feature in a rank's batch."""
    return math.ceil(scenario.batch_size / table.shared_by)


def _distinct_rows(scenario: Scenario, table: PlannedTable, world_size: int) -> float:
    """Expected number of rows of a table that the batches of one step touch, all alike likely."""
    bags = world_size * scenario.batch_size / table.shared_by
    lookups = bags * sum(feature.pooling_factor for feature in table.features)
    rows = table.num_embeddings
    return -rows * math.expm1(lookups * math.log1p(-1 / rows)) if rows > 1 else 1.0


@dataclass(frozen=True)
class EvenLookups(CacheStatistics):
    """Look-ups spread evenly over the rows of a table: the worst case for a cache, and what is
    assumed where the popularity of ids is not known. Without statistics TorchRec's planner takes
    the prefetch as free."""

    distinct_rows: float
    """Touched in a step, on all ranks together."""

    @property
    def expected_lookups(self) -> float:
        """Distinct rows of a step."""
        return self.distinct_rows

    def expected_miss_rate(self, clf: float) -> float:
        """Share of the rows that are not in a cache of a share `clf` of them."""
        return 1 - clf

    @property
    def cacheability(self) -> float:
        """Mean miss rate over all sizes of the cache."""
        return 0.5


def _strategy_types(
    scenario: Scenario, strategy: Strategy, world_size: int, table: PlannedTable
) -> tuple[str, ...]:
    if world_size == 1 and strategy != "data_parallel":
        # Nothing is cut on one rank; TorchRec's estimates of the types differ there all the same.
        return (ShardingType.TABLE_WISE.value,)
    if strategy != "auto":
        return (strategy,)
    hosts = world_size // scenario.hardware.local_world_size(world_size)
    types = [ShardingType.TABLE_WISE.value, _ROW_WISE]
    if hosts > 1:
        types.append(_TABLE_ROW_WISE)
    if scenario.sparse_optimizer != "rowwise_adagrad":
        # Otherwise cutting columns changes what is trained, which nobody asked for.
        types.append(ShardingType.COLUMN_WISE.value)
        if hosts > 1 and scenario.hardware.device == "cuda" and table.pooling != "mean":
            types.append(ShardingType.GRID_SHARD.value)
    return tuple(types)


def _refusal(scenario: Scenario, table: PlannedTable, choice: _Choice) -> str | None:
    """Why a table cannot be trained so, whatever the memory."""
    device = scenario.hardware.device
    sharder = AnyDeviceSharder()
    for name, kernels in choice.kernels.items():
        if name not in sharder.sharding_types(device):
            return f"TorchRec has no {name} on a {_device_name(device)}"
        if not set(sharder.compute_kernels(name, device)) & set(kernels):
            return (
                f"table {table.name!r}: TorchRec has no {name} with the kernel "
                f"{' or '.join(kernels)} on a {_device_name(device)}"
            )
        if name == ShardingType.GRID_SHARD.value and table.pooling == "mean":
            return (
                f"table {table.name!r} has mean pooling, which TorchRec's grid_shard computes "
                "wrongly"
            )
        if set(kernels) == {_DENSE}:
            if scenario.sparse_optimizer == "rowwise_adagrad":
                return (
                    f"table {table.name!r} would need the dense kernel, for which rowwise_adagrad "
                    "does not exist; use --sparse-optimizer adagrad, sgd or adam"
                )
        elif device == "cpu" and scenario.sparse_optimizer == "adam":
            return (
                "adam does not exist in the fused kernel on a CPU; use --kernels dense or another "
                "--sparse-optimizer"
            )
    return None


def _device_name(device: str) -> str:
    return "GPU" if device == "cuda" else "CPU"


class _StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's, with what it leaves out: the gradient that a dense kernel holds, as large as the
    table; float32 in the state of a fused optimiser, whatever the type of the rows; and the pooled
    embeddings of empty bags."""

    def __init__(self, scenario: Scenario, topology: Topology, **values: Any) -> None:
        super().__init__(topology=topology, **values)
        self._tables = {table.name: table for table in scenario.tables.tables}
        self._bags = {name: _bags(scenario, table) for name, table in self._tables.items()}
        self._optimizer = scenario.sparse_optimizer

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap
    ) -> None:
        super().estimate(sharding_options, sharder_data_map)
        on_gpu = self._topology.compute_device == "cuda"
        for option in sharding_options:
            table = self._tables[option.name]
            empty = self._bags[option.name] * sum(
                max(0.0, 1 - feature.pooling_factor) for feature in table.features
            )
            if option.sharding_type != ShardingType.DATA_PARALLEL.value:
                empty *= self._topology.world_size
            value_bytes = option.tensor.element_size()
            in_host = option.compute_kernel in (_UVM, _CACHING)
            cached = (option.cache_load_factor or 0.0) if option.compute_kernel == _CACHING else 0.0
            for shard in option.shards:
                assert shard.storage is not None
                values = math.prod(shard.size)
                device, host = math.ceil(4 * empty * shard.size[1]) if values else 0, 0
                if option.compute_kernel == _DENSE:
                    device += values * value_bytes
                elif value_bytes < 4:
                    states = {"sgd": 0, "adam": 2, "rowwise_adagrad": 1 / table.embedding_dim}
                    more = values * states.get(self._optimizer, 1) * (4 - value_bytes)
                    device += round(more * (cached if in_host else 1))
                    host += round(more) if in_host else 0
                shard.storage += (
                    Storage(hbm=device, ddr=host) if on_gpu else Storage(0, ddr=device + host)
                )


class _CpuPerf(EmbeddingPerfEstimatorConfig):
    """TorchRec's formulas without what they charge narrow tables for the shape of a GPU's blocks
    (and under table_wise and column_wise only)."""

    _use_min_dim_for_lookup = False
    _use_block_usage_penalty = False


class _EveryBag(ShardPerfContext):
    """TorchRec's, with a pooled embedding in float32 for every bag. TorchRec takes bags without an
    id as not sent, and a table's type for that of what is sent."""

    @property
    def batch_outputs(self) -> float:
        """Pooled embeddings of one rank's batch."""
        bags = sum(
            number * size for number, size in zip(self.num_poolings, self.batch_sizes, strict=True)
        )
        if self.sharding_type == ShardingType.DATA_PARALLEL.value:
            # For this type alone, TorchRec multiplies by the bytes of the table's type.
            return bags * self.output_data_type_size / self.table_data_type_size
        return bags


class _Time(ShardEstimator):
    """TorchRec's formulas, asked once for all shards of one size: a table cut into 128 equal parts
    has 128 equal answers, and each takes a third of a millisecond."""

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> None:
        self._topology = topology
        self._constraints = constraints
        on_gpu = topology.compute_device == "cuda"
        self._config = EmbeddingPerfEstimatorConfig() if on_gpu else _CpuPerf()

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap
    ) -> None:
        for option in sharding_options:
            sizes = list({tuple(shard.size): list(shard.size) for shard in option.shards}.values())
            contexts = _EveryBag.build_shard_perf_contexts(
                config=self._config,
                shard_sizes=sizes,
                sharding_option=option,
                topology=self._topology,
                constraints=self._constraints,
                sharder_data=sharder_data_map[option.module_type_key],
            )
            evaluator = get_embedding_perf_sharding_evaluator(option.sharding_type)
            perf = {
                tuple(size): evaluator.compute_perf(
                    ctx=replace(context, **_FLOAT32_COMMS), config=self._config
                )
                for size, context in zip(sizes, contexts, strict=True)
            }
            option.is_weighted = contexts[0].is_weighted
            for shard in option.shards:
                shard.perf = perf[tuple(shard.size)]


_FLOAT32_COMMS = {
    f"{direction}_{kind}_comm_data_type_size": 4.0
    for direction in ("fwd", "bwd")
    for kind in ("a2a", "sr")
}
"""Pooled embeddings and their gradients are sent as fbgemm makes them."""


class _NoTime(ShardEstimator):
    """Zero, for the partitioner where only memory is asked for."""

    def __init__(self) -> None:
        pass

    def estimate(
        self,
        sharding_options: list[ShardingOption],
        sharder_data_map: SharderDataMap,  # noqa: ARG002
    ) -> None:
        for option in sharding_options:
            for shard in option.shards:
                shard.perf = Perf(0, 0, 0, 0)


@dataclass(frozen=True)
class _Footprint:
    """Memory of one option of a table, asked for once: it is compared in every proposal."""

    largest_shard: Storage
    total: Storage


def _footprint(option: ShardingOption) -> _Footprint:
    storages = [shard.storage or Storage(0, 0) for shard in option.shards]
    return _Footprint(
        largest_shard=Storage(max(s.hbm for s in storages), max(s.ddr for s in storages)),
        total=Storage(sum(s.hbm for s in storages), sum(s.ddr for s in storages)),
    )


def _search(
    scenario: Scenario, space: list[ShardingOption], topology: Topology, *, first: bool
) -> Placement | Misfit:
    """The fastest placement that fits, or the first, or what stops the proposal that comes closest.

    A choice among types is never slower than one of them for all tables that may have it, and
    finds a place wherever one does, since these are among what is proposed.
    """
    footprints = {id(option): _footprint(option) for option in space}
    cap = topology.devices[0].storage

    def excess(proposal: Sequence[ShardingOption]) -> tuple[int, int]:
        """Bytes by which the largest shard exceeds a rank and all tables exceed all ranks."""
        prints = [footprints[id(option)] for option in proposal]
        shard = max(
            max(p.largest_shard.hbm - cap.hbm, p.largest_shard.ddr - cap.ddr) for p in prints
        )
        whole = max(
            sum(p.total.hbm for p in prints) - cap.hbm * topology.world_size,
            sum(p.total.ddr for p in prints) - cap.ddr * topology.world_size,
        )
        return max(shard, 0), max(whole, 0)

    best: tuple[float, list[ShardingOption], list[list[int | None]]] | None = None
    closest: tuple[tuple[int, int], list[ShardingOption]] | None = None
    for proposer in _proposers(space, footprints, cap, thrifty_only=first):
        proposer.load(space)
        while (proposal := proposer.propose()) is not None:
            too_much = excess(proposal)
            if any(too_much) or not _partition(proposal, topology):
                if closest is None or too_much < closest[0]:
                    closest = (too_much, list(proposal))
                proposer.feedback(partitionable=False, plan=proposal)
                continue
            if first:
                return Placement(proposal, topology)
            rating = _slowest_rank_ms(proposal, topology.world_size)
            if best is None or rating < best[0]:
                ranks = [[shard.rank for shard in option.shards] for option in proposal]
                best = (rating, list(proposal), ranks)
            proposer.feedback(partitionable=True, plan=proposal, perf_rating=rating)
    if best is None:
        assert closest is not None
        _partition(closest[1], topology)
        return _explain(scenario, closest[1], topology)
    for option, ranks in zip(best[1], best[2], strict=True):
        for shard, rank in zip(option.shards, ranks, strict=True):
            shard.rank = rank
    return Placement(best[1], topology)


def _proposers(
    space: Sequence[ShardingOption],
    footprints: Mapping[int, _Footprint],
    cap: Storage,
    *,
    thrifty_only: bool,
) -> list[Proposer]:
    """Proposals in the order in which they are tried.

    For each sharding type, every table that may have it and whose shards fit a rank does, with its
    fastest kernel and with its thriftiest, and every other table has the option whose largest
    shard is smallest; then all tables have that option; then the greedy search of TorchRec, until
    fifty proposals in a row got no faster.
    """
    by_table: dict[str, list[ShardingOption]] = {}
    for option in space:
        by_table.setdefault(option.name, []).append(option)
    if all(len(options) == 1 for options in by_table.values()):
        return [GreedyProposer()]

    def size(option: ShardingOption) -> Storage:
        return footprints[id(option)].largest_shard

    def slowness(option: ShardingOption) -> float:
        return max(shard.perf.total for shard in option.shards if shard.perf)

    kinds = dict.fromkeys(option.sharding_type for option in space)
    thriftiest = [min(options, key=size) for options in by_table.values()]

    def of_type(kind: str, key: Callable[[ShardingOption], Any]) -> list[ShardingOption]:
        return [
            min(
                (o for o in options if o.sharding_type == kind and size(o).fits_in(cap)),
                key=key,
                default=thrifty,
            )
            for options, thrifty in zip(by_table.values(), thriftiest, strict=True)
        ]

    if thrifty_only:
        return [_Proposals([thriftiest, *(of_type(kind, size) for kind in kinds)])]
    uniform = [of_type(kind, key) for key in (size, slowness) for kind in kinds]
    return [_Proposals([*uniform, thriftiest]), GreedyProposer(threshold=50)]


class _Proposals(Proposer):
    """Proposes what it was given, one after the other, the same once only."""

    def __init__(self, proposals: Sequence[list[ShardingOption]]) -> None:
        different = {tuple(map(id, proposal)): proposal for proposal in proposals}
        self._waiting = list(different.values())

    def load(
        self, search_space: list[ShardingOption], enumerator: Enumerator | None = None
    ) -> None:
        pass

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


def _partition(proposal: list[ShardingOption], topology: Topology) -> bool:
    """Gives the shards ranks, so that times are even, or where memory is too short for that, so
    that each goes to the first rank with room; where both fail, those before the failure have
    one."""
    if _greedy(proposal, topology):
        return True
    shards = [shard for option in proposal for shard in option.shards]
    times = [shard.perf for shard in shards]
    if not any(time.total for time in times if time):
        return False
    for shard in shards:
        shard.perf = Perf(0, 0, 0, 0)
    placed = _greedy(proposal, topology)
    for shard, time in zip(shards, times, strict=True):
        shard.perf = time
    return placed


def _greedy(proposal: list[ShardingOption], topology: Topology) -> bool:
    for option in proposal:
        for shard in option.shards:
            shard.rank = None
    try:
        GreedyPerfPartitioner().partition(proposal, topology)
    except PlannerError:
        return False
    return True


def _slowest_rank_ms(options: Sequence[ShardingOption], world_size: int) -> float:
    """TorchRec's rating of a plan: the embedding time of its slowest rank."""
    times = [0.0] * world_size
    for option in options:
        for shard in option.shards:
            assert shard.perf is not None
            assert shard.rank is not None
            times[shard.rank] += shard.perf.total
    return max(times)


def _explain(scenario: Scenario, proposal: Sequence[ShardingOption], topology: Topology) -> Misfit:
    """Finds the table at which the partitioner stopped, from the ranks it had given by then."""
    cap = topology.devices[0].storage
    kinds = ("hbm", "ddr") if topology.compute_device == "cuda" else ("ddr",)

    def largest(option: ShardingOption, kind: str) -> int:
        return max(getattr(shard.storage, kind) for shard in option.shards)

    def missing(option: ShardingOption) -> bool:
        return any(shard.rank is None for shard in option.shards)

    too_large = [
        (option, kind)
        for kind in kinds
        for option in proposal
        if largest(option, kind) > getattr(cap, kind)
    ]
    if too_large:
        option, kind = max(too_large, key=lambda pair: largest(*pair))
        need, have = largest(option, kind), getattr(cap, kind)
        names = tuple(dict.fromkeys(option.name for option, _ in too_large))
        others = f" (nor do {len(names) - 1} others)" if len(names) > 1 else ""
        return Misfit(
            sentence=f"table {option.name!r} does not fit{others}: {option.sharding_type} puts "
            f"{gib(need)} of it on one {_where(scenario, kind)}, which has {gib(have)} for "
            f"tables, {gib(need - have)} too little",
            tables=names,
            alone=True,
        )
    used = {kind: [0] * topology.world_size for kind in kinds}
    for option in proposal:
        if not missing(option):
            for shard in option.shards:
                for kind in kinds:
                    assert shard.rank is not None
                    used[kind][shard.rank] += getattr(shard.storage, kind)
    uniform = [o for o in proposal if o.partition_by == PartitionByType.UNIFORM.value]
    others = [o for o in proposal if o.partition_by != PartitionByType.UNIFORM.value]
    others.sort(key=lambda o: (o.total_storage.hbm, o.total_storage.ddr), reverse=True)
    option = next(o for o in (*uniform, *others) if missing(o))
    kind = max(
        kinds,
        key=lambda k: largest(option, k) - min(getattr(cap, k) - u for u in used[k]),
    )
    free = [getattr(cap, kind) - u for u in used[kind]]
    # On every rank of a uniform cut, else on the roomiest.
    room = min(free) if option in uniform else max(free)
    need = largest(option, kind)
    total = sum(getattr(shard.storage, kind) for o in proposal for shard in o.shards)
    have = getattr(cap, kind) * topology.world_size
    placed = sum(not missing(o) for o in proposal)
    where = _where(scenario, kind)
    return Misfit(
        sentence=f"table {option.name!r} does not fit beside the {placed} placed before it: "
        f"{option.sharding_type} puts {gib(need)} of it on one {where} and the most that one has "
        f"left is {gib(room)}, {gib(max(need - room, 0))} too little; all tables need "
        f"{gib(total)} and the {topology.world_size} have {gib(have)}",
        tables=tuple(option.name for option in proposal),
    )


def _where(scenario: Scenario, kind: str) -> str:
    if scenario.hardware.device == "cpu":
        return "rank"
    return "GPU" if kind == "hbm" else "GPU's share of host memory"


def gib(nbytes: float) -> str:
    """A number of bytes for a person."""
    amount = nbytes / GIB
    digits = 0 if amount >= 100 else 1 if amount >= 1 else 3
    return f"{amount:,.{digits}f} GiB"
