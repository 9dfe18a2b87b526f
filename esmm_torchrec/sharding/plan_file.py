"""A sharding plan as data: a JSON file that is read, changed by hand, compared and trained with.

TorchRec's ShardingPlan is an object of one process. Here it becomes a file that says for each
table how it is cut and which rank holds which part::

    {
      "format_version": 1,
      "world_size": 2,
      "local_world_size": 2,
      "device": "cpu",
      "tables": {
        "item": {
          "num_embeddings": 1000,
          "embedding_dim": 16,
          "sharding_type": "table_wise",
          "compute_kernel": "fused",
          "ranks": [1]
        }
      }
    }

`shards` (a list of `{"rank", "offset": [row, column], "size": [rows, columns]}`) may stand beside
`ranks`; it is written only where it does not follow from the sharding type and the ranks, so that
a table is moved by changing one number. `ranks` itself may be left out for row_wise and
data_parallel, which use every rank. `data_type` (float32 where left out) and `cache_load_factor`
are optional.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.types import DataType

from esmm_torchrec.errors import PlanError

FORMAT_VERSION = 1

SHARDING_TYPES = tuple(kind.value for kind in ShardingType)
COMPUTE_KERNELS = tuple(
    kernel.value
    for kernel in (
        EmbeddingComputeKernel.DENSE,
        EmbeddingComputeKernel.FUSED,
        EmbeddingComputeKernel.FUSED_UVM,
        EmbeddingComputeKernel.FUSED_UVM_CACHING,
    )
)
"""Kernels that train and that this library configures."""

DATA_TYPES: dict[str, tuple[DataType, int]] = {
    "float32": (DataType.FP32, 4),
    "float16": (DataType.FP16, 2),
    "bfloat16": (DataType.BF16, 2),
}
"""Name → TorchRec's data type, bytes of one value."""

COLUMN_MULTIPLE = 4
"""The fused kernels take only shards whose width is a multiple of this."""


class Shard(NamedTuple):
    """One part of a table on one rank."""

    rank: int
    offset: tuple[int, int]
    """First row, first column."""
    size: tuple[int, int]
    """Rows, columns."""


@dataclass(frozen=True)
class TablePlacement:
    """How one table is cut and where its parts are."""

    num_embeddings: int
    embedding_dim: int
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]
    """Rank of each shard, in the order of `shards`."""
    shards: tuple[Shard, ...]
    """Under data_parallel one whole copy a rank."""
    data_type: str = "float32"
    cache_load_factor: float | None = None
    """Share of the rows that the cache of fused_uvm_caching holds; None: the kernel's default."""

    @property
    def nbytes(self) -> int:
        """Bytes of one copy of the weights, optimiser state not counted."""
        return self.num_embeddings * self.embedding_dim * DATA_TYPES[self.data_type][1]


def derive_shards(
    sharding_type: str,
    *,
    num_embeddings: int,
    embedding_dim: int,
    ranks: Sequence[int],
    world_size: int,
    local_world_size: int,
) -> tuple[Shard, ...]:
    """The shards that TorchRec's own `sharding_plan` helpers make of a type and its ranks.

    Rows are cut into blocks of ceil(rows / parts), the last ones smaller or empty: the input
    distribution of TorchRec sends an id to `id // block`, whatever the plan says.

    Raises:
        PlanError: the ranks do not suit the sharding type; the sentence starts with what is wrong
            and names no table.
    """
    rows, columns = num_embeddings, embedding_dim
    if sharding_type == ShardingType.TABLE_WISE.value:
        if len(ranks) != 1:
            raise PlanError(f"table_wise needs exactly one rank, not {list(ranks)}")
        return (Shard(ranks[0], (0, 0), (rows, columns)),)
    if sharding_type in (ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value):
        if list(ranks) != list(range(world_size)):
            raise PlanError(
                f"{sharding_type} uses every rank in order, 0 to {world_size - 1}, not "
                f"{list(ranks)}; leave 'ranks' out"
            )
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return tuple(Shard(rank, (0, 0), (rows, columns)) for rank in ranks)
        return tuple(_row_blocks(rows, ranks, 0, columns))
    if sharding_type == ShardingType.TABLE_ROW_WISE.value:
        _check_hosts(sharding_type, ranks, local_world_size)
        if len(ranks) != local_world_size:
            raise PlanError(
                f"table_row_wise needs the {local_world_size} ranks of one host, not {len(ranks)}"
            )
        return tuple(_row_blocks(rows, ranks, 0, columns))
    if sharding_type == ShardingType.GRID_SHARD.value:
        _check_hosts(sharding_type, ranks, local_world_size)
        width = _even_width(sharding_type, columns, len(ranks) // local_world_size)
        return tuple(
            shard
            for block, start in enumerate(range(0, len(ranks), local_world_size))
            for shard in _row_blocks(
                rows, ranks[start : start + local_world_size], block * width, width
            )
        )
    width = _even_width(sharding_type, columns, len(ranks))
    return tuple(Shard(rank, (0, part * width), (rows, width)) for part, rank in enumerate(ranks))


def _row_blocks(rows: int, ranks: Sequence[int], column: int, width: int) -> Iterator[Shard]:
    block = math.ceil(rows / len(ranks))
    for part, rank in enumerate(ranks):
        start = min(part * block, rows)
        yield Shard(rank, (start, column), (min(block, rows - start), width))


def _check_hosts(sharding_type: str, ranks: Sequence[int], local_world_size: int) -> None:
    if not ranks or len(ranks) % local_world_size:
        raise PlanError(
            f"{sharding_type} needs all {local_world_size} ranks of each host it uses, not "
            f"{list(ranks)}"
        )
    for start in range(0, len(ranks), local_world_size):
        host = list(ranks[start : start + local_world_size])
        first = host[0]
        if first % local_world_size or host != list(range(first, first + local_world_size)):
            raise PlanError(
                f"{sharding_type} needs the ranks of a host together and in order (hosts of "
                f"{local_world_size}), not {host}"
            )


def _even_width(sharding_type: str, columns: int, parts: int) -> int:
    if not parts or columns % parts or (columns // parts) % COLUMN_MULTIPLE:
        fitting = [
            n
            for n in range(1, columns // COLUMN_MULTIPLE + 1)
            if not columns % (n * COLUMN_MULTIPLE)
        ]
        raise PlanError(
            f"{sharding_type} cannot cut {columns} columns into {parts} equal parts whose width is "
            f"a multiple of {COLUMN_MULTIPLE}; use {_or(fitting)}"
        )
    return columns // parts


def _or(values: Iterable[Any]) -> str:
    names = [str(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True)
class PlanFile:
    """A checked plan: table name → placement. Table names are unique across collections."""

    world_size: int
    local_world_size: int
    device: str
    """'cpu' or 'cuda', for which the plan was made."""
    tables: Mapping[str, TablePlacement]
    source: str = field(default="the sharding plan", compare=False)
    """What messages call the plan: its file."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.local_world_size < 1:
            raise PlanError(f"{self.source}: world_size and local_world_size must be at least 1")
        if self.world_size % self.local_world_size:
            raise PlanError(
                f"{self.source}: {self.world_size} ranks do not divide into hosts of "
                f"{self.local_world_size}; correct world_size or local_world_size"
            )
        for name, table in self.tables.items():
            try:
                _check_placement(table, self.world_size, self.local_world_size)
            except PlanError as error:
                raise PlanError(f"{self.source}: table {name!r}: {error}") from None

    @classmethod
    def from_sharding_plan(
        cls,
        plan: ShardingPlan,
        tables: Iterable[EmbeddingBagConfig],
        *,
        world_size: int,
        local_world_size: int,
        device: str,
    ) -> PlanFile:
        """The plan of TorchRec's planner as data.

        Args:
            plan: what `EmbeddingShardingPlanner.plan` returned.
            tables: the configurations of the tables in the plan (`embedding_tables(module)`).
        """
        configs = {config.name: config for config in tables}
        placements: dict[str, TablePlacement] = {}
        for module_plan in plan.plan.values():
            assert isinstance(module_plan, EmbeddingModuleShardingPlan)
            for name, parameter in module_plan.items():
                placements[name] = _placement_of(parameter, configs[name], world_size)
        return cls(
            world_size=world_size,
            local_world_size=local_world_size,
            device=device,
            tables={name: placements[name] for name in configs if name in placements},
        )

    def to_sharding_plan(
        self,
        module: nn.Module,
        *,
        world_size: int,
        local_world_size: int,
        device: str | None = None,
    ) -> ShardingPlan:
        """TorchRec's plan for the EmbeddingBagCollections inside `module`, for
        DistributedModelParallel.

        Args:
            module: one or more EmbeddingBagCollections anywhere in it.
            world_size, local_world_size: of the run that will use the plan.
            device: 'cpu' or 'cuda' where it runs; None: the plan's own.

        Raises:
            PlanError: the plan is for other tables, rows, dimensions or ranks, or uses grid_shard
                for a table with mean pooling, which TorchRec pools wrongly.
        """
        self._check_run(world_size, local_world_size)
        self._check_tables(embedding_tables(module).values())
        run_device = device or self.device
        plans = {
            path: EmbeddingModuleShardingPlan(
                {
                    config.name: _parameter_sharding(
                        self.tables[config.name], run_device, local_world_size
                    )
                    for config in collection.embedding_bag_configs()
                }
            )
            for path, collection in _collections(module)
        }
        return ShardingPlan(plan=dict(plans))

    def _check_run(self, world_size: int, local_world_size: int) -> None:
        if world_size != self.world_size:
            raise PlanError(
                f"{self.source} is for {self.world_size} ranks and this run has {world_size}; "
                f"start {self.world_size} ranks or make a plan for {world_size}"
            )
        host_bound = (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
        bound = [n for n, table in self.tables.items() if table.sharding_type in host_bound]
        if bound and local_world_size != self.local_world_size:
            raise PlanError(
                f"{self.source} is for hosts of {self.local_world_size} ranks, on which table "
                f"{bound[0]!r} ({self.tables[bound[0]].sharding_type}) depends, and this run has "
                f"{local_world_size} a host; make a plan for such hosts"
            )

    def _check_tables(self, configs: Iterable[EmbeddingBagConfig]) -> None:
        configs = list(configs)
        missing = [config.name for config in configs if config.name not in self.tables]
        if missing:
            raise PlanError(
                f"{self.source} has no table {missing[0]!r}"
                + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
                + ", which the model has; make a plan for this model's tables"
            )
        names = {config.name for config in configs}
        unknown = [name for name in self.tables if name not in names]
        if unknown:
            raise PlanError(
                f"{self.source} places table {unknown[0]!r}"
                + (f" (and {len(unknown) - 1} others)" if len(unknown) > 1 else "")
                + ", which the model does not have; remove it or make a plan for this model"
            )
        for config in configs:
            table = self.tables[config.name]
            have = (config.num_embeddings, config.embedding_dim)
            planned = (table.num_embeddings, table.embedding_dim)
            if have != planned:
                raise PlanError(
                    f"{self.source}: table {config.name!r} is {planned[0]} x {planned[1]} in the "
                    f"plan and {have[0]} x {have[1]} in the model; make a plan for this model"
                )
            if (
                table.sharding_type == ShardingType.GRID_SHARD.value
                and config.pooling == PoolingType.MEAN
            ):
                raise PlanError(
                    f"{self.source}: table {config.name!r} has mean pooling, which TorchRec's "
                    f"grid_shard computes wrongly; place it table_row_wise or column_wise"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of the file."""
        return {
            "format_version": FORMAT_VERSION,
            "world_size": self.world_size,
            "local_world_size": self.local_world_size,
            "device": self.device,
            "tables": {name: self._table_to_dict(table) for name, table in self.tables.items()},
        }

    def _table_to_dict(self, table: TablePlacement) -> dict[str, Any]:
        values: dict[str, Any] = {
            "num_embeddings": table.num_embeddings,
            "embedding_dim": table.embedding_dim,
            "sharding_type": table.sharding_type,
            "compute_kernel": table.compute_kernel,
            "ranks": list(table.ranks),
        }
        if table.data_type != "float32":
            values["data_type"] = table.data_type
        if table.cache_load_factor is not None:
            values["cache_load_factor"] = table.cache_load_factor
        if table.shards != self._derived(table):
            values["shards"] = [
                {"rank": shard.rank, "offset": list(shard.offset), "size": list(shard.size)}
                for shard in table.shards
            ]
        return values

    def _derived(self, table: TablePlacement) -> tuple[Shard, ...] | None:
        try:
            return derive_shards(
                table.sharding_type,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                ranks=table.ranks,
                world_size=self.world_size,
                local_world_size=self.local_world_size,
            )
        except PlanError:
            return None


def embedding_tables(module: nn.Module) -> dict[str, EmbeddingBagConfig]:
    """Name → configuration of the tables of all EmbeddingBagCollections inside `module`.

    Raises:
        PlanError: two collections have a table of the same name, or there is no collection.
    """
    tables: dict[str, EmbeddingBagConfig] = {}
    for path, collection in _collections(module):
        for config in collection.embedding_bag_configs():
            if config.name in tables:
                raise PlanError(
                    f"table {config.name!r} of collection {path!r} is also in another collection; "
                    "give each table its own name"
                )
            tables[config.name] = config
    if not tables:
        raise PlanError("the model has no EmbeddingBagCollection, so there is nothing to shard")
    return tables


def _collections(module: nn.Module) -> Iterator[tuple[str, EmbeddingBagCollection]]:
    for path, child in module.named_modules():
        if isinstance(child, EmbeddingBagCollection):
            yield path, child


def _data_type_name(data_type: DataType) -> str:
    return next(name for name, (known, _) in DATA_TYPES.items() if known == data_type)


def _placement_of(
    parameter: ParameterSharding, config: EmbeddingBagConfig, world_size: int
) -> TablePlacement:
    whole = (config.num_embeddings, config.embedding_dim)
    if parameter.sharding_spec is None:
        shards = tuple(Shard(rank, (0, 0), whole) for rank in range(world_size))
    else:
        assert isinstance(parameter.sharding_spec, EnumerableShardingSpec)
        assert parameter.ranks is not None
        shards = tuple(
            Shard(
                rank,
                (shard.shard_offsets[0], shard.shard_offsets[1]),
                (shard.shard_sizes[0], shard.shard_sizes[1]),
            )
            for rank, shard in zip(parameter.ranks, parameter.sharding_spec.shards, strict=True)
        )
    caching = parameter.compute_kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value
    cache = parameter.cache_params if caching else None
    return TablePlacement(
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        sharding_type=parameter.sharding_type,
        compute_kernel=parameter.compute_kernel,
        ranks=tuple(shard.rank for shard in shards),
        shards=shards,
        data_type=_data_type_name(config.data_type),
        cache_load_factor=cache.load_factor if cache else None,
    )


def _parameter_sharding(
    table: TablePlacement, device: str, local_world_size: int
) -> ParameterSharding:
    return ParameterSharding(
        sharding_type=table.sharding_type,
        compute_kernel=table.compute_kernel,
        ranks=list(table.ranks),
        sharding_spec=(
            None
            if table.sharding_type == ShardingType.DATA_PARALLEL.value
            else EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_offsets=list(shard.offset),
                        shard_sizes=list(shard.size),
                        placement=placement(device, shard.rank, local_world_size),
                    )
                    for shard in table.shards
                ]
            )
        ),
        cache_params=(
            None
            if table.cache_load_factor is None
            else CacheParams(load_factor=table.cache_load_factor)
        ),
    )


def _check_type_and_ranks(sharding_type: str, ranks: Iterable[int], world_size: int) -> None:
    if sharding_type not in SHARDING_TYPES:
        raise PlanError(f"there is no sharding type {sharding_type!r}; use {_or(SHARDING_TYPES)}")
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank} does not exist; the plan has ranks 0 to {world_size - 1}")


def _check_placement(table: TablePlacement, world_size: int, local_world_size: int) -> None:
    all_ranks = (*table.ranks, *(shard.rank for shard in table.shards))
    _check_type_and_ranks(table.sharding_type, all_ranks, world_size)
    if table.compute_kernel not in COMPUTE_KERNELS:
        raise PlanError(
            f"there is no compute kernel {table.compute_kernel!r}; use {_or(COMPUTE_KERNELS)}"
        )
    if table.data_type not in DATA_TYPES:
        raise PlanError(f"there is no data type {table.data_type!r}; use {_or(DATA_TYPES)}")
    if (
        table.sharding_type == ShardingType.DATA_PARALLEL.value
        and table.compute_kernel != EmbeddingComputeKernel.DENSE.value
    ):
        raise PlanError(
            f"data_parallel runs with the kernel 'dense' only, not {table.compute_kernel!r}"
        )
    if table.cache_load_factor is not None and not 0 < table.cache_load_factor <= 1:
        raise PlanError(f"cache_load_factor {table.cache_load_factor} is not above 0 and at most 1")
    if [shard.rank for shard in table.shards] != list(table.ranks):
        raise PlanError(
            "'ranks' and the ranks of 'shards' differ; change both or leave 'shards' out"
        )
    if table.sharding_type != ShardingType.DATA_PARALLEL.value:
        _check_cover(table)
    if table.sharding_type in (
        ShardingType.COLUMN_WISE.value,
        ShardingType.TABLE_COLUMN_WISE.value,
    ):
        narrow = [shard for shard in table.shards if shard.size[1] % COLUMN_MULTIPLE]
        if narrow:
            raise PlanError(
                f"a shard of {narrow[0].size[1]} columns cannot be trained; widths must be "
                f"multiples of {COLUMN_MULTIPLE}"
            )
        if any(shard.size[0] != table.num_embeddings for shard in table.shards):
            raise PlanError(f"{table.sharding_type} cuts columns only; each shard needs all rows")
        return
    expected = derive_shards(
        table.sharding_type,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        ranks=table.ranks,
        world_size=world_size,
        local_world_size=local_world_size,
    )
    if expected != table.shards:
        raise PlanError(
            f"the shards are not the equal blocks that {table.sharding_type} needs (TorchRec finds "
            "a row's rank by division); leave 'shards' out"
        )


def _check_cover(table: TablePlacement) -> None:
    """Refuses shards that leave a part of the table out or hold a part twice."""
    blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for shard in table.shards:
        columns = (shard.offset[1], shard.offset[1] + shard.size[1])
        blocks.setdefault(columns, []).append((shard.offset[0], shard.offset[0] + shard.size[0]))
    _check_contiguous("columns", sorted(blocks), table.embedding_dim)
    for rows in blocks.values():
        _check_contiguous("rows", sorted(rows), table.num_embeddings)


def _check_contiguous(what: str, spans: Sequence[tuple[int, int]], end: int) -> None:
    reached = 0
    for start, stop in [*spans, (end, end)]:
        if start > reached:
            raise PlanError(
                f"the shards do not cover it: {what} {reached} to {start - 1} are missing"
            )
        if start < reached:
            raise PlanError(
                f"the shards hold {what} {start} to {reached - 1} twice or go past the end"
            )
        reached = max(reached, stop)
    if reached > end:
        raise PlanError(f"the shards go past its {end} {what}")


def write_plan(
    plan: ShardingPlan | PlanFile,
    path: Path | str,
    *,
    tables: Iterable[EmbeddingBagConfig] = (),
    world_size: int = 1,
    local_world_size: int | None = None,
    device: str = "cpu",
) -> PlanFile:
    """Writes a plan as JSON and returns what was written.

    Args:
        plan: TorchRec's plan, described by the other arguments, or a PlanFile, which needs none.
        tables: the configurations of the planned tables (`embedding_tables(module).values()`).
        local_world_size: ranks a host; None: all on one.
    """
    if not isinstance(plan, PlanFile):
        plan = PlanFile.from_sharding_plan(
            plan,
            tables,
            world_size=world_size,
            local_world_size=local_world_size or world_size,
            device=device,
        )
    Path(path).write_text(_to_json(plan.to_dict()), encoding="utf-8")
    return plan


def _to_json(values: dict[str, Any]) -> str:
    """JSON with one field a line and lists kept on it, made for an editor."""

    def table(fields: dict[str, Any]) -> str:
        lines = []
        for key, value in fields.items():
            if key == "shards":
                shards = ",\n".join(f"        {json.dumps(shard)}" for shard in value)
                lines.append(f'      "shards": [\n{shards}\n      ]')
            else:
                lines.append(f"      {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n    }"

    head = [
        f"  {json.dumps(key)}: {json.dumps(value)}"
        for key, value in values.items()
        if key != "tables"
    ]
    body = ",\n".join(
        f"    {json.dumps(name)}: {table(fields)}" for name, fields in values["tables"].items()
    )
    return "{\n" + ",\n".join(head) + ',\n  "tables": {\n' + body + "\n  }\n}\n"


def read_plan(path: Path | str) -> PlanFile:
    """Reads and checks a plan.

    Raises:
        PlanError: the file is not JSON, lacks a field or has one too many, or says something
            that cannot be; the sentence names the file and the table.
    """
    source = str(path)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"{source} line {error.lineno} column {error.colno} is not JSON: {error.msg.lower()}"
        ) from None
    except UnicodeDecodeError:
        raise PlanError(f"{source} is not UTF-8 text, so it is no plan") from None
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from None
    try:
        return _plan_of(values, source)
    except _FieldError as error:
        raise PlanError(f"{source}: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{twice!r} occurs twice; remove one")
    return values


class _FieldError(Exception):
    """What is wrong with a field, without the file."""


def _fields(
    values: Any, where: str, required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise _FieldError(f"{where} must be an object")
    required = list(required)
    for name in required:
        if name not in values:
            raise _FieldError(f"{where} lacks {name!r}")
    known = [*required, *optional]
    for name in values:
        if name not in known:
            raise _FieldError(f"{where} has the unknown field {name!r}; use {_or(known)}")
    return values


def _integer(value: Any, where: str, minimum: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise _FieldError(f"{where} must be a whole number of at least {minimum}, not {value!r}")
    return value


def _integers(value: Any, where: str, length: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise _FieldError(f"{where} must be a list of {length or 'whole'} numbers, not {value!r}")
    return tuple(_integer(item, f"each number of {where}") for item in value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _FieldError(f"{where} must be a text, not {value!r}")
    return value


def _plan_of(values: Any, source: str) -> PlanFile:
    fields = _fields(
        values,
        "the plan",
        ["format_version", "world_size", "local_world_size", "device", "tables"],
    )
    if fields["format_version"] != FORMAT_VERSION:
        raise _FieldError(
            f"format_version is {fields['format_version']!r} and this program reads "
            f"{FORMAT_VERSION}; make the plan again"
        )
    world_size = _integer(fields["world_size"], "world_size", 1)
    local_world_size = _integer(fields["local_world_size"], "local_world_size", 1)
    device = _text(fields["device"], "device")
    if device not in ("cpu", "cuda"):
        raise _FieldError(f"device must be 'cpu' or 'cuda', not {device!r}")
    if not isinstance(fields["tables"], dict) or not fields["tables"]:
        raise _FieldError("'tables' must be an object with at least one table")
    return PlanFile(
        world_size=world_size,
        local_world_size=local_world_size,
        device=device,
        tables={
            name: _table_of(name, table, world_size, local_world_size)
            for name, table in fields["tables"].items()
        },
        source=source,
    )


def _table_of(name: str, values: Any, world_size: int, local_world_size: int) -> TablePlacement:
    where = f"table {name!r}"
    fields = _fields(
        values,
        where,
        ["num_embeddings", "embedding_dim", "sharding_type", "compute_kernel"],
        ["ranks", "shards", "data_type", "cache_load_factor"],
    )
    rows = _integer(fields["num_embeddings"], f"{where}: num_embeddings", 1)
    dim = _integer(fields["embedding_dim"], f"{where}: embedding_dim", 1)
    sharding_type = _text(fields["sharding_type"], f"{where}: sharding_type")
    shards = None
    if "shards" in fields:
        if not isinstance(fields["shards"], list) or not fields["shards"]:
            raise _FieldError(f"{where}: 'shards' must be a list; leave it out to derive it")
        shards = tuple(_shard_of(shard, where) for shard in fields["shards"])
    if "ranks" in fields:
        ranks = _integers(fields["ranks"], f"{where}: ranks")
    elif shards is not None:
        ranks = tuple(shard.rank for shard in shards)
    elif sharding_type in (ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value):
        ranks = tuple(range(world_size))
    else:
        raise _FieldError(f"{where} lacks 'ranks', which {sharding_type} needs")
    if shards is None:
        try:
            _check_type_and_ranks(sharding_type, ranks, world_size)
            shards = derive_shards(
                sharding_type,
                num_embeddings=rows,
                embedding_dim=dim,
                ranks=ranks,
                world_size=world_size,
                local_world_size=local_world_size,
            )
        except PlanError as error:
            raise _FieldError(f"{where}: {error}") from None
    factor = fields.get("cache_load_factor")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float)):
        raise _FieldError(f"{where}: cache_load_factor must be a number, not {factor!r}")
    return TablePlacement(
        num_embeddings=rows,
        embedding_dim=dim,
        sharding_type=sharding_type,
        compute_kernel=_text(fields["compute_kernel"], f"{where}: compute_kernel"),
        ranks=ranks,
        shards=shards,
        data_type=_text(fields.get("data_type", "float32"), f"{where}: data_type"),
        cache_load_factor=factor,
    )


def _shard_of(values: Any, where: str) -> Shard:
    fields = _fields(values, f"a shard of {where}", ["rank", "offset", "size"])
    row, column = _integers(fields["offset"], f"{where}: offset", 2)
    rows, columns = _integers(fields["size"], f"{where}: size", 2)
    return Shard(_integer(fields["rank"], f"{where}: rank"), (row, column), (rows, columns))


def plan_warnings(plan: PlanFile, *, optimizer: str) -> list[str]:
    """What trains, but otherwise than on one rank; one sentence each.

    Args:
        optimizer: of the embeddings, in the spelling of `--sparse-optimizer`.
    """
    if optimizer != "rowwise_adagrad":
        return []
    cut = (
        ShardingType.COLUMN_WISE.value,
        ShardingType.TABLE_COLUMN_WISE.value,
        ShardingType.GRID_SHARD.value,
    )
    return [
        f"table {name!r} is cut into columns ({table.sharding_type}) and rowwise_adagrad keeps one "
        "momentum per row and shard, so it trains otherwise than uncut; that is by design, and "
        "adagrad or table_wise avoid it"
        for name, table in plan.tables.items()
        if table.sharding_type in cut and len({shard.offset[1] for shard in table.shards}) > 1
    ]


def format_plan(plan: PlanFile) -> str:
    """The plan as a table for a person: one line a table, and a line of totals a rank."""
    lines = [("table", "rows", "dim", "MB", "sharding", "kernel", "ranks")]
    held = [0] * plan.world_size
    for name, table in plan.tables.items():
        lines.append(
            (
                name,
                f"{table.num_embeddings:,}",
                str(table.embedding_dim),
                f"{table.nbytes / 1e6:,.1f}",
                table.sharding_type,
                table.compute_kernel,
                format_ranks(table.ranks),
            )
        )
        for shard in table.shards:
            held[shard.rank] += shard.size[0] * shard.size[1] * DATA_TYPES[table.data_type][1]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = {1, 2, 3}
    text = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    ranks = f"{plan.world_size} ranks" if plan.world_size > 1 else "1 rank"
    text.append(
        f"{len(plan.tables)} tables on {ranks} ({plan.device}); weights a rank: "
        f"{min(held) / 1e6:,.1f} to {max(held) / 1e6:,.1f} MB"
    )
    return "\n".join(text)


def format_ranks(ranks: Sequence[int]) -> str:
    """Ranks with runs written short: 0-7, 3 or 0,4,2."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def compare_plans(first: PlanFile, second: PlanFile) -> str:
    """The differences of two plans, a line each; says so where there are none."""
    lines = [
        f"{what}: {getattr(first, what)} -> {getattr(second, what)}"
        for what in ("world_size", "local_world_size", "device")
        if getattr(first, what) != getattr(second, what)
    ]
    for name in first.tables:
        if name not in second.tables:
            lines.append(f"table {name!r}: only in the first")
    for name, after in second.tables.items():
        before = first.tables.get(name)
        if before is None:
            lines.append(f"table {name!r}: only in the second")
        elif before != after:
            lines.append(f"table {name!r}: {_describe(before, after)}")
    return "\n".join(lines) or "the plans are the same"


def _describe(before: TablePlacement, after: TablePlacement) -> str:
    changes = []
    if (before.num_embeddings, before.embedding_dim) != (after.num_embeddings, after.embedding_dim):
        changes.append(
            f"{before.num_embeddings:,} x {before.embedding_dim} -> "
            f"{after.num_embeddings:,} x {after.embedding_dim}"
        )
    for what in ("data_type", "sharding_type", "compute_kernel", "cache_load_factor"):
        old, new = getattr(before, what), getattr(after, what)
        if old != new:
            changes.append(
                f"{old} -> {new}" if what != "cache_load_factor" else f"{what} {old} -> {new}"
            )
    if before.ranks != after.ranks:
        changes.append(f"ranks {format_ranks(before.ranks)} -> {format_ranks(after.ranks)}")
    return ", ".join(changes) or "cut at other places"
