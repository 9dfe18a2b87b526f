"""A page of the documentation, followed as its reader would."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from esmm_torchrec.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"


def follow(page: str, folder: Path, commands: list[str]) -> None:
    """Runs a page's one program and then its commands, in order.

    Args:
        page: its file in docs/.
        folder: where it is followed.
        commands: that it is known to have, by their first words.
    """
    whole = (DOCS / page).read_text()
    (program,) = re.findall(r"```python\n(.*?)```", whole, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", whole, flags=re.DOTALL).replace("\\\n", " ")
    found = re.findall(r"^    esmm-torchrec (.*)$", text, flags=re.MULTILINE)
    assert [command.split()[0] for command in found] == commands
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(program, {})
        for command in found:
            main(shlex.split(command))
