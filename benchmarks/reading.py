"""Cost of reading: training through the reader against training on batches built in advance.

    python benchmarks/reading.py [--impressions 1000000] [--out reading.json]
    python benchmarks/reading.py --ranks 1 8 64 512

Both contenders are the library's trainer on one process, with bfloat16 towers, which have the
shortest steps; they take turns. One reads the memory-mapped copy of the data set in random order,
the other has every batch in memory as a KeyedJaggedTensor. The rates of the reader alone and of
writing the copy, and the disk space of each form, are printed too. With --ranks, it measures
instead the time that the first of that many ranks takes for a batch of 1024, whose sums come from a
simulated exchange with the others, or from looking up the rows of all ranks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from alternate import alternate, publish  # noqa: E402
from impressions import write_impressions  # noqa: E402

from esmm_torchrec.batch import ImpressionBatch  # noqa: E402
from esmm_torchrec.data.mapped import CACHE_FOLDER, MappedSplit  # noqa: E402
from esmm_torchrec.data.reader import STEPS_PER_BLOCK, ImpressionReader  # noqa: E402
from esmm_torchrec.sharding.planner import Workload  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.fit import build_trainer, training_part  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402

WARM_UP_STEPS = 5
RANK_BATCH_SIZE, RANK_TURNS = 1024, 5
IN_MEMORY, THROUGH_READER = "batches in memory", "through the reader"


@dataclass(frozen=True)
class Options:
    """Measure the cost of reading."""

    impressions: int = 1_000_000
    """Number of training impressions."""
    turns: int = 7
    """Number of turns of both contenders."""
    steps: int = 30
    """Steps per turn."""
    batch_size: int = 4096
    """Impressions per step."""
    ranks: tuple[int, ...] = ()
    """Measure one rank's reader with these numbers of ranks instead."""
    out: Path | None = None
    """JSON file for the figures."""


class SimulatedExchange:
    """Exchange with ranks that all have the same as this one."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values * self._world_size

    def max(self, values: np.ndarray) -> np.ndarray:
        return values


def measure_ranks(options: Options, folder: Path) -> dict[str, Any]:
    """Measures CPU milliseconds for a batch of one rank, by number of ranks."""
    split = MappedSplit.open(write_impressions(folder, train=options.impressions, test=1), "train")
    figures: dict[str, Any] = {}
    print(f"{'ranks':>6}{'exchange':>12}{'all rows':>12}   CPU ms for a batch")
    for world_size in options.ranks:
        for name, exchange in (("exchange", SimulatedExchange(world_size)), ("all rows", None)):
            reader = ImpressionReader(
                split,
                batch_size=RANK_BATCH_SIZE,
                world_size=world_size,
                rows_per_step=min(RANK_BATCH_SIZE * world_size, split.impressions),
                exchange=exchange,
            )
            order = reader._order(0)
            starts = range(0, reader.num_rows, reader.global_batch_size)[:STEPS_PER_BLOCK]
            seconds = []
            for _ in range(RANK_TURNS):
                started = time.process_time()
                block = reader._block(order, starts)
                for step, totals in enumerate(block.counts):
                    block.batch(step, totals)
                seconds.append((time.process_time() - started) / len(starts))
            figures.setdefault(str(world_size), {})[name] = median(seconds) * 1e3
        of = figures[str(world_size)]
        print(f"{world_size:>6}{of['exchange']:>12.2f}{of['all rows']:>12.2f}", flush=True)
    return {"cpu_milliseconds_per_batch": figures}


class BatchesInMemory(ImpressionReader):
    """A reader whose batches of one epoch are all built in advance."""

    def make(self) -> None:
        self.batches = list(super().__iter__())

    def __iter__(self) -> Iterator[ImpressionBatch]:
        return iter(self.batches)


def disk_bytes(folder: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def measure(options: Options, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Takes all measurements and prints them."""
    dataset = write_impressions(folder, train=options.impressions, test=1 << 12)
    started, cpu_started = time.perf_counter(), time.process_time()
    split = MappedSplit.open(dataset, "train")
    layout_seconds = time.perf_counter() - started
    layout_cpu_seconds = time.process_time() - cpu_started

    settings = TrainOptions(batch_size=options.batch_size, dtype="bfloat16", device="cpu")
    readers = {
        IN_MEMORY: BatchesInMemory(split, batch_size=options.batch_size),
        THROUGH_READER: ImpressionReader(split, batch_size=options.batch_size),
    }
    made = readers[IN_MEMORY]
    assert isinstance(made, BatchesInMemory)
    reader_cpu = time.process_time()
    made.make()
    reader_cpu = (time.process_time() - reader_cpu) / options.impressions * 1e6

    def contender(reader: ImpressionReader) -> Callable[[int], int]:
        trainer = build_trainer(
            split,
            settings,
            ranks,
            part=training_part(split, settings),
            workload=Workload(options.batch_size),
        )
        steps = trainer.steps(reader, reader.steps_left)

        def take(num_steps: int) -> int:
            for _ in range(num_steps):
                next(steps)
            return num_steps * options.batch_size

        take(WARM_UP_STEPS)
        return take

    needed = WARM_UP_STEPS + options.turns * options.steps
    if needed > made.steps_per_epoch:
        raise SystemExit(f"{needed} steps need {needed * options.batch_size:,} --impressions")
    contenders = {name: contender(reader) for name, reader in readers.items()}
    timings = alternate(
        {name: lambda take=take: take(options.steps) for name, take in contenders.items()},
        turns=options.turns,
    )

    share = reader_cpu * timings.rate(THROUGH_READER) / 1e6
    parquet, mapped = disk_bytes(folder / "train", "*.parquet"), disk_bytes(folder / CACHE_FOLDER)
    print(timings.table(IN_MEMORY, unit="impressions/s"))
    print(
        f"\nreader alone: {reader_cpu:.2f} CPU s for a million impressions, {share:.1%} of a core "
        f"at this speed\n"
        f"laid out for random access: {options.impressions / layout_seconds:,.0f} impressions/s, "
        f"{layout_cpu_seconds / options.impressions * 1e6:.2f} CPU s for a million, once\n"
        f"disk: {parquet / options.impressions:.0f} bytes per impression of zstd Parquet, "
        f"{mapped / (options.impressions + (1 << 12)):.0f} laid out\n"
        f"load {timings.load_average[0]:.1f} before, {timings.load_average[1]:.1f} after"
    )
    return timings.to_dict(IN_MEMORY) | {
        "reader_cpu_seconds_per_million": reader_cpu,
        "reader_share_of_a_core": share,
        "layout_seconds": layout_seconds,
        "layout_cpu_seconds": layout_cpu_seconds,
        "parquet_bytes": parquet,
        "mapped_bytes": mapped,
    }


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder, process_group("cpu") as ranks:
        prepared = Path(folder) / "prepared"
        if options.ranks:
            figures = measure_ranks(options, prepared)
        else:
            figures = measure(options, ranks, prepared)
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
