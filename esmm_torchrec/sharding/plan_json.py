"""A plan as JSON, made to be edited::

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

`shards` (a list of `{"rank", "offset": [row, column], "size": [rows, columns]}`) may be given
beside `ranks`; it is written only if it does not follow from the sharding type and the ranks, so
that a table is moved by changing one number. `ranks` itself may be left out for row_wise and
data_parallel, which use every rank. `data_type` (float32 by default) and `cache_load_factor` are
optional.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from esmm_torchrec.durable import replace_file
from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.forms import Form, NonNegativeInt, PositiveInt, checked
from esmm_torchrec.sharding.plan_file import PlanFile
from esmm_torchrec.sharding.table_placement import (
    Shard,
    TablePlacement,
    check_type_and_ranks,
    derive_shards,
)

FORMAT_VERSION = 1

_LIST_OF_NUMBERS = re.compile(r"\[\s+([-0-9,\s]*?)\s+\]")


class _ShardForm(Form):
    rank: NonNegativeInt
    offset: tuple[NonNegativeInt, NonNegativeInt]
    size: tuple[NonNegativeInt, NonNegativeInt]


class _TableForm(Form):
    num_embeddings: PositiveInt
    embedding_dim: PositiveInt
    sharding_type: str
    compute_kernel: str
    ranks: tuple[NonNegativeInt, ...] | None = None
    data_type: str = "float32"
    cache_load_factor: float | None = None
    shards: tuple[_ShardForm, ...] | None = None


class _PlanForm(Form):
    format_version: int
    world_size: PositiveInt
    local_world_size: PositiveInt
    device: str
    tables: dict[str, Any]
    """Each a `_TableForm`, checked one by one so that messages name the table."""


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
        path: of the file.
        tables: the configurations of the planned tables (`embedding_tables(module).values()`).
        world_size: number of ranks.
        local_world_size: ranks per host; None: all on one.
        device: "cpu" or "cuda".
    """
    if not isinstance(plan, PlanFile):
        plan = PlanFile.from_sharding_plan(
            plan,
            tables,
            world_size=world_size,
            local_world_size=local_world_size or world_size,
            device=device,
        )
    text = json.dumps(plan_to_dict(plan), indent=2)
    text = _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    replace_file(Path(path), f"{text}\n".encode())
    return plan


def plan_to_dict(plan: PlanFile) -> dict[str, Any]:
    """Plain values in the form of the file."""
    form = _PlanForm(
        format_version=FORMAT_VERSION,
        world_size=plan.world_size,
        local_world_size=plan.local_world_size,
        device=plan.device,
        tables={
            name: _TableForm(
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                sharding_type=table.sharding_type,
                compute_kernel=table.compute_kernel,
                ranks=table.ranks,
                data_type=table.data_type,
                cache_load_factor=table.cache_load_factor,
                shards=None
                if _follows(table, plan)
                else tuple(
                    _ShardForm(rank=shard.rank, offset=shard.offset, size=shard.size)
                    for shard in table.shards
                ),
            )
            for name, table in plan.tables.items()
        },
    )
    return msgspec.to_builtins(form)


def _follows(table: TablePlacement, plan: PlanFile) -> bool:
    """Whether the shards are those that the sharding type and the ranks give."""
    try:
        return table.shards == _derived(table, table.ranks, plan)
    except PlanError:
        return False


def _derived(
    table: TablePlacement | _TableForm, ranks: tuple[int, ...], plan: PlanFile | _PlanForm
) -> tuple[Shard, ...]:
    check_type_and_ranks(table.sharding_type, ranks, plan.world_size)
    return derive_shards(
        table.sharding_type,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        ranks=ranks,
        world_size=plan.world_size,
        local_world_size=plan.local_world_size,
    )


def read_plan(path: Path | str) -> PlanFile:
    """Reads and checks a plan.

    Raises:
        PlanError: the file is not JSON, lacks a field or has one too many, or describes a plan
            that is impossible; the sentence names the file and the table.
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
        raise PlanError(f"{source} is not UTF-8 text, so it is not a plan") from None
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from None
    form = checked(values, _PlanForm, source)
    if form.format_version != FORMAT_VERSION:
        raise PlanError(
            f"{source}: format_version is {form.format_version} and this program reads "
            f"{FORMAT_VERSION}; make the plan again"
        )
    if not form.tables:
        raise PlanError(f"{source}: 'tables' must be an object with at least one table")
    if form.world_size % form.local_world_size:
        tables = {}  # PlanFile says so.
    else:
        tables = {name: _table(name, of, form, source) for name, of in form.tables.items()}
    return PlanFile(
        world_size=form.world_size,
        local_world_size=form.local_world_size,
        device=form.device,
        tables=tables,
        source=source,
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{twice!r} occurs twice; remove one")
    return values


def _table(name: str, values: Any, plan: _PlanForm, source: str) -> TablePlacement:
    where = f"{source}: table {name!r}"
    form = checked(values, _TableForm, where)
    shards = None
    if form.shards is not None:
        shards = tuple(Shard(shard.rank, shard.offset, shard.size) for shard in form.shards)
    if form.ranks is not None:
        ranks = form.ranks
    elif shards is not None:
        ranks = tuple(shard.rank for shard in shards)
    elif form.sharding_type in (ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value):
        ranks = tuple(range(plan.world_size))
    else:
        raise PlanError(f"{where} lacks 'ranks', which {form.sharding_type} needs")
    try:
        shards = _derived(form, ranks, plan) if shards is None else shards
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None
    return TablePlacement(
        num_embeddings=form.num_embeddings,
        embedding_dim=form.embedding_dim,
        sharding_type=form.sharding_type,
        compute_kernel=form.compute_kernel,
        ranks=ranks,
        shards=shards,
        data_type=form.data_type,
        cache_load_factor=form.cache_load_factor,
    )
