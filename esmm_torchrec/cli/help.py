"""The help of each command, stored as text so that printing it imports neither torch nor the data
libraries.

    python -m esmm_torchrec.cli.help        regenerates the texts; a test compares them

A stored text applies to `--help` alone. If other arguments choose parts of a method, or if an
installed package adds parts or methods, the help is generated from the options instead.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

FOLDER = Path(__file__).with_name("help_texts")
WIDTH = "80"
EXTENDED_GROUPS = tuple(
    f"esmm_torchrec.{kind}"
    for kind in ("rows", "architectures", "interactions", "objectives", "methods")
)


def stored_help(command: str, arguments: Sequence[str]) -> str | None:
    """Returns the stored help of a command; None if the help must be generated from its options,
    or if the arguments do not request it."""
    if not arguments or not set(arguments) <= {"-h", "--help"}:
        return None
    extended = entry_points()
    if any(extended.select(group=group) for group in EXTENDED_GROUPS):
        return None
    try:
        return _file(command).read_text(encoding="utf-8")
    except OSError:  # the package is in a zip file
        return None


def made_help(command: str) -> str:
    """Generates the help of a command from its options."""
    from esmm_torchrec.cli.main import import_command, parse_options  # noqa: PLC0415

    shown, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            parse_options(import_command(command).Options, f"esmm-torchrec {command}", ["--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return "".join(f"{line.rstrip()}\n" for line in shown.getvalue().splitlines())


def _file(command: str) -> Path:
    return FOLDER / f"{command.replace(' ', '-')}.txt"


def write_texts() -> None:
    """Writes the help text of every command."""
    from esmm_torchrec.cli.main import COMMANDS  # noqa: PLC0415

    FOLDER.mkdir(exist_ok=True)
    for command in COMMANDS:
        _file(command).write_text(made_help(command), encoding="utf-8")
        print(_file(command), file=sys.stderr)


if __name__ == "__main__":
    write_texts()
