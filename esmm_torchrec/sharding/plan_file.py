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
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from torchrec.types import DataType

from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.planner import embedding_bag_collections_of
from esmm_torchrec.sharding.table_placement import (
    DATA_TYPES,
    Shard,
    TablePlacement,
    check_placement,
    check_type_and_ranks,
    derive_shards,
    either,
)

FORMAT_VERSION = 1


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
                check_placement(table, self.world_size, self.local_world_size)
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
            PlanError: the plan is for other tables, rows, dimensions, types or ranks, uses
                grid_shard for a table with mean pooling, which TorchRec pools wrongly, or leaves a
                CPU rank without a row of a table that is divided.
        """
        self._check_run(world_size, local_world_size)
        self._check_tables(embedding_tables(module).values())
        run_device = device or self.device
        if run_device == "cpu":
            self._check_rows()
        plans = {
            path: EmbeddingModuleShardingPlan(
                {
                    config.name: _parameter_sharding(
                        self.tables[config.name], run_device, local_world_size
                    )
                    for config in collection.embedding_bag_configs()
                }
            )
            for path, collection in embedding_bag_collections_of(module).items()
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

    def _check_rows(self) -> None:
        for name, table in self.tables.items():
            empty = [shard.rank for shard in table.shards if shard.size[0] == 0]
            if empty:
                raise PlanError(
                    f"{self.source}: table {name!r} has too few rows ({table.num_embeddings}) for "
                    f"{table.sharding_type}: rank {empty[0]} gets none, and with such a rank "
                    "fbgemm's kernels for a CPU fail now and then; place it table_wise"
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
            if DATA_TYPES[table.data_type][0] != config.data_type:
                raise PlanError(
                    f"{self.source}: table {config.name!r} is {table.data_type} in the plan and "
                    f"{_data_type_name(config.data_type)} in the model; give both one data type"
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
    for path, collection in embedding_bag_collections_of(module).items():
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


def _data_type_name(data_type: DataType) -> str:
    names = (name for name, (known, _) in DATA_TYPES.items() if known == data_type)
    return next(names, data_type.value)


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


def write_plan(
    plan: ShardingPlan | PlanFile,
    path: Path | str,
    *,
    tables: Iterable[EmbeddingBagConfig] = (),
    world_size: int = 1,
    local_world_size: int | None = None,
    device: str = "cpu",
) -> PlanFile:
    """Writes a plan as JSON and returns what was written. Another plan at `path` is replaced at
    once: a reader sees the one or the other.

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
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(_to_json(plan.to_dict()))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
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
            f"{source} line {error.lineno} column {error.colno} is not JSON: {error.msg.lower()}; "
            "correct it or make a new plan"
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
            raise _FieldError(f"{where} has the unknown field {name!r}; use {either(known)}")
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
            check_type_and_ranks(sharding_type, ranks, world_size)
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
