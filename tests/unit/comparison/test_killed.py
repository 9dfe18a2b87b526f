"""A comparison as it is typed, with a method of the documentation, killed and begun again."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from esmm_torchrec.comparison.processes import helped_by
from esmm_torchrec.sharding.process_group import Ranks

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "methods.md"
ARGUMENTS = ["compare", "--methods", "base", "recent", "--seeds", "2", "--trials", "2"]
ARGUMENTS += ["--epochs", "1", "--batch-size", "256", "--tower", "8", "--test-impressions", "2000"]
ARGUMENTS += ["--world.impressions", "6000", "--world.ctr", "0.2", "--world.cvr", "0.4"]
ARGUMENTS += ["--device", "cpu"]
RECORDS_BEFORE_THE_END = 3
ENDS_WITHIN_SECONDS = 240


def _script() -> str:
    """A program in which the method that docs/methods.md walks through is one of all methods."""
    _, _, rest = DOCUMENTATION.read_text().partition("```python\n")
    code, _, _ = rest.partition("```")
    assert "class RecentRows(Rows)" in code
    return "\n".join(
        [
            "import sys, numpy as np",
            "from dataclasses import dataclass",
            "from esmm_torchrec.models.methods import *",
            "from esmm_torchrec.models.parts import LoggedImpressions, TrainingRows",
            code,
            "ROWS.register('recent', RecentRows)",
            "METHODS.register('recent', RECENT)",
            "from esmm_torchrec.cli.main import main",
            "main(sys.argv[1:])",
        ]
    )


def _start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    given = [*ARGUMENTS, *(arguments or ("--processes", "1")), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", _script(), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _finished(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The results, and what it said."""
    process = _start(out, *arguments)
    said, _ = process.communicate(timeout=ENDS_WITHIN_SECONDS)
    assert process.returncode == 0, said
    return json.loads((out / "results.json").read_text()), said


def _records(out: Path) -> set[Path]:
    return set((out / "trials").glob("*/*.json"))


def _without_times(results: dict[str, Any]) -> dict[str, Any]:
    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if "seconds" not in k and k != "command"}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return kept(results)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    _finished(out)
    return out


def test_the_method_of_the_documentation_is_trained_and_reported(uninterrupted: Path) -> None:
    results = json.loads((uninterrupted / "results.json").read_text())
    assert list(results["methods"]) == ["BASE", "RECENT"]
    rows = {name: of["1"]["training_rows"] for name, of in results["training"].items()}
    assert rows["RECENT"] == pytest.approx(rows["BASE"] / 2, abs=1)
    assert results["methods"]["RECENT"]["1"]["cvr_auc"]["mean"] is not None
    for file in ("report.html", "table.md", "table.csv"):
        assert "RECENT" in (uninterrupted / file).read_text()
    assert "BASE on the latest half of the clicks" in (uninterrupted / "report.html").read_text()


def test_a_killed_comparison_goes_on_to_the_same_numbers(
    uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = _start(out)
    end = time.monotonic() + ENDS_WITHIN_SECONDS
    while len(_records(out)) < RECORDS_BEFORE_THE_END:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in _records(out)}
    assert RECORDS_BEFORE_THE_END <= len(before) < len(_records(uninterrupted))
    assert not (out / "results.json").exists()

    other_code = out / "trials" / ("0" * 12)
    other_code.mkdir()
    for name in ("tune-base-1.json", "seed-0-base-2.json"):
        (other_code / name).write_text("{}")
    resumed, said = _finished(out)
    assert "2 trainings from other versions of the code or libraries are ignored" in said
    first = json.loads((uninterrupted / "results.json").read_text())
    assert _without_times(resumed) == _without_times(first)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_two_processes_find_what_one_finds(uninterrupted: Path, tmp_path: Path) -> None:
    found, _ = _finished(tmp_path / "out", "--processes", "2", "--methods", "base")
    alone = json.loads((uninterrupted / "results.json").read_text())
    for part in ("methods", "tuning"):
        of_base = {name: results[part]["BASE"] for name, results in (("1", alone), ("2", found))}
        assert _without_times(of_base["2"]) == _without_times(of_base["1"])
    assert not list((tmp_path / "out").rglob("*.lock"))


def _hang(ranks: Ranks, started: Path) -> None:
    assert ranks.world_size == 1
    started.write_text(str(os.getpid()))
    time.sleep(ENDS_WITHIN_SECONDS)


def _be_helped(started: Path) -> None:
    with helped_by(1, "cpu", _hang, started):
        time.sleep(ENDS_WITHIN_SECONDS)


def test_other_processes_end_with_a_killed_one(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    parent = multiprocessing.get_context("spawn").Process(target=_be_helped, args=(started,))
    parent.start()
    end = time.monotonic() + ENDS_WITHIN_SECONDS / 2
    try:
        while not started.exists() or not started.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        parent.kill()
    parent.join()
    other = Path(f"/proc/{started.read_text()}")
    while other.exists() and "Z" not in (other / "stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < end + ENDS_WITHIN_SECONDS / 2
        time.sleep(0.1)
