"""Sharding plans as JSON, in a form that users can edit::

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
in addition to `ranks`. It is written only if it does not follow from the sharding type and the
ranks, so that changing one number moves a table. `ranks` may be omitted for row_wise and
data_parallel, which use every rank. `data_type` (float32 by default) and `cache_load_factor` are
optional.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from esmm_torchrec.durable import replace_file
from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.forms import Form, PositiveInt, checked
from esmm_torchrec.sharding.plan_file import PlanFile
from esmm_torchrec.sharding.table_placement import TablePlacement, derive_shards

FORMAT_VERSION = 1

_LIST_OF_NUMBERS = re.compile(r"\[\s+([-0-9,\s]*?)\s+\]")


class _PlanForm(Form, frozen=True):
    format_version: int
    world_size: PositiveInt
    local_world_size: PositiveInt
    device: str
    tables: dict[str, Any]
    """Values of `TablePlacement`s, checked one by one so that messages name the table."""


def write_plan(plan: PlanFile, path: Path | str) -> None:
    """Writes a plan as JSON. A file at `path` is replaced atomically: a reader sees either the old
    plan or the new one."""
    text = json.dumps(plan_to_dict(plan), indent=2)
    text = _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    replace_file(Path(path), f"{text}\n".encode())


def plan_to_dict(plan: PlanFile) -> dict[str, Any]:
    """Returns the content of the plan's file as plain values."""
    form = _PlanForm(
        format_version=FORMAT_VERSION,
        world_size=plan.world_size,
        local_world_size=plan.local_world_size,
        device=plan.device,
        tables={
            name: replace(table, shards=()) if _follow(table, plan) else table
            for name, table in plan.tables.items()
        },
    )
    return msgspec.to_builtins(form)


def _follow(table: TablePlacement, plan: PlanFile) -> bool:
    """Whether the shards follow from the sharding type and the ranks."""
    try:
        return table.shards == derive_shards(table, plan.world_size, plan.local_world_size)
    except PlanError:
        return False


def read_plan(path: Path | str) -> PlanFile:
    """Reads and checks a plan.

    Raises:
        PlanError: the file is not JSON, has a missing or an unknown field, or describes an
            impossible plan; the sentence names the file and the table.
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
    tables = {
        name: checked(of, TablePlacement, f"{source}: table {name!r}")
        for name, of in form.tables.items()
    }
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
