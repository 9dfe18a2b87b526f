"""What the pages show works: commands parse and run, programs run, links resolve."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from torch.distributed.run import get_args_parser

from esmm_torchrec.cli.main import COMMANDS, main, parse_options
from examples import train_ali_ccp

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("[!_]*.md")),
    *sorted((ROOT / "datasets").glob("*.md")),
]
RUN_PAGES = (
    "README.md",
    "datasets/hillstrom.md",
    "datasets/synthetic.md",
    "docs/daily.md",
    "docs/serving.md",
    "docs/tuning.md",
)
"""Pages whose commands are run in order; those of other pages need more ranks, data or hours."""
SMALL = {
    "train": ["--tower", "8", "--embedding-dim", "4", "--epochs", "1"],
    "compare": ["--trials", "1", "--epochs", "1", "--seeds", "1"],
    "generate": ["--impressions", "2000"],
}
"""Options appended to a command so that it takes seconds."""


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _lines(page: Path) -> list[list[str]]:
    """The words of each command line in an indented or fenced block."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"```(?:bash|shell|console)\n(.*?)```", text, flags=re.DOTALL)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = re.findall(r"^    (\S.*)$", outside, flags=re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()] + indented
    commands = ("esmm-torchrec ", "torchrun ", "python ")
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith(commands) and "…" not in line
    ]


def _options_of(words: list[str]) -> list[str]:
    """The words after `esmm-torchrec`; checks the options of torchrun before them."""
    if words[0] == "torchrun":
        arguments = get_args_parser().parse_args(words[1:])
        started = [arguments.training_script, *arguments.training_script_args]
        return started if not arguments.module else _without_module(started)
    if words[:2] == ["python", "-m"]:
        return _without_module(words[2:])
    return words[1:]


def _without_module(words: list[str]) -> list[str]:
    assert words[0] == "esmm_torchrec"
    return words[1:]


COMMAND_LINES = [
    (_name(page), words)
    for page in PAGES
    if page.name
    != "extending.md"  # its commands need its package: tests/examples/test_extending.py
    for words in _lines(page)
]


@pytest.mark.parametrize(
    "words", [words for _, words in COMMAND_LINES], ids=lambda words: " ".join(words)[:80]
)
def test_commands_parse(words: list[str]) -> None:
    options = _options_of(words)
    if options[0].endswith(".py"):
        assert (ROOT / options[0]).exists()
        if options[0] == "examples/train_ali_ccp.py":
            assert parse_options(train_ali_ccp.Options, options[0], options[1:])
        return
    name = next(n for n in (" ".join(options[:2]), options[0]) if n in COMMANDS)
    module = importlib.import_module(f"esmm_torchrec.{COMMANDS[name][0]}")
    assert parse_options(module.Options, name, options[len(name.split()) :])


def test_there_are_commands_to_check() -> None:
    shown = {" ".join(_options_of(words)) for _, words in COMMAND_LINES}
    for name in COMMANDS:
        assert any(line.startswith(name) for line in shown), name


def _log(rows: int, seed: int) -> pd.DataFrame:
    """Impressions with the columns that the pages name."""
    rng = np.random.default_rng(seed)
    names = ("channel", "zip_code", "segment", "history_segment", "mens", "womens", "newbie")
    log = pd.DataFrame({name: rng.integers(0, 4, rows) for name in names})
    log["recency"], log["history"] = rng.integers(1, 13, rows), rng.lognormal(size=rows)
    log["visit"] = rng.integers(0, 2, rows)
    log["conversion"] = log["visit"] * rng.integers(0, 2, rows)
    return log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a log, PREPARED and RUN."""
    folder = tmp_path_factory.mktemp("pages")
    _log(600, 0).to_csv(folder / "train.csv", index=False)
    _log(400, 1).to_csv(folder / "test.csv", index=False)
    _log(1000, 2).to_csv(folder / "hillstrom.csv", index=False)
    for seed, day in enumerate(("monday", "tuesday", "wednesday"), 4):
        _log(400, seed).to_parquet(folder / f"{day}.parquet")
    _log(7, 3).drop(columns=["visit", "conversion"]).to_parquet(folder / "new_rows.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        daily = _lines(ROOT / "docs/daily.md")[0]
        main([("PREPARED" if word == "prepared-today" else word) for word in daily[1:]])
        main(["train", "--data", "PREPARED", "--out", "RUN", *SMALL["train"]])
    return folder


@pytest.fixture
def work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(folder, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("page", RUN_PAGES)
def test_commands_run(page: str, work: Path) -> None:
    lines = [options for words in _lines(ROOT / page) if (options := _options_of(words))]
    assert lines
    for options in lines:
        if options[0] == "prepare":
            shutil.rmtree(work / "PREPARED", ignore_errors=True)
        if options[0] == "serve":
            _serve_for_a_moment(options)
            continue
        main([*options, *SMALL.get(options[0], [])])


def _serve_for_a_moment(options: list[str]) -> None:
    options = [*options[: options.index("--port")], "--port", "0"]
    command = [sys.executable, "-m", "esmm_torchrec", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            (url,) = re.findall(r"http://\S+", server.stdout.readline())
            answer = httpx.post(f"{url}/score", json={"rows": [{"channel": 2, "recency": 7}]})
            assert 0 < answer.json()["scores"]["pctcvr"][0] < 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()


def _programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_programs_are_python(page: Path) -> None:
    for program in _programs(_name(page)):
        compile(program, page.name, "exec")


@pytest.mark.usefixtures("work")
def test_readme_programs_run() -> None:
    frames, pipeline = _programs("README.md")
    random = np.random.default_rng(0)
    rows = pd.DataFrame({name: random.integers(0, 5, 400) for name in ("user", "item")})
    rows["visit"] = random.integers(0, 2, 400)
    rows["purchase"] = rows["visit"] * random.integers(0, 2, 400)
    names: dict[str, Any] = {"log": rows[:200], "later_log": rows[200:], "new_rows": rows[:7]}
    exec(frames, names)
    assert list(names["scores"]) == ["sample_id", "pctr", "pcvr", "pctcvr"]
    assert len(names["scores"]) == 7

    names = {"__name__": "readme"}
    exec(pipeline, names)
    assert names["task"].model(names["features"]).conversion.shape == (4,)


def test_serving_program_runs(work: Path) -> None:
    (work / "RUN").rename(work / "run")
    names: dict[str, Any] = {"new_rows": pd.read_parquet("new_rows.parquet")}
    for program in _programs("docs/serving.md"):
        exec(program, names)
    assert len(names["scores"]) == 7
    assert names["many"]["pcvr"].shape == (3,)
    assert all(len(tensor) for tensor in torch.load("inputs.pt"))


def test_split_program_runs(work: Path) -> None:
    (program,) = _programs("datasets/hillstrom.md")
    exec(program, {})
    split = [len(pd.read_csv(work / name)) for name in ("train.csv", "test.csv")]
    assert sum(split) == 1000
    assert 700 < split[0] < 900


def test_tutorial_runs() -> None:
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    shown = [cell.get("outputs") for cell in notebook.cells]
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT)}}).execute()
    for before, cell in zip(shown, notebook.cells, strict=True):
        if cell.cell_type == "code":
            results = [
                [output.data["text/plain"].count("\n") for output in outputs if "data" in output]
                for outputs in (before, cell.outputs)
            ]
            assert results[0] == results[1], cell.source


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_make_targets_and_requirements_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"pip install -r (\S+)", page.read_text()):
        assert (ROOT / path).exists(), path


def test_site_has_every_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("[!_]*.*"):
        assert f": {page.name}\n" in site, page.name
