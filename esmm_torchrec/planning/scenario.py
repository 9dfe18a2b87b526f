"""Scenarios: tables to train, machines, and the memory that is left for the tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal, get_args

from torchrec.distributed.planner.types import Topology

from esmm_torchrec.choices import check_choices
from esmm_torchrec.errors import OptionError
from esmm_torchrec.planning.hardware import Hardware, TowerDtype
from esmm_torchrec.planning.table_list import TableList
from esmm_torchrec.sharding.planner import STORAGE_MARGIN, SparseOptimizerOption
from esmm_torchrec.sharding.search import GIB
from esmm_torchrec.sharding.table_placement import COMPUTE_KERNELS

Strategy = Literal[
    "auto",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "grid_shard",
    "data_parallel",
]
"""A sharding type for all tables, or auto: the planner chooses for each table."""

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]

CACHING: Kernel = "fused_uvm_caching"

DEFAULT_COLUMN_WIDTH = 32
"""Minimum number of columns of a shard; kernels take as long for fewer columns as for 32."""

DEFAULT_BATCH_SIZE = 4096


@dataclass(frozen=True)
class Constraint:
    """Options of the tables whose name matches a pattern, whatever the strategy."""

    pattern: str
    """Pattern with a shell's wildcards: `user_*`."""
    sharding_types: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    cache_load_factor: float | None = None


def parse_constraint(text: str) -> Constraint:
    """Parses `PATTERN=WORD,WORD…`. A word is a sharding type, a kernel or `cache=SHARE`.

    Raises:
        OptionError: a word is unknown, or the words exclude each other.
    """
    pattern, equals, words = text.partition("=")
    if not pattern or not equals or not words:
        raise OptionError(
            f"`constraints` {text!r} is not PATTERN=WORDS, such as 'item*=row_wise,fused_uvm'"
        )
    types: list[str] = []
    kernels: list[str] = []
    cache: float | None = None
    for word in words.split(","):
        if word in STRATEGIES and word != "auto":
            types.append(word)
        elif word in COMPUTE_KERNELS:
            kernels.append(word)
        elif word.startswith("cache="):
            try:
                cache = float(word.removeprefix("cache="))
            except ValueError:
                cache = math.nan
            if not 0 < cache <= 1:
                raise OptionError(f"`constraints` {text!r}: cache must be above 0 and at most 1")
        else:
            known = ", ".join((*STRATEGIES[1:], *COMPUTE_KERNELS, "cache=SHARE"))
            raise OptionError(f"`constraints` {text!r}: there is no {word!r}; use {known}")
    if "data_parallel" in types and kernels and "dense" not in kernels:
        raise OptionError(
            f"`constraints` {text!r}: data_parallel runs with the kernel dense only; leave "
            f"{kernels[0]} out"
        )
    return Constraint(pattern, tuple(types), tuple(kernels), cache)


@dataclass(frozen=True)
class Scenario:
    """Tables to train, and machines to train them on."""

    tables: TableList
    hardware: Hardware
    batch_size: int
    """Impressions per rank and step."""
    kernels: tuple[Kernel, ...] = ("fused",)
    """Kernels that the planner may choose from for tables without a constraint."""
    cache_load_factor: float | None = None
    """Share of a table's rows that fused_uvm_caching keeps on the GPU; None: TorchRec's 0.2."""
    sparse_optimizer: SparseOptimizerOption = "rowwise_adagrad"
    constraints: tuple[Constraint, ...] = ()
    """Options of tables by name; later ones take precedence over earlier ones."""
    column_width: int = DEFAULT_COLUMN_WIDTH
    """Minimum number of columns of a shard."""
    reserve: float = STORAGE_MARGIN
    """Share of memory reserved for everything that is not counted: CUDA itself, buffers of
    collectives, fragmentation, the next batch."""
    towers: tuple[int, ...] = (360, 200, 80)
    """Widths of the hidden layers of each of the two towers."""
    tower_dtype: TowerDtype = "float32"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.batch_size < 1:
            raise OptionError(f"`batch_size` {self.batch_size} is not at least 1")
        if not 0 <= self.reserve < 1:
            raise OptionError(f"`reserve` {self.reserve} is not at least 0 and below 1")
        if self.cache_load_factor is not None and not 0 < self.cache_load_factor <= 1:
            raise OptionError(
                f"`cache_load_factor` {self.cache_load_factor} is not above 0 and at most 1"
            )
        if self.column_width < 4 or self.column_width % 4:
            raise OptionError(f"`column_width` {self.column_width} is not a multiple of 4")
        if not self.kernels:
            raise OptionError("`kernels` needs at least one kernel")
        if not self.towers or min(self.towers) < 1:
            raise OptionError("`towers` needs widths of at least 1")
        for constraint in self.constraints:
            names = [table.name for table in self.tables.tables]
            if not any(fnmatchcase(name, constraint.pattern) for name in names):
                raise OptionError(
                    f"`constraints` {constraint.pattern!r} matches no table of "
                    f"{self.tables.source}, which has {', '.join(names[:5])}"
                    + (", …" if len(names) > 5 else "")
                )
            if constraint.cache_load_factor is not None and not self._may_cache(constraint):
                raise OptionError(
                    f"`constraints` {constraint.pattern}=cache={constraint.cache_load_factor:g} "
                    "needs the kernel fused_uvm_caching; add it to the constraint or to `kernels`"
                )
        offered = (self.kernels, *(constraint.kernels for constraint in self.constraints))
        if self.cache_load_factor is not None and not any(CACHING in some for some in offered):
            raise OptionError(
                f"`cache_load_factor` {self.cache_load_factor:g} needs the kernel "
                f"{CACHING}; add it to `kernels` or to a `constraints`"
            )

    def _may_cache(self, constraint: Constraint) -> bool:
        """Whether a table that a constraint matches may have the caching kernel."""
        if constraint.kernels:
            return CACHING in constraint.kernels
        return CACHING in self.kernels or any(
            CACHING in other.kernels
            and fnmatchcase(table.name, constraint.pattern)
            and fnmatchcase(table.name, other.pattern)
            for table in self.tables.tables
            for other in self.constraints
        )

    def topology(self, world_size: int) -> Topology:
        """Returns the machines and their memory for tables as TorchRec's planner takes them."""
        capacity = self.capacity(world_size)
        return self.hardware.topology(
            world_size,
            memory_bytes=capacity.for_tables,
            host_memory_bytes=capacity.host_for_tables,
        )

    def capacity(self, world_size: int) -> Capacity:
        """Returns the memory of one of `world_size` ranks."""
        hardware = self.hardware
        total = int(hardware.memory_gib * GIB)
        host_total = int(hardware.host_memory_gib * GIB) if hardware.device == "cuda" else 0
        return Capacity(
            total=total,
            reserved=int(total * self.reserve),
            towers=estimate_towers(self, world_size).memory_bytes,
            host_total=host_total,
            host_reserved=int(host_total * self.reserve),
        )


@dataclass(frozen=True)
class TowerEstimate:
    """Estimates of the two towers on a rank. Each rank has a copy, which the planner ignores."""

    parameters: int
    compute_ms: float
    """Time of forward and backward in one step, at the assumed share of the peak."""
    all_reduce_ms: float
    """Time of the all-reduce of the gradients."""
    memory_bytes: int
    """Bytes of weights, gradients, Adam's moments, the all-reduce's buffer, and activations."""


def estimate_towers(scenario: Scenario, world_size: int) -> TowerEstimate:
    """Estimates time and memory of ESMM's two towers and their input on one rank."""
    widths = (scenario.tables.tower_width, *scenario.towers, 1)
    layers = list(pairwise(widths))
    weights = 2 * sum(a * b for a, b in layers)
    parameters = weights + 2 * sum(b for _, b in layers)
    hardware = scenario.hardware
    tflops = {"float32": hardware.float32_tflops, "bfloat16": hardware.bfloat16_tflops}
    # 2 operations per weight and impression forward, twice as many backward.
    operations = 6 * scenario.batch_size * weights
    per_ms = tflops[scenario.tower_dtype] * 1e9 * hardware.tower_efficiency
    # Pooled and concatenated input and its gradient; each hidden layer before and after ReLU, and
    # the gradients of both.
    activations = 4 * scenario.batch_size * (3 * widths[0] + 2 * 4 * sum(scenario.towers))
    return TowerEstimate(
        parameters=parameters,
        compute_ms=operations / per_ms,
        all_reduce_ms=hardware.all_reduce_ms(4 * parameters, world_size),
        memory_bytes=5 * 4 * parameters + activations,
    )


@dataclass(frozen=True)
class Capacity:
    """Memory of one rank, in bytes."""

    total: int
    reserved: int
    towers: int
    host_total: int
    """The rank's whole share of host memory; 0 on a CPU, for which `total` is that share."""
    host_reserved: int

    @property
    def for_tables(self) -> int:
        """Memory available to tables."""
        return self.total - self.reserved - self.towers

    @property
    def host_for_tables(self) -> int:
        """Host memory available to tables."""
        return self.host_total - self.host_reserved
