"""How one table is cut and placed: its shards, and what makes a placement impossible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import (
    ShardingType,
)
from torchrec.types import DataType

from esmm_torchrec.errors import PlanError
from esmm_torchrec.models.embeddings import DIM_MULTIPLE

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


def every_part_has_a_row(rows: int, parts: int) -> bool:
    """Whether blocks of ceil(rows / parts) rows leave no part empty. fbgemm's kernels for a CPU
    read beyond their arrays where the last of the tables that they hold has no row on a rank, and
    then fail now and then."""
    return rows > math.ceil(rows / parts) * (parts - 1)


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
    if not parts or columns % parts or (columns // parts) % DIM_MULTIPLE:
        fitting = [
            n for n in range(1, columns // DIM_MULTIPLE + 1) if not columns % (n * DIM_MULTIPLE)
        ]
        raise PlanError(
            f"{sharding_type} cannot cut {columns} columns into {parts} equal parts whose width is "
            f"a multiple of {DIM_MULTIPLE}; use {either(fitting)}"
        )
    return columns // parts


def either(values: Iterable[Any]) -> str:
    """Values as a sentence offers them: "a, b or c"."""
    names = [str(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def check_type_and_ranks(sharding_type: str, ranks: Iterable[int], world_size: int) -> None:
    """Raises PlanError if there is no such sharding type or no such rank."""
    if sharding_type not in SHARDING_TYPES:
        raise PlanError(
            f"there is no sharding type {sharding_type!r}; use {either(SHARDING_TYPES)}"
        )
    for rank in ranks:
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank} does not exist; the plan has ranks 0 to {world_size - 1}")


def check_placement(table: TablePlacement, world_size: int, local_world_size: int) -> None:
    """Raises PlanError for what TorchRec does not have, or not rightly."""
    all_ranks = (*table.ranks, *(shard.rank for shard in table.shards))
    check_type_and_ranks(table.sharding_type, all_ranks, world_size)
    if table.compute_kernel not in COMPUTE_KERNELS:
        raise PlanError(
            f"there is no compute kernel {table.compute_kernel!r}; use {either(COMPUTE_KERNELS)}"
        )
    if table.data_type not in DATA_TYPES:
        raise PlanError(f"there is no data type {table.data_type!r}; use {either(DATA_TYPES)}")
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
        narrow = [shard for shard in table.shards if shard.size[1] % DIM_MULTIPLE]
        if narrow:
            raise PlanError(
                f"a shard of {narrow[0].size[1]} columns cannot be trained; widths must be "
                f"multiples of {DIM_MULTIPLE}"
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
