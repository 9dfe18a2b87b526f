"""Stability of a long training: memory, open files, threads and speed.

    python benchmarks/endurance.py [--steps 20000] [--checkpoint-every 200] [--out endurance.json]

A small model is trained on synthetic impressions with regular checkpoints, of which the last three
are kept. At each checkpoint a thread records the resources of the process.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from alternate import publish  # noqa: E402

from esmm_torchrec import TrainOptions, prepare_table, process_group, train  # noqa: E402
from esmm_torchrec.checkpoints.files import checkpoint_folders  # noqa: E402

IMPRESSIONS = 20_000


@dataclass(frozen=True)
class Options:
    """Watch a long training."""

    steps: int = 20_000
    """Steps to train."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    batch_size: int = 100
    """Impressions per step."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True)
class Use:
    """Resources that the process uses when a checkpoint is complete."""

    step: int
    seconds: float
    """Seconds since the first checkpoint."""
    resident_bytes: int
    open_files: int
    threads: int


def made_up(seed: int) -> pd.DataFrame:
    """Draws impressions of 500 users and 300 items; a click depends on the item."""
    rng = np.random.default_rng(seed)
    item = rng.integers(300, size=IMPRESSIONS)
    click = rng.random(IMPRESSIONS) < 0.1 + 0.3 * (item % 3 == 0)
    conversion = click & (rng.random(IMPRESSIONS) < 0.2)
    return pd.DataFrame(
        {
            "click": click.astype(int),
            "conversion": conversion.astype(int),
            "user": rng.integers(500, size=IMPRESSIONS),
            "item": item,
            "price": rng.normal(size=IMPRESSIONS),
        }
    )


def watch(checkpoints: Path, noted: list[Use], ended: threading.Event) -> None:
    """Records the resources of the process at each new checkpoint."""
    started = time.perf_counter()
    while not ended.wait(0.02):
        step = max(checkpoint_folders(checkpoints), default=0)
        if step == (noted[-1].step if noted else 0):
            continue
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        noted.append(
            Use(
                step,
                time.perf_counter() - started,
                int(status["VmRSS"].split()[0]) << 10,
                len(os.listdir("/proc/self/fd")),
                int(status["Threads"]),
            )
        )


def main(options: Options) -> None:
    """Trains, and compares the second quarter of the run with the last."""
    noted: list[Use] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_table(
            folder / "data",
            train=made_up(0),
            test=made_up(1),
            click="click",
            conversion="conversion",
            ids=["user", "item"],
            dense=["price"],
        )
        steps_per_pass = -(-IMPRESSIONS // options.batch_size)
        train_options = TrainOptions(
            epochs=-(-options.steps // steps_per_pass),
            max_steps=options.steps,
            batch_size=options.batch_size,
            embedding_dim=8,
            tower=(16,),
            checkpoint_every=options.checkpoint_every,
            keep_checkpoints=3,
            device="cpu",
        )
        ended = threading.Event()
        watcher = threading.Thread(
            target=watch, args=(folder / "run" / "checkpoints", noted, ended), daemon=True
        )
        watcher.start()
        with process_group("cpu") as ranks:
            train(folder / "data", folder / "run", train_options, ranks)
        ended.set()
        watcher.join()
    quarter = len(noted) // 4
    figures = {
        part: {
            "resident_bytes": statistics.median(use.resident_bytes for use in uses),
            "open_files": statistics.median(use.open_files for use in uses),
            "threads": statistics.median(use.threads for use in uses),
            "steps_per_second": (uses[-1].step - uses[0].step)
            / (uses[-1].seconds - uses[0].seconds),
        }
        for part, uses in (
            ("second_quarter", noted[quarter : 2 * quarter]),
            ("last_quarter", noted[-quarter:]),
        )
    }
    publish({**figures, "checkpoints": [asdict(use) for use in noted]}, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
