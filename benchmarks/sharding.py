"""Measured cost of sharding plans on the available machines, next to their estimates.

    torchrun --nproc-per-node 2 benchmarks/sharding.py --out DIR
    torchrun --nproc-per-node 8 benchmarks/sharding.py --tables F.yaml --gpu h100 --out DIR

For each strategy, the tables are planned as `esmm-torchrec plan` does, sharded, and trained on
random ids. The parts of a step are timed one by one with a barrier before each: ids to the rows,
look-ups, embeddings to their impressions, towers, gradients to the rows, the look-ups' backward
pass, which includes the update of fused kernels, and the update of dense kernels. On a GPU, times
come from CUDA events and memory is the allocator's peak.

DIR/sharding.json contains measurements and estimates. DIR/hardware.yaml describes the machine by
its measured rates: `esmm-torchrec plan --hardware DIR/hardware.yaml` estimates with it.
"""

from __future__ import annotations

import gc
import json
import logging
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.planner.types import CollectiveType
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.cli.main import run_command
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.towers import Tower
from esmm_torchrec.planning.estimates import Estimate, StepParts, estimate
from esmm_torchrec.planning.hardware import (
    BYTES_PER_MS,
    Hardware,
    RankBandwidths,
    TowerDtype,
    preset,
    read_hardware,
    write_hardware,
)
from esmm_torchrec.planning.scenario import Kernel, Scenario, Strategy
from esmm_torchrec.planning.table_list import (
    PlannedFeature,
    PlannedTable,
    TableList,
    read_tables,
)
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.host import usable_memory
from esmm_torchrec.sharding.plan_file import PlanFile
from esmm_torchrec.sharding.planner import SparseOptimizerOption
from esmm_torchrec.sharding.process_group import DeviceOption, Ranks, process_group
from esmm_torchrec.sharding.search import GIB
from esmm_torchrec.sharding.table_placement import DATA_TYPES
from esmm_torchrec.training.optimizers import dense_table_optimizer, fuse_optimizer

BATCHES = 4
"""Number of different batches that the steps cycle through."""

WARM_UP_STEPS = 3

PARTS = (
    "input_comms",
    "forward",
    "forward_comms",
    "towers",
    "backward_comms",
    "backward",
    "update",
)
"""Parts of a step as they are timed, named as in StepParts: `towers` includes their all-reduce,
`backward` the update of fused kernels and the all-reduce of data_parallel's gradients; `update` is
that of dense kernels."""


@dataclass(frozen=True)
class Options:
    """Measure sharding strategies on the available ranks, next to their estimates."""

    out: Path
    """Output folder for sharding.json and hardware.yaml."""
    tables: Path | None = None
    """YAML list of tables; without it, nine tables that fit on a laptop."""
    strategies: tuple[Strategy, ...] = (
        "table_wise",
        "row_wise",
        "column_wise",
        "data_parallel",
    )
    """Strategies to measure."""
    kernels: tuple[Kernel, ...] = ("fused",)
    """Kernels to measure each strategy with, one after the other."""
    gpu: str | None = None
    """Preset to estimate with; without it and --hardware, h100 on GPUs and cpu elsewhere."""
    hardware: Path | None = None
    """Hardware file of the machine to estimate with."""
    batch_size: int | None = None
    """Impressions per rank and step; without it, the list's batch size, else 4096."""
    sparse_optimizer: SparseOptimizerOption = "adagrad"
    """Optimiser of the tables; every kernel has adagrad."""
    tower: tuple[int, ...] = (360, 200, 80)
    """Widths of the hidden layers of each tower."""
    tower_dtype: TowerDtype = "float32"
    """Data type in which the towers compute."""
    column_width: int = 32
    """Minimum width of the shards of column_wise."""
    steps: int = 10
    """Number of steps to time per round; the median over all rounds counts."""
    rounds: int = 3
    """Number of rounds through all cases, so that other load on the machine affects each."""
    round_seconds: float = 20.0
    """Maximum seconds of a case's round; its steps end early."""
    device: DeviceOption = "auto"
    """Device to measure on; auto: CUDA if there is a GPU for each rank."""


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of each part of a step: the largest of the ranks' medians."""

    input_comms: float
    forward: float
    forward_comms: float
    towers: float
    backward_comms: float
    backward: float
    update: float
    step_of_rounds: tuple[float, ...]
    """Milliseconds of the step in each round; their spread is the noise."""
    weights_bytes: tuple[int, ...]
    """Bytes of each rank's shards."""
    peak_bytes: tuple[int, ...]
    """Peak memory of each rank: the allocator's peak on a GPU, else the peak resident set of the
    process, earlier cases included."""

    @property
    def step(self) -> float:
        """Sum of its parts; see `_step`."""
        return _step({name: getattr(self, name) for name in PARTS})


def default_tables() -> TableList:
    """Returns one busy table, which table_wise places on one rank, and quiet ones, small enough for
    a laptop."""

    def table(name: str, rows: int, factor: float) -> PlannedTable:
        return PlannedTable(name, rows, 64, (PlannedFeature(name, factor),))

    busy = [table("history", 200_000, 60.0)]
    large = [table(f"large_{number}", 500_000, 1.0) for number in range(2)]
    small = [table(f"small_{number}", 1_000, 1.0) for number in range(6)]
    return TableList((*busy, *large, *small), batch_size=2048, source="the default tables")


class Clock:
    """Times parts of a step on one rank, with all ranks entering each part together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._milliseconds: dict[str, list[float]] = {name: [0.0] for name in PARTS}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        dist.barrier()
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            torch.cuda.synchronize(self._device)
            elapsed = start.elapsed_time(end)
        else:
            begun = time.perf_counter()
            yield
            elapsed = 1e3 * (time.perf_counter() - begun)
        self._milliseconds[part][-1] += elapsed

    def next_step(self) -> None:
        """Ends a step; a part timed several times within it was summed."""
        for values in self._milliseconds.values():
            values.append(0.0)

    def steps(self) -> dict[str, list[float]]:
        """Returns the milliseconds of each part in every completed step."""
        return {part: values[:-1] for part, values in self._milliseconds.items()}


class Benchmark:
    """A sharded list of tables followed by two towers, trained on random ids."""

    def __init__(self, scenario: Scenario, plan: PlanFile, ranks: Ranks) -> None:
        self._tables, self._ranks = scenario.tables, ranks
        self._batch_size = scenario.batch_size
        module = scenario.tables.to_module()
        kernels = {name: table.compute_kernel for name, table in plan.tables.items()}
        fuse_optimizer(
            module,
            scenario.sparse_optimizer,
            lr=0.01,
            kernels=kernels,
            device=ranks.device,
        )
        sharding = plan.to_sharding_plan(
            module,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            device=ranks.device.type,
        )
        self.model = shard(module, plan=sharding, ranks=ranks)
        self._collections: dict[str, ShardedEmbeddingBagCollection] = {}
        for name in scenario.tables.collections:
            collection = self.model.module[name]  # pyright: ignore[reportIndexIssue]
            assert isinstance(collection, ShardedEmbeddingBagCollection)
            self._collections[name] = collection
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[scenario.tower_dtype]
        width = scenario.tables.tower_width
        towers = nn.ModuleList(Tower(width, scenario.towers, dtype=dtype) for _ in range(2))
        self._towers = DistributedDataParallel(_Both(towers).to(ranks.device))
        dense = dict(in_backward_optimizer_filter(self.model.named_parameters())).values()
        tables = [parameter for parameter in dense if parameter.numel()]
        self._tower_optimizer = torch.optim.Adam(self._towers.parameters(), lr=0.001, fused=True)
        self.table_optimizer = (
            dense_table_optimizer(tables, scenario.sparse_optimizer, lr=0.01) if tables else None
        )
        generator = torch.Generator().manual_seed(ranks.rank)
        self._batches = [self._random_batch(generator) for _ in range(BATCHES)]

    def _random_batch(
        self, generator: torch.Generator
    ) -> dict[str, tuple[KeyedJaggedTensor, torch.Tensor | None]]:
        """Returns collection → its features, and each impression's bag if they share bags."""
        batch: dict[str, tuple[KeyedJaggedTensor, torch.Tensor | None]] = {}
        for name, tables in self._tables.collections.items():
            shared_by = tables[0].shared_by
            bags = -(-self._batch_size // int(shared_by)) if shared_by > 1 else self._batch_size
            keys: list[str] = []
            lengths: list[torch.Tensor] = []
            values: list[torch.Tensor] = []
            for table in tables:
                for feature in table.features:
                    keys.append(feature.name)
                    lengths.append(_lengths(feature.pooling_factor, bags, generator))
                    total = int(lengths[-1].sum())
                    ids = torch.randint(table.num_embeddings, (total,), generator=generator)
                    values.append(ids)
            ids = torch.cat(values)
            features = KeyedJaggedTensor(
                keys=keys,
                values=ids,
                lengths=torch.cat(lengths),
                weights=torch.rand(len(ids), generator=generator) if tables[0].weighted else None,
            )
            index = None
            if bags < self._batch_size:
                index = (torch.arange(self._batch_size) % bags).to(self._ranks.device)
            batch[name] = (features.to(self._ranks.device), index)
        return batch

    def step(self, number: int, clock: Clock) -> None:
        """Runs one step and times its parts."""
        batch = self._batches[number % BATCHES]
        looked_up: list[torch.Tensor] = []
        cut: list[torch.Tensor] = []
        pooled: list[torch.Tensor] = []
        for name, collection in self._collections.items():
            context = collection.create_context()
            with clock("input_comms"):
                ids = collection.input_dist(context, batch[name][0]).wait().wait()
            with clock("forward"):
                outputs = collection.compute(context, ids)
            # Cutting the graph here allows the two halves of the backward pass to be
            # timed separately.
            leaves = [output.detach().requires_grad_() for output in outputs]
            with clock("forward_comms"):
                pooled.append(collection.output_dist(context, leaves).wait().values())
            looked_up += outputs
            cut += leaves
        at_towers = [values.detach().requires_grad_() for values in pooled]
        with clock("towers"):
            rows: list[torch.Tensor] = []
            for name, values in zip(self._collections, at_towers, strict=True):
                index = batch[name][1]
                rows.append(values if index is None else values.index_select(0, index))
            self._towers(torch.cat(rows, dim=1)).square().mean().backward()
            self._tower_optimizer.step()
            self._tower_optimizer.zero_grad()
        with clock("backward_comms"):
            for values, leaf in zip(pooled, at_towers, strict=True):
                values.backward(leaf.grad)
        with clock("backward"):
            graph = [
                (o, leaf.grad) for o, leaf in zip(looked_up, cut, strict=True) if o.requires_grad
            ]
            torch.autograd.backward([o for o, _ in graph], [grad for _, grad in graph])
        with clock("update"):
            if self.table_optimizer is not None:
                self.table_optimizer.step()
                self.table_optimizer.zero_grad()


class _Both(nn.Module):
    """Two towers on the same features."""

    def __init__(self, towers: nn.ModuleList) -> None:
        super().__init__()
        self._towers = towers

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([tower(features) for tower in self._towers])


def _lengths(mean: float, bags: int, generator: torch.Generator) -> torch.Tensor:
    """Draws lengths of bags: 0 or 1 for a mean up to 1, else Poisson."""
    if mean <= 1:
        return (torch.rand(bags, generator=generator) < mean).long()
    return torch.poisson(torch.full((bags,), mean), generator=generator).long()


class Samples:
    """Measurements of a case on one rank so far."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, list[float]]] = []
        self.peak_bytes = 0

    def add_round(self, scenario: Scenario, plan: PlanFile, ranks: Ranks, options: Options) -> None:
        """Shards the tables by a plan and trains for some steps, all ranks together."""
        on_gpu = ranks.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(ranks.device)
        benchmark = Benchmark(scenario, plan, ranks)
        begun = time.perf_counter()
        for number in range(WARM_UP_STEPS):
            benchmark.step(number, Clock(ranks.device))
        each = torch.tensor((time.perf_counter() - begun) / WARM_UP_STEPS, device=ranks.device)
        dist.all_reduce(each, op=dist.ReduceOp.MAX)
        clock = Clock(ranks.device)
        for number in range(max(1, min(options.steps, int(options.round_seconds / each.item())))):
            benchmark.step(number, clock)
            clock.next_step()
        self.rounds.append(clock.steps())
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(ranks.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.peak_bytes = max(self.peak_bytes, peak)
        dist.barrier()
        del benchmark
        gc.collect()

    def summary(self, plan: PlanFile, ranks: Ranks) -> Measurement:
        """Summarises the measurements of all ranks."""
        held = sum(
            shard.size[0] * shard.size[1] * DATA_TYPES[table.data_type][1]
            for table in plan.tables.values()
            for shard in table.shards
            if shard.rank == ranks.rank
        )
        every: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(every, (self.rounds, held, self.peak_bytes))
        rounds_of_ranks = [rounds for rounds, _, _ in every]
        parts = _slowest(rounds_of_ranks)
        return Measurement(
            **parts,
            step_of_rounds=tuple(
                _step(_slowest([[rounds[number]] for rounds in rounds_of_ranks]))
                for number in range(len(self.rounds))
            ),
            weights_bytes=tuple(held for _, held, _ in every),
            peak_bytes=tuple(peak for _, _, peak in every),
        )


def _slowest(rounds_of_ranks: Sequence[Sequence[Mapping[str, list[float]]]]) -> dict[str, float]:
    """Returns part → the largest of the ranks' medians over all their steps."""
    return {
        part: max(
            statistics.median(value for steps in rounds for value in steps[part])
            for rounds in rounds_of_ranks
        )
        for part in PARTS
    }


def _step(parts: Mapping[str, float]) -> float:
    """Sums all parts except the input distribution, which TorchRec's pipeline hides on a GPU and
    which the estimates leave out."""
    return sum(value for name, value in parts.items() if name != "input_comms")


@dataclass(frozen=True)
class Case:
    """One strategy with one kernel, estimated and measured."""

    strategy: Strategy
    kernel: Kernel
    estimated: Estimate
    measured: Measurement

    @property
    def parts(self) -> StepParts:
        """Estimated parts of a step."""
        assert self.estimated.placed is not None
        return self.estimated.placed.parts

    @property
    def name(self) -> str:
        """Human-readable name."""
        return f"{self.strategy}, {self.kernel}"


def calibrate(base: Hardware, cases: Sequence[Case], scenario: Scenario, ranks: Ranks) -> Hardware:
    """Returns the machine with measured rates in place of peaks.

    A part that no case measured keeps its value. Bandwidths are those at which TorchRec's formulas
    yield the measured times, summed over the cases.
    """
    fused = [case for case in cases if case.kernel == "fused" and case.strategy != "data_parallel"]
    memory = _ratio(fused, lambda parts: parts.forward, lambda m: m.forward) or 1.0
    changes: dict[str, Any] = {
        "name": f"{base.name}, measured",
        "ranks_per_host": ranks.local_world_size,
        "memory_gb_s": base.memory_gb_s * memory,
    }
    backward = _ratio(fused, lambda parts: parts.backward / memory, lambda m: m.backward)
    if backward is not None:
        changes["backward_multiplier"] = base.backward_multiplier / backward
    changes |= _host_link(base, cases, memory)
    machine = replace(base, **changes)
    reached = _reached_bandwidths(base, machine, cases, scenario, ranks)
    machine = replace(machine, **_links(machine, reached, ranks))

    # The links' share of the towers' time is known by now.
    towers = [case.estimated.towers for case in cases]
    measured = sum(case.measured.towers for case in cases)
    all_reduces = sum(
        machine.all_reduce_ms(4 * tower.parameters, ranks.world_size) for tower in towers
    )
    share = base.tower_efficiency * sum(tower.compute_ms for tower in towers)
    share /= max(measured - all_reduces, 0.1 * measured)
    changes = {"tower_efficiency": min(share, 1.0)}
    if share > 1:
        changes["float32_tflops"] = base.float32_tflops * share
        changes["bfloat16_tflops"] = base.bfloat16_tflops * share
    changes["sources"] = (
        f"measured by benchmarks/sharding.py on {ranks.world_size} {ranks.device.type} ranks: "
        f"{', '.join(case.name for case in cases)}; other numbers as {base.name}",
    )
    return replace(machine, **changes)


def _ratio(
    cases: Sequence[Case],
    estimated: Callable[[StepParts], float],
    measured: Callable[[Measurement], float],
) -> float | None:
    """Returns estimated over measured time: how much a bandwidth was underestimated (or over-)."""
    estimate = sum(estimated(case.parts) for case in cases)
    took = sum(measured(case.measured) for case in cases)
    return estimate / took if estimate > 0 and took > 0 else None


def _host_link(base: Hardware, cases: Sequence[Case], memory: float) -> dict[str, float]:
    """Returns the bandwidth between GPU and host memory, from the kernels that keep rows there."""
    uvm = [case for case in cases if case.kernel == "fused_uvm"]
    link = _ratio(uvm, lambda parts: parts.forward, lambda m: m.forward)
    if link is None:
        caching = [case for case in cases if case.kernel == "fused_uvm_caching"]
        # The timed forward pass includes filling the cache.
        looked_up = sum(case.parts.forward for case in caching) / memory
        fetching = sum(case.measured.forward for case in caching) - looked_up
        if caching and fetching > 0:
            link = sum(case.parts.prefetch for case in caching) / fetching
    return {} if link is None else {"host_to_device_gb_s": base.host_to_device_gb_s * link}


def _reached_bandwidths(
    base: Hardware, machine: Hardware, cases: Sequence[Case], scenario: Scenario, ranks: Ranks
) -> dict[CollectiveType, float]:
    """Returns bytes of a rank's output per ms, for each collective that a case used alone.

    Args:
        base: machine with which the cases were estimated.
        machine: the same machine with its measured memory bandwidths.
    """
    memory = machine.memory_gb_s / base.memory_gb_s
    backward = machine.backward_multiplier / base.backward_multiplier / memory
    by_table = [case for case in cases if case.strategy in ("table_wise", "column_wise")]
    alone = ["row_wise"]
    if ranks.world_size == ranks.local_world_size:
        alone.append("table_row_wise")
    by_row = [case for case in cases if case.strategy in alone]
    ratios = {
        CollectiveType.ALL_TO_ALL: _ratio(
            by_table,
            lambda parts: parts.forward_comms + parts.backward_comms,
            lambda m: m.forward_comms + m.backward_comms,
        ),
        CollectiveType.REDUCE_SCATTER: _ratio(
            by_row, lambda parts: parts.forward_comms, lambda m: m.forward_comms
        ),
    }

    def before(kind: CollectiveType) -> float:
        return base.bandwidths.get_bw(ranks.local_world_size, ranks.world_size, kind)

    # In the backward pass, TorchRec adds a copy at memory bandwidth to the all-gather.
    scatter_to_gather = before(CollectiveType.REDUCE_SCATTER) / before(CollectiveType.ALL_GATHER)
    gathers = sum(case.parts.forward_comms for case in by_row) * scatter_to_gather
    copies = (sum(case.parts.backward_comms for case in by_row) - gathers) / memory
    took = sum(case.measured.backward_comms for case in by_row)
    if by_row and gathers > 0:
        ratios[CollectiveType.ALL_GATHER] = gathers / max(took - copies, 0.1 * took)
    replicated = [case for case in cases if case.strategy == "data_parallel"]
    rings, took, others = 0.0, 0.0, 0.0
    for case in replicated:
        ring = base.all_reduce_ms(scenario.tables.nbytes, ranks.world_size)
        rings += ring
        took += case.measured.backward + case.measured.update
        others += case.parts.backward * backward + (case.parts.backward_comms - ring) / memory
    if rings > 0:
        ratios[CollectiveType.ALL_REDUCE] = rings / max(took - others, 0.1 * took)
    return {kind: before(kind) * ratio for kind, ratio in ratios.items() if ratio is not None}


def _links(
    machine: Hardware, reached: Mapping[CollectiveType, float], ranks: Ranks
) -> dict[str, float]:
    """Returns links as fast as the fastest collective on them, and each one's share of that."""
    world, local = ranks.world_size, ranks.local_world_size
    if world == 1 or not reached:
        return {}
    intra, inter = machine.intra_host_gb_s * BYTES_PER_MS, machine.inter_host_gb_s * BYTES_PER_MS
    # Bytes per ms that pass each link of a ring, whatever the collective.
    rings = {
        kind: speed * (world - 1) / world
        for kind, speed in reached.items()
        if kind != CollectiveType.ALL_TO_ALL
    }
    if CollectiveType.ALL_REDUCE in rings:
        once = RankBandwidths(1.0, 1.0)
        rings[CollectiveType.ALL_REDUCE] *= once.of_links(
            local, world, CollectiveType.REDUCE_SCATTER
        ) / once.of_links(local, world, CollectiveType.ALL_REDUCE)
    to_all = reached.get(CollectiveType.ALL_TO_ALL)
    if world == local:
        own = [] if to_all is None else [to_all * (world - 1) / world]
        intra = max([*rings.values(), *own])
    else:
        # The inter-host link is being measured; the intra-host link keeps its value unless
        # something was faster.
        intra = max(intra, *rings.values())
        needed = [speed / local for speed in rings.values()]
        if to_all is not None:
            elsewhere = (world - local) / world
            here = 1 - elsewhere - 1 / world
            intra = max(intra, to_all * (elsewhere + here))
            needed.append(elsewhere / (1 / to_all - here / intra))
        inter = max(needed)
    links = RankBandwidths(intra, inter)
    return {
        "intra_host_gb_s": intra / BYTES_PER_MS,
        "inter_host_gb_s": inter / BYTES_PER_MS,
        **{
            f"{kind.value}_efficiency": min(speed / links.of_links(local, world, kind), 1.0)
            for kind, speed in reached.items()
        },
    }


def machine_at_hand(options: Options, ranks: Ranks) -> Hardware:
    """Returns the hardware to estimate with: that of the options, else a preset with this machine's
    memory and ranks."""
    if options.gpu is not None and options.hardware is not None:
        raise OptionError("give either --gpu NAME or --hardware FILE")
    if options.gpu is not None:
        return preset(options.gpu)
    if options.hardware is not None:
        return read_hardware(options.hardware)
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        known = preset("h100")
        return replace(
            known,
            name=name,
            memory_gib=total / GIB,
            ranks_per_host=ranks.local_world_size,
            sources=(f"numbers of {known.name}, memory of this GPU",),
        )
    return replace(
        preset("cpu"),
        name="this machine",
        ranks_per_host=ranks.local_world_size,
        memory_gib=usable_memory() / ranks.local_world_size / GIB,
        sources=("numbers of cpu, memory of this machine",),
    )


@dataclass(frozen=True)
class Pairs:
    """Pairs of cases, compared by their steps."""

    in_order: int
    """Number of pairs whose estimates have the measured order."""
    wrong: tuple[str, ...]
    ties: tuple[str, ...]
    """Pairs whose rounds overlap, so that the measurement itself does not order them."""


def pairs(rounds: Mapping[str, Sequence[float]], estimated: Mapping[str, float]) -> Pairs:
    """Compares the order of the estimates with the order of the measurements.

    Args:
        rounds: case → its measured step in each round.
        estimated: case → its estimated step.
    """
    in_order = 0
    wrong: list[str] = []
    ties: list[str] = []
    for a, b in combinations(rounds, 2):
        fast, slow = sorted((a, b), key=lambda name: statistics.median(rounds[name]))
        if max(rounds[fast]) >= min(rounds[slow]):
            ties.append(f"{fast} and {slow}")
        elif estimated[fast] < estimated[slow]:
            in_order += 1
        else:
            wrong.append(f"{fast} before {slow}")
    return Pairs(in_order, tuple(wrong), tuple(ties))


def run(options: Options) -> None:
    """Measures every strategy with every kernel and writes the results."""
    # TorchRec warns for each table, and torch for each case, of things known here.
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch(rec)?\.")
    with process_group(options.device) as ranks:
        benchmark_all(options, ranks)


def benchmark_all(options: Options, ranks: Ranks) -> None:
    """Does the work of `run` inside a process group."""
    tables = read_tables(options.tables) if options.tables else default_tables()
    base = machine_at_hand(options, ranks)
    scenario = Scenario(
        tables=tables,
        hardware=base,
        batch_size=options.batch_size or tables.batch_size or 4096,
        sparse_optimizer=options.sparse_optimizer,
        column_width=options.column_width,
        towers=options.tower,
        tower_dtype=options.tower_dtype,
    )
    planned: list[tuple[Scenario, Estimate, Samples]] = []
    for strategy in options.strategies:
        kernels: tuple[Kernel, ...] = options.kernels
        for kernel in ("dense",) if strategy == "data_parallel" else kernels:
            one = replace(scenario, kernels=(kernel,))
            expected = estimate(one, strategy, ranks.world_size)
            if expected.placed is not None:
                planned.append((one, expected, Samples()))
            elif ranks.is_first:
                print(f"{strategy}, {kernel}: {expected.reason}", flush=True)
    with progress_bar(
        "measuring", options.rounds * len(planned), "cases", disable=not ranks.is_first
    ) as bar:
        for _ in range(options.rounds):
            for one, expected, samples in planned:
                assert expected.placed is not None
                samples.add_round(one, expected.placed.plan, ranks, options)
                bar.update(1)
    cases = [
        Case(
            expected.strategy,
            one.kernels[0],
            expected,
            samples.summary(expected.placed.plan, ranks),
        )
        for one, expected, samples in planned
        if expected.placed is not None
    ]
    if not cases:
        raise OptionError("none of --strategies can be measured here")
    calibrated = calibrate(base, cases, scenario, ranks)
    again = {
        case.name: estimate(
            replace(scenario, hardware=calibrated, kernels=(case.kernel,)),
            case.strategy,
            ranks.world_size,
        )
        for case in cases
    }
    if ranks.is_first:
        print("\n".join(map(_line, cases)))
        _write(options.out, cases, again, calibrated, scenario, ranks)


def _line(case: Case) -> str:
    parts = ", ".join(f"{part} {getattr(case.measured, part):.2f}" for part in PARTS)
    return f"{case.name}: measured {case.measured.step:.2f} ms per step ({parts})"


def _write(
    out: Path,
    cases: Sequence[Case],
    again: Mapping[str, Estimate],
    calibrated: Hardware,
    scenario: Scenario,
    ranks: Ranks,
) -> None:
    measured = {case.name: case.measured.step for case in cases}
    rounds = {case.name: case.measured.step_of_rounds for case in cases}
    before = {case.name: case.estimated.step_ms for case in cases}
    after = {name: estimate.step_ms for name, estimate in again.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_hardware(calibrated, out / "hardware.yaml")
    values = {
        "ranks": ranks.world_size,
        "ranks_per_host": ranks.local_world_size,
        "device": ranks.device.type,
        "threads_per_rank": torch.get_num_threads(),
        "batch_size": scenario.batch_size,
        "sparse_optimizer": scenario.sparse_optimizer,
        "cases": [
            {
                "strategy": case.strategy,
                "kernel": case.kernel,
                "measured_ms": {
                    "step": case.measured.step,
                    **{part: getattr(case.measured, part) for part in PARTS},
                    "step_of_rounds": list(case.measured.step_of_rounds),
                },
                "estimated_ms": {"step": case.estimated.step_ms, **asdict(case.parts)},
                "estimated_ms_calibrated": _parts(again[case.name]),
                "weights_bytes_per_rank": list(case.measured.weights_bytes),
                "peak_bytes_per_rank": list(case.measured.peak_bytes),
                "table_bytes_per_rank_estimate": _table_bytes(case.estimated),
            }
            for case in cases
        ],
        "pairs_in_measured_order": {
            "before": asdict(pairs(rounds, before)),
            "calibrated": asdict(pairs(rounds, after)),
        },
        "hardware": calibrated.to_dict(),
    }
    (out / "sharding.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"\n{'ms per step':<26}{'measured':>10}{'in rounds':>18}{'estimated':>12}{'fitted':>10}")
    for name in sorted(measured, key=lambda name: measured[name]):
        spread = f"{min(rounds[name]):.1f} to {max(rounds[name]):.1f}"
        print(
            f"{name:<26}{measured[name]:>10.1f}{spread:>18}{before[name]:>12.1f}{after[name]:>10.1f}"
        )
    for what, estimated in ((scenario.hardware.name, before), (calibrated.name, after)):
        found = pairs(rounds, estimated)
        text = f"{what}: {found.in_order} pairs estimated in the measured order"
        if found.wrong:
            text += f", {len(found.wrong)} not ({'; '.join(found.wrong)})"
        if found.ties:
            text += f"; measured as ties: {'; '.join(found.ties)}"
        print(text)
    print(f"wrote {out / 'sharding.json'} and {out / 'hardware.yaml'}")


def _parts(estimate: Estimate) -> dict[str, float]:
    assert estimate.placed is not None
    parts = estimate.placed.parts
    return {"step": parts.step} | {f.name: getattr(parts, f.name) for f in fields(parts)}


def _table_bytes(estimate: Estimate) -> list[int]:
    assert estimate.placed is not None
    return [int(value) for value in estimate.placed.table_bytes.sum(axis=0)]


if __name__ == "__main__":
    run_command(run, tyro.cli(Options))
