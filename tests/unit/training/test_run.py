"""One training run on one rank, from Python: what it writes, when it stops, what identifies it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esmm_torchrec.checkpoints.files import checkpoint_folders
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import Interrupted, RunError
from esmm_torchrec.runs.lock import RunLock
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training import run as run_module
from esmm_torchrec.training.callbacks import _short
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import _interrupts_in_words, train
from esmm_torchrec.training.trainer import Trainer
from tests.plain_esmm import read_frame
from tests.prepared_data import write_data_set
from tests.ranks import train_here

TRAIN_ROWS, TEST_ROWS = 410, 130
OPTIONS = TrainOptions(
    batch_size=20, embedding_dim=8, tower=(8,), epochs=2, sparse_lr=0.2, dense_lr=0.01
)
STEPS_PER_EPOCH = -(-TRAIN_ROWS // 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=TRAIN_ROWS, test=TEST_ROWS)
    return path


@pytest.fixture(scope="module")
def trained(data: Path) -> tuple[Path, dict[str, Any]]:
    """A run folder and what `train` returned."""
    out = data.parent / "run"
    return out, train_here(data, out, replace(OPTIONS, checkpoint_every=15))


def _history(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_it_should(trained: tuple[Path, dict[str, Any]], data: Path) -> None:
    out, metrics = trained
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "history.jsonl", "metrics.json", "plan.json", "plots",
        "preprocessing", "tensorboard",
    ]  # fmt: skip
    assert list(checkpoint_folders(out / "checkpoints")) == [15, 30, 42]
    assert len(list((out / "checkpoints").iterdir())) == 3
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for name in ("history.png", "calibration.png"):
        assert (out / "plots" / name).read_bytes().startswith(b"\x89PNG")
    copied = PreparedDataSet.open(out / "preprocessing", data_files=False)
    assert copied.schema == PreparedDataSet.open(data).schema


def test_everything_is_resolved_in_the_config(
    trained: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    assert config["options"].keys() == {field.name for field in fields(TrainOptions)}
    assert config["options"]["checkpoint_every"] == 15
    (started,) = config["history"]
    assert started["step"] == 0
    assert started["data"] == {
        "path": str(data.resolve()),
        "fingerprint": PreparedDataSet.open(data).fingerprint,
    }
    assert started["environment"]["torch"] == version("torch")
    # Each option either identifies the run or belongs to its history.
    options = {field.name for field in fields(TrainOptions)}
    assert config["identity"].keys() | started["options"].keys() == options
    assert not config["identity"].keys() & started["options"].keys()
    assert {"epochs", "sparse_lr", "batch_size", "device"} <= started["options"].keys()


def test_history_and_tensorboard_say_the_same(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    history = _history(out)
    every = 2 * STEPS_PER_EPOCH // 10
    assert [line["step"] for line in history] == [*range(every, 42, every), 42]
    assert [line["epoch"] for line in history] == [
        int(line["step"] >= STEPS_PER_EPOCH) + int(line["step"] == 42) for line in history
    ]
    for line in history:
        assert np.isfinite(list(line.values())).all()
        for task in ("ctr", "cvr", "ctcvr"):
            assert {f"{task}_auc", f"{task}_ne", f"{task}_calibration"} <= line.keys()
        assert line["samples_per_second"] > 0
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "ctr_auc"):
        told = {event.step: event.value for event in board.Scalars(name)}
        assert told == pytest.approx({line["step"]: line[name] for line in history}, rel=1e-6)


def test_the_loss_in_history_is_the_mean_since_the_line_before(
    trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """With a line for every step it is each step's own; the first is at the start's base rates."""
    out, _ = trained
    single = tmp_path / "single"
    train_here(data, single, replace(OPTIONS, max_steps=8))
    losses = [line["loss"] for line in _history(single)]
    assert len(losses) == 8
    assert _history(out)[0]["loss"] == pytest.approx(np.mean(losses[:4]), rel=1e-5)
    assert _history(out)[1]["loss"] == pytest.approx(np.mean(losses[4:]), rel=1e-5)
    frame = read_frame(PreparedDataSet.open(data), "train")
    click, both = frame["click"].mean(), (frame["click"] * frame["conversion"]).mean()
    entropy = sum(-p * np.log(p) - (1 - p) * np.log(1 - p) for p in (click, both))
    assert losses[0] == pytest.approx(entropy, rel=0.1)


def test_it_learns(trained: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = trained
    history = _history(out)
    first, last = (np.mean([line["loss"] for line in part]) for part in (history[:2], history[-2:]))
    assert last < first - 0.05
    assert 0.6 < metrics["test"]["ctr_auc"] < metrics["truth"]["oracle"]["ctr_auc"] + 0.05


def test_it_stops_after_max_steps(data: Path, tmp_path: Path) -> None:
    train_here(data, tmp_path, replace(OPTIONS, max_steps=7))
    assert [line["step"] for line in _history(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert list(checkpoint_folders(tmp_path / "checkpoints")) == [7]
    whole = replace(OPTIONS, max_steps=1000)
    train_here(data, tmp_path / "whole", whole)
    assert _history(tmp_path / "whole")[-1]["step"] == 2 * STEPS_PER_EPOCH


def test_the_same_options_give_the_same_model_and_another_seed_another(
    trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    _, metrics = trained
    again = train_here(data, tmp_path / "again", OPTIONS)
    assert again["test"] == metrics["test"]
    other = train_here(data, tmp_path / "other", replace(OPTIONS, seed=1))
    assert other["test"]["ctr_auc"] != metrics["test"]["ctr_auc"]


def test_it_counts_what_it_measures_on(trained: tuple[Path, dict[str, Any]], data: Path) -> None:
    _, metrics = trained
    frame = read_frame(PreparedDataSet.open(data), "test")
    test = metrics["test"]
    assert test["impressions"] == TEST_ROWS == len(frame)
    assert test["clicks"] == frame["click"].sum()
    assert test["conversions"] == (frame["click"] * frame["conversion"]).sum()
    throughput = metrics["throughput"]
    assert throughput["train_samples_per_second"] == pytest.approx(
        2 * TRAIN_ROWS / throughput["train_seconds"]
    )


def test_a_run_of_other_options_is_left_alone(
    trained: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, _ = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def refused() -> None:
        with process_group("cpu") as ranks, pytest.raises(RunError, match="`tower` 8 and this one"):
            train(data, out, replace(OPTIONS, tower=(9,)), ranks)

    refused()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_broken_plan_does_not_keep_a_run_from_resuming(
    trained: tuple[Path, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, metrics = trained
    again = tmp_path / "again"
    shutil.copytree(out, again)
    plan = again / "plan.json"
    plan.write_text(plan.read_text()[:200])
    options = replace(OPTIONS, resume="15", checkpoint_every=20)
    assert train_here(data, again, options)["test"] == metrics["test"]
    assert f"warning: {plan} line" in capsys.readouterr().out
    assert plan.read_text() == (out / "plan.json").read_text()


def test_resuming_from_an_earlier_step_drops_the_later_ones(
    trained: tuple[Path, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Paths may be strings, and other options than at first are noted and told."""
    out, metrics = trained
    again = tmp_path / "again"
    shutil.copytree(out, again)
    plan = again / "plan.json"
    plan.write_text(plan.read_text().replace('"table_wise"', '"row_wise"'))
    options = replace(OPTIONS, resume="15", checkpoint_every=20, sharding="row_wise")
    assert train_here(str(data), str(again), options)["test"] == metrics["test"]
    said = capsys.readouterr().out.partition("placed differently from before:\n")[2]
    tables = json.loads(plan.read_text())["tables"]
    for line, name in zip(said.splitlines()[: len(tables)], tables, strict=True):
        assert line == f"  table {name!r}: row_wise -> table_wise"
    # Nothing is divided on one rank, whatever the option says.
    assert {table["sharding_type"] for table in tables.values()} == {"table_wise"}
    assert list(checkpoint_folders(again / "checkpoints")) == [15, 20, 40, 42]
    assert [line["step"] for line in _history(again)] == [line["step"] for line in _history(out)]
    config = json.loads((again / "config.json").read_text())
    started, resumed = config["history"]
    assert [started] == json.loads((out / "config.json").read_text())["history"]
    noted = {name: resumed["options"][name] for name in ("checkpoint_every", "sharding", "plan")}
    assert noted == {"checkpoint_every": 20, "sharding": "row_wise", "plan": None}
    assert {name: resumed[name] for name in ("step", "ranks", "device", "environment")} == {
        "step": 15,
        **{name: started[name] for name in ("ranks", "device", "environment")},
    }


def test_more_epochs_continue_a_finished_run(
    trained: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out, again = trained[0], tmp_path / "again"
    first = train_here(data, again, replace(OPTIONS, epochs=1))
    assert _history(again)[-1]["step"] == STEPS_PER_EPOCH
    assert first["test"] != trained[1]["test"]
    assert train_here(data, again, OPTIONS)["test"] == trained[1]["test"]
    assert _history(again)[-1]["step"] == _history(out)[-1]["step"] == 2 * STEPS_PER_EPOCH


def test_other_data_continue_a_run_from_their_first_row(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other data, resuming is exact too; on the first data again, it starts at their start."""
    other = tmp_path / "other"
    write_data_set(other, train=90, test=TEST_ROWS, seed=1)
    one_pass = replace(OPTIONS, epochs=1, checkpoint_every=2)
    notice = f"{other.resolve()} is not the data that step {STEPS_PER_EPOCH} was trained on"
    train_here(data, tmp_path / "run", one_pass)
    metrics = train_here(other, tmp_path / "run", one_pass)
    assert notice in capsys.readouterr().out
    assert _history(tmp_path / "run")[-1]["step"] == STEPS_PER_EPOCH + 5
    throughput = metrics["throughput"]
    assert throughput["train_samples_per_second"] == pytest.approx(90 / throughput["train_seconds"])

    step = str(STEPS_PER_EPOCH + 3)
    train_here(data, tmp_path / "stopped", replace(one_pass, checkpoint_every=0))
    train_here(other, tmp_path / "stopped", replace(one_pass, max_steps=STEPS_PER_EPOCH + 3))
    resumed = train_here(other, tmp_path / "stopped", replace(one_pass, resume=step))
    assert "is not the data" not in capsys.readouterr().out.partition(f"step {step} (")[2]
    assert resumed["test"] == metrics["test"]


def test_two_trainings_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()

    def refused() -> None:
        with process_group("cpu") as ranks, pytest.raises(RunError, match="is in use by another"):
            train(data, tmp_path, OPTIONS, ranks)

    refused()
    lock.close()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_step_back_leaves_the_chosen_step_the_last(
    trained: tuple[Path, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained[0], again)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "steps", interrupted)
    with pytest.raises(Interrupted) as interrupt:
        train_here(data, again, replace(OPTIONS, resume="15"))
    assert str(interrupt.value) == (
        f"interrupted; give `resume` auto to resume {again} from step 15"
    )
    assert list(checkpoint_folders(again / "checkpoints")) == [15]
    assert not (again / "metrics.json").exists()
    assert _history(again)[-1]["step"] <= 15
    with pytest.raises(Interrupted) as interrupt:
        train_here(data, again, OPTIONS)
    assert str(interrupt.value) == (
        f"interrupted; rerun the same command to resume {again} from step 15"
    )
    with pytest.raises(Interrupted) as interrupt:
        train_here(data, tmp_path / "new", OPTIONS)
    assert str(interrupt.value) == (
        f"interrupted before a checkpoint was written to {tmp_path / 'new'}; rerun the same "
        "command to start again, and set `checkpoint_every` to save checkpoints on the way"
    )


def test_sigterm_is_an_interrupt_and_stays_what_it_was_after(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "steps", terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, after other tests
    try:
        with pytest.raises(Interrupted):
            train_here(data, tmp_path, OPTIONS)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_plan_is_said_to_decide_alone(
    trained: tuple[Path, dict[str, Any]],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = trained[0] / "plan.json"
    train_here(data, tmp_path, replace(OPTIONS, max_steps=1, plan=plan, sharding="row_wise"))
    said = f"placed according to {plan}; the sharding row_wise is not used beside it\n"
    assert said in capsys.readouterr().out
    options = json.loads((tmp_path / "config.json").read_text())["options"]
    assert (options["sharding"], options["plan"]) == (None, str(plan))


def test_the_rows_of_a_method_that_needs_a_pctr_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks would train other networks, which would choose other rows."""
    options = replace(OPTIONS, method="unbias", max_steps=6, checkpoint_every=3)
    metrics = train_here(data, tmp_path / "run", options)
    frame = read_frame(PreparedDataSet.open(data), "train")
    assert np.load(tmp_path / "run" / "pctr.npz")["pctr"].shape == (frame["click"].sum(),)

    def not_again(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(run_module, "out_of_fold_pctr", not_again)
    resumed = train_here(data, tmp_path / "run", replace(options, resume="3"))
    assert resumed["test"] == metrics["test"]


def test_what_stands_beside_the_bar_is_short() -> None:
    figures = {"loss": 0.123456, "epoch": 1, "samples_per_second": 1e5}
    assert _short(figures) == "loss 0.1235"
    for task in ("ctr", "cvr", "ctcvr"):
        figures |= {f"{task}_auc": 0.61234, f"{task}_ne": 0.98765, f"{task}_calibration": 1.0}
    assert _short(figures) == (
        "loss 0.1235, AUC/NE ctr 0.612/0.988 cvr 0.612/0.988 ctcvr 0.612/0.988"
    )


@pytest.mark.parametrize("option", ["sharding", "checkpoint_every", "device"])
def test_what_does_not_identify_a_run_may_change(
    option: str, trained: tuple[Path, dict[str, Any]], data: Path
) -> None:
    out, metrics = trained
    value = {"sharding": "row_wise", "checkpoint_every": 3, "device": "cpu"}[option]
    assert train_here(data, out, replace(OPTIONS, **{option: value}))["test"] == metrics["test"]


def test_the_history_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    data: Path, tmp_path: Path
) -> None:
    """Stopped between two lines, so that losses and windows are carried over."""
    options = replace(OPTIONS, checkpoint_every=10)
    train_here(data, tmp_path / "whole", options)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    train_here(data, tmp_path / "resumed", replace(options, resume="10"))
    histories = [_history(tmp_path / name) for name in ("whole", "resumed")]
    for line in (line for history in histories for line in history):
        del line["samples_per_second"]
    assert histories[0] == histories[1]


def test_an_interrupt_that_comes_behind_a_lost_rank_is_an_interrupt(tmp_path: Path) -> None:
    """A signal to all ranks may end another one first, and with it what this one waits for."""
    lost = RuntimeError("Connection closed by peer")

    def interrupted_soon() -> None:
        with _interrupts_in_words(tmp_path, "auto"):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise lost

    with pytest.raises(Interrupted, match="rerun the same command to start again"):
        interrupted_soon()
    with pytest.raises(RuntimeError, match="by peer"), _interrupts_in_words(tmp_path, "auto"):
        raise lost


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capable", [False, True])
def test_slow_bfloat16_is_told(
    dtype: str,
    capable: bool,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    train_here(data, tmp_path / "run", replace(OPTIONS, dtype=dtype, max_steps=1))
    warned = "this processor has no bfloat16 instructions" in capsys.readouterr().out
    assert warned == (dtype == "bfloat16" and not capable)


def test_an_interrupt_that_python_ignored_is_not_lost(tmp_path: Path) -> None:
    def interrupted() -> None:
        with _interrupts_in_words(tmp_path, "auto"):
            with suppress(KeyboardInterrupt):  # as in a finaliser
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(Interrupted, match="before a checkpoint was written"):
        interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
