"""Start and end of the process group, and the one place where the device is chosen.

`with process_group("auto") as ranks:` serves a process that torchrun started and one that stands
alone. Everything sharded must be local to a function called inside the block: destroying the group
while a DistributedModelParallel is alive aborts the process now and then.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from esmm_torchrec.errors import EsmmTorchrecError, OptionError
from esmm_torchrec.sharding.host import threads_per_rank

T = TypeVar("T")

DeviceOption = Literal["auto", "cpu", "cuda"]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Rank 0 alone may prepare data for a while before the others hear of it."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints, writes and decides for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def from_first(self, work: Callable[[], T]) -> T:
        """Does `work` on rank 0 alone and gives its (picklable) result to every rank.

        Raises:
            EsmmTorchrecError: as `work` raised it, on every rank, so that none is left waiting.
        """
        outcome: list[object] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (EsmmTorchrecError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[1], Exception):
            raise outcome[1]
        return outcome[0]  # pyright: ignore[reportReturnType]


def choose_device(option: DeviceOption, local_rank: int, local_world_size: int = 1) -> torch.device:
    """The device of a rank; "auto" is CUDA where each rank of the machine has a GPU, else the CPU.

    Raises:
        OptionError: "cuda" where there is no GPU for this rank.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if option == "cpu" or (option == "auto" and gpus < local_world_size):
        if option == "auto" and gpus and local_rank == 0:
            print(
                f"{local_world_size} ranks on this machine and GPUs for {gpus}: all on the CPU",
                file=sys.stderr,
                flush=True,
            )
        return torch.device("cpu")
    if local_rank >= gpus:
        raise OptionError(
            f"--device {option} needs a GPU for each rank of this machine and finds {gpus}; "
            "start fewer ranks or use --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: DeviceOption = "auto") -> Iterator[Ranks]:
    """Joins the group that torchrun describes, or makes one of a single rank; leaves it at the end.

    On the CPU the cores are divided among the ranks of the machine; gloo carries the collectives.
    On CUDA, NCCL does. After an error a group of several ranks is left as it is: waiting for the
    others would hang where only this rank failed. A group of one is left, so that the next block
    of a notebook finds none.

    Example::

        with process_group() as ranks:
            metrics = train(data, out, TrainOptions(), ranks)

    Args:
        device: "auto" is CUDA where there is a GPU for each rank of the machine, else the CPU.

    Yields:
        this process among all of them, with its device.

    Raises:
        OptionError: "cuda" where there is no GPU for this rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = choose_device(device, local_rank, local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_num_threads(threads_per_rank(local_world_size))
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
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
    try:
        yield ranks
        dist.barrier()
    except BaseException:
        if ranks.world_size == 1:
            _leave()
        raise
    _leave()


def _leave() -> None:
    gc.collect()
    dist.destroy_process_group()
