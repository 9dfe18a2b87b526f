"""Cost of streaming: time to the first batch, memory, and speed against the mapped copy.

    python benchmarks/streaming.py [--impressions 500000 2000000] [--out streaming.json]
    torchrun --nproc-per-node 2 benchmarks/streaming.py [--out streaming.json]
    torchrun --nproc-per-node 2 benchmarks/streaming.py --data PREPARED

Reads data sets of two sizes from Parquet into batches, then trains on the larger one, with bfloat16
towers, which have the shortest steps: the streamed and the mapped reader take turns. Writing the
mapped copy is timed separately and not counted. With --data, existing data sets are read, and
nothing is trained.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from alternate import alternate, publish  # noqa: E402
from impressions import write_impressions  # noqa: E402

from esmm_torchrec.data.mapped import MappedSplit  # noqa: E402
from esmm_torchrec.data.prepared import PreparedDataSet  # noqa: E402
from esmm_torchrec.data.stream import Split, StreamedSplit  # noqa: E402
from esmm_torchrec.sharding.planner import Workload  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.fit import build_trainer, training_part  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402
from esmm_torchrec.training.reading import training_reader  # noqa: E402

WARM_UP_STEPS = 5
MAPPED, STREAMED = "mapped copy", "streamed"


@dataclass(frozen=True)
class Options:
    """Measure the cost of streaming."""

    impressions: tuple[int, ...] = (500_000, 2_000_000)
    """Training impressions of each data set, ascending."""
    data: tuple[str, ...] = ()
    """Prepared data sets to read instead."""
    turns: int = 7
    """Number of turns of both contenders."""
    steps: int = 20
    """Steps per turn."""
    batch_size: int = 4096
    """Impressions per step, over all ranks."""
    lanes: int = 8
    """Lanes of the stream."""
    window: int = 32_768
    """Window of the stream."""
    tower: tuple[int, ...] = (360, 200, 80)
    """Widths of the hidden layers of each tower; small ones make reading weigh more."""
    out: Path | None = None
    """JSON file for the figures."""


def anonymous_bytes() -> int:
    """Returns the memory of this process that is not mapped from files."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def read_all(split: StreamedSplit, settings: TrainOptions, ranks: Ranks) -> dict[str, float]:
    """Reads an epoch into batches, without training."""
    reader = training_reader(split, settings, ranks, rows_per_step=int(settings.batch_size))
    before, started, cpu = anonymous_bytes(), time.perf_counter(), time.process_time()
    first, first_cpu, most, rows = 0.0, 0.0, 0, 0.0
    for batch in reader:
        if not first:
            first, first_cpu = time.perf_counter() - started, time.process_time() - cpu
        most = max(most, anonymous_bytes() - before)
        assert batch.weight is not None
        rows += float(batch.weight.sum())
    cpu = time.process_time() - cpu
    seconds = time.perf_counter() - started
    return {
        "impressions": split.impressions,
        "first_batch_seconds": first,
        "first_batch_cpu_seconds": first_cpu,
        "rows_per_second": rows / seconds,
        "rows_per_cpu_second": rows / cpu,
        "anonymous_bytes": most,
    }


def contender(
    split: Split, settings: TrainOptions, ranks: Ranks, dataset: PreparedDataSet
) -> Callable[[int], int]:
    """Returns a function that trains on a split for a number of steps."""
    reader = training_reader(split, settings, ranks, rows_per_step=int(settings.batch_size))
    trainer = build_trainer(
        split,
        settings,
        ranks,
        part=training_part(split, settings),
        workload=Workload(reader.batch_size, dataset.statistics.mean_values_per_bag),
    )
    steps = trainer.steps(reader, reader.steps_left)

    def take(num_steps: int) -> int:
        for _ in range(num_steps):
            next(steps)
        return num_steps * int(settings.batch_size)

    take(WARM_UP_STEPS)
    return take


def measure(options: Options, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Takes all measurements; rank 0 prints them."""
    settings = TrainOptions(
        batch_size=options.batch_size,
        tower=options.tower,
        dtype="bfloat16",
        device="cpu",
        sharding="table_wise",
    )
    reading: list[dict[str, float]] = []
    paths: list[str] = list(options.data)
    if not paths:
        paths = [str(folder / str(size)) for size in options.impressions]
        for path, size in zip(paths, options.impressions, strict=True):
            ranks.from_first(lambda path=path, size=size: _write(Path(path), size))
    for path in paths:
        dataset = PreparedDataSet.open(path)
        split = StreamedSplit(dataset, "train", lanes=options.lanes, window=options.window)
        reading.append(read_all(split, settings, ranks))
    if ranks.is_first:
        show(reading, ranks)
    if options.data:
        return {"ranks": ranks.world_size, "reading": reading}
    largest = PreparedDataSet.open(paths[-1])
    started = time.perf_counter()
    mapped = MappedSplit.open(largest, "train")
    layout_seconds = time.perf_counter() - started
    streamed = StreamedSplit(largest, "train", lanes=options.lanes, window=options.window)
    takes = {
        name: contender(split, replace(settings), ranks, largest)
        for name, split in ((MAPPED, mapped), (STREAMED, streamed))
    }
    timings = alternate(
        {name: lambda take=take: take(options.steps) for name, take in takes.items()},
        turns=options.turns,
    )
    if ranks.is_first:
        print(f"laying out the mapped copy: {layout_seconds:.1f} s\n")
        print(timings.table(MAPPED, unit="impressions/s"))
        print(f"load {timings.load_average[0]:.1f} before, {timings.load_average[1]:.1f} after")
    return timings.to_dict(MAPPED) | {
        "ranks": ranks.world_size,
        "reading": reading,
        "layout_seconds": layout_seconds,
    }


def show(reading: list[dict[str, float]], ranks: Ranks) -> None:
    """Prints the figures of reading."""
    print(f"{ranks.world_size} ranks, {os.cpu_count()} cores")
    for of in reading:
        print(
            f"{of['impressions']:>12,.0f} impressions: first batch after "
            f"{of['first_batch_seconds']:.2f} s ({of['first_batch_cpu_seconds']:.2f} of CPU), "
            f"{of['rows_per_second']:,.0f} rows/s of a "
            f"rank, {of['rows_per_cpu_second']:,.0f} rows per CPU second, "
            f"{of['anonymous_bytes'] / 2**20:,.0f} MiB of a rank"
        )


def _write(path: Path, size: int) -> None:
    write_impressions(path, train=size, test=1 << 12)


def main(options: Options) -> None:
    with process_group("cpu") as ranks, tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.from_first(lambda: own))
        figures = measure(options, ranks, folder)
        if ranks.is_first:
            publish(figures, options.out)
        ranks.barrier()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
