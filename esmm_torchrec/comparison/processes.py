"""Additional processes for one comparison, which share only the files of their jobs (`work`)."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from esmm_torchrec.cli.main import configure_threads
from esmm_torchrec.sharding.process_group import DeviceOption, Ranks, process_group

PARENT_CHECK_SECONDS = 1.0


@contextmanager
def helped_by(
    others: int, device: DeviceOption, work: Callable[..., object], *arguments: Any
) -> Iterator[None]:
    """Runs `work(ranks, *arguments)` in other processes, each a single rank, until the block ends.

    They print nothing. If one fails, the others take over its job, and this process meets the same
    error. They end with this process, even if it is killed.

    Args:
        others: number of processes.
        device: device of each process.
        work: a module-level function.
        arguments: arguments of `work`; picklable.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_help, args=(os.getpid(), device, work, arguments), daemon=True)
        for _ in range(others)
    ]
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _help(
    parent: int, device: DeviceOption, work: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    configure_threads()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        process_group(device) as ranks,
    ):
        _with_ranks(ranks, work, arguments)


def _with_ranks(ranks: Ranks, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """A separate function, so that sharded modules are freed before the process group ends."""
    work(ranks, *arguments)


def _end_with(parent: int) -> None:
    """Ends this process once its parent has ended."""
    wait = threading.Event().wait
    while os.getppid() == parent:
        wait(PARENT_CHECK_SECONDS)
    os._exit(1)
