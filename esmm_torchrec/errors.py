"""Exceptions for errors that the user can fix.

    EsmmTorchrecError
    ├── DataError      a raw file, a prepared data set, a column, a row
    ├── OptionError    an option, an argument, a combination of them
    ├── PlanError      a sharding plan or a request for one
    └── RunError       a run folder or a checkpoint in it

Each message is one sentence that names the file, row, column or argument and says what to do.
Arguments are in backticks under their Python names, `embedding_dim`. The command line replaces them
by its options, --embedding-dim, prints the sentence and exits with code 2. An internal bug raises
an AssertionError.

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
"""Argument → option, for options whose name differs from the argument's."""


def for_command_line(sentence: str) -> str:
    """Replaces arguments in a sentence by options: "`embedding_dim`" by "--embedding-dim"."""
    return _ARGUMENT.sub(
        lambda found: f"--{_OPTIONS.get(found[1], found[1]).replace('_', '-')}", sentence
    )


class EsmmTorchrecError(Exception):
    """Base class of all errors that the user can fix; its argument is one sentence."""


class DataError(EsmmTorchrecError):
    """A raw file or a prepared data set is missing, corrupt, or not of the expected kind."""


class OptionError(EsmmTorchrecError, ValueError):
    """An argument is invalid, on its own or in combination with others."""


class PlanError(EsmmTorchrecError):
    """A sharding plan does not fit the tables, the ranks or the device."""


class RunError(EsmmTorchrecError):
    """A run folder cannot be written, read or resumed as requested."""


class Interrupted(KeyboardInterrupt):
    """A training run was interrupted.

    Args:
        sentence: the message: what is saved, and how to resume.
        terminated: whether SIGTERM interrupted it rather than Ctrl-C.
    """

    def __init__(self, sentence: str, *, terminated: bool = False) -> None:
        super().__init__(sentence)
        self.terminated = terminated
