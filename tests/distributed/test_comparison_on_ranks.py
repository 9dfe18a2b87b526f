"""Comparison on two ranks against the same comparison on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esmm_torchrec.comparison.options import ComparisonOptions
from esmm_torchrec.comparison.study import compare
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.sharding.process_group import process_group
from tests.ranks import run_on_ranks

OPTIONS = ComparisonOptions(
    methods=("unbias", "esmm"),
    seeds=1,
    trials=1,
    epochs=3,
    tower=(8,),
    test_impressions=1500,
    device="cpu",
)
GLOBAL_BATCH = 2000
"""All training rows."""


def _compare(out: Path) -> dict[str, Any]:
    with process_group("cpu") as ranks:
        options = replace(OPTIONS, batch_size=GLOBAL_BATCH)
        world = World(impressions=4000, ctr=0.2, cvr=0.4)
        folder = out / f"{ranks.world_size}-ranks"
        return compare(options, folder, ranks, data=None, world=world, command="test")


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    (alone,) = run_on_ranks(1, _compare, tmp_path)
    first, second = run_on_ranks(2, _compare, tmp_path)
    assert first == second
    for name, fractions in alone["methods"].items():
        for metric, figure in fractions["1"].items():
            other = first["methods"][name]["1"][metric]["mean"]
            if figure["mean"] is None:
                assert other is None
            else:
                assert other == pytest.approx(figure["mean"], rel=1e-3, abs=1e-4), metric
    accepted = [results["training"]["UNBIAS"]["1"] for results in (alone, first)]
    assert accepted[0]["training_rows"] == accepted[1]["training_rows"]
