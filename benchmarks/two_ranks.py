"""Speed of two ranks of one thread each against one rank of one thread, at the same global batch.

    python benchmarks/two_ranks.py [--turns 3] [--out two_ranks.json]

Jobs of one and of two ranks alternate; each trains the same model over the same batches with every
sharding in turn. Start-up is not timed. CPU seconds are summed over ranks; twice those of one rank
over those of two ("at best") would be the speed-up if no rank waited.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from alternate import publish  # noqa: E402
from impressions import write_impressions  # noqa: E402

from esmm_torchrec.data.mapped import MappedSplit  # noqa: E402
from esmm_torchrec.data.prepared import PreparedDataSet  # noqa: E402
from esmm_torchrec.data.reader import ImpressionReader  # noqa: E402
from esmm_torchrec.models.esmm import TrainOutput  # noqa: E402
from esmm_torchrec.models.methods import DtypeOption  # noqa: E402
from esmm_torchrec.sharding.planner import ShardingOption, Workload  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.fit import build_trainer, training_part  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402

WARM_UP_STEPS = 4
ROUNDS = 3
"""Number of rounds in which the shardings of one job take turns."""


@dataclass(frozen=True)
class Options:
    """Measure two ranks against one."""

    turns: int = 3
    """Number of jobs of each number of ranks."""
    steps: int = 8
    """Steps that a sharding trains in each round of a job."""
    global_batch: int = 4096
    """Impressions per step over all ranks."""
    dtype: DtypeOption = "bfloat16"
    """Data type in which the towers compute."""
    shardings: tuple[ShardingOption, ...] = ("auto", "table_wise", "row_wise")
    """Shardings on two ranks."""
    out: Path | None = None
    """JSON file for the figures."""
    data: Path | None = None
    """Data set; set only for the ranks of a job."""
    result: Path | None = None
    """File for the measurements of the first rank; set only for the ranks of a job."""


@dataclass
class Rates:
    """Measurements of one sharding, one entry per round."""

    impressions_per_second: list[float] = field(default_factory=list)
    cpu_seconds_per_million: list[float] = field(default_factory=list)


def work(options: Options, ranks: Ranks) -> dict[str, Rates]:
    """Does the work of every rank of a job."""
    torch.set_num_threads(1)
    assert options.data is not None
    split = MappedSplit.open(PreparedDataSet.open(options.data), "train")

    def steps(sharding: ShardingOption) -> Iterator[TrainOutput]:
        batch_size = options.global_batch // ranks.world_size
        settings = TrainOptions(
            dtype=options.dtype,
            sharding=sharding,
            device="cpu",
        )
        trainer = build_trainer(
            split,
            settings,
            ranks,
            part=training_part(split, settings),
            workload=Workload(batch_size),
        )
        reader = ImpressionReader(
            split,
            batch_size=batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        yield from trainer.steps(reader, reader.steps_left)

    running = {sharding: steps(sharding) for sharding in options.shardings}
    rates = {sharding: Rates() for sharding in running}
    for iterator in running.values():
        for _ in range(WARM_UP_STEPS):
            next(iterator)
    rows = options.steps * options.global_batch
    for _ in range(ROUNDS):
        for sharding, iterator in running.items():
            dist.barrier()
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(options.steps):
                next(iterator)
            dist.barrier()
            rates[sharding].impressions_per_second.append(rows / (time.perf_counter() - started))
            cpu_seconds = torch.tensor(time.process_time() - cpu_started)
            dist.all_reduce(cpu_seconds)
            rates[sharding].cpu_seconds_per_million.append(cpu_seconds.item() / rows * 1e6)
    return rates


def job(options: Options) -> None:
    """Runs one rank of one job."""
    with process_group("cpu") as ranks:
        rates = work(options, ranks)
        if ranks.is_first:
            assert options.result is not None
            options.result.write_text(json.dumps({name: vars(r) for name, r in rates.items()}))


def run_job(num_ranks: int, options: Options, folder: Path) -> dict[str, Any]:
    """Starts a job and returns its measurements."""
    result = folder / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__]
    command += ["--data", str(folder / "prepared"), "--result", str(result)]
    command += ["--steps", str(options.steps), "--global-batch", str(options.global_batch)]
    command += ["--dtype", options.dtype, "--shardings"]
    command += ["table_wise"] if num_ranks == 1 else list(options.shardings)
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-3000:])
    return json.loads(result.read_text())


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Lets jobs of one and two ranks take turns."""
    steps = WARM_UP_STEPS + ROUNDS * options.steps
    dataset = write_impressions(
        folder / "prepared", train=(steps + 8) * options.global_batch, test=1 << 12
    )
    MappedSplit.open(dataset, "train")
    load = os.getloadavg()[0]
    turns = [
        {num_ranks: run_job(num_ranks, options, folder) for num_ranks in (1, 2)}
        for _ in range(options.turns)
    ]

    def medians(num_ranks: int, sharding: str, what: str) -> list[float]:
        return [statistics.median(turn[num_ranks][sharding][what]) for turn in turns]

    one = medians(1, "table_wise", "impressions_per_second")
    one_cpu = medians(1, "table_wise", "cpu_seconds_per_million")
    print(f"{'':22}{'impressions/s':>14}{'ratio':>7}{'spread':>14}{'CPU s/M':>9}{'at best':>9}")
    print(
        f"{'one rank':22}{statistics.median(one):>14,.0f}{1:>7.2f}{'':14}"
        f"{statistics.median(one_cpu):>9.1f}"
    )
    figures: dict[str, Any] = {"turns": turns, "load_average": load}
    for sharding in options.shardings:
        rates = medians(2, sharding, "impressions_per_second")
        cpu = medians(2, sharding, "cpu_seconds_per_million")
        ratios = [two / base for two, base in zip(rates, one, strict=True)]
        bound = [2 * base / two for two, base in zip(cpu, one_cpu, strict=True)]
        figures[sharding] = {"ratio": statistics.median(ratios), "bound": statistics.median(bound)}
        print(
            f"{f'two ranks, {sharding}':22}{statistics.median(rates):>14,.0f}"
            f"{statistics.median(ratios):>7.2f}{f'{min(ratios):.2f} to {max(ratios):.2f}':>14}"
            f"{statistics.median(cpu):>9.1f}{statistics.median(bound):>9.2f}"
        )
    print(f"\n{options.dtype} towers; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    return figures


def main(options: Options) -> None:
    if options.data is not None:
        job(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
