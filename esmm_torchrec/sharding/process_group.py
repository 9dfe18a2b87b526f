"""The process group of a run, and the choice of its device.

`with process_group("auto") as ranks:` works both under torchrun and in a single process. Keep
everything sharded local to a function called inside the block: destroying the group while a
DistributedModelParallel is alive sometimes aborts the process.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.errors import EsmmTorchrecError, OptionError
from esmm_torchrec.sharding.host import threads_per_rank

T = TypeVar("T")

DeviceOption = Literal["auto", "cpu", "cuda"]

_GROUP_VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torch.distributed reads."""

PARENT_CHECK_SECONDS = 1.0
"""Interval, in seconds, at which a rank checks that torchrun is still alive."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of a collective. It is long because the others wait while rank 0 prepares data."""


@dataclass(frozen=True)
class Ranks:
    """Position of this process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints, writes and decides for all ranks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def from_first(self, work: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
        """Runs `work` on rank 0 only and returns its (picklable) result on every rank.

        Args:
            work: function to run.
            group: a group of all ranks to use instead of the default one.

        Raises:
            EsmmTorchrecError, OSError: `work` raised it; it is raised on every rank, so that none
                is left waiting.
        """
        outcome: list[object] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (EsmmTorchrecError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=group)
        if isinstance(outcome[1], Exception):
            raise outcome[1]
        return outcome[0]  # pyright: ignore[reportReturnType]


def on_every_rank(work: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Runs `work` on every rank and returns the (picklable) results of all, in order of rank.

    Args:
        work: function to run; it must not communicate.
        group: a group of all ranks to use instead of the default one.

    Raises:
        EsmmTorchrecError, OSError: `work` raised it. The error of the lowest failing rank is raised
            on every rank, so that none is left waiting.
    """
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = work(), None
    except (EsmmTorchrecError, OSError) as error:
        outcome = None, error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group=group)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


class RankExchange:
    """Reduces arrays over all ranks. All ranks must create it together and call its methods in the
    same order, with the same shapes."""

    def __init__(self) -> None:
        # TorchRec's evaluation pipeline fetches batches in a separate thread, in which collectives
        # of the default group would mix with the model's.
        self._group = dist.new_group(backend="gloo")

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Returns the elementwise sums over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: np.ndarray) -> np.ndarray:
        """Returns the elementwise maxima over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: np.ndarray, operation: dist.ReduceOp.RedOpType) -> np.ndarray:
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, operation, group=self._group)
        return reduced.numpy()


def choose_device(option: DeviceOption, local_rank: int, local_world_size: int = 1) -> torch.device:
    """Returns a rank's device. "auto" is CUDA if each rank of the machine has a GPU, else the CPU.

    Raises:
        OptionError: the option is "cuda" and there is no GPU for this rank.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if option == "cpu" or (option == "auto" and gpus < local_world_size):
        if option == "auto" and gpus and local_rank == 0:
            print(
                f"this machine has {local_world_size} ranks but GPUs for only {gpus}; "
                "all ranks use the CPU",
                file=sys.stderr,
                flush=True,
            )
        return torch.device("cpu")
    if local_rank >= gpus:
        raise OptionError(
            f"`device` {option} needs a GPU for each rank of this machine but finds {gpus}; "
            "start fewer ranks or use `device` cpu"
        )
    return torch.device("cuda", local_rank)


@checks_choices
@contextmanager
def process_group(device: DeviceOption = "auto") -> Iterator[Ranks]:
    """Joins torchrun's process group, or creates one of a single rank, and destroys it at the end.

    Collectives use gloo on the CPU, where the ranks of a machine share its cores, and NCCL on CUDA.
    After an error a group of several ranks is not destroyed: waiting for the other ranks would hang
    if only this rank failed. A group of one is destroyed even then, so that the next block of a
    notebook can create its own.

    Example::

        with process_group() as ranks:
            metrics = train(data, out, TrainOptions(), ranks)

    Args:
        device: "auto" is CUDA if there is a GPU for each rank of the machine, else the CPU.

    Yields:
        this process among all of them, with its device.

    Raises:
        OptionError: `device` is "cuda" and there is no GPU for this rank, or the environment
            describes a group incompletely.
    """
    has_others = _is_started_as_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = choose_device(device, local_rank, local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_num_threads(threads_per_rank(local_world_size))
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if has_others:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    ranks = Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=chosen,
    )
    with _ending_with_torchrun(ranks):
        try:
            yield ranks
            dist.barrier()
        except BaseException:
            if ranks.world_size == 1:
                _leave()
            raise
        _leave()


def _is_started_as_rank() -> bool:
    """Whether the environment describes a group of ranks.

    Raises:
        OptionError: it describes one incompletely.
    """
    missing = [name for name in _GROUP_VARIABLES if not os.environ.get(name)]
    if len(missing) == len(_GROUP_VARIABLES):
        return False
    if missing:
        found = next(name for name in _GROUP_VARIABLES if name not in missing)
        raise OptionError(
            f"the environment variable {found} is set and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; start the ranks with torchrun, or unset "
            f"{found} to use one process"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise OptionError(
                f"the environment variable {name} is {value!r} and should be a number; start the "
                "ranks with torchrun"
            )
    return True


@contextmanager
def _ending_with_torchrun(ranks: Ranks) -> Iterator[None]:
    """Ends this process if torchrun ends: a killed torchrun leaves its ranks running. A thread
    checks, because the rank itself may be waiting for another rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    parent, left = os.getppid(), threading.Event()

    def watch() -> None:
        while not left.wait(PARENT_CHECK_SECONDS):
            if os.getppid() != parent:
                if ranks.is_first:
                    message = "esmm-torchrec: torchrun has ended; rerun the same command"
                    print(message, file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _leave() -> None:
    gc.collect()
    dist.destroy_process_group()
