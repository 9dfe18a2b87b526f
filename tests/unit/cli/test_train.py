"""The command `train` on one rank, called with its arguments."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from esmm_torchrec.checkpoints.files import checkpoint_folders
from esmm_torchrec.cli.main import main
from esmm_torchrec.data.prepared_form import FORMAT_VERSION
from tests.prepared_data import description_of, write_data_set

TRAIN_ROWS, TEST_ROWS = 300, 120
MODEL = ["--embedding-dim", "8", "--tower", "16", "8", "--batch-size", "32"]
MODEL += ["--epochs", "1"]
STEPS = -(-TRAIN_ROWS // 32)
PROGRESS = ("Laying out ", "Training: ")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=TRAIN_ROWS, test=TEST_ROWS)
    return path


def _train(data: Path, out: Path, *more: str) -> None:
    main(["train", "--data", str(data), "--out", str(out), *MODEL, *more])


def _refused(capsys: pytest.CaptureFixture[str], data: Path, out: Path, *more: str) -> str:
    """Returns the only message of a training that is refused."""
    with pytest.raises(SystemExit) as stop:
        _train(data, out, *more)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return _sentence(said.err)


def _sentence(err: str) -> str:
    """Returns the only line besides progress lines, without the prefix."""
    (line,) = (line for line in err.splitlines() if not line.startswith(PROGRESS))
    assert line.startswith("esmm-torchrec: ")
    return line.removeprefix("esmm-torchrec: ")


def _metrics(out: Path) -> dict[str, Any]:
    """Returns the metrics that do not depend on the speed of the machine."""
    metrics = json.loads((out / "metrics.json").read_text())
    return {name: metrics[name] for name in ("test", "truth")}


def _steps(out: Path) -> list[int]:
    """Returns the step of each line of history.jsonl."""
    return [json.loads(line)["step"] for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A run with a checkpoint every four steps."""
    out = data.parent / "run"
    _train(data, out, "--checkpoint-every", "4")
    return out


def test_it_prints_the_figures_of_metrics_json(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "mine"
    _train(data, out)
    said = capsys.readouterr()
    metrics = _metrics(out)
    for label, figures, calibration in (
        ("click, all impressions", metrics["test"], "ctr"),
        ("conversion if click", metrics["test"], "cvr"),
        ("click and conversion, all impressions", metrics["test"], "ctcvr"),
    ):
        auc = f"{figures[f'{calibration}_auc']:.4f}"
        ne = f"{figures[f'{calibration}_ne']:.4f}"
        oracle = f"{metrics['truth']['oracle'][f'{calibration}_auc']:.4f}"
        assert re.search(rf"^{label} +{auc} +{ne} +[\d.]+ .*{oracle}$", said.out, flags=re.M)
    assert f"run folder: {out} (" in said.out
    assert "esmm on 1 cpu rank: 300 impressions, " in said.out
    for noise in ("Warning", "warn", "Traceback", "W1"):
        assert noise not in said.err
    assert "Training: 300/300 rows" in said.err


def test_given_again_it_measures_again_and_trains_nothing(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _metrics(run)
    history = (run / "history.jsonl").read_text()
    (run / "metrics.json").unlink()
    _train(data, run)
    assert f"resuming from step {STEPS} (" in capsys.readouterr().out
    assert _metrics(run) == before
    assert (run / "history.jsonl").read_text() == history


@pytest.mark.parametrize("step", [4, 8])
def test_from_an_earlier_step_it_ends_the_same(
    step: int, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    (out / "metrics.json").unlink()
    _train(data, out, "--resume", str(step))
    assert f"resuming from step {step} (" in capsys.readouterr().out
    assert _metrics(out) == _metrics(run)
    assert _steps(out) == list(range(1, STEPS + 1))


def test_another_run_in_the_folder_is_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = "choose another --out"
    same = f"{choose}, or give the same option to resume"
    holds = f"{run} holds a run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert _refused(capsys, data, run, "--seed", "5") == (
        f"{holds} with --seed 0 and this one has 5; {same}"
    )
    assert _refused(capsys, data, run, "--resume", "never") == (
        f"{holds} already and --resume is never; {choose}"
    )
    assert _refused(capsys, data, run, "--resume", "7") == (
        f"{run / 'checkpoints'} has no checkpoint of step 7; it has: 4, 8, {STEPS}"
    )
    other = tmp_path / "other"
    write_data_set(other, train=50, test=20, seed=1)
    description = description_of(other)
    description["statistics"]["dense"]["price"]["mean"] += 1
    (other / "dataset.json").write_text(json.dumps(description))
    assert _refused(capsys, other, run) == (
        f"{other} standardised its dense features differently from the data of {run}; give data "
        f"prepared with the same vocabularies, or start another run with --from {run}"
    )
    assert not (other / ".mapped").exists()  # it is refused before any work is done
    assert _refused(capsys, data, data) == f"{data} is not empty and does not hold a run; {choose}"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--embedding-dim", "18"],
            "--embedding-dim 18 is not a positive multiple of 4, which fbgemm's kernels require; "
            "use the next one up",
        ),
        (
            ["--sharding", "data_parallel"],
            "--sharding data_parallel cannot be used with --sparse-optimizer rowwise_adagrad, "
            "which TorchRec provides only in fused form; use adagrad or another sharding",
        ),
        (["--resume", "4"], "{out} does not hold a run to resume; leave out --resume 4"),
        (["--plan", "{out}.json"], "cannot read or write {out}.json: no such file or directory"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda needs a GPU for each rank of this machine but finds 0; start fewer "
            "ranks or use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(
    options: list[str],
    sentence: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    given = [option.format(out=out) for option in options]
    assert _refused(capsys, data, out, *given) == sentence.format(out=out)
    assert not out.exists()


def _change(path: Path, **values: Any) -> None:
    description = description_of(path) | values
    (path / "dataset.json").write_text(json.dumps(description))


def _of_a_later_version(path: Path) -> str:
    _change(path, format_version=FORMAT_VERSION + 1)
    return (
        f"{path} is a prepared data set of format version {FORMAT_VERSION + 1}, but this library "
        f"reads versions 2 and {FORMAT_VERSION}; "
        "prepare the data set again"
    )


def _half_a_file(path: Path) -> str:
    file = path / "train" / "impressions-00000.parquet"
    before = file.stat().st_size
    file.write_bytes(file.read_bytes()[: before // 2])
    return _of_another_size(file, before)


def _of_another_size(file: Path, before: int) -> str:
    return (
        f"{file} has {file.stat().st_size} bytes, but dataset.json says {before}: it is broken or "
        "was cut short; restore it from a copy or prepare the data set again"
    )


def _an_empty_file(path: Path) -> str:
    file = path / "test" / "shared-00000.parquet"
    before = file.stat().st_size
    file.write_bytes(b"")
    return _of_another_size(file, before)


def _no_description(path: Path) -> str:
    (path / "dataset.json").unlink()
    return (
        f"{path} is not a prepared data set (dataset.json is missing); create one with "
        "'esmm-torchrec prepare'"
    )


def _a_vocabulary_larger_than_its_table(path: Path) -> str:
    schema = description_of(path)["schema"]
    schema["tables"][0]["num_embeddings"] -= 5
    _change(path, schema=schema)
    file = path / "vocabulary" / f"{schema['tables'][0]['name']}.parquet"
    rows = schema["tables"][0]["num_embeddings"] + 4
    return f"{file} has {rows} ids, but dataset.json says {rows - 5}; prepare the data set again"


def _an_id_beyond_its_table(path: Path) -> str:
    file = path / "train" / "impressions-00000.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("item")
    beyond = pc.add(table["item"], pa.scalar(1000, pa.int32()))
    before = file.stat().st_size
    pq.write_table(table.set_column(place, table.schema.field(place), beyond), file)
    return _of_another_size(file, before)


def _another_byte(path: Path) -> str:
    file = path / "train" / "impressions-00000.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return (
        f"{file} was changed after it was written (its checksum differs); restore it from a "
        "copy or prepare the data set again"
    )


@pytest.mark.parametrize(
    "spoil",
    [
        _of_a_later_version,
        _half_a_file,
        _an_empty_file,
        _no_description,
        _a_vocabulary_larger_than_its_table,
        _an_id_beyond_its_table,
        _another_byte,
    ],
)
def test_a_spoilt_data_set_is_refused(
    spoil: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(data, tmp_path / "prepared", ignore=shutil.ignore_patterns(".mapped"))
    sentence = spoil(copy)
    assert _refused(capsys, copy, tmp_path / "run") == sentence
    assert not (tmp_path / "run").exists()


def test_a_test_half_without_conversions_has_reasons_for_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prepared"
    write_data_set(data, train=200, test=1, seed=4)
    _train(data, tmp_path / "run")
    said = capsys.readouterr().out
    test = _metrics(tmp_path / "run")["test"]
    assert test["impressions"] == 1
    for task in ("ctr", "cvr", "ctcvr"):
        assert test[f"{task}_auc"] is None
        assert test["reasons"][f"{task}_auc"] in said.splitlines()


def test_a_checkpoint_that_is_broken_is_named_and_kept(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    advice = "; delete it to resume from an earlier one, or train again"
    for file, size in ((".metadata", 100), ("__0_0.distcp", 3000), ("checkpoint.json", 5)):
        out = shutil.copytree(run, tmp_path / file)
        os.truncate(out / last / file, size)
        with pytest.raises(SystemExit) as stop:
            _train(data, out)
        assert stop.value.code == 2
        sentence = _sentence(capsys.readouterr().err)
        assert sentence.startswith(
            f"checkpoint {out / last} is damaged or belongs to another model ("
        )
        assert sentence.endswith(advice)
        assert (out / last / file).stat().st_size == size
    shutil.rmtree(out / last)  # as the message advises
    _train(data, out)
    assert "resuming from step 8 (" in capsys.readouterr().out
    assert _metrics(out) == _metrics(run)


def _start(data: Path, out: Path, *more: str, largest_file_kib: str = "unlimited"):
    command = [sys.executable, "-m", "esmm_torchrec", "train"]
    command += ["--data", str(data), "--out", str(out), *MODEL, *more]
    return subprocess.Popen(
        ["bash", "-c", f'ulimit -f {largest_file_kib} && exec "$@"', "bash", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_said_and_what_was_there_is_gone_on_with(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit on file size allows every file except those of the checkpoints."""
    out = tmp_path / "run"
    process = _start(data, out, "--checkpoint-every", "4", largest_file_kib="40")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    place = re.escape(str(out / "checkpoints" / "step-00000004"))
    assert re.fullmatch(
        rf"checkpoint {place} cannot be written \(.+; [\d,]+ MB are free on its disk\); make room "
        "and rerun the same command",
        _sentence(err),
    )
    assert list((out / "checkpoints").iterdir()) == []
    _train(data, out, "--checkpoint-every", "4")
    assert "resuming" not in capsys.readouterr().out
    assert _metrics(out) == _metrics(run)
    assert _steps(out) == list(range(1, STEPS + 1))


def test_an_interrupted_run_goes_on_to_the_same_end(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after a checkpoint, then SIGTERM after a later one, at any point of the run."""
    long = ["--epochs", "20", "--checkpoint-every", "10"]
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    for number, code, step in ((signal.SIGINT, 130, 10), (signal.SIGTERM, 143, 40)):
        process = _start(data, out, *long)
        try:
            deadline = time.monotonic() + 120
            while not (out / "checkpoints" / f"step-{step:08d}").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == code, err
        last = max(checkpoint_folders(out / "checkpoints"))
        assert _sentence(err) == (
            f"interrupted; rerun the same command to resume {out} from step {last}"
        )
        assert not (out / "metrics.json").exists()
    _train(data, out, *long)
    assert "resuming from step " in capsys.readouterr().out
    _train(data, whole, *long)
    assert _metrics(out) == _metrics(whole)
    assert _steps(out) == _steps(whole)


def test_a_training_that_ends_within_a_pass_is_validated(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(data, out, "--validation-share", "0.2", "--max-steps", "3")
    (measured,) = json.loads((out / "metrics.json").read_text())["validation"]["curve"]
    assert measured["step"] == 3
