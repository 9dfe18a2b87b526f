"""A run that starts from another one, whose data knew fewer ids."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tests.prepared_data
from esmm_torchrec.errors import EsmmTorchrecError, RunError
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train
from tests.prepared_data import ROWS, write_data_set
from tests.ranks import train_here

OPTIONS = TrainOptions(batch_size=40, embedding_dim=8, tower=(8,), epochs=1, sparse_lr=0.2)
STILL = replace(OPTIONS, sparse_lr=1e-30, dense_lr=1e-30, max_steps=1)
"""Trains without changing a weight."""
NEW_ITEMS = 15


def _refusal(data: Path, out: Path, options: TrainOptions) -> str:
    def refused() -> str:
        with process_group("cpu") as ranks, pytest.raises(EsmmTorchrecError) as refusal:
            train(data, out, options, ranks)
        return str(refusal.value)

    return refused()


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return Predictor(run).task.state_dict()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=410, test=90)
    return path


@pytest.fixture(scope="module")
def next_day(data: Path) -> Path:
    path = data.parent / "next_day"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tests.prepared_data.ROWS, "item", ROWS["item"] + NEW_ITEMS)
        write_data_set(path, train=200, test=90, seed=1)
    return path


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    out = data.parent / "run"
    train_here(data, out, OPTIONS)
    return out


def test_rows_of_known_ids_are_the_runs_and_new_ones_are_drawn(
    run: Path, next_day: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started, fresh = tmp_path / "started", tmp_path / "fresh"
    train_here(next_day, started, replace(STILL, start_from=run))
    assert f"starting from the weights and optimiser state of {run}" in capsys.readouterr().out
    train_here(next_day, fresh, STILL)
    drawn = _weights(fresh)
    for key, weight in _weights(started).items():
        known = _weights(run)[key]
        is_item = len(known) == ROWS["item"] + 1
        assert len(weight) - len(known) == (NEW_ITEMS if is_item else 0), key
        # First-order columns begin at 0, where one step of 1e-30 is not lost to rounding.
        torch.testing.assert_close(weight[: len(known)], known, rtol=0, atol=1e-25)
        drawn_rows = drawn[key][len(known) :]
        torch.testing.assert_close(weight[len(known) :], drawn_rows, rtol=0, atol=1e-25)

    (entry,) = json.loads((started / "config.json").read_text())["history"]
    assert entry["options"]["start_from"] == str(run)
    train_here(next_day, started, replace(OPTIONS, start_from=run))
    assert "resuming from step 1 " in capsys.readouterr().out


def test_a_run_does_not_start_from_what_means_something_else(
    run: Path, data: Path, next_day: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start = replace(STILL, start_from=run)
    assert _refusal(next_day, out, replace(start, embedding_dim=16)) == (
        f"{run} has `embedding_dim` 8 and this one has 16; give the same option to start from it"
    )
    advice = (
        f"the data of {run}; to start from that run, give data whose vocabularies begin with those "
        "of the run"
    )
    fewer = tmp_path / "fewer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tests.prepared_data.ROWS, "item", ROWS["item"] - 1)
        write_data_set(fewer, train=200, test=90, seed=1)
    assert _refusal(fewer, out, start) == (
        f"{fewer} gives ids of table 'item' other rows than {advice}"
    )
    empty = shutil.copytree(run, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    assert _refusal(data, out, replace(start, start_from=empty)) == (
        f"{empty} has no checkpoint yet; wait for its first one"
    )
    assert re.match(
        rf"{data} is not a run folder", _refusal(data, out, replace(start, start_from=data))
    )
    assert not out.exists()
    with pytest.raises(RunError):
        Predictor(out)
