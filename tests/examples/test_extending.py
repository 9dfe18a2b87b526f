"""docs/extending.md as its reader would follow it: a package outside the repository, installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from tests.prepared_data import write_data_set

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
MAX_LINES = 40


PACKAGE, THIRD_TASK = PAGE.read_text().split("## A third task")


def _blocks(language: str, text: str = PACKAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which the page's package is installed."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "shop_models.py").write_text("\n".join(_blocks("python")))
    (toml,) = _blocks("toml")
    project = tomllib.loads(toml)["project"]
    metadata = folder / f"shop_models-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=400, test=200)
    return path


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esmm_torchrec", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


SMALL = ("--epochs", "1", "--embedding-dim", "4", "--tower", "8", "--device", "cpu")


def test_each_part_takes_few_lines() -> None:
    for block in _blocks("python"):
        assert len(block.splitlines()) <= MAX_LINES
    assert len(THIRD_TASK.splitlines()) <= MAX_LINES


def test_a_third_task(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a change to the library, through the package's own objective and architecture."""
    monkeypatch.chdir(tmp_path)
    (program,) = _blocks("python", THIRD_TASK)
    exec(program, {})
    commands = re.findall(r"^    esmm-torchrec (.*)$", THIRD_TASK, flags=re.MULTILINE)
    prepare, train, compare = (command.split() for command in commands)
    small = ("--embedding-dim", "4", "--tower", "8", "--device", "cpu", "--epochs", "1")
    few = ("--trials", "1", "--seeds", "1", "--batch-size", "64")
    for arguments in (prepare, [*train, *small], [*compare, *small, *few]):
        done = _run(environment, *arguments)
        assert done.returncode == 0, done.stderr
    test = json.loads(Path("runs/shop/metrics.json").read_text())["test"]
    log = pd.read_parquet("shop.parquet")
    split = json.loads(Path("shop/dataset.json").read_text())["splits"]
    assert sum(of["happened"]["order"] for of in split.values()) == log["order"].sum()
    assert test["orders"] == split["test"]["happened"]["order"]
    assert all(test[f"{name}_auc"] > 0.5 for name in ("click", "cart", "order"))
    scored = _run(environment, "score", "runs/shop", "--data", "shop", "--out", "scores.parquet")
    assert scored.returncode == 0, scored.stderr
    names = ["p_click", "p_cart_given_click", "p_cart", "p_order_given_cart", "p_order"]
    assert pd.read_parquet("scores.parquet").columns.tolist() == ["sample_id", *names]
    results = json.loads(Path("shop-comparison/results.json").read_text())
    assert set(results["methods"]) == {"ESMM", "FOCAL-DCN"}


def test_train_knows_the_parts_and_their_options(
    environment: dict[str, str], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "focal"
    arguments = ("--data", str(data), "--out", str(out), *SMALL)
    done = _run(environment, "train", *arguments, "--method", "focal-dcn", "--objective.gamma", "1")
    assert done.returncode == 0, done.stderr
    model = json.loads((out / "config.json").read_text())["model"]
    assert model["objective"]["name"] == "focal"
    assert model["objective"]["gamma"] == 1
    assert model["architecture"] == {"name": "cross-network", "num_layers": 2, "rank": 8}
    assert json.loads((out / "metrics.json").read_text())["test"]["ctcvr_auc"] is not None

    scored = _run(
        environment, "score", str(out), "--data", str(data), "--out", str(tmp_path / "s.parquet")
    )
    assert scored.returncode == 0, scored.stderr

    other = tmp_path / "crossed"
    arguments = ("--data", str(data), "--out", str(other), *SMALL)
    mixed = _run(
        environment, "train", *arguments, "--method", "shared-bottom",
        "--architecture", "cross-network", "--architecture.rank", "4",
    )  # fmt: skip
    assert mixed.returncode == 0, mixed.stderr
    wrong = _run(environment, "train", *arguments, "--method", "esmm", "--objective.gamma", "1")
    assert wrong.returncode == 2
    assert "there is no option --objective.gamma" in wrong.stderr


def test_compare_knows_the_method(environment: dict[str, str], data: Path, tmp_path: Path) -> None:
    done = _run(
        environment, "compare", "--data", str(data), "--out", str(tmp_path / "c"),
        "--methods", "esmm", "focal-dcn", "--seeds", "1", "--trials", "1", "--epochs", "1",
        "--embedding-dim", "4", "--tower", "8", "--batch-size", "64", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert set(results["methods"]) == {"ESMM", "FOCAL-DCN"}


def test_without_the_package_a_run_names_what_is_missing(
    environment: dict[str, str], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "focal"
    arguments = ("train", "--data", str(data), "--out", str(out), *SMALL)
    assert _run(environment, *arguments, "--method", "focal-dcn").returncode == 0
    without = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    done = _run(without, "evaluate", str(out), "--data", str(data))
    assert done.returncode == 2
    assert "there is no method 'focal-dcn'" in done.stderr
