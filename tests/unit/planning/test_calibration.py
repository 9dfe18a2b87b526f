"""Calibration, against machines whose numbers are known: what they would measure, they estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from benchmarks.sharding import PARTS, Benchmark, Case, Measurement, calibrate, pairs
from esmm_torchrec.planning.estimates import estimate
from esmm_torchrec.planning.hardware import Hardware, preset
from esmm_torchrec.planning.scenario import Kernel, Scenario, Strategy
from esmm_torchrec.planning.table_list import PlannedFeature, PlannedTable, TableList
from esmm_torchrec.sharding.planner import SparseOptimizerOption
from esmm_torchrec.sharding.process_group import Ranks, process_group

TABLES = TableList(
    tuple(PlannedTable(f"t{n}", 50_000, 64, (PlannedFeature(f"f{n}", 20.0),)) for n in range(32))
)
"""All alike, so that every rank has as much to do on every machine."""
BASE = preset("h100")
SLOW = replace(
    BASE,
    name="slow",
    memory_gb_s=700.0,
    host_to_device_gb_s=9.0,
    backward_multiplier=3.1,
    intra_host_gb_s=31.0,
    inter_host_gb_s=2.3,
    all_to_all_efficiency=0.7,
    reduce_scatter_efficiency=0.9,
    all_gather_efficiency=0.8,
    all_reduce_efficiency=0.6,
    tower_efficiency=0.02,
)


def on(machine: Hardware, kernel: Kernel = "fused") -> Scenario:
    return Scenario(TABLES, machine, 1024, kernels=(kernel,), sparse_optimizer="adagrad")


def ranks_of(world_size: int) -> Ranks:
    return Ranks(0, world_size, 0, min(world_size, 8), torch.device("cuda"))


def measured_on(
    machine: Hardware, base: Hardware, strategy: Strategy, world_size: int, kernel: Kernel
) -> Case:
    """A case as a benchmark would find it on a machine that is as its numbers say."""
    true = estimate(on(machine, kernel), strategy, world_size)
    assert true.placed is not None
    parts = true.placed.parts
    times = dict.fromkeys(PARTS, 0.0) | {
        "forward": parts.forward + parts.prefetch,
        "forward_comms": parts.forward_comms,
        "towers": parts.towers + parts.towers_all_reduce,
        "backward_comms": parts.backward_comms,
        "backward": parts.backward,
    }
    if strategy == "data_parallel":
        # The ring runs inside the backward pass and the update is what else is counted there.
        ring = machine.all_reduce_ms(TABLES.nbytes, world_size)
        times["backward"] += ring
        times["update"] = times["backward_comms"] - ring
        times["backward_comms"] = 0.0
    measured = Measurement(**times, step_of_rounds=(parts.step,), weights_bytes=(), peak_bytes=())
    assert measured.step == pytest.approx(parts.step)
    return Case(strategy, kernel, estimate(on(base, kernel), strategy, world_size), measured)


STRATEGIES: tuple[tuple[Strategy, Kernel], ...] = (
    ("table_wise", "fused"),
    ("row_wise", "fused"),
    ("data_parallel", "dense"),
)


@pytest.mark.parametrize("world_size", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("base", [BASE, replace(BASE, all_to_all_efficiency=0.4, name="before")])
def test_what_was_measured_is_what_is_estimated_next(base: Hardware, world_size: int) -> None:
    cases = [measured_on(SLOW, base, *case[:1], world_size, case[1]) for case in STRATEGIES]
    found = calibrate(base, cases, on(base), ranks_of(world_size))
    for case in cases:
        again = estimate(on(found, case.kernel), case.strategy, world_size)
        assert again.step_ms == pytest.approx(case.measured.step, rel=1e-6), case.name
        assert again.placed is not None
        parts = again.placed.parts
        assert parts.towers + parts.towers_all_reduce == pytest.approx(case.measured.towers)
    # And of what was not measured.
    unseen = estimate(on(found), "column_wise", world_size)
    assert unseen.step_ms == pytest.approx(estimate(on(SLOW), "column_wise", world_size).step_ms)
    if world_size > 8:
        # With several hosts the link between them is what is found, up to the share that the
        # fastest collective reaches of it.
        assert 0.6 * SLOW.inter_host_gb_s < found.inter_host_gb_s <= SLOW.inter_host_gb_s


def test_a_collective_that_nobody_measured_keeps_its_share() -> None:
    base = replace(BASE, all_reduce_efficiency=0.25)
    case = measured_on(SLOW, base, "table_wise", 8, "fused")
    found = calibrate(base, [case], on(base), ranks_of(8))
    assert found.all_reduce_efficiency == 0.25
    assert found.intra_host_gb_s == pytest.approx(0.7 * SLOW.intra_host_gb_s)


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_the_way_to_the_host_is_that_of_the_kernels_with_rows_there(kernel: Kernel) -> None:
    kinds: tuple[tuple[Strategy, Kernel], ...] = (("table_wise", "fused"), ("table_wise", kernel))
    cases = [measured_on(SLOW, BASE, strategy, 8, kind) for strategy, kind in kinds]
    found = calibrate(BASE, cases, on(BASE), ranks_of(8))
    assert found.host_to_device_gb_s == pytest.approx(SLOW.host_to_device_gb_s)
    without = calibrate(BASE, cases[:1], on(BASE), ranks_of(8))
    assert without.host_to_device_gb_s == BASE.host_to_device_gb_s


@pytest.mark.parametrize("optimizer", get_args(SparseOptimizerOption))
def test_dense_tables_are_trained_by_the_optimizer_that_was_asked_for(
    optimizer: SparseOptimizerOption,
) -> None:
    if optimizer == "rowwise_adagrad":
        return  # It has no dense form.
    with process_group("cpu") as ranks:

        def on_rank() -> str:
            tables = TableList((PlannedTable("a", 50, 8, (PlannedFeature("a"),)),))
            machine = replace(preset("cpu"), ranks_per_host=1)
            one = Scenario(tables, machine, 16, kernels=("dense",), sparse_optimizer=optimizer)
            planned = estimate(one, "table_wise", 1).placed
            assert planned is not None
            return type(Benchmark(one, planned.plan, ranks).table_optimizer).__name__

        assert on_rank().lower() == optimizer


def test_rounds_that_overlap_are_ties_and_not_right_or_wrong() -> None:
    rounds = {"a": [10.0, 11.0], "b": [10.5, 12.0], "c": [20.0, 21.0]}
    found = pairs(rounds, {"a": 2.0, "b": 1.0, "c": 1.5})
    assert found.ties == ("a and b",)
    assert (found.in_order, found.wrong) == (1, ("a before c",))
