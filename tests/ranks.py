"""Runs a function on several gloo ranks, as torchrun does, and gives back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train

# Ranks fork from one process that has imported the library: importing takes longer than most of
# what ranks do here.
multiprocessing.set_forkserver_preload(["torchrec", "esmm_torchrec.training.run"])

_HANDLED_BY_TORCH = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a module-level `function(*arguments)` on `num_ranks` processes of one job.

    Returns:
        what each rank returned, by rank.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        max_restarts=0,
        monitor_interval=0.1,
    )
    handlers = {number: signal.getsignal(number) for number in _HANDLED_BY_TORCH}
    try:
        results = elastic_launch(config, entrypoint=_enter)(function, arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return [results[rank] for rank in range(num_ranks)]


def train_here(data: Path | str, out: Path | str, options: TrainOptions) -> dict[str, Any]:
    """Trains on the ranks that `run_on_ranks` started, or on this process alone."""
    with process_group("cpu") as ranks:
        metrics = train(data, out, options, ranks)
    return metrics


def torchrun(num_ranks: int, *arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess:
    """Runs a script or a module (`"-m", name`) under torchrun, as a person does."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(num_ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def _enter(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch  # noqa: PLC0415  (in the new process only)

    torch.set_num_threads(1)
    return function(*arguments)
