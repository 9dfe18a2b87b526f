"""Plans for training: one rank's process asks for plans of two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding import planner
from esmm_torchrec.sharding.planner import (
    KernelOption,
    ShardingOption,
    SparseOptimizerOption,
    Workload,
    choose_kernel,
    make_plan,
)
from esmm_torchrec.sharding.process_group import Ranks, process_group

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def one() -> Iterator[Ranks]:
    with process_group("cpu") as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two(one: Ranks) -> Ranks:
    """The first of two ranks; it plans for both without the other."""
    return replace(one, world_size=2, local_world_size=2)


class Model(nn.Module):
    """Two collections, nothing allocated."""

    def __init__(self, rows: int = 1000, dim: int = 16) -> None:
        super().__init__()
        self.plain = _collection({"item": rows, "shop": 7}, dim, weighted=False)
        self.weighted = _collection({"history": rows}, dim, weighted=True)


def _collection(tables: dict[str, int], dim: int, *, weighted: bool) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name]
            )
            for name, rows in tables.items()
        ],
        is_weighted=weighted,
        device=torch.device("meta"),
    )


def _plan(
    ranks: Ranks,
    sharding: ShardingOption,
    *,
    kernel: KernelOption = "fused",
    model: nn.Module | None = None,
) -> dict[str, ParameterSharding]:
    plan = make_plan(
        Model() if model is None else model,
        ranks=ranks,
        sharding=sharding,
        kernel=kernel,
        workload=Workload(512, {"history": 20.0}),
    )
    tables: dict[str, ParameterSharding] = {}
    for of_module in plan.plan.values():
        assert isinstance(of_module, EmbeddingModuleShardingPlan)
        tables |= of_module
    return tables


@pytest.mark.parametrize("kernel", ["fused", "dense"])
@pytest.mark.parametrize(
    ("sharding", "on_ranks"),
    [
        ("table_wise", 1),
        ("row_wise", 2),
        ("column_wise", 2),
        ("table_row_wise", 2),
    ],
)
def test_what_is_asked_for_is_what_every_table_gets(
    sharding: ShardingOption, on_ranks: int, kernel: KernelOption, two: Ranks
) -> None:
    tables = _plan(two, sharding, kernel=kernel)
    assert sorted(tables) == ["history", "item", "shop"]
    for table in tables.values():
        assert table.sharding_type == sharding
        assert table.compute_kernel == kernel
        assert table.ranks is not None
        assert len(set(table.ranks)) == on_ranks


def test_data_parallel_is_dense_and_everywhere(two: Ranks) -> None:
    for table in _plan(two, "data_parallel", kernel="dense").values():
        assert (table.sharding_type, table.compute_kernel) == ("data_parallel", "dense")
        assert table.ranks == [0, 1]


@pytest.mark.parametrize("kernel", ["fused", "dense"])
def test_auto_never_chooses_what_was_not_asked_for(kernel: KernelOption, two: Ranks) -> None:
    """No data_parallel, which the planner likes for small tables and which has no fused optimiser;
    no column_wise, which keeps several Adagrad momenta for a row."""
    kinds = {table.sharding_type for table in _plan(two, "auto", kernel=kernel).values()}
    assert kinds <= {"table_wise", "row_wise"}


def _kinds(ranks: Ranks, sharding: ShardingOption, tables: dict[str, int]) -> set[str]:
    model = nn.ModuleList([_collection(tables, 16, weighted=False)])
    return {table.sharding_type for table in _plan(ranks, sharding, model=model).values()}


def test_auto_on_a_cpu_divides_only_where_whole_tables_leave_a_rank_too_much(
    two: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    even = {"item": 200_000, "shop": 150_000}
    assert _kinds(two, "auto", even) == {"table_wise"}
    assert _kinds(two, "auto", {"item": 200_000}) == {"row_wise"}

    # item takes 12.8 MB, half of both 11.2
    monkeypatch.setattr(planner, "usable_memory", lambda: int(2 * 12_000_000 / 0.85))
    with pytest.raises(PlanError, match="`sharding` table_wise on 2 ranks"):
        _kinds(two, "table_wise", even)
    assert "row_wise" in _kinds(two, "auto", even)


def test_auto_on_one_rank_divides_nothing(one: Ranks) -> None:
    for table in _plan(one, "auto").values():
        assert (table.sharding_type, table.ranks) == ("table_wise", [0])


@pytest.mark.parametrize(("dim", "widths"), [(4, [4]), (8, [4, 4]), (12, [12]), (16, [8, 8])])
def test_column_wise_cuts_where_fbgemms_kernels_can(
    dim: int, widths: list[int], two: Ranks
) -> None:
    """Each strip is a multiple of 4 columns wide, and all are equal."""
    for table in _plan(two, "column_wise", model=Model(dim=dim)).values():
        spec = table.sharding_spec
        assert spec is not None
        assert [shard.shard_sizes[1] for shard in spec.shards] == widths  # pyright: ignore


@pytest.mark.parametrize("sharding", ["auto", "row_wise", "table_row_wise"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_no_rank_is_left_without_a_row(
    sharding: ShardingOption, world_size: int, one: Ranks
) -> None:
    """Of a table that is divided; with such, fbgemm fails on a CPU now and then."""
    ranks = replace(one, world_size=world_size, local_world_size=world_size)
    model = nn.Module()
    model.plain = _collection({f"t{rows}": rows for rows in range(1, 11)}, 16, weighted=False)
    kinds = {}
    for name, table in _plan(ranks, sharding, model=model).items():
        spec = table.sharding_spec
        assert spec is not None
        assert min(shard.shard_sizes[0] for shard in spec.shards) > 0, name  # pyright: ignore
        kinds[name] = table.sharding_type
    if sharding != "auto":
        assert kinds[f"t{world_size - 1}"] == "table_wise"
        assert kinds[f"t{world_size}"] == sharding
        assert kinds["t10"] == sharding


def test_tables_that_do_not_fit_are_said_to(two: Ranks) -> None:
    sentence = (
        "no plan for `sharding` row_wise on 2 ranks: table 'history' does not fit (nor do 1 "
        "others): row_wise puts 1,907 GiB of it on one rank"
    )
    with pytest.raises(PlanError, match="^" + re.escape(sentence)) as error:
        _plan(two, "row_wise", model=Model(rows=4_000_000_000, dim=256))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optimizer", "sharding", "device", "kernel"),
    [
        ("rowwise_adagrad", "auto", CPU, "fused"),
        ("adagrad", "row_wise", CPU, "fused"),
        ("sgd", "column_wise", CUDA, "fused"),
        ("adam", "table_wise", CPU, "dense"),
        ("adam", "table_wise", CUDA, "fused"),
        ("adagrad", "data_parallel", CPU, "dense"),
        ("adam", "data_parallel", CUDA, "dense"),
    ],
)
def test_the_kernel_is_fused_wherever_torchrec_has_it(
    optimizer: SparseOptimizerOption,
    sharding: ShardingOption,
    device: torch.device,
    kernel: KernelOption,
) -> None:
    assert choose_kernel(optimizer, sharding=sharding, device=device) == kernel


def test_rowwise_adagrad_has_no_data_parallel() -> None:
    with pytest.raises(PlanError, match="`sharding` data_parallel cannot be used with `sparse_"):
        choose_kernel("rowwise_adagrad", sharding="data_parallel", device=CPU)
