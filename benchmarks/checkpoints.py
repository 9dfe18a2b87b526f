"""Time that a save blocks training, and time until its checkpoint is complete.

    python benchmarks/checkpoints.py [--rows 1000000] [--turns 5] [--out checkpoints.json]

One table with row-wise Adagrad on one rank; synchronous saves and saves from a thread take turns.
Nothing trains between two saves, so the thread has the cores to itself.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from alternate import publish  # noqa: E402

from esmm_torchrec.checkpoints.manager import CheckpointManager  # noqa: E402
from esmm_torchrec.models.methods import build_train_task  # noqa: E402
from esmm_torchrec.schema import IdFeature, Schema, Table  # noqa: E402
from esmm_torchrec.sharding.planner import Workload  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402
from esmm_torchrec.training.trainer import Trainer  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Measure how long a save blocks training."""

    rows: int = 1_000_000
    """Rows of the table."""
    embedding_dim: int = 64
    """Embedding dimension of the table."""
    turns: int = 5
    """Number of saves of each kind."""
    out: Path | None = None
    """JSON file for the figures."""


def measure(options: Options, ranks: Ranks, folder: Path) -> dict[str, list[float]]:
    """Measures seconds until each save returns, and until its checkpoint is complete."""
    schema = Schema((Table("item", options.rows),), (IdFeature("item", "item"),))
    train_options = TrainOptions(embedding_dim=options.embedding_dim, device="cpu")
    trainer = Trainer(
        build_train_task(schema, train_options.model),
        options=train_options,
        ranks=ranks,
        workload=Workload(4096),
    )
    trainer.optimizer.init_state()
    seconds: dict[str, list[float]] = {}
    for turn in range(options.turns):
        for kind, asynchronous in (("synchronous", False), ("asynchronous", True)):
            checkpoints = CheckpointManager(
                folder / kind, ranks=ranks, keep_last=1, asynchronous=asynchronous
            )
            started = time.perf_counter()
            checkpoints.save(
                step=turn + 1, model=trainer.model, optimizer=trainer.optimizer, progress={}
            )
            seconds.setdefault(f"{kind}_wait", []).append(time.perf_counter() - started)
            checkpoints.wait()
            seconds.setdefault(f"{kind}_complete", []).append(time.perf_counter() - started)
    return seconds


def main(options: Options) -> None:
    """Measures and publishes the figures."""
    with process_group("cpu") as ranks, tempfile.TemporaryDirectory() as folder:
        seconds = measure(options, ranks, Path(folder))
    weights = options.rows * (options.embedding_dim + 1) * 4
    publish({"bytes": weights, "seconds": seconds}, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
