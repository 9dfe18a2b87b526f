"""A sharding plan as data: which rank holds which part of each table. TorchRec's ShardingPlan lives
only in memory; a `PlanFile` can also be checked, saved (`plan_json`) and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
from esmm_torchrec.sharding.search import embedding_bag_collections_of
from esmm_torchrec.sharding.table_placement import (
    DATA_TYPES,
    Shard,
    TablePlacement,
    completed,
)


@dataclass(frozen=True)
class PlanFile:
    """A checked plan: table name → placement. Table names are unique across collections."""

    world_size: int
    local_world_size: int
    device: str
    """Device that the plan was made for: 'cpu' or 'cuda'."""
    tables: Mapping[str, TablePlacement]
    source: str = field(default="the sharding plan", compare=False)
    """Name of the plan in messages: its file."""

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise PlanError(f"{self.source}: device must be 'cpu' or 'cuda', not {self.device!r}")
        if self.world_size % self.local_world_size:
            raise PlanError(
                f"{self.source}: {self.world_size} ranks do not divide into hosts of "
                f"{self.local_world_size}; correct world_size or local_world_size"
            )
        tables: dict[str, TablePlacement] = {}
        for name, table in self.tables.items():
            try:
                tables[name] = completed(
                    table, world_size=self.world_size, local_world_size=self.local_world_size
                )
            except PlanError as error:
                raise PlanError(f"{self.source}: table {name!r}: {error}") from None
        object.__setattr__(self, "tables", tables)

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
        """Converts a plan made by TorchRec's planner.

        Args:
            plan: the result of `EmbeddingShardingPlanner.plan`.
            tables: configurations of the tables in the plan (`embedding_tables(module)`).
        """
        configs = {config.name: config for config in tables}
        placements: dict[str, TablePlacement] = {}
        for module_plan in plan.plan.values():
            assert isinstance(module_plan, EmbeddingModuleShardingPlan)
            for name, parameter in module_plan.items():
                placements[name] = _placement_of(parameter, configs[name])
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
        """Returns TorchRec's plan for the EmbeddingBagCollections inside `module`, which
        DistributedModelParallel takes.

        Args:
            module: a module with one or more EmbeddingBagCollections at any depth.
            world_size, local_world_size: numbers of ranks of the run that will use the plan.
            device: device of that run, 'cpu' or 'cuda'; None: the plan's own.

        Raises:
            PlanError: the plan is for other tables, rows, dimensions, types or ranks, uses
                grid_shard for a table with mean pooling, which TorchRec pools wrongly, or leaves a
                CPU rank without a row of a divided table.
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
                f"{local_world_size} per host; make a plan for such hosts"
            )

    def _check_rows(self) -> None:
        for name, table in self.tables.items():
            empty = [shard.rank for shard in table.shards if shard.size[0] == 0]
            if empty:
                raise PlanError(
                    f"{self.source}: table {name!r} has too few rows ({table.num_embeddings}) for "
                    f"{table.sharding_type}: rank {empty[0]} gets none, and with such a rank "
                    "fbgemm's kernels for a CPU sometimes fail; place it table_wise"
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


def embedding_tables(module: nn.Module) -> dict[str, EmbeddingBagConfig]:
    """Returns name → configuration of the tables of all EmbeddingBagCollections inside `module`.

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


def _placement_of(parameter: ParameterSharding, config: EmbeddingBagConfig) -> TablePlacement:
    shards: tuple[Shard, ...] = ()
    if parameter.sharding_spec is not None:  # None under data_parallel
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
