"""What the library raises for things its user can fix.

    EsmmTorchrecError
    ├── DataError      a raw file, a prepared data set, a column, a row
    ├── OptionError    an option, an argument, a combination of them
    ├── PlanError      a sharding plan or a request for one
    └── RunError       a run folder or a checkpoint in it

Each message is one sentence that names the file, row, column or argument and says what to do.
Arguments stand in backticks, as a Python caller knows them: `embedding_dim`. The command line
prints the sentence with options in their place, --embedding-dim, and exits with code 2. An internal
bug raises AssertionError.

    KeyboardInterrupt
    └── Interrupted    a training that was interrupted; the message says what is saved
"""

from __future__ import annotations

import re

_ARGUMENT = re.compile(r"`([a-z][a-z0-9_.]*)`")

_OPTIONS = {
    "constraints": "constraint",
    "hashed": "hash",
    "ids": "id",
    "shared_tables": "share-table",
    "start_from": "from",
    "texts": "text",
    "towers": "tower",
}
"""Argument → its option, if that has another name."""


def for_command_line(sentence: str) -> str:
    """A sentence with options for arguments: "--embedding-dim" for "`embedding_dim`"."""
    return _ARGUMENT.sub(
        lambda found: f"--{_OPTIONS.get(found[1], found[1]).replace('_', '-')}", sentence
    )


class EsmmTorchrecError(Exception):
    """Base of all errors that the user can fix; its argument is a sentence."""


class DataError(EsmmTorchrecError):
    """A raw file or a prepared data set is missing, broken, or not what it says it is."""


class OptionError(EsmmTorchrecError, ValueError):
    """An argument cannot be used, alone or beside the others."""


class PlanError(EsmmTorchrecError):
    """A sharding plan does not fit the tables, the ranks or the device."""


class RunError(EsmmTorchrecError):
    """A run folder cannot be written, read or continued as asked."""


class Interrupted(KeyboardInterrupt):
    """A training was interrupted; one sentence on what is saved and how to resume.

    Args:
        sentence: for the user.
        terminated: whether it was by SIGTERM rather than by Ctrl-C.
    """

    def __init__(self, sentence: str, *, terminated: bool = False) -> None:
        super().__init__(sentence)
        self.terminated = terminated
