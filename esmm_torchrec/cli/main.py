"""The command line: finds the command, reads its options, turns errors into one sentence.

Each command is one module of this package with a frozen dataclass `Options`, whose docstrings are
the help, and `run(options)`. It is imported only when it is called.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from esmm_torchrec.errors import EsmmTorchrecError

T = TypeVar("T")

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("generate", "write impressions with known probabilities in raw Ali-CCP form"),
    "prepare ali-ccp": ("prepare_ali_ccp", "turn the raw Ali-CCP files into a prepared data set"),
    "prepare table": ("prepare_table", "turn any CSV or Parquet files into a prepared data set"),
    "train": ("train", "train a model on a prepared data set"),
    "evaluate": ("evaluate", "measure a trained model on a split"),
    "score": ("score", "write pCTR, pCVR and pCTCVR of every impression to Parquet"),
    "plan": ("plan", "estimate sharding plans for GPUs that need not be there"),
}
"""Command → module of this package, one line of help."""

EXIT_USER_ERROR = 2
OTHER_RANKS_WAIT_SECONDS = 3.0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: esmm-torchrec COMMAND [OPTIONS]\n\n"
        "Conversion models over the entire space of impressions, on TorchRec.\n\n"
        + "\n".join(lines)
        + "\n\n'esmm-torchrec COMMAND --help' shows the options of a command."
    )


def print_error(message: str) -> None:
    """Prints a sentence once, however many ranks fail with it.

    Rank 0 prints at once. Another rank waits a moment first: where rank 0 failed too, torchrun
    ends this process meanwhile; where it did not, the sentence would otherwise be lost.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    print(f"esmm-torchrec: {message}", file=sys.stderr, flush=True)


def parse_options(options: type[T], prog: str, arguments: Sequence[str]) -> T:
    """Reads the options of a command; a wrong one ends the process with a sentence, code 2."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options, prog=prog, args=list(arguments))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box of several lines around what is wrong and repeats the usage.
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯─│]", " ", complaint.getvalue())
        text = re.sub(r"\s+", " ", text).strip().removeprefix("Parsing error ")
        print_error(f"{text.partition(' For full helptext')[0].rstrip('. ')}; see '{prog} --help'")
        raise SystemExit(EXIT_USER_ERROR) from None


def settle_process() -> None:
    """Settles what must be settled before torch is imported.

    Idle OpenMP threads that spin take the cores from each other when several ranks share them.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # Said by torchrec and torch to their own developers, on every start.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; `arguments` default to those of the process."""
    settle_process()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return
    name = next((n for n in (" ".join(given[:2]), given[0]) if n in COMMANDS), None)
    if name is None:
        print_error(f"there is no command {given[0]!r}; see 'esmm-torchrec --help'")
        raise SystemExit(EXIT_USER_ERROR)
    module = importlib.import_module(f"esmm_torchrec.cli.{COMMANDS[name][0]}")
    options = parse_options(module.Options, f"esmm-torchrec {name}", given[len(name.split()) :])
    run_command(module.run, options)


def run_command(run: Callable[[T], None], options: T) -> None:
    """Calls `run(options)`; errors the user can mend become a sentence and exit code 2."""
    try:
        run(options)
    except EsmmTorchrecError as error:
        print_error(str(error))
        _end(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        print_error(f"cannot read or write{where}: {error.strerror.lower()}")
        _end(EXIT_USER_ERROR)


def _end(code: int) -> NoReturn:
    """Ends a process after an error. One of several ranks ends at once: taking down a model that
    is spread over processes waits for the others, which may not come."""
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)
    raise SystemExit(code) from None
