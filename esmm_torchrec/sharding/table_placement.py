"""Placement of one table: its shards, and the checks that a placement must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ShardingType
from torchrec.types import DataType

from esmm_torchrec.errors import PlanError
from esmm_torchrec.models.embeddings import DIM_MULTIPLE
from esmm_torchrec.sharding.forms import Form, NonNegativeInt, PositiveInt, either

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
"""Kernels for training that this library configures."""

DATA_TYPES: dict[str, tuple[DataType, int]] = {
    "float32": (DataType.FP32, 4),
    "float16": (DataType.FP16, 2),
    "bfloat16": (DataType.BF16, 2),
}
"""Name → TorchRec's data type and the bytes per value."""

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
_ON_EVERY_RANK = (ShardingType.ROW_WISE.value, _DATA_PARALLEL)
_ON_WHOLE_HOSTS = (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)


class Shard(Form, frozen=True, kw_only=False):
    """A part of a table on one rank."""

    rank: NonNegativeInt
    offset: tuple[NonNegativeInt, NonNegativeInt]
    """First row and first column."""
    size: tuple[NonNegativeInt, NonNegativeInt]
    """Number of rows and of columns."""


class TablePlacement(Form, frozen=True):
    """Shards of one table and their ranks. `completed` checks a placement and fills in `ranks` and
    `shards` if a file omits them."""

    num_embeddings: PositiveInt
    embedding_dim: PositiveInt
    sharding_type: str
    compute_kernel: str
    ranks: Annotated[tuple[NonNegativeInt, ...], Meta(min_length=1)] = ()
    """Rank of each shard, in the order of `shards`."""
    data_type: str = "float32"
    cache_load_factor: float | None = None
    """Share of the rows in the cache of fused_uvm_caching; None: the kernel's default."""
    shards: Annotated[tuple[Shard, ...], Meta(min_length=1)] = ()
    """Parts of the table; under data_parallel, a whole copy per rank."""

    @property
    def nbytes(self) -> int:
        """Bytes of one copy of the weights, without optimiser state."""
        return self.num_embeddings * self.embedding_dim * DATA_TYPES[self.data_type][1]


def completed(table: TablePlacement, *, world_size: int, local_world_size: int) -> TablePlacement:
    """Checks a placement and returns it with its ranks and shards.

    Raises:
        PlanError: TorchRec does not support it, or computes it wrongly. The sentence does not name
            the table.
    """
    if table.sharding_type not in SHARDING_TYPES:
        raise PlanError(
            f"there is no sharding type {table.sharding_type!r}; use {either(SHARDING_TYPES)}"
        )
    if table.compute_kernel not in COMPUTE_KERNELS:
        raise PlanError(
            f"there is no compute kernel {table.compute_kernel!r}; use {either(COMPUTE_KERNELS)}"
        )
    if table.data_type not in DATA_TYPES:
        raise PlanError(f"there is no data type {table.data_type!r}; use {either(DATA_TYPES)}")
    if table.sharding_type == _DATA_PARALLEL and table.compute_kernel != "dense":
        raise PlanError(
            f"data_parallel runs with the kernel 'dense' only, not {table.compute_kernel!r}"
        )
    if table.cache_load_factor is not None and not 0 < table.cache_load_factor <= 1:
        raise PlanError(f"cache_load_factor {table.cache_load_factor} is not above 0 and at most 1")
    of_shards = tuple(shard.rank for shard in table.shards)
    ranks = table.ranks or of_shards
    if not ranks:
        if table.sharding_type not in _ON_EVERY_RANK:
            raise PlanError(f"it lacks 'ranks', which {table.sharding_type} needs")
        ranks = tuple(range(world_size))
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank} does not exist; the plan has ranks 0 to {world_size - 1}")
    table = replace(table, ranks=ranks)
    if not table.shards:
        return replace(table, shards=derive_shards(table, world_size, local_world_size))
    if of_shards != ranks:
        raise PlanError(
            "'ranks' and the ranks of 'shards' differ; change both or leave 'shards' out"
        )
    _check_shards(table, world_size, local_world_size)
    return table


def derive_shards(
    table: TablePlacement, world_size: int, local_world_size: int
) -> tuple[Shard, ...]:
    """Returns the shards that TorchRec's `sharding_plan` helpers make for a type and its ranks.

    Rows are divided into blocks of ceil(rows / parts), the last ones smaller or empty: TorchRec's
    input distribution sends an id to part `id // block`, whatever the plan specifies.

    Raises:
        PlanError: the ranks do not match the sharding type.
    """
    kind, ranks = table.sharding_type, table.ranks
    rows, columns = table.num_embeddings, table.embedding_dim
    _check_ranks(kind, ranks, world_size, local_world_size)
    if kind == _DATA_PARALLEL:
        return tuple(Shard(rank, (0, 0), (rows, columns)) for rank in ranks)
    row_parts = len(ranks) if kind == ShardingType.ROW_WISE.value else 1
    if kind in _ON_WHOLE_HOSTS:
        row_parts = local_world_size
    width = _even_width(kind, columns, len(ranks) // row_parts)
    height = math.ceil(rows / row_parts)
    shards: list[Shard] = []
    for part, rank in enumerate(ranks):
        column, row = divmod(part, row_parts)
        start = min(row * height, rows)
        size = (min(height, rows - start), width)
        shards.append(Shard(rank, (start, column * width), size))
    return tuple(shards)


def every_part_has_a_row(rows: int, parts: int) -> bool:
    """Whether no part is empty if rows are divided into blocks of ceil(rows / parts). fbgemm's CPU
    kernels read beyond their arrays, and sometimes fail, if the last of their tables has no row on
    a rank."""
    return rows > math.ceil(rows / parts) * (parts - 1)


def _check_ranks(kind: str, ranks: Sequence[int], world_size: int, local_world_size: int) -> None:
    if kind == ShardingType.TABLE_WISE.value and len(ranks) != 1:
        raise PlanError(f"table_wise needs exactly one rank, not {list(ranks)}")
    if kind in _ON_EVERY_RANK and list(ranks) != list(range(world_size)):
        raise PlanError(
            f"{kind} uses every rank in order, 0 to {world_size - 1}, not {list(ranks)}; leave "
            "'ranks' out"
        )
    if kind not in _ON_WHOLE_HOSTS:
        return
    if len(ranks) % local_world_size:
        raise PlanError(
            f"{kind} needs all {local_world_size} ranks of each host it uses, not {list(ranks)}"
        )
    for start in range(0, len(ranks), local_world_size):
        host = list(ranks[start : start + local_world_size])
        first = host[0]
        if first % local_world_size or host != list(range(first, first + local_world_size)):
            raise PlanError(
                f"{kind} needs the ranks of a host together and in order (hosts of "
                f"{local_world_size}), not {host}"
            )
    if kind == ShardingType.TABLE_ROW_WISE.value and len(ranks) != local_world_size:
        raise PlanError(
            f"table_row_wise needs the {local_world_size} ranks of one host, not {len(ranks)}"
        )


def _even_width(kind: str, columns: int, parts: int) -> int:
    if parts > 1 and columns % (parts * DIM_MULTIPLE):
        fitting = [
            n for n in range(1, columns // DIM_MULTIPLE + 1) if not columns % (n * DIM_MULTIPLE)
        ]
        raise PlanError(
            f"{kind} cannot cut {columns} columns into {parts} equal parts whose width is a "
            f"multiple of {DIM_MULTIPLE}; use {either(fitting or ['table_wise'])}"
        )
    return columns // parts


def _check_shards(table: TablePlacement, world_size: int, local_world_size: int) -> None:
    kind = table.sharding_type
    if kind != _DATA_PARALLEL:
        _check_cover(table)
    if kind in (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value):
        narrow = [shard for shard in table.shards if shard.size[1] % DIM_MULTIPLE]
        if narrow:
            raise PlanError(
                f"a shard of {narrow[0].size[1]} columns cannot be trained; widths must be "
                f"multiples of {DIM_MULTIPLE}"
            )
        if any(shard.size[0] != table.num_embeddings for shard in table.shards):
            raise PlanError(f"{kind} cuts columns only; each shard needs all rows")
    elif table.shards != derive_shards(table, world_size, local_world_size):
        raise PlanError(
            f"the shards are not the equal blocks that {kind} needs (TorchRec finds a row's rank "
            "by division); leave 'shards' out"
        )


def _check_cover(table: TablePlacement) -> None:
    """Raises PlanError if the shards do not cover the table or overlap."""
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
