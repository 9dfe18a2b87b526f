"""Trainings killed at random moments, also during a save, end like uninterrupted ones: weights,
optimiser state, position, metrics and history are bitwise equal."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from esmm_torchrec.checkpoints.files import (
    checkpoint_folders,
    find_checkpoint,
    rank_file,
    read_description,
)
from tests.prepared_data import write_data_set

OPTIONS = [
    "--embedding-dim", "8", "--tower", "8", "--batch-size", "40", "--sharding", "row_wise",
    "--epochs", "40", "--checkpoint-every", "2",
]  # fmt: skip
MEASURED_TIMES = {"samples_per_second"}
KILLED_WHILE_STARTING = 0.2
"""Share of the kills that happen before a run has saved a new checkpoint."""


def _command(ranks: int, data: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"]
    return [*command, "esmm_torchrec", "train", "--data", str(data), "--out", str(out), *OPTIONS]


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _last_step(out: Path) -> int:
    return max(checkpoint_folders(out / "checkpoints"), default=0)


def _kill_at_a_random_moment(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Kills a training at a random moment; returns whether it was still running."""
    if random.random() < KILLED_WHILE_STARTING:
        time.sleep(random.uniform(0, 10))
    else:
        until = _last_step(out) + 2 * random.randint(1, 3)
        while process.poll() is None and _last_step(out) < until:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))  # a step and a save take about as long
    was_running = process.poll() is None
    for one in _descendants(process.pid):  # torchrun's workers have separate sessions
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait()
    return was_running


def _descendants(process: int) -> list[int]:
    """Returns a process and all of its descendants."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [process, *(one for child in map(int, children) for one in _descendants(child))]


def _state(out: Path) -> dict[str, Any]:
    """Returns everything that a run writes, except times."""
    last = find_checkpoint(out / "checkpoints")
    assert last is not None
    description = read_description(last)
    description["progress"].pop("seconds")
    # Only weights and optimiser state: pickles of equal values need not be equal.
    files = description.pop("files")
    description["tensors"] = {k: entry for k, entry in files.items() if k.endswith(".distcp")}
    assert description["tensors"]
    metrics = json.loads((out / "metrics.json").read_text())
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return {
        "checkpoint": description,
        "ranks": [
            _with_bytes(torch.load(last / rank_file(rank), weights_only=True))
            for rank in range(description["num_ranks"])
        ],
        "test": metrics["test"],
        "history": [
            {name: value for name, value in line.items() if name not in MEASURED_TIMES}
            for line in history
        ],
    }


def _with_bytes(value: Any) -> Any:
    """Returns a value with each tensor replaced by its bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _with_bytes(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_bytes(entry) for entry in value]
    return value


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        (1, 1),
        pytest.param(1, 70, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param(2, 30, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(ranks: int, kills: int, tmp_path: Path) -> None:
    random.seed(ranks)
    data, out, whole = (tmp_path / name for name in ("data", "killed", "whole"))
    write_data_set(data, train=410, test=90)
    killed = 0
    for _ in range(kills):
        killed += _kill_at_a_random_moment(_start(_command(ranks, data, out)), out)
    assert killed > kills // 2
    for folder in (out, whole):
        assert _start(_command(ranks, data, folder)).wait() == 0
    assert _state(out) == _state(whole)
    assert not [path for path in out.rglob("*") if path.suffix in (".partial", ".removed")]
