"""The smallest use is small, and learns the four impressions it is given."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "by_hand.py"


def code_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith(('"""', "#"))]


def test_it_is_at_most_twenty_lines_and_is_the_one_in_the_readme() -> None:
    program = code_lines(PROGRAM.read_text())
    assert len(program) <= 20
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    assert program in [code_lines(block.split("```")[0]) for block in blocks]


def test_it_learns_its_batch() -> None:
    torch.manual_seed(0)
    names = runpy.run_path(str(PROGRAM))
    pcvr = names["task"].model(names["features"]).conversion.sigmoid()
    assert pcvr.shape == (4,)
    assert pcvr[0] > 0.9
    assert pcvr[1:].max() < 0.1
    assert names["loss"] < 0.1
