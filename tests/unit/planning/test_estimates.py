"""Estimates against arithmetic by hand, against TorchRec's own planner, and against each other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.constants import DP_ELEMENTWISE_KERNELS_PERF_FACTOR
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ShardingOption

from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.towers import Tower
from esmm_torchrec.planning.estimates import Estimate, estimate
from esmm_torchrec.planning.hardware import preset
from esmm_torchrec.planning.scenario import (
    STRATEGIES,
    Constraint,
    Scenario,
    Strategy,
    estimate_towers,
    parse_constraint,
)
from esmm_torchrec.planning.table_list import PlannedFeature, PlannedTable, TableList
from esmm_torchrec.sharding.plan_file import PlanFile
from esmm_torchrec.sharding.search import GIB
from esmm_torchrec.sharding.sharders import sharders

BATCH = 256
CUT_BY_RANKS: tuple[Strategy, ...] = (
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "grid_shard",
)


def table(name: str, rows: int, dim: int, **fields: Any) -> PlannedTable:
    feature = PlannedFeature(f"f_{name}", fields.pop("pooling_factor", 1.0))
    return PlannedTable(name, rows, dim, (feature,), **fields)


def scenario(*tables: PlannedTable, gpu: str = "h100", **fields: Any) -> Scenario:
    return Scenario(TableList(tables), preset(gpu), BATCH, **fields)


MIXED = scenario(
    table("user", 3_000_000, 64),
    table("item", 1_000_000, 128),
    table("shop", 40_000, 32, pooling_factor=20.0),
    table("age", 9, 16),
    table("history", 500_000, 64, pooling_factor=100.0, shared_by=8.0, weighted=True),
)


def placed(result: Estimate) -> Any:
    assert result.placed is not None, result.reason
    return result.placed


def test_memory_of_a_table_by_hand() -> None:
    rows, dim, world = 1_000_000, 128, 2
    found = placed(estimate(scenario(table("item", rows, dim)), "table_wise", world))
    weights = rows * dim * 4
    momentum = rows * 4
    batch_in = BATCH * world * 8
    batch_out = BATCH * world * dim * 4
    assert sorted(found.table_bytes[0]) == [0, weights + momentum + batch_in + batch_out]

    cut = placed(estimate(scenario(table("item", rows, dim)), "row_wise", world))
    # Half the rows each, all impressions' partial sums, and on average half their ids.
    share = (weights + momentum) // 2 + BATCH * 8 + batch_out
    assert cut.table_bytes[0].tolist() == [share, share]


@pytest.mark.parametrize("strategy", ["column_wise", "grid_shard"])
def test_rowwise_adagrad_keeps_a_momentum_per_row_and_strip(strategy: Strategy) -> None:
    """Eight strips of a row have eight momenta in fbgemm, and TorchRec counts one."""
    rows, dim, world = 1_000_000, 128, 64
    case = scenario(table("item", rows, dim), column_width=16)
    per_row = {}
    for optimizer in ("rowwise_adagrad", "sgd"):
        found = placed(estimate(replace(case, sparse_optimizer=optimizer), strategy, world))
        per_row[optimizer] = found.table_bytes.sum() / rows
    assert per_row["rowwise_adagrad"] - per_row["sgd"] == 8 * 4


def test_narrow_strips_of_a_table_that_their_momenta_make_too_large_do_not_fit() -> None:
    # 525 GiB of weights and 131 of momenta on 8 x 80 GiB.
    case = Scenario(
        TableList((table("huge", 1_100_000_000, 128),)), preset("h100"), 4096, column_width=4
    )
    reason = estimate(case, "column_wise", 8).reason
    assert "all tables together need 656 GiB" in str(reason)


def test_shared_rows_are_pooled_once() -> None:
    common = {"pooling_factor": 10.0}
    alone = placed(estimate(scenario(table("h", 1000, 64, **common)), "table_wise", 2))
    shared = table("h", 1000, 64, **common, shared_by=8.0)
    once = placed(estimate(scenario(shared), "table_wise", 2))
    weights = 1000 * 64 * 4 + 1000 * 4
    assert once.table_bytes.max() - weights == pytest.approx(
        (alone.table_bytes.max() - weights) / 8
    )
    assert once.parts.forward_comms == pytest.approx(alone.parts.forward_comms / 8)


def test_time_of_a_table_by_hand() -> None:
    dim, factor, world = 128, 10.0, 8
    item = table("item", 1_000_000, dim, pooling_factor=factor)
    parts = placed(estimate(scenario(item), "table_wise", world)).parts
    lookups = BATCH * world * factor
    pooled = BATCH * world * dim * 4
    read = lookups * 8 + lookups * dim * 4 + pooled
    assert parts.forward == pytest.approx(read / 3.35e9)
    assert parts.backward == pytest.approx(2 * read / 3.35e9)
    assert parts.forward_comms == pytest.approx(pooled * 7 / 8 / 450e6)
    assert parts.backward_comms == parts.forward_comms
    assert parts.prefetch == 0


def test_the_step_is_the_slowest_rank_and_the_towers() -> None:
    result = estimate(MIXED, "table_wise", 4)
    found = placed(result)
    times = found.table_ms.sum(axis=0)
    parts = found.parts
    assert parts.step - parts.towers - parts.towers_all_reduce == pytest.approx(times.max())
    assert found.time_imbalance == pytest.approx(times.max() / times.mean())
    assert result.impressions_per_second == pytest.approx(4 * BATCH / parts.step * 1000)


class KeepBestPlan(NoopEmbeddingStats):
    """Where TorchRec's planner shows the plan it chose."""

    def __init__(self) -> None:
        self.best: list[ShardingOption] = []

    def log(self, **values: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.best = values["best_plan"]


@pytest.mark.parametrize("strategy", CUT_BY_RANKS)
def test_placement_and_time_are_those_of_torchrecs_planner(strategy: Strategy) -> None:
    world = 16
    found = placed(estimate(MIXED, strategy, world))
    capacity = MIXED.capacity(world)
    stats = KeepBestPlan()
    planner = EmbeddingShardingPlanner(
        topology=MIXED.hardware.topology(
            world,
            memory_bytes=capacity.for_tables,
            host_memory_bytes=capacity.host_for_tables,
        ),
        batch_size=BATCH,
        proposer=GreedyProposer(),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        stats=stats,
        constraints={
            t.name: ParameterConstraints(
                sharding_types=[strategy],
                compute_kernels=["fused"],
                min_partition=32,
                pooling_factors=[f.pooling_factor for f in t.features],
                batch_sizes=[int(BATCH / t.shared_by)],
                is_weighted=t.weighted,
            )
            for t in MIXED.tables.tables
        },
    )
    module = MIXED.tables.to_module()
    theirs = PlanFile.from_sharding_plan(
        planner.plan(module, sharders()),
        [c for e in module.children() for c in e.embedding_bag_configs()],  # pyright: ignore
        world_size=world,
        local_world_size=8,
        device="cuda",
    )
    assert found.plan.tables == theirs.tables
    ours = dict(zip(found.names, found.table_ms, strict=True))
    assert len(stats.best) == len(ours)
    for option in stats.best:
        expected = np.zeros(world)
        for shard in option.shards:
            assert shard.perf is not None
            expected[shard.rank] += shard.perf.total
        assert ours[option.name] == pytest.approx(expected)


def test_a_choice_is_never_slower_than_one_type_for_all() -> None:
    free = replace(MIXED, sparse_optimizer="adagrad")
    for case, world in ((free, 8), (free, 16), (MIXED, 16)):
        auto = estimate(case, "auto", world)
        types = ("table_wise", "row_wise", "table_row_wise")
        if case is free:
            types = (*types, "column_wise", *(("grid_shard",) if world > 8 else ()))
        assert auto.step_ms <= min(estimate(case, name, world).step_ms for name in types)
        assert "data_parallel" not in str(placed(auto).placements)


def test_a_choice_makes_an_exception_of_a_table_too_large_for_a_host() -> None:
    # 620 GiB on hosts of eight times 68.
    huge = table("huge", 1_300_000_000, 128)
    case = scenario(huge, *(table(f"t{n}", 100_000, 64, pooling_factor=9.0) for n in range(20)))
    constraint = Constraint("huge", sharding_types=("row_wise",))
    excepted = replace(case, constraints=(constraint,))
    auto = estimate(case, "auto", 16)
    for name in ("table_wise", "row_wise", "table_row_wise"):
        assert auto.step_ms <= estimate(excepted, name, 16).step_ms
    assert placed(auto).plan.tables["huge"].sharding_type == "row_wise"


def test_rowwise_adagrads_tables_are_not_cut_into_columns_unasked() -> None:
    wide = scenario(table("wide", 10_000_000, 256), table("small", 100, 16))
    assert "column_wise" not in str(placed(estimate(wide, "auto", 8)).placements)
    asked = placed(estimate(wide, "column_wise", 8))
    assert len(asked.plan.tables["wide"].ranks) == 256 // 32
    assert len(asked.warnings) == 1


def test_towers_are_counted_as_torch_counts_them() -> None:
    case = replace(MIXED, towers=(32, 16))
    towers = [Tower(case.tables.tower_width, case.towers) for _ in range(2)]
    features = torch.zeros(BATCH, case.tables.tower_width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.stack([tower(features) for tower in towers]).sum().backward()
    found = estimate_towers(case, 8)
    assert found.parameters == sum(p.numel() for tower in towers for p in tower.parameters())
    seconds = counter.get_total_flops() / (494e12 * 0.3)
    assert found.compute_ms == pytest.approx(seconds * 1e3)
    gradients = 4 * found.parameters
    assert found.all_reduce_ms == pytest.approx(2 * 7 / 8 * gradients / 450e6)
    assert estimate_towers(case, 1).all_reduce_ms == 0
    # Weights, gradients and Adam's two moments at the least.
    assert found.memory_bytes > 4 * gradients


def test_a_table_fits_until_its_last_byte() -> None:
    dim = 128
    case = scenario(table("item", 1000, dim))
    room = case.capacity(1).for_tables - BATCH * 8 - BATCH * dim * 4
    rows = room // (dim * 4 + 4)
    for number, fits in ((rows, True), (rows + 1, False)):
        result = estimate(scenario(table("item", number, dim)), "table_wise", 1)
        assert (result.placed is not None) == fits


def test_a_table_too_large_is_named_with_what_it_lacks_and_what_helps() -> None:
    # 190.7 GiB of weights and 1.5 GiB of momentum on 80 GiB less 15 %.
    case = scenario(table("huge", 400_000_000, 128), table("small", 1000, 64))
    result = estimate(case, "table_wise", 4)
    assert result.placed is None
    assert result.step_ms == math.inf
    reason = str(result.reason)
    assert "table 'huge' does not fit: table_wise puts 192 GiB of it on one GPU" in reason
    lacking = (400_000_000 * (128 * 4 + 4)) / GIB - case.capacity(4).for_tables / GIB
    assert f"{lacking:,.0f} GiB too little" in reason
    assert "row_wise for table 'huge'" in result.remedies
    assert not any("GPUs" in remedy and "GiB" not in remedy for remedy in result.remedies)
    row_wise = replace(case, constraints=(Constraint("huge", sharding_types=("row_wise",)),))
    assert placed(estimate(row_wise, "table_wise", 4)).plan.tables["huge"].ranks == (0, 1, 2, 3)


def test_tables_too_large_together_are_named_with_the_machines_that_hold_them() -> None:
    # Ten tables of 38.4 GiB, one on each of eight GPUs with 68 GiB and two left over.
    case = scenario(*(table(f"t{n}", 80_000_000, 128) for n in range(10)))
    result = estimate(case, "table_wise", 8)
    assert "TorchRec's planner cannot place every table" in str(result.reason)
    assert "16 GPUs" in result.remedies
    # `train` has float32 tables only.
    assert not any("float16" in remedy for remedy in result.remedies)
    assert placed(estimate(case, "row_wise", 8))
    assert placed(estimate(case, "table_wise", 16))


def test_towers_that_leave_nothing_are_said_so() -> None:
    result = estimate(replace(MIXED, batch_size=10**9), "table_wise", 8)
    assert "the towers and their activations alone need 22,471 GiB" in str(result.reason)
    assert result.remedies == ()
    slightly = replace(MIXED, batch_size=4_000_000)
    result = estimate(slightly, "table_wise", 8)
    assert "the towers" in str(result.reason)
    assert result.remedies == ("--batch-size 2000000", "GPUs with 140 GiB each")
    assert estimate(replace(slightly, batch_size=2_000_000), "table_wise", 8).placed is not None


def test_each_remedy_of_a_batch_too_large_is_true() -> None:
    # 61 GiB of weights; the batch of 8 ranks, pooled, is another 12 on the rank of the table.
    case = replace(
        scenario(table("item", 125_000_000, 128, shared_by=2.0)), batch_size=6_000_000, towers=(4,)
    )
    result = estimate(case, "table_wise", 8)
    assert result.placed is None
    sizes = [remedy for remedy in result.remedies if remedy.startswith("--batch-size")]
    assert len(sizes) == 1
    smaller = replace(case, batch_size=int(sizes[0].split()[1]))
    assert smaller.batch_size < case.batch_size
    assert estimate(smaller, "table_wise", 8).placed is not None


def test_a_dense_kernel_holds_a_gradient_as_large_as_the_table() -> None:
    item = table("item", 1_000_000, 64)
    case = scenario(item, kernels=("dense",), sparse_optimizer="adam")
    weights = item.nbytes
    batch = BATCH * 8 + BATCH * 64 * 4
    one = placed(estimate(case, "table_wise", 1))
    assert one.table_bytes[0, 0] == 4 * weights + batch
    everywhere = placed(estimate(case, "data_parallel", 4))
    assert everywhere.table_bytes[0].tolist() == [4 * weights + batch] * 4
    assert everywhere.plan.tables["item"].compute_kernel == "dense"


def test_rows_in_host_memory_leave_the_gpu_a_cache() -> None:
    rows, dim, share, world = 1_000_000, 128, 0.1, 2
    case = scenario(
        table("item", rows, dim), kernels=("fused_uvm_caching",), cache_load_factor=share
    )
    found = placed(estimate(case, "table_wise", world))
    with_momentum = rows * dim * 4 + rows * 4
    cache_state = rows * (4 + share * 16)
    batch = BATCH * world * (8 + dim * 4)
    assert found.table_host_bytes.sum() == with_momentum
    assert found.table_bytes.sum() == pytest.approx(share * with_momentum + cache_state + batch)
    distinct = rows * (1 - (1 - 1 / rows) ** (BATCH * world))
    missed = (1 - share) * distinct * dim * 4
    assert found.parts.prefetch == pytest.approx(missed / 64e6)
    assert found.plan.tables["item"].cache_load_factor == share


@pytest.mark.parametrize(
    ("case", "strategy", "reason"),
    [
        (MIXED, "data_parallel", "rowwise_adagrad does not exist"),
        (scenario(table("a", 9, 16, pooling="mean")), "grid_shard", "computes wrongly"),
        (scenario(table("a", 9, 16), gpu="cpu"), "grid_shard", "no grid_shard on a CPU"),
        (
            scenario(table("a", 9, 16), gpu="cpu", kernels=("fused_uvm",)),
            "table_wise",
            "no table_wise with the kernel fused_uvm on a CPU",
        ),
        (
            scenario(table("a", 9, 16), gpu="cpu", sparse_optimizer="adam"),
            "row_wise",
            "adam does not exist in the fused kernel on a CPU",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(case: Scenario, strategy: Strategy, reason: str) -> None:
    result = estimate(case, strategy, 2)
    assert result.placed is None
    assert reason in str(result.reason)
    assert result.remedies == ()


def test_constraints_go_before_the_strategy_and_later_ones_before_earlier() -> None:
    case = replace(
        MIXED,
        constraints=(
            parse_constraint("*=row_wise"),
            parse_constraint("it*=column_wise,fused_uvm_caching,cache=0.5"),
            parse_constraint("shop=fused_uvm"),
        ),
    )
    tables = placed(estimate(case, "table_wise", 8)).plan.tables
    assert tables["user"].sharding_type == "row_wise"
    assert (tables["shop"].sharding_type, tables["shop"].compute_kernel) == (
        "row_wise",
        "fused_uvm",
    )
    assert tables["item"].sharding_type == "column_wise"
    assert tables["item"].cache_load_factor == 0.5


@pytest.mark.parametrize(
    "text", ["item", "=row_wise", "item=", "item=rows", "item=cache=2", "a=data_parallel,fused"]
)
def test_a_constraint_must_be_words_that_exist(text: str) -> None:
    with pytest.raises(OptionError, match="`constraints`"):
        parse_constraint(text)


def test_a_scenario_checks_its_options() -> None:
    for fields, expected in (
        ({"batch_size": 0}, "`batch_size` 0"),
        ({"reserve": 1.0}, "`reserve` 1.0"),
        ({"cache_load_factor": 0.0}, "`cache_load_factor`"),
        ({"column_width": 6}, "`column_width` 6"),
        ({"towers": ()}, "`towers`"),
        ({"kernels": ()}, "`kernels`"),
        ({"constraints": (Constraint("zzz*"),)}, "'zzz[*]' matches no table"),
    ):
        with pytest.raises(OptionError, match=expected):
            replace(MIXED, **fields)


def test_memory_of_a_fused_optimizers_state_and_of_what_is_pooled_is_float32() -> None:
    """As fbgemm keeps and gives them for rows of 16 bits."""
    rows, dim, world = 1_000_000, 128, 8
    cases: dict[str, Any] = {
        data_type: scenario(
            table("item", rows, dim, data_type=data_type), sparse_optimizer="adagrad"
        )
        for data_type in ("float32", "float16", "bfloat16")
    }
    whole = placed(estimate(cases["float32"], "table_wise", world))
    for data_type in ("float16", "bfloat16"):
        half = placed(estimate(cases[data_type], "table_wise", world))
        assert whole.table_bytes.max() - half.table_bytes.max() == 2 * rows * dim
    for optimizer, state in (("adam", 2 * rows * dim * 4), ("rowwise_adagrad", rows * 4)):
        case = replace(cases["float16"], sparse_optimizer=optimizer)
        batch = BATCH * world * (8 + dim * 4)
        found = placed(estimate(case, "table_wise", world)).table_bytes.max()
        assert found == rows * dim * 2 + state + batch
        case = replace(case, kernels=("fused_uvm",))
        host = placed(estimate(case, "table_wise", world)).table_host_bytes.max()
        assert host == rows * dim * 2 + state


def test_a_cache_is_filled_before_the_look_ups_which_then_run_in_it() -> None:
    item = table("item", 1_000_000, 128, pooling_factor=10.0)
    fused = placed(estimate(scenario(item), "table_wise", 2)).parts
    cached = placed(estimate(scenario(item, kernels=("fused_uvm_caching",)), "table_wise", 2)).parts
    assert (cached.forward, cached.backward) == (fused.forward, fused.backward)
    assert cached.prefetch > 0
    assert cached.step == pytest.approx(fused.step + cached.prefetch)


@pytest.mark.parametrize("world", [8, 16, 32])
def test_copies_of_a_table_are_all_reduced_as_the_towers_are(world: int) -> None:
    item = table("item", 1_000_000, 128)
    case = scenario(item, sparse_optimizer="sgd")
    case = replace(case, hardware=replace(case.hardware, inter_host_gb_s=10.0))
    parts = placed(estimate(case, "data_parallel", world)).parts
    # TorchRec adds kernels that go over the gradient, at half of the memory's bandwidth.
    kernels = item.nbytes * DP_ELEMENTWISE_KERNELS_PERF_FACTOR / (3.35e9 / 2)
    expected = case.hardware.all_reduce_ms(item.nbytes, world)
    assert parts.backward_comms - kernels == pytest.approx(expected)


@pytest.mark.parametrize("strategy", ["row_wise", "table_row_wise", "auto"])
def test_no_cpu_rank_is_left_without_a_row(strategy: Strategy) -> None:
    case = scenario(*(table(f"t{rows}", rows, 16) for rows in range(1, 10)), gpu="cpu")
    case = replace(case, hardware=replace(case.hardware, ranks_per_host=4))
    tables = placed(estimate(case, strategy, 4)).plan.tables
    assert min(shard.size[0] for t in tables.values() for shard in t.shards) == 1
    if strategy != "auto":
        assert tables["t5"].sharding_type == "table_wise"
        assert tables["t7"].sharding_type == strategy
        # On a GPU nothing is known to be wrong with it.
        on_gpus = placed(estimate(replace(case, hardware=preset("h100")), strategy, 4))
        assert on_gpus.plan.tables["t5"].sharding_type == strategy


def test_data_parallel_has_its_kernel_beside_another_type() -> None:
    case = scenario(table("a", 50, 16), table("b", 5_000_000, 64), sparse_optimizer="sgd")
    words = "*=table_wise,data_parallel"
    found = placed(estimate(replace(case, constraints=(parse_constraint(words),)), "row_wise", 8))
    kinds = {(t.sharding_type, t.compute_kernel) for t in found.plan.tables.values()}
    assert kinds <= {("table_wise", "fused"), ("data_parallel", "dense")}
    assert found.plan.tables["b"].sharding_type == "table_wise"


def test_data_parallel_beside_another_type_is_refused_without_its_optimizer() -> None:
    words = parse_constraint("a=table_wise,data_parallel")
    result = estimate(scenario(table("a", 50, 16), constraints=(words,)), "row_wise", 8)
    assert "dense kernel, for which rowwise_adagrad does not exist" in str(result.reason)


def test_auto_cuts_no_columns_whatever_the_optimizer() -> None:
    wide = scenario(table("wide", 10_000_000, 256, pooling_factor=50.0), sparse_optimizer="sgd")
    assert estimate(wide, "column_wise", 8).step_ms < estimate(wide, "auto", 8).step_ms


def test_kernels_without_the_optimizer_are_left_out() -> None:
    case = scenario(table("a", 50, 16), kernels=("fused", "dense"))
    assert placed(estimate(case, "row_wise", 8)).plan.tables["a"].compute_kernel == "fused"
    adam = replace(case, hardware=preset("cpu"), sparse_optimizer="adam")
    assert placed(estimate(adam, "row_wise", 2)).plan.tables["a"].compute_kernel == "dense"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"constraints": ("item=cache=0.1",)}, "needs the kernel fused_uvm_caching"),
        ({"constraints": ("item=fused,cache=0.1",)}, "needs the kernel fused_uvm_caching"),
        (
            {"constraints": ("item=cache=0.1", "user=fused_uvm_caching")},
            "needs the kernel fused_uvm_caching",
        ),
        ({"cache_load_factor": 0.1}, "`cache_load_factor` 0.1 needs the kernel"),
        ({"constraints": ("item=cache=0.1",), "kernels": ("fused_uvm_caching",)}, None),
        ({"constraints": ("item=cache=0.1", "*=fused_uvm_caching")}, None),
        ({"constraints": ("item=fused_uvm_caching",), "cache_load_factor": 0.1}, None),
    ],
)
def test_a_cache_without_its_kernel_is_refused(
    fields: dict[str, Any], expected: str | None
) -> None:
    words = fields.pop("constraints", ())
    fields["constraints"] = tuple(map(parse_constraint, words))
    if expected is None:
        case = replace(MIXED, **fields)
        assert placed(estimate(case, "row_wise", 2)).plan.tables["item"].cache_load_factor == 0.1
        return
    with pytest.raises(OptionError, match=expected):
        replace(MIXED, **fields)


def test_one_rank_is_never_cut() -> None:
    steps = {estimate(MIXED, strategy, 1).step_ms for strategy in ("auto", *CUT_BY_RANKS)}
    assert len(steps) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_entry_of_plans_json_is_plain_and_adds_up(strategy: Strategy) -> None:
    entry = json.loads(json.dumps(estimate(MIXED, strategy, 8).to_dict()))
    assert (entry["strategy"], entry["gpus"]) == (strategy, 8)
    if not entry["feasible"]:
        assert entry["reason"]
        return
    assert entry["step_ms_estimate"] == pytest.approx(sum(entry["parts_ms_estimate"].values()))
    memory = entry["memory_per_gpu_bytes"]
    assert len(memory["tables"]) == 8
    assert max(memory["tables"]) <= memory["for_tables"]
    assert memory["for_tables"] == (
        memory["capacity"] - memory["reserved"] - memory["towers_estimate"]
    )
    assert sum(entry["placements"].values()) == len(MIXED.tables.tables)
