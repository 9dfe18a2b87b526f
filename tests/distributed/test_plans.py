"""Training with a plan of `esmm-torchrec plan`; changing it by hand does not change the result."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.sharding import Options, run
from esmm_torchrec.cli.main import main
from esmm_torchrec.errors import PlanError
from esmm_torchrec.planning.hardware import read_hardware
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.plan_json import read_plan
from esmm_torchrec.sharding.plan_text import compare_plans
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train
from tests.prepared_data import ROWS, write_data_set
from tests.ranks import run_on_ranks, train_here

OPTIONS = TrainOptions(batch_size=64, embedding_dim=8, tower=(16, 8), epochs=1, seed=3)


def _refused(data: Path, out: Path, options: TrainOptions) -> str:
    try:
        with process_group("cpu") as ranks:
            train(data, out, options, ranks)
    except PlanError as error:
        return str(error)
    return "trained"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path)
    return path


@pytest.fixture(scope="module")
def planned(data: Path) -> Path:
    """Plans for two CPU ranks."""
    out = data.parent / "planned"
    options = ["--gpu", "cpu", "--gpus", "2", "--embedding-dim", "8", "--batch-size", "64"]
    strategies = ["--strategies", "table_wise", "row_wise"]
    main(["plan", "--data", str(data), *options, *strategies, "--out", str(out)])
    return out


def test_a_plan_changed_by_hand_trains_to_the_same_numbers(
    data: Path, planned: Path, tmp_path: Path
) -> None:
    plan = planned / "plan-table_wise-2.json"
    values = json.loads(plan.read_text())
    item, history, tag = (values["tables"][name] for name in ("item", "history", "tag"))
    item["ranks"] = [1 - item["ranks"][0]]
    history["sharding_type"] = "row_wise"
    del history["ranks"]
    tag["sharding_type"], tag["ranks"] = "column_wise", [1, 0]
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(values))
    assert len(compare_plans(read_plan(plan), read_plan(changed)).splitlines()) == 3

    # rowwise_adagrad keeps one momentum per row and column shard, so it differs by design.
    options = replace(OPTIONS, plan=plan, sparse_optimizer="adagrad")
    before = run_on_ranks(2, train_here, data, tmp_path / "before", options)[0]
    options = replace(options, plan=changed)
    after = run_on_ranks(2, train_here, data, tmp_path / "after", options)[0]
    for name in ("ctr_auc", "cvr_auc", "ctcvr_auc", "ctr_ne", "ctcvr_ne"):
        assert after["test"][name] == pytest.approx(before["test"][name], abs=2e-5)

    used = read_plan(tmp_path / "after" / "plan.json")
    assert used == read_plan(changed)
    assert {name: t.num_embeddings for name, t in used.tables.items()} == {
        name: rows + 1 for name, rows in ROWS.items()
    }


def test_a_plan_for_other_ranks_is_refused_by_every_rank(
    data: Path, planned: Path, tmp_path: Path
) -> None:
    plan = planned / "plan-row_wise-2.json"
    (message,) = run_on_ranks(1, _refused, data, tmp_path / "run", replace(OPTIONS, plan=plan))
    assert message == (
        f"{plan} is for 2 ranks and this run has 1; start 2 ranks or make a plan for 1"
    )


def _errors_on_two_hosts(path: Path) -> dict[str, float]:
    """Runs four ranks as two hosts. Returns sharding type → largest error, against an unsharded
    collection, of pooled embeddings before and after an SGD step on a different batch per rank."""
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(int(os.environ["RANK"]) % 2)}
    errors: dict[str, float] = {}
    with process_group("cpu") as ranks:
        for number, (sharding_type, places) in enumerate(PLACES.items()):
            errors[sharding_type] = _error(path / f"{number}.json", sharding_type, places, ranks)
    return errors


PLACES = {
    "row_wise": ([0, 1, 2, 3], [0, 1, 2, 3]),
    "table_row_wise": ([2, 3], [0, 1]),
    "column_wise": ([3, 0], [2]),
    "grid_shard": ([0, 1, 2, 3], [2, 3]),
}
"""Sharding type → ranks of tables a and b."""


def _error(
    path: Path, sharding_type: str, places: tuple[list[int], list[int]], ranks: Ranks
) -> float:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=name, num_embeddings=rows, embedding_dim=16, feature_names=[f"f_{name}"]
        )
        for name, rows in (("a", 41), ("b", 30))
    ]
    plain = EmbeddingBagCollection(tables=tables)
    module = nn.ModuleDict({"tables": copy.deepcopy(plain)})
    apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    values = {
        "format_version": 1,
        "world_size": 4,
        "local_world_size": 2,
        "device": "cpu",
        "tables": {
            table.name: {
                "num_embeddings": table.num_embeddings,
                "embedding_dim": 16,
                "sharding_type": sharding_type,
                "compute_kernel": "fused",
                "ranks": place,
            }
            for table, place in zip(tables, places, strict=True)
        },
    }
    if ranks.is_first:
        path.write_text(json.dumps(values))
    ranks.barrier()
    plan = read_plan(path).to_sharding_plan(module, world_size=4, local_world_size=2)
    sharded = shard(module, plan=plan, ranks=ranks).module["tables"]  # pyright: ignore
    generator = torch.Generator().manual_seed(ranks.rank)
    lengths = torch.randint(0, 4, (10,), generator=generator)
    bags = KeyedJaggedTensor(
        keys=["f_a", "f_b"],
        values=torch.randint(0, 30, (int(lengths.sum()),), generator=generator),
        lengths=lengths,
    )
    error = 0.0
    for _ in range(2):
        found, expected = sharded(bags), plain(bags)
        for key in bags.keys():  # noqa: SIM118
            error = max(error, (found[key] - expected[key]).abs().max().item())
        sum(found[key].square().sum() for key in bags.keys()).backward()  # noqa: SIM118
        sum(expected[key].square().sum() for key in bags.keys()).backward()  # noqa: SIM118
        for parameter in plain.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.data -= 0.1 * parameter.grad / 4
            parameter.grad = None
    return error


def test_every_type_pools_and_updates_right_on_two_hosts(tmp_path: Path) -> None:
    for errors in run_on_ranks(4, _errors_on_two_hosts, tmp_path):
        assert errors == pytest.approx(dict.fromkeys(PLACES, 0.0), abs=1e-6)


def _measure(options: Options) -> None:
    run(options)


def test_the_benchmark_measures_beside_the_estimate(tmp_path: Path) -> None:
    tables = tmp_path / "tables.yaml"
    tables.write_text(
        "batch_size: 32\ntables:\n"
        "  - {name: item, num_embeddings: 500, embedding_dim: 64, pooling_factor: 3}\n"
        "  - {name: shop, num_embeddings: 90, embedding_dim: 8, weighted: true, shared_by: 4}\n"
    )
    options = Options(
        out=tmp_path / "out",
        tables=tables,
        strategies=("table_wise", "row_wise", "column_wise", "grid_shard", "data_parallel"),
        tower=(8,),
        steps=2,
        rounds=1,
        device="cpu",
    )
    run_on_ranks(2, _measure, options)
    found = json.loads((tmp_path / "out" / "sharding.json").read_text())
    assert [case["strategy"] for case in found["cases"]] == [
        "table_wise",
        "row_wise",
        "column_wise",
        "data_parallel",
    ]
    weights = (500 * 64 + 90 * 8) * 4
    for case in found["cases"]:
        copies = 2 if case["strategy"] == "data_parallel" else 1
        assert sum(case["weights_bytes_per_rank"]) == copies * weights
        assert case["measured_ms"]["forward"] > 0
        assert case["estimated_ms"]["step"] > 0
    machine = read_hardware(tmp_path / "out" / "hardware.yaml")
    assert machine.to_dict() == found["hardware"]
    assert machine.ranks_per_host == 2
