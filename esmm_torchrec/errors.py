"""What the library raises for things its user can fix.

    EsmmTorchrecError
    ├── DataError      a raw file, a prepared data set, a column, a row
    ├── OptionError    an option, an argument, a combination of them
    ├── PlanError      a sharding plan or a request for one
    └── RunError       a run folder or a checkpoint in it

Each message is one sentence that names the file, row, column or option and says what to do. The
command line prints it and exits with code 2. An internal bug raises AssertionError.

    KeyboardInterrupt
    └── Interrupted    a training that was interrupted; the message says what is saved
"""

from __future__ import annotations

import re


class EsmmTorchrecError(Exception):
    """Base of all errors that the user can fix."""


class DataError(EsmmTorchrecError):
    """A raw file or a prepared data set is missing, broken, or not what it says it is."""


class OptionError(EsmmTorchrecError, ValueError):
    """An argument cannot be used, alone or beside the others.

    Args:
        message: names the arguments as a Python caller knows them.
        arguments: the names in the message that are options of the command line, which are
            spelled differently there; see `for_command_line`.
    """

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments

    def for_command_line(self) -> str:
        """The message with options for arguments: "--embedding-dim" for "embedding_dim"."""
        message = str(self)
        for argument in self.arguments:
            option = f"--{argument.replace('_', '-')}"
            message = re.sub(rf"(?<![\w-]){re.escape(argument)}(?!\w)", option, message)
        return message

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, ...]]:
        return type(self), (str(self), *self.arguments)


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
