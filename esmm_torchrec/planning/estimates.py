"""Estimates of memory and time for a strategy on a number of ranks, made without the hardware.

The estimates of every shard come from TorchRec's planner; those of the towers, which the planner
does not count, are added. A time is bytes divided by a bandwidth, or operations divided by a share
of the peak; latencies and overlap are not modelled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torchrec.distributed.planner.planners import to_sharding_plan
from torchrec.distributed.planner.types import ShardingOption, Topology

from esmm_torchrec.errors import PlanError
from esmm_torchrec.planning.hardware import PRESETS
from esmm_torchrec.planning.placement import place
from esmm_torchrec.planning.scenario import (
    Capacity,
    Constraint,
    Scenario,
    Strategy,
    TowerEstimate,
    estimate_towers,
)
from esmm_torchrec.sharding.plan_file import PlanFile, embedding_tables
from esmm_torchrec.sharding.plan_text import plan_warnings
from esmm_torchrec.sharding.search import NoPlanError, imbalance

MAX_RANKS_TRIED = 1024


@dataclass(frozen=True)
class StepParts:
    """Milliseconds of one step on the slowest rank. Parts do not overlap: their sum is the step."""

    forward: float
    """Time of look-ups and pooling."""
    forward_comms: float
    """Time to send pooled embeddings to the ranks of their impressions."""
    backward: float
    """Time of gradients and the fused optimiser."""
    backward_comms: float
    prefetch: float
    """Time in which fused_uvm_caching fetches rows from the host."""
    towers: float
    towers_all_reduce: float
    input_comms: float
    """Time to send ids to the ranks that hold their rows. It is not part of the sum, because
    TorchRec's pipeline overlaps it with the previous step."""

    @property
    def counted(self) -> dict[str, float]:
        """Parts that count towards the step, by name."""
        return {name: value for name, value in vars(self).items() if name != "input_comms"}

    @property
    def step(self) -> float:
        """Milliseconds of the step: the sum of `counted`."""
        return sum(self.counted.values())


_PERF_FIELDS = {
    "forward": "fwd_compute",
    "forward_comms": "fwd_comms",
    "backward": "bwd_compute",
    "backward_comms": "bwd_comms",
    "prefetch": "prefetch_compute",
    "input_comms": "input_dist_comms",
}
"""Part of a step → its name in TorchRec's `Perf`."""


@dataclass(frozen=True)
class Placed:
    """A plan and its estimates. Arrays are (tables, ranks), in the order of `names`."""

    plan: PlanFile
    parts: StepParts
    names: tuple[str, ...]
    table_bytes: np.ndarray
    """Bytes of each rank's memory per table: weights, optimiser state, and a batch in and out."""
    table_host_bytes: np.ndarray
    """Bytes of each rank's host memory per table (fused_uvm*)."""
    table_ms: np.ndarray
    placements: Mapping[str, int]
    """'sharding type, kernel' → number of tables."""
    tables_cut: int
    """Tables with more than one shard."""
    warnings: tuple[str, ...] = ()

    @property
    def memory_imbalance(self) -> float:
        """Table memory of the fullest rank divided by the mean; 1 is perfectly even."""
        return imbalance(self.table_bytes.sum(axis=0).tolist())

    @property
    def time_imbalance(self) -> float:
        """Embedding time of the slowest rank divided by the mean; 1 is perfectly even."""
        return imbalance(self.table_ms.sum(axis=0).tolist())


@dataclass(frozen=True)
class Estimate:
    """One strategy on one number of ranks: its plan, or the reason why there is none."""

    strategy: Strategy
    world_size: int
    local_world_size: int
    batch_size: int
    capacity: Capacity
    towers: TowerEstimate
    placed: Placed | None = None
    reason: str | None = None
    """Sentence that says which table does not fit where and by how much, or what rules the
    strategy out."""
    remedies: tuple[str, ...] = ()
    """Changes with which the planner found a plan."""

    @property
    def step_ms(self) -> float:
        """Estimated milliseconds per step; infinite if there is no plan."""
        return self.placed.parts.step if self.placed else math.inf

    @property
    def impressions_per_second(self) -> float:
        """Estimated throughput of all ranks together."""
        return self.batch_size * self.world_size / self.step_ms * 1e3

    @property
    def fullest_rank_bytes(self) -> int:
        """Bytes in use on the fullest rank, without the reserve."""
        assert self.placed is not None
        return int(self.placed.table_bytes.sum(axis=0).max()) + self.capacity.towers

    @property
    def plan_file(self) -> str:
        """Name of the plan's file."""
        return f"plan-{self.strategy}-{self.world_size}.json"

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry for plans.json."""
        capacity = self.capacity
        entry: dict[str, Any] = {
            "strategy": self.strategy,
            "gpus": self.world_size,
            "gpus_per_host": self.local_world_size,
            "feasible": self.placed is not None,
            "memory_per_gpu_bytes": {
                "capacity": capacity.total,
                "reserved": capacity.reserved,
                "towers_estimate": capacity.towers,
                "for_tables": capacity.for_tables,
            },
        }
        if capacity.host_total:
            entry["host_memory_per_gpu_bytes"] = {
                "capacity": capacity.host_total,
                "for_tables": capacity.host_for_tables,
            }
        if self.placed is None:
            return entry | {"reason": self.reason, "would_fit": list(self.remedies)}
        placed, parts = self.placed, self.placed.parts
        entry["memory_per_gpu_bytes"]["tables"] = placed.table_bytes.sum(axis=0).tolist()
        if capacity.host_total:
            entry["host_memory_per_gpu_bytes"]["tables"] = placed.table_host_bytes.sum(
                axis=0
            ).tolist()
        return entry | {
            "step_ms_estimate": parts.step,
            "parts_ms_estimate": {
                name if name.startswith("towers") else f"embedding_{name}": value
                for name, value in parts.counted.items()
            },
            "input_comms_ms_estimate_not_in_step": parts.input_comms,
            "impressions_per_second_estimate": self.impressions_per_second,
            "embedding_ms_per_gpu_estimate": placed.table_ms.sum(axis=0).tolist(),
            "imbalance": {"memory": placed.memory_imbalance, "time": placed.time_imbalance},
            "placements": dict(placed.placements),
            "tables_cut": placed.tables_cut,
            "warnings": list(placed.warnings),
        }


def estimate(scenario: Scenario, strategy: Strategy, world_size: int) -> Estimate:
    """Plans a scenario with one strategy on a number of ranks.

    Raises:
        OptionError: the ranks do not fill their last host.
    """
    towers = estimate_towers(scenario, world_size)
    result = Estimate(
        strategy=strategy,
        world_size=world_size,
        local_world_size=scenario.hardware.local_world_size(world_size),
        batch_size=scenario.batch_size,
        capacity=scenario.capacity(world_size),
        towers=towers,
    )
    try:
        options = place(scenario, strategy, world_size)
    except PlanError as refusal:
        return replace(result, reason=str(refusal))
    except NoPlanError as misfit:
        remedies = tuple(_remedies(scenario, strategy, world_size, misfit))
        return replace(result, reason=str(misfit), remedies=remedies)
    return replace(result, placed=_placed(scenario, options, scenario.topology(world_size), towers))


def _fits(scenario: Scenario, strategy: Strategy, world_size: int) -> bool:
    try:
        place(scenario, strategy, world_size)
    except (PlanError, NoPlanError):
        return False
    return True


def _remedies(
    scenario: Scenario, strategy: Strategy, world_size: int, misfit: NoPlanError
) -> Iterator[str]:
    """Yields changes with each of which, as tried here, the planner can place all tables."""
    names = misfit.tables
    which = "all tables"
    if misfit.alone:
        which = f"table {names[0]!r}" if len(names) == 1 else f"the {len(names)} tables"
    noun = "GPUs" if scenario.hardware.device == "cuda" else "ranks"

    def constrained(**values: Any) -> Scenario:
        extra = tuple(Constraint(pattern=_escape(name), **values) for name in names)
        return replace(scenario, constraints=(*scenario.constraints, *extra))

    def first(tried: Iterable[tuple[str, Scenario, int]]) -> Iterator[str]:
        for text, changed, count in tried:
            if _fits(changed, strategy, count):
                yield text
                return

    if names:
        kinds = ("row_wise", "table_row_wise", "column_wise") if world_size > 1 else ()
        yield from first(
            (f"{kind} for {which}", constrained(sharding_types=(kind,)), world_size)
            for kind in kinds
            if kind != strategy
        )
        if scenario.hardware.device == "cuda":
            yield from first(
                (
                    f"the kernel {kernel} for {which} (rows in host memory)",
                    constrained(kernels=(kernel,)),
                    world_size,
                )
                for kernel in ("fused_uvm_caching", "fused_uvm")
                if kernel not in scenario.kernels
            )
        full = scenario.hardware.ranks_per_host
        counts = sorted({*(world_size * factor for factor in (2, 4, 8, 16)), full, 2 * full})
        yield from first(
            (f"{count} {noun}", scenario, count)
            for count in counts
            if world_size < count <= MAX_RANKS_TRIED and (count < full or count % full == 0)
        )
    yield from first(
        (f"--batch-size {smaller.batch_size}", smaller, world_size)
        for smaller in _smaller_batches(scenario)
    )
    yield from first(
        (
            f"{noun} with {memory_gib:,.0f} GiB each",
            replace(scenario, hardware=replace(scenario.hardware, memory_gib=memory_gib)),
            world_size,
        )
        for memory_gib in _memory_sizes(scenario)
        if memory_gib > scenario.hardware.memory_gib
    )


def _smaller_batches(scenario: Scenario) -> Iterator[Scenario]:
    """Yields the scenario with a half, a quarter and an eighth of the batch size. Fewer impressions
    share a row then; at worst as many stored rows are pooled as before."""
    for parts in (2, 4, 8):
        if scenario.batch_size % parts == 0:
            tables = tuple(
                replace(table, shared_by=max(1.0, table.shared_by / parts))
                for table in scenario.tables.tables
            )
            yield replace(
                scenario,
                tables=replace(scenario.tables, tables=tables),
                batch_size=scenario.batch_size // parts,
            )


def _memory_sizes(scenario: Scenario) -> Sequence[float]:
    """Returns memory sizes, in GiB per rank, of available hardware."""
    if scenario.hardware.device == "cpu":
        return [scenario.hardware.memory_gib * factor for factor in (2, 4)]
    return sorted({machine.memory_gib for machine in PRESETS.values() if machine.device == "cuda"})


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _placed(
    scenario: Scenario, options: list[ShardingOption], topology: Topology, towers: TowerEstimate
) -> Placed:
    world_size = topology.world_size
    on_gpu = topology.compute_device == "cuda"
    order = {table.name: number for number, table in enumerate(scenario.tables.tables)}
    shape = (len(order), world_size)
    memory, host, times = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for option in options:
        row = order[option.name]
        for shard in option.shards:
            assert shard.perf is not None
            assert shard.storage is not None
            memory[row, shard.rank] += shard.storage.hbm if on_gpu else shard.storage.ddr
            host[row, shard.rank] += shard.storage.ddr if on_gpu else 0
            times[row, shard.rank] += shard.perf.total
    slowest = int(times.sum(axis=0).argmax())
    on_slowest = [s.perf for option in options for s in option.shards if s.rank == slowest]
    plan = PlanFile.from_sharding_plan(
        to_sharding_plan(options, topology),
        embedding_tables(scenario.tables.to_module()).values(),
        world_size=world_size,
        local_world_size=topology.local_world_size,
        device=scenario.hardware.device,
    )
    plan = replace(plan, tables={name: plan.tables[name] for name in order})
    kinds = Counter((option.sharding_type, option.compute_kernel) for option in options)
    return Placed(
        plan=plan,
        parts=StepParts(
            **{
                name: sum((getattr(perf, field) for perf in on_slowest), 0.0)
                for name, field in _PERF_FIELDS.items()
            },
            towers=towers.compute_ms,
            towers_all_reduce=towers.all_reduce_ms,
        ),
        names=tuple(order),
        table_bytes=memory,
        table_host_bytes=host,
        table_ms=times,
        placements={f"{kind}, {kernel}": n for (kind, kernel), n in sorted(kinds.items())},
        tables_cut=sum(len(option.shards) > 1 for option in options),
        warnings=tuple(plan_warnings(plan, optimizer=scenario.sparse_optimizer)),
    )
