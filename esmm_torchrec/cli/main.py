"""The command line: finds a command, parses its options and turns errors into one sentence.

Each command is a module with a frozen dataclass `Options`, whose docstrings are the help texts,
and a function `run(options)`. It is imported only when the command is called.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NoReturn, TypeVar

from esmm_torchrec.cli.arguments import read_options
from esmm_torchrec.cli.help import stored_help
from esmm_torchrec.errors import EsmmTorchrecError, Interrupted, OptionError, for_command_line

T = TypeVar("T")

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": (
        "comparison.commands.generate",
        "write impressions with known probabilities in raw Ali-CCP form",
    ),
    "prepare ali-ccp": (
        "cli.prepare_ali_ccp",
        "turn the raw Ali-CCP files into a prepared data set",
    ),
    "prepare table": (
        "cli.prepare_table",
        "turn any CSV or Parquet files into a prepared data set",
    ),
    "prepare append": (
        "cli.prepare_append",
        "add the impressions of a new day to a prepared data set",
    ),
    "bundle": (
        "cli.bundle",
        "write this package as a zip file for spark-submit",
    ),
    "train": ("cli.train", "train a model on a prepared data set"),
    "compare": (
        "comparison.commands.compare",
        "compare conversion methods: a table, a figure and a report",
    ),
    "evaluate": ("cli.evaluate", "measure a trained model on a split"),
    "calibrate": ("cli.calibrate", "fit a calibration of a model's probabilities"),
    "score": (
        "cli.score",
        "write pCTR, pCVR and pCTCVR of every impression to files",
    ),
    "export": (
        "cli.export",
        "write a trained model as a package that needs no TorchRec",
    ),
    "report": ("cli.report", "write one page about a run: data, curves, calibration, importance"),
    "serve": ("cli.serve", "serve an exported model over HTTP"),
    "plan": (
        "planning.commands.plan",
        "estimate sharding plans for hardware you do not have",
    ),
}
"""Module and one-line help of each command."""

EXIT_USER_ERROR = 2
EXIT_LOST_RANK = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143
OTHER_RANKS_WAIT_SECONDS = 10.0

_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer")
"""Messages of gloo on the remaining ranks after another rank has ended."""


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: esmm-torchrec COMMAND [OPTIONS]\n\n"
        "Conversion models over the entire space of impressions, on TorchRec.\n\n"
        + "\n".join(lines)
        + "\n\n'esmm-torchrec COMMAND --help' shows the options of a command."
    )


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_error(message: str, *, on_every_rank: bool = False) -> None:
    """Prints an error message once, even if several ranks fail with it.

    Rank 0 prints at once. Other ranks wait first: if rank 0 failed too, torchrun ends them during
    the wait; if it did not, they print the message, which would otherwise be lost.

    Args:
        message: one sentence; arguments in backticks are shown as options.
        on_every_rank: whether every rank is certain to fail with this error, so that only rank 0
            needs to print it.
    """
    if not _is_first_rank():
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
        if on_every_rank:
            return
    print(f"esmm-torchrec: {for_command_line(message)}", file=sys.stderr, flush=True)


def parse_options(options: type[T], prog: str, arguments: Sequence[str]) -> T:
    """Parses the options of a command; an invalid one ends the process with a message, code 2."""
    try:
        return read_options(options, prog, arguments)
    except OptionError as error:
        print_error(str(error), on_every_rank=True)
        raise SystemExit(EXIT_USER_ERROR) from None


def configure_threads() -> None:
    """Configures what must be configured before torch is imported.

    Idle OpenMP threads that spin take the cores from each other when several processes share
    them. Threads that sleep at once wake too late for the many short loops of fbgemm's table
    updates (13 ms per step instead of 8 with two threads). So they spin for about ten microseconds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # torchrec and torch print these warnings for their own developers on every start.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; `arguments` defaults to the arguments of the process."""
    configure_threads()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and "RANK" not in os.environ:
        # The exit lets a command remove its temporary files. A rank may be waiting for another one
        # outside Python, where no handler runs, so torchrun's signal keeps its default action.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    with errors_as_sentences():
        _run(given)


def _run(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return
    name = next((n for n in (" ".join(given[:2]), given[0]) if n in COMMANDS), None)
    if name is None:
        raise OptionError(f"there is no command {_named(given)}; see 'esmm-torchrec --help'")
    arguments = given[len(name.split()) :]
    help_text = stored_help(name, arguments)
    if help_text is not None:
        print(help_text, end="")
        return
    module = import_command(name)
    run_command(module.run, parse_options(module.Options, f"esmm-torchrec {name}", arguments))


def import_command(name: str) -> ModuleType:
    """Imports the module of a command; the laboratories need packages that the core does not."""
    module = COMMANDS[name][0]
    try:
        return importlib.import_module(f"esmm_torchrec.{module}")
    except ModuleNotFoundError as error:
        laboratory = module.split(".")[0]
        if laboratory == "cli" or (error.name or "").startswith("esmm_torchrec"):
            raise
        raise OptionError(
            f"the command {name} needs {error.name}, which is not installed; "
            f"pip install 'esmm_torchrec[{laboratory}]'"
        ) from None


def _named(given: list[str]) -> str:
    """Names an unknown command and the existing commands that begin with the same word, if any."""
    longer = [name for name in COMMANDS if name.startswith(f"{given[0]} ")]
    if not longer:
        return repr(given[0])
    *others, last = map(repr, longer)
    existing = f"{', '.join(others)} and {last}" if others else last
    return f"{' '.join(given[:2])!r}, but {existing}"


def run_command(run: Callable[[T], None], options: T) -> None:
    """Calls `run(options)`; an error that the user can fix becomes a sentence and exit code 2."""
    with errors_as_sentences(getattr(options, "out", None)):
        run(options)


@contextlib.contextmanager
def errors_as_sentences(out: object = None) -> Iterator[None]:
    """Ends the process with one sentence if the block fails in a way that the user can fix.

    Args:
        out: path that the block writes, for system errors that name no file.
    """
    try:
        try:
            yield
        except SystemExit:  # after a help text
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except EsmmTorchrecError as error:
        print_error(str(error))
        _end(EXIT_USER_ERROR)
    except KeyboardInterrupt as error:
        if _is_first_rank():  # torchrun passes the signal on to every rank
            known = str(error) if isinstance(error, Interrupted) else ""
            print_error(known or "interrupted; rerun the same command")
        terminated = isinstance(error, Interrupted) and error.terminated
        _end(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader has closed it, as in '… | head'
        _end(EXIT_BROKEN_PIPE)
    except OSError as error:
        if error.errno is None and error.filename is None and not str(error):
            raise
        print_error(_system_error(error, out))
        _end(EXIT_USER_ERROR)
    except RuntimeError as error:
        if not any(words in str(error) for words in _LOST_CONNECTION):
            raise
        if _is_first_rank():
            print_error("another rank has ended; see its output or that of torchrun")
        _end(EXIT_LOST_RANK)


def _system_error(error: OSError, out: object) -> str:
    place = error.filename or out
    where = f" {place}" if place else ""
    if error.errno is None:
        return f"cannot read or write{where}: {' '.join(str(error).split())}"
    reason = os.strerror(error.errno).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write{where}: {reason}; make room and rerun the same command"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot read or write{where}: {reason}; choose another place or make it accessible"
    return f"cannot read or write{where}: {reason}"


def _end(code: int) -> NoReturn:
    """Ends a process after an error. One of several ranks exits at once: the teardown of a sharded
    model waits for the other ranks, which may never get there."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes once more at exit, and on an error would replace the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if "RANK" in os.environ:
        os._exit(code)
    raise SystemExit(code) from None
