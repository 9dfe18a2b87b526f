"""Large sets: generated, prepared by Spark and streamed for one epoch on two ranks.

    python benchmarks/large_set.py FOLDER [--impressions 5000000 50000000] [--out large_set.json]

Every step is a command of the library in separate processes, whose CPU seconds and memory are
sampled. A step whose figures are in FOLDER/figures.json is not repeated, so an interrupted
measurement continues; with --delete, FOLDER is removed at the end. The log contains Zipf-like ids
of users, items and contexts, a history of items, and two dense columns; clicks and conversions
depend on user and item. It is generated, and read, a row group at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from alternate import publish

IMPRESSIONS_PER_USER = 58
ROWS_PER_GROUP, GROUPS_PER_FILE = 1 << 18, 16
CONTEXTS = {"category": 1000, "shop": 50_000, "position": 20, "city": 400}
HISTORY = 5
EVERY_SECONDS = 0.25


@dataclass(frozen=True)
class Options:
    """Measure how a large set is prepared and trained on."""

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Folder for the data, about 110 bytes per impression."""
    impressions: tuple[int, ...] = (5_000_000, 50_000_000)
    """Training impressions of each set; it has 2 % as many test impressions."""
    ranks: int = 2
    """Number of ranks that train."""
    lanes: int = 8
    """Lanes of the stream."""
    window: int = 131_072
    """Window of the stream."""
    batch_size: int = 16_384
    """Impressions per step, over all ranks."""
    delete: bool = False
    """Remove FOLDER at the end."""
    out: Path | None = None
    """JSON file for the figures."""


def generate(folder: Path, rows: int, seed: int) -> None:
    """Writes a log of impressions as Parquet files, a row group at a time."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    world = np.random.default_rng(0)
    users, items = max(1000, rows // IMPRESSIONS_PER_USER), max(1000, rows // 100)
    effects = world.normal(0, 0.7, (2, 1 << 16)).astype(np.float32)

    def skewed(ids: int, size: int) -> np.ndarray:
        return np.minimum((ids + 1) ** random.random(size), ids).astype(np.int64)

    def group(size: int) -> pa.Table:
        user = random.integers(0, users, size)
        item = skewed(items, size)
        match = effects[:, user & 0xFFFF] + effects[:, item * 7919 & 0xFFFF]
        click, buy = random.random((2, size)) < 1 / (1 + np.exp(-match - [[-3.0], [-2.0]]))
        history = pa.FixedSizeListArray.from_arrays(
            pa.array((np.repeat(item, HISTORY) + skewed(50, size * HISTORY)) % items), HISTORY
        )
        return pa.table(
            {
                "click": click.astype(np.int8),
                "buy": (click & buy).astype(np.int8),
                "user": user,
                "item": item,
                "seen": history.cast(pa.list_(pa.int64())),
                **{name: skewed(ids, size) for name, ids in CONTEXTS.items()},
                "price": random.lognormal(3, 1, size).astype(np.float32),
                "age": random.random(size).astype(np.float32),
            }
        )

    for number in range(0, rows, ROWS_PER_GROUP * GROUPS_PER_FILE):
        end = min(rows, number + ROWS_PER_GROUP * GROUPS_PER_FILE)
        first = group(min(ROWS_PER_GROUP, end - number))
        file = folder / f"part-{number // (ROWS_PER_GROUP * GROUPS_PER_FILE):05}.parquet"
        with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for start in range(number + len(first), end, ROWS_PER_GROUP):
                writer.write_table(group(min(ROWS_PER_GROUP, end - start)))


def _sampled(root: int) -> tuple[dict[int, float], int]:
    """Returns CPU seconds of each process below `root`, and anonymous bytes of all."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    memory: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            status = (path / "status").read_text().splitlines()
        except OSError:
            continue  # it has ended
        process = int(path.name)
        parents[process] = int(fields[1])
        used[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        anonymous = [line for line in status if line.startswith("RssAnon")]
        memory[process] = sum(int(line.split()[1]) << 10 for line in anonymous)

    def is_below(process: int) -> bool:
        while process not in (root, 0):
            process = parents.get(process, 0)
        return process == root

    below = [process for process in used if is_below(process)]
    return {process: used[process] for process in below}, sum(map(memory.__getitem__, below))


def run(*command: object) -> dict[str, Any]:
    """Runs a program, and returns the time and memory that it and its processes took."""
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    seconds: dict[int, float] = {}
    peak = 0
    try:
        while process.poll() is None:
            of_processes, memory = _sampled(process.pid)
            seconds |= of_processes
            peak = max(peak, memory)
            time.sleep(EVERY_SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise SystemExit(f"{command[0]} … {command[-1]} has failed")
    assert process.stdout is not None
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": sum(seconds.values()),
        "peak_bytes": peak,
        "said": process.stdout.read(),
    }


def size_of(folder: Path) -> int:
    """Returns the bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(options: Options, rows: int, step: Callable[..., dict[str, Any]]) -> None:
    """Runs the steps of one set."""
    folder = options.folder / str(rows)
    raw, prepared, trained = folder / "raw", folder / "prepared", folder / "run"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    torchrun += ("--nproc-per-node", str(options.ranks))
    stream = ("--lanes", options.lanes, "--window", options.window)

    def generated() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        started, cpu = time.perf_counter(), time.process_time()
        generate(raw / "train", rows, 1)
        generate(raw / "test", rows // 50, 2)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": size_of(raw)}

    def prepare() -> dict[str, Any]:
        shutil.rmtree(prepared, ignore_errors=True)
        shutil.rmtree(f"{prepared}.partial", ignore_errors=True)
        figures = run(
            *(sys.executable, "-m", "esmm_torchrec", "prepare", "table", prepared),
            *("--train", raw / "train", "--test", raw / "test"),
            *("--click", "click", "--conversion", "buy", "--id", "user", "item", "seen", *CONTEXTS),
            *("--share-table", "item=item,seen", "--dense", "price", "age", "--key", "user"),
            *("--engine", "spark"),
        )
        return figures | {"bytes": size_of(prepared)}

    def read() -> dict[str, Any]:
        out = folder / "reading.json"
        streaming = Path(__file__).with_name("streaming.py")
        figures = run(*torchrun, streaming, "--data", prepared, *stream, "--out", out)
        return figures | json.loads(out.read_text())["reading"][0]

    def train() -> dict[str, Any]:
        # An interrupted run is resumed; its seconds include all its parts.
        figures = run(
            *(*torchrun, "-m", "esmm_torchrec", "train", "--data", prepared, "--out", trained),
            *("--read", "stream", *stream, "--batch-size", options.batch_size, "--epochs", 1),
            *("--dtype", "bfloat16", "--tower", 32, "--device", "cpu", "--checkpoint-every", 500),
        )
        metrics = json.loads((trained / "metrics.json").read_text())
        return figures | {"metrics": metrics, "seconds": metrics["throughput"]["train_seconds"]}

    for name, action in (
        ("generate", generated),
        ("prepare", prepare),
        ("train", train),
        ("read", read),
    ):
        figures = step(f"{rows}/{name}", action)
        per_million = figures["cpu_seconds"] / rows * 1e6
        of_rank = figures.get("anonymous_bytes", 0) / 2**30
        print(
            f"{rows:>12,} {name:<9}{figures['seconds']:>9.0f} s{figures['cpu_seconds']:>9.0f} CPU s"
            f"{per_million:>8.1f} CPU s/M{figures.get('peak_bytes', 0) / 2**30:>8.2f} GiB at most"
            f"{figures.get('bytes', 0) / 1e9:>8.2f} GB written"
            + (f"{of_rank:>8.2f} GiB of a rank" if of_rank else ""),
            flush=True,
        )


def main(options: Options) -> None:
    """Measures all sets."""
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "figures.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}

    def step(name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in figures:
            figures[name] = action()
            kept.write_text(json.dumps(figures, indent=2))
        return figures[name]

    for rows in options.impressions:
        measure(options, rows, step)
    publish(figures, options.out)
    if options.delete:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
