"""The example that does the whole job, under torchrun on two ranks, in an empty folder."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from tests.ranks import torchrun

PROGRAM = Path(__file__).parents[2] / "examples" / "train_ali_ccp.py"
IMPRESSIONS = 6000
SMALL = ["--batch-size", "512", "--embedding-dim", "8", "--tower", "16", "8"]
SMALL += ["--epochs", "1"]


def _bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a data set but the copy that is laid out for reading."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".mapped" not in path.parts
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with contextlib.chdir(folder):
        return torchrun(2, PROGRAM, *SMALL, *arguments)


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    """With neither --raw nor --data."""
    return _run(folder, "--impressions", str(IMPRESSIONS))


def test_in_an_empty_folder_it_does_the_whole_job(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["generated", "runs"]
    raw, prepared = folder / "generated" / "ali-ccp-6000", "ali-ccp-6000-prepared"
    assert sorted(path.name for path in raw.parent.iterdir()) == [raw.name, prepared]
    (run,) = (folder / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    test = metrics["test"]
    assert test["impressions"] == IMPRESSIONS // 2
    assert test["clicks"] > test["conversions"] > 0
    for auc in ("ctr_auc", "cvr_auc", "ctcvr_auc"):
        assert 0 < test[auc] < 1
        assert 0.6 < metrics["truth"]["oracle"][auc] < 1
    assert f"esmm on 2 cpu ranks: {IMPRESSIONS // 2:,} impressions, " in first.stdout
    # The table once, by one rank, and where the run is.
    row = rf"^click, all impressions +{test['ctr_auc']:.4f} "
    assert len(re.findall(row, first.stdout, flags=re.M)) == 1
    assert f"run folder: runs/{run.name} (" in first.stdout


def test_nothing_is_said_that_is_of_no_use(first: subprocess.CompletedProcess[str]) -> None:
    progress = r"(generate|(common|sample)_\w+\.csv|encode \w+|Laying out \w+|Training|Evaluating)"
    for line in first.stderr.splitlines():
        assert re.match(rf"{progress}: [\d.]+[kM]?/", line), line


def test_run_again_it_takes_the_data_that_is_there(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    """And a new run, of the same figures: nothing of it depends on the time of day."""
    assert first.returncode == 0
    data = folder / "generated"
    before = _bytes(data)
    times = {
        path: path.stat().st_mtime_ns for path in data.rglob("*") if ".mapped" not in path.parts
    }
    (old,) = (folder / "runs").iterdir()
    second = _run(folder, "--impressions", str(IMPRESSIONS), "--out", "runs/second")
    assert second.returncode == 0, second.stderr
    assert "generate" not in second.stderr
    assert "sample_skeleton" not in second.stderr
    assert _bytes(data) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    metrics = [
        json.loads((run / "metrics.json").read_text())["test"]
        for run in (old, folder / "runs" / "second")
    ]
    assert metrics[0].pop("reasons") == metrics[1].pop("reasons") == {}
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


def test_given_raw_files_it_prepares_them_beside(
    folder: Path, first: subprocess.CompletedProcess[str]
) -> None:
    assert first.returncode == 0
    raw = folder / "mine"
    raw.mkdir()
    for path in (folder / "generated" / "ali-ccp-6000").iterdir():
        (raw / path.name).hardlink_to(path)
    third = _run(folder, "--raw", "mine", "--out", "runs/raw", "--max-steps", "2")
    assert third.returncode == 0, third.stderr
    assert _bytes(folder / "mine-prepared") == _bytes(folder / "generated/ali-ccp-6000-prepared")
    config = json.loads((folder / "runs" / "raw" / "config.json").read_text())
    assert config["history"][-1]["data"]["path"] == str((folder / "mine-prepared").resolve())
    assert config["history"][-1]["ranks"] == 2


def test_raw_and_data_together_are_refused(tmp_path: Path) -> None:
    failed = _run(tmp_path, "--raw", "a", "--data", "b")
    assert failed.returncode == 1
    assert failed.stderr.count("esmm-torchrec: ") == 1
    assert "esmm-torchrec: give --raw or --data, not both\n" in failed.stderr
    assert "exitcode  : 2 " in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_folder_one_stands_in_may_hold_the_raw_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, prepared = tmp_path / "raw", tmp_path / "raw-prepared"
    for folder in (raw, prepared):
        folder.mkdir()
    monkeypatch.chdir(raw)
    program = runpy.run_path(str(PROGRAM))
    assert program["prepared_data"](program["Options"](raw=Path())) == prepared
