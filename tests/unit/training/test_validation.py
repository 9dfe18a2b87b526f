"""Held-out impressions: which they are, what is measured on them, and when training stops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from esmm_torchrec.checkpoints.files import checkpoint_folders, find_best
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.data.subsets import only_ids_of
from esmm_torchrec.errors import DataError, RunError
from esmm_torchrec.runs.restore import restore
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.chosen_checkpoint import chosen_step
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.passes import PATIENCE
from esmm_torchrec.training.validation import hold_out
from tests.prepared_data import write_data_set
from tests.ranks import train_here

OPTIONS = TrainOptions(
    batch_size=40,
    embedding_dim=4,
    tower=(8,),
    sparse_lr=0.2,
    dense_lr=0.02,
    validation_share=0.25,
    device="cpu",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=500, test=150, users=80)
    return path


@pytest.fixture(scope="module")
def trained(data: Path) -> tuple[Path, dict[str, Any]]:
    """A run until the held-out part stops improving."""
    out = data.parent / "run"
    options = replace(OPTIONS, epochs="auto", checkpoint_every=5)
    return out, train_here(data, out, options)


def test_users_are_held_out_whole(data: Path) -> None:
    split = MappedSplit.open(PreparedDataSet.open(data), "train")
    held_out = hold_out(split, share=0.25, by="hash")
    users = split.scalars["group_id"]
    assert not set(users[held_out.rows]) & set(users[held_out.kept])
    rows = np.sort(np.concatenate([held_out.rows, held_out.kept]))
    np.testing.assert_array_equal(rows, np.arange(500))
    assert 0.1 < len(held_out.rows) / 500 < 0.4


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataSet:
    rng = np.random.default_rng(0)
    click = rng.integers(0, 2, 300)
    frame = pd.DataFrame(
        {
            "item": rng.integers(0, 9, 300),
            "click": click,
            "conversion": click * rng.integers(0, 2, 300),
            "at": rng.permutation(300) // 3,
        }
    )
    return prepare_table(
        tmp_path_factory.mktemp("timed") / "prepared",
        train=frame,
        test=frame,
        click="click",
        conversion="conversion",
        ids=["item"],
        timestamp="at",
    )


def test_the_latest_are_held_out_by_time(timed: PreparedDataSet) -> None:
    split = MappedSplit.open(timed, "train")
    held_out = hold_out(split, share=0.1, by="time")
    times = split.scalars["timestamp"]
    assert times[held_out.kept].max() < times[held_out.rows].min()
    assert len(held_out.rows) == 30


def test_time_needs_timestamps(data: Path) -> None:
    split = MappedSplit.open(PreparedDataSet.open(data), "train")
    with pytest.raises(DataError, match="no timestamps to validate by; prepare it with `timest"):
        hold_out(split, share=0.1, by="time")


def test_a_share_that_leaves_nothing_is_refused(timed: PreparedDataSet) -> None:
    split = MappedSplit.open(timed, "train")
    with pytest.raises(DataError, match="leaves 0 to train on and 300 to validate on; choose"):
        hold_out(split, share=0.999, by="time")


def test_training_stops_and_the_best_checkpoint_is_the_model(
    trained: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, metrics = trained
    validation = metrics["validation"]
    assert json.loads((out / "metrics.json").read_text())["validation"] == validation
    curve = validation["curve"]
    means = [np.mean([entry[f"{task}_ne"] for task in ("ctr", "cvr", "ctcvr")]) for entry in curve]
    best = int(np.argmin(means))
    assert len(curve) == best + 1 + PATIENCE
    assert [entry["epoch"] for entry in curve] == list(range(1, len(curve) + 1))
    assert validation["step"] == curve[best]["step"]
    run = RunFolder.open(out)
    assert chosen_step(run) == find_best(run.checkpoints) == validation["step"]
    assert max(checkpoint_folders(run.checkpoints)) == curve[-1]["step"]

    split = MappedSplit.open(PreparedDataSet.open(data), "train")
    held_out = hold_out(split, share=0.25, by="hash")
    with process_group("cpu") as ranks:
        model = restore(run, ranks, batch_size=64)
        known = only_ids_of(split, split, held_out.kept)
        scored = score_split(model, known, ranks, rows=held_out.rows)
        tested = score_split(model, MappedSplit.open(PreparedDataSet.open(data), "test"), ranks)
    assert scored is not None
    assert tested is not None
    for part, figures in ((scored, validation), (tested, metrics["test"])):
        auc = roc_auc_score(part.labels["click"], part.scores["ctr"].values)
        assert figures["ctr_auc"] == pytest.approx(auc, abs=1e-9)


def test_the_held_out_curve_is_in_the_history(trained: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = trained
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    measured = {line["step"]: line for line in lines if "validation_ctr_auc" in line}
    for entry in metrics["validation"]["curve"]:
        assert measured[entry["step"]]["validation_cvr_ne"] == entry["cvr_ne"]


def test_a_run_is_resumed_exactly(
    trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """Within a pass, at a measurement that was the best, and just before one."""
    out, metrics = trained
    options = replace(OPTIONS, epochs="auto", checkpoint_every=5)
    steps = sorted(checkpoint_folders(out / "checkpoints"))
    ends = [entry["step"] for entry in metrics["validation"]["curve"]]
    best = metrics["validation"]["step"]
    within = next(step for step in steps if step not in ends and step > ends[0])
    for step in {within, best}:
        again = tmp_path / str(step)
        shutil.copytree(out, again)
        resumed = train_here(data, again, replace(options, resume=str(step)))
        assert resumed["validation"] == metrics["validation"]
        assert resumed["test"] == metrics["test"]


def test_a_run_killed_before_a_measurement_makes_up_for_it(data: Path, tmp_path: Path) -> None:
    """A checkpoint at the end of a pass is written before what is measured there."""
    rows = len(hold_out(MappedSplit.open(PreparedDataSet.open(data), "train"),
                        share=0.25, by="hash").kept)  # fmt: skip
    steps = -(-rows // 40)
    options = replace(OPTIONS, epochs=2, checkpoint_every=steps)
    metrics = train_here(data, tmp_path / "run", options)
    assert [entry["epoch"] for entry in metrics["validation"]["curve"]] == [1, 2]
    assert find_best(tmp_path / "run" / "checkpoints") is None, "the last checkpoint is the model"
    resumed = train_here(data, tmp_path / "run", replace(options, resume=str(steps)))
    assert resumed["validation"] == metrics["validation"]


def test_rows_once_trained_on_are_not_held_out(data: Path, tmp_path: Path) -> None:
    """Neither in a finished run nor within a pass, where the position would be beyond the end."""
    options = replace(OPTIONS, epochs=2, validation_share=0.0)
    for max_steps in (None, 11):
        out = tmp_path / f"run-{max_steps}"
        train_here(data, out, replace(options, max_steps=max_steps))
        for share in (0.25, 0.5):
            with pytest.raises(RunError, match="with `validation_share` 0"):
                train_here(data, out, replace(options, validation_share=share))
    run = RunFolder.open(out)
    del run.config["identity"]["validation_share"]  # as earlier versions wrote it
    assert run.difference({"validation_share": 0.25}) is not None
    assert run.difference({"validation_share": 0.0}) is None


def test_a_step_whose_best_checkpoint_is_gone_is_refused_before_training(
    trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out, metrics = trained
    again = tmp_path / "run"
    shutil.copytree(out, again)
    best, folders = metrics["validation"]["step"], checkpoint_folders(again / "checkpoints")
    later = max(folders)
    assert best < later
    shutil.rmtree(folders[best])
    (again / "metrics.json").unlink()
    with pytest.raises(RunError, match=f"from step {later}, as the checkpoint of step {best}"):
        train_here(data, again, replace(OPTIONS, epochs="auto", resume=str(later)))
