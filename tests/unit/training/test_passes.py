"""The number of passes that `--epochs auto` chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esmm_torchrec.training import passes
from esmm_torchrec.training.options import TrainOptions
from tests.prepared_data import write_data_set
from tests.ranks import train_here

OPTIONS = TrainOptions(
    batch_size=40, embedding_dim=4, tower=(8,), sparse_lr=0.2, dense_lr=0.02, device="cpu"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=400, test=100, users=80)
    return path


@pytest.fixture(scope="module")
def searched(data: Path) -> tuple[Path, dict[str, Any]]:
    out = data.parent / "run"
    return out, train_here(data, out, OPTIONS)


def test_few_rows_are_trained_on_for_the_passes_of_a_search(
    searched: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out, metrics = searched
    curve = metrics["validation"]["curve"]
    chosen = metrics["validation"]["epoch"]
    best = min(curve, key=lambda entry: sum(entry[f"{t}_ne"] for t in ("ctr", "cvr", "ctcvr")))
    assert chosen == best["epoch"]
    assert json.loads((out / "config.json").read_text())["options"]["epochs"] == chosen
    options = replace(OPTIONS, epochs=int(chosen), average_weights="on")
    given = train_here(data, tmp_path / "run", options)
    assert given["test"] == metrics["test"]
    assert "validation" not in given


def test_a_search_is_not_repeated(
    searched: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, metrics = searched
    monkeypatch.setattr(passes, "build_loop", None)
    again = train_here(data, out, OPTIONS)
    assert (again["test"], again["validation"]) == (metrics["test"], metrics["validation"])


def test_many_rows_take_one_pass(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passes, "MAX_SEARCHED_ROWS", 400)
    metrics = train_here(data, tmp_path / "run", OPTIONS)
    assert "validation" not in metrics
    assert "one pass, as there are 400 rows or more (chosen automatically)" in (
        capsys.readouterr().out
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["epochs"] == 1


def test_a_search_that_cannot_be_made_takes_one_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows are of one user."""
    write_data_set(tmp_path / "data", train=60, test=50, users=1)
    train_here(tmp_path / "data", tmp_path / "run", replace(OPTIONS, batch_size=20))
    assert "one pass, as the number cannot be searched" in capsys.readouterr().out


def test_a_run_that_continued_on_other_data_stays_so(data: Path, tmp_path: Path) -> None:
    """The same command again does not take the passes that were searched on the first data."""
    other, out = tmp_path / "other", tmp_path / "run"
    write_data_set(other, train=200, test=100, users=80, seed=1)
    options = replace(OPTIONS, sparse_lr=0.02, dense_lr=0.002)
    assert train_here(data, out, options)["validation"]["epoch"] > 1
    continued = train_here(other, out, options)
    again = train_here(other, out, options)
    assert again["test"] == continued["test"]
    assert "validation" not in again
    last = json.loads((out / "config.json").read_text())["history"][-1]["options"]
    assert (last["epochs"], last["average_weights"]) == (1, "off")
