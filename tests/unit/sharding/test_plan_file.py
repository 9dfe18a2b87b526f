"""Plans as JSON: nothing lost between TorchRec and the file, and nothing wrong gets through."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.types import DataType

from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.plan_file import PlanFile, embedding_tables
from esmm_torchrec.sharding.plan_json import read_plan, write_plan
from esmm_torchrec.sharding.plan_text import compare_plans, format_plan, plan_warnings
from esmm_torchrec.sharding.sharders import sharders
from esmm_torchrec.sharding.table_placement import Shard, TablePlacement, derive_shards


def collection(
    *names: str, rows: int = 1001, dim: int = 64, weighted: bool = False
) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        device=torch.device("meta"),
        is_weighted=weighted,
        tables=[
            EmbeddingBagConfig(
                name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f_{name}"]
            )
            for name in names
        ],
    )


class TwoCollections(nn.Module):
    """Collections at different depths, as in a model with a weighted and an unweighted one."""

    def __init__(self) -> None:
        super().__init__()
        self.weighted = collection("history", rows=50, dim=128, weighted=True)
        self.deep = nn.ModuleDict({"inner": collection("item", "shop")})


def torchrec_plan(module: nn.Module, sharding_type: str) -> ShardingPlan:
    names = embedding_tables(module)
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            trainer_config=TrainerConfig(world_size=16, local_world_size=8),
            kernel_config=KernelConfig(compute_device="cuda"),
        ),
        constraints={
            name: ParameterConstraints(sharding_types=[sharding_type], min_partition=32)
            for name in names
        },
    )
    return planner.plan(module, sharders())


@pytest.mark.parametrize(
    "sharding_type",
    [
        "table_wise",
        "row_wise",
        "column_wise",
        "table_row_wise",
        "table_column_wise",
        "grid_shard",
        "data_parallel",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_planners_plan_survives_the_file(tmp_path: Path, sharding_type: str) -> None:
    module = TwoCollections()
    plan = torchrec_plan(module, sharding_type)
    written = PlanFile.from_sharding_plan(
        plan, embedding_tables(module).values(), world_size=16, local_world_size=8, device="cuda"
    )
    write_plan(written, tmp_path / "plan.json")
    read = read_plan(tmp_path / "plan.json")
    assert read == written
    assert "shards" not in (tmp_path / "plan.json").read_text()

    rebuilt = read.to_sharding_plan(module, world_size=16, local_world_size=8)
    assert rebuilt.plan.keys() == plan.plan.keys() == {"weighted", "deep.inner"}
    for path, tables in plan.plan.items():
        for name, parameter in tables.items():  # pyright: ignore[reportAttributeAccessIssue]
            again = rebuilt.plan[path][name]  # pyright: ignore[reportIndexIssue]
            assert again.sharding_type == parameter.sharding_type
            assert again.compute_kernel == parameter.compute_kernel
            assert again.ranks == parameter.ranks
            assert again.sharding_spec == parameter.sharding_spec


@pytest.mark.parametrize(
    ("sharding_type", "ranks", "torchrecs"),
    [
        ("table_wise", [3], table_wise(rank=3)),
        ("row_wise", list(range(4)), row_wise()),
        ("column_wise", [2, 0], column_wise(ranks=[2, 0])),
        ("column_wise", [1, 1, 3, 0], column_wise(ranks=[1, 1, 3, 0])),
        ("table_row_wise", [2, 3], table_row_wise(host_index=1)),
        ("data_parallel", list(range(4)), data_parallel()),
    ],
)
def test_shards_left_out_are_those_of_torchrecs_helpers(
    sharding_type: str, ranks: list[int], torchrecs: Any
) -> None:
    module = collection("item", rows=10, dim=32)
    expected = construct_module_sharding_plan(
        module, {"item": torchrecs}, local_size=2, world_size=4, device_type="cpu"
    )["item"]
    table = TablePlacement(
        num_embeddings=10,
        embedding_dim=32,
        sharding_type=sharding_type,
        compute_kernel="fused",
        ranks=tuple(ranks),
    )
    shards = derive_shards(table, world_size=4, local_world_size=2)
    assert [shard.rank for shard in shards] == expected.ranks
    if expected.sharding_spec is not None:
        metadata = expected.sharding_spec.shards  # pyright: ignore[reportAttributeAccessIssue]
        assert [list(shard.offset) for shard in shards] == [m.shard_offsets for m in metadata]
        assert [list(shard.size) for shard in shards] == [m.shard_sizes for m in metadata]


@given(
    rows=st.integers(1, 200),
    hosts=st.integers(1, 3),
    local=st.integers(1, 4),
    blocks=st.sampled_from([1, 2, 4]),
    sharding_type=st.sampled_from(["row_wise", "table_row_wise", "column_wise", "grid_shard"]),
)
def test_derived_shards_hold_every_cell_once(
    rows: int, hosts: int, local: int, blocks: int, sharding_type: str
) -> None:
    world = hosts * local
    ranks = {
        "row_wise": list(range(world)),
        "table_row_wise": list(range(world - local, world)),
        "column_wise": [block % world for block in range(blocks)],
        "grid_shard": [rank for block in range(blocks) for rank in _host(block % hosts, local)],
    }[sharding_type]
    table = TablePlacement(
        num_embeddings=rows,
        embedding_dim=16,
        sharding_type=sharding_type,
        compute_kernel="fused",
        ranks=tuple(ranks),
    )
    shards = derive_shards(table, world_size=world, local_world_size=local)
    held = torch.zeros(rows, 16, dtype=torch.int)
    for shard in shards:
        (row, column), (height, width) = shard.offset, shard.size
        held[row : row + height, column : column + width] += 1
    assert bool((held == 1).all())


def _host(index: int, local: int) -> list[int]:
    return list(range(index * local, (index + 1) * local))


def plan_values(**changes: Any) -> dict[str, Any]:
    """A right plan for item and shop on two ranks, with some fields of 'item' changed."""
    item = {
        "num_embeddings": 1001,
        "embedding_dim": 64,
        "sharding_type": "table_wise",
        "compute_kernel": "fused",
        "ranks": [0],
    } | changes
    shop = {
        "num_embeddings": 1001,
        "embedding_dim": 64,
        "sharding_type": "row_wise",
        "compute_kernel": "fused",
    }
    return {
        "format_version": 1,
        "world_size": 2,
        "local_world_size": 2,
        "device": "cpu",
        "tables": {"item": {k: v for k, v in item.items() if v is not None}, "shop": shop},
    }


def write_values(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_a_plan_changed_by_hand_moves_the_table(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    before = read_plan(write_values(path, plan_values()))
    write_plan(before, path)
    text = path.read_text()
    assert '"ranks": [0]' in text
    path.write_text(text.replace('"ranks": [0]', '"ranks": [1]'))
    after = read_plan(path)
    assert after.tables["item"].shards == (Shard(1, (0, 0), (1001, 64)),)
    assert after.tables["shop"].ranks == (0, 1)
    assert compare_plans(before, after) == "table 'item': ranks 0 -> 1"
    assert compare_plans(after, after) == "the plans are the same"
    plan = after.to_sharding_plan(collection("item", "shop"), world_size=2, local_world_size=2)
    assert plan.plan[""]["item"].ranks == [1]  # pyright: ignore[reportIndexIssue]


def test_a_plan_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    before = read_plan(write_values(path, plan_values()))
    write_plan(before, path)

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    after = read_plan(write_values(tmp_path / "other.json", plan_values(ranks=[1])))
    with pytest.raises(OSError, match="No space left"):
        write_plan(after, path)
    assert read_plan(path) == before
    monkeypatch.undo()
    write_plan(after, path)
    assert read_plan(path) == after
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.json", "plan.json"]


def test_uneven_columns_are_kept(tmp_path: Path) -> None:
    shards = [
        {"rank": 0, "offset": [0, 0], "size": [1001, 48]},
        {"rank": 1, "offset": [0, 48], "size": [1001, 16]},
    ]
    values = plan_values(sharding_type="column_wise", ranks=[0, 1], shards=shards)
    path = write_values(tmp_path / "plan.json", values)
    plan = read_plan(path)
    write_plan(plan, path)
    assert [shard.size for shard in read_plan(path).tables["item"].shards] == [
        (1001, 48),
        (1001, 16),
    ]
    assert read_plan(path) == plan


MISTAKES = {
    "item is on no rank": ({"ranks": None}, "lacks 'ranks'"),
    "two ranks": ({"ranks": [0, 1]}, "table_wise needs exactly one rank"),
    "a rank too many": ({"ranks": [2]}, "rank 2 does not exist"),
    "a negative rank": ({"ranks": [-1]}, "ranks[0]: expected 'int' >= 0"),
    "unknown type": ({"sharding_type": "rowwise"}, "no sharding type 'rowwise'"),
    "unknown kernel": ({"compute_kernel": "quick"}, "no compute kernel 'quick'"),
    "unknown field": ({"shard": []}, "unknown field 'shard'; use num_embeddings"),
    "no rows": ({"num_embeddings": 0}, "num_embeddings: expected 'int' >= 1"),
    "rows as text": ({"num_embeddings": "1001"}, "num_embeddings: expected 'int', got 'str'"),
    "fused data_parallel": (
        {"sharding_type": "data_parallel", "ranks": None},
        "kernel 'dense' only",
    ),
    "row_wise on some ranks": (
        {"sharding_type": "row_wise", "ranks": [0]},
        "row_wise uses every rank in order",
    ),
    "half a host": ({"sharding_type": "table_row_wise", "ranks": [1]}, "all 2 ranks of each host"),
    "columns that do not divide": (
        {"sharding_type": "column_wise", "ranks": [0, 1, 0]},
        "cannot cut 64 columns into 3 equal parts",
    ),
    "columns that cannot be divided": (
        {"sharding_type": "column_wise", "ranks": [0, 1], "embedding_dim": 18},
        "multiple of 4; use table_wise",
    ),
    "a gap": (
        {"shards": [{"rank": 0, "offset": [0, 0], "size": [1000, 64]}]},
        "rows 1000 to 1000 are missing",
    ),
    "an overlap": (
        {
            "sharding_type": "column_wise",
            "ranks": [0, 1],
            "shards": [
                {"rank": 0, "offset": [0, 0], "size": [1001, 32]},
                {"rank": 1, "offset": [0, 28], "size": [1001, 36]},
            ],
        },
        "columns 28 to 31 twice",
    ),
    "rows that TorchRec would not find": (
        {
            "sharding_type": "row_wise",
            "ranks": [0, 1],
            "shards": [
                {"rank": 0, "offset": [0, 0], "size": [700, 64]},
                {"rank": 1, "offset": [700, 0], "size": [301, 64]},
            ],
        },
        "not the equal blocks",
    ),
    "narrow columns": (
        {
            "sharding_type": "column_wise",
            "ranks": [0, 1],
            "shards": [
                {"rank": 0, "offset": [0, 0], "size": [1001, 62]},
                {"rank": 1, "offset": [0, 62], "size": [1001, 2]},
            ],
        },
        "multiples of 4",
    ),
    "ranks and shards differ": (
        {"ranks": [1], "shards": [{"rank": 0, "offset": [0, 0], "size": [1001, 64]}]},
        "differ",
    ),
    "a cache of more than all": ({"cache_load_factor": 1.5}, "at most 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_file_and_table(tmp_path: Path, mistake: str) -> None:
    changes, expected = MISTAKES[mistake]
    path = write_values(tmp_path / "plan.json", plan_values(**changes))
    with pytest.raises(PlanError) as raised:
        read_plan(path)
    message = str(raised.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "'item'" in message
    assert "\n" not in message


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text, expected in (
        ("{", "line 1 column 2 is not JSON"),
        ("[]", "expected 'object', got 'array'"),
        ('{"format_version": 2}', "missing required field 'world_size'"),
        (json.dumps(plan_values() | {"format_version": 2}), "format_version is 2"),
        (json.dumps(plan_values() | {"tables": {}}), "at least one table"),
        (json.dumps(plan_values() | {"device": "tpu"}), "'cpu' or 'cuda'"),
        (json.dumps(plan_values() | {"local_world_size": 3}), "do not divide into hosts of 3"),
        ('{"tables": {"a": 1, "a": 2}}', "'a' occurs twice"),
    ):
        path.write_text(text)
        with pytest.raises(PlanError, match=expected):
            read_plan(path)


def read_right(tmp_path: Path, **changes: Any) -> PlanFile:
    return read_plan(write_values(tmp_path / "plan.json", plan_values(**changes)))


def test_a_plan_for_something_else_is_refused(tmp_path: Path) -> None:
    plan = read_right(tmp_path)
    two = {"world_size": 2, "local_world_size": 2}
    with pytest.raises(PlanError, match=r"is for 2 ranks and this run has 4"):
        plan.to_sharding_plan(collection("item", "shop"), world_size=4, local_world_size=4)
    with pytest.raises(PlanError, match=r"no table 'user', which the model has"):
        plan.to_sharding_plan(collection("item", "shop", "user"), **two)
    with pytest.raises(PlanError, match=r"places table 'shop', which the model does not have"):
        plan.to_sharding_plan(collection("item"), **two)
    with pytest.raises(PlanError, match=r"'item' is 1001 x 64 in the plan and 1002 x 64"):
        plan.to_sharding_plan(collection("item", "shop", rows=1002), **two)
    with pytest.raises(PlanError, match="no EmbeddingBagCollection"):
        plan.to_sharding_plan(nn.Linear(1, 1), **two)
    by_host = read_right(tmp_path, sharding_type="table_row_wise", ranks=[0, 1])
    with pytest.raises(PlanError, match=r"hosts of 2 ranks, on which table 'item'"):
        by_host.to_sharding_plan(collection("item", "shop"), world_size=2, local_world_size=1)


def test_another_data_type_than_the_models_is_refused(tmp_path: Path) -> None:
    plan = read_right(tmp_path, data_type="float16")
    with pytest.raises(PlanError, match=r"'item' is float16 in the plan and float32 in the model"):
        plan.to_sharding_plan(collection("item", "shop"), world_size=2, local_world_size=2)
    module = collection("item", "shop")
    module.embedding_bag_configs()[0].data_type = DataType.FP16
    plan.to_sharding_plan(module, world_size=2, local_world_size=2)


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_row_wise"])
def test_a_cpu_rank_without_a_row_is_refused(tmp_path: Path, sharding_type: str) -> None:
    item = {
        "num_embeddings": 5,
        "embedding_dim": 16,
        "sharding_type": sharding_type,
        "compute_kernel": "fused",
        "ranks": [0, 1, 2, 3],
    }
    values = plan_values() | {"world_size": 4, "local_world_size": 4, "tables": {"item": item}}
    plan = read_plan(write_values(tmp_path / "plan.json", values))
    four: dict[str, Any] = {"world_size": 4, "local_world_size": 4}
    module = collection("item", rows=5, dim=16)
    with pytest.raises(PlanError, match=r"'item' has too few rows \(5\) for .*rank 3 gets none"):
        plan.to_sharding_plan(module, **four)
    plan.to_sharding_plan(module, **four, device="cuda")
    item["num_embeddings"] = 7
    plan = read_plan(write_values(tmp_path / "plan.json", values))
    plan.to_sharding_plan(collection("item", rows=7, dim=16), **four)


def test_grid_shard_of_means_is_refused(tmp_path: Path) -> None:
    plan = read_right(tmp_path, sharding_type="grid_shard", ranks=[0, 1])
    module = collection("item", "shop")
    plan.to_sharding_plan(module, world_size=2, local_world_size=2)
    module.embedding_bag_configs()[0].pooling = PoolingType.MEAN
    with pytest.raises(PlanError, match="mean pooling"):
        plan.to_sharding_plan(module, world_size=2, local_world_size=2)


def test_cut_columns_are_a_warning_under_rowwise_adagrad(tmp_path: Path) -> None:
    cut = read_right(tmp_path, sharding_type="column_wise", ranks=[0, 1])
    whole = read_right(tmp_path, sharding_type="column_wise", ranks=[0])
    (warning,) = plan_warnings(cut, optimizer="rowwise_adagrad")
    assert "'item'" in warning
    assert plan_warnings(cut, optimizer="adagrad") == []
    assert plan_warnings(whole, optimizer="rowwise_adagrad") == []


def test_the_printed_plan_counts_what_ranks_hold(tmp_path: Path) -> None:
    lines = format_plan(read_right(tmp_path)).splitlines()
    assert lines[1].split() == ["item", "1,001", "64", "0.3", "table_wise", "fused", "0"]
    assert lines[2].split()[-1] == "0,1"
    # Rank 0: 1001 rows of item and 501 of shop; rank 1: 500 of shop; 64 columns of 4 bytes.
    assert lines[-1].endswith("weights per rank: 0.1 to 0.4 MB")
