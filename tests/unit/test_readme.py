"""What the README shows can be typed: commands parse, programs run, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from esmm_torchrec.cli.main import COMMANDS, parse_options

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]


def _commands() -> list[list[str]]:
    """Words after `esmm-torchrec` or `-m esmm_torchrec` of every indented command line."""
    found = []
    for page in PAGES:
        for line in page.replace("\\\n", " ").splitlines():
            match = re.match(r"    (?:esmm-torchrec|torchrun .* -m esmm_torchrec) (.+)", line)
            if match and "…" not in line:
                found.append(shlex.split(match[1], comments=True))
    return found


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS)
    module = importlib.import_module(f"esmm_torchrec.{COMMANDS[name][0]}")
    assert parse_options(module.Options, name, words[len(name.split()) :])


def test_there_are_commands_to_check() -> None:
    assert {words[0] for words in _commands()} >= {"prepare", "train", "score", "generate", "plan"}


def test_whole_programs_run() -> None:
    programs = [
        block
        for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
        if block.startswith("import ")
    ]
    assert programs
    for program in programs:
        names: dict[str, object] = {"__name__": "readme"}
        exec(program, names)
        logits: Any = names["task"].model(names["features"])  # pyright: ignore
        assert logits.conversion.shape == (4,)


def test_data_frames_go_in_and_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
        if "prepare_table" in block
    ]
    random = np.random.default_rng(0)
    rows = pd.DataFrame({name: random.integers(0, 5, 400) for name in ("user", "item")})
    rows["visit"] = random.integers(0, 2, 400)
    rows["purchase"] = rows["visit"] * random.integers(0, 2, 400)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"log": rows[:200], "later_log": rows[200:], "new_rows": rows[:7]}
    exec(program, names)
    assert list(names["scores"]) == ["sample_id", "pctr", "pcvr", "pctcvr"]
    assert len(names["scores"]) == 7


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:`|    )make ([a-z-]+)", page):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
