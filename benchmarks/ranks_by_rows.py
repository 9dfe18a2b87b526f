"""`train` as one process or on two ranks, by the rows of the table: which should `prepare` suggest?

    python benchmarks/ranks_by_rows.py --out bench/ranks-by-rows --prepare     # makes the tables
    python benchmarks/ranks_by_rows.py --out bench/ranks-by-rows

Times whole commands, from start-up to metrics.json, in turns: one pass at the defaults, with one
process on all cores and with two ranks. Prints the medians of the turns, and their ratio.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.first_model_sets import TableShape, generated_table
from esmm_torchrec.data.sources.tabular import prepare_table

LAUNCHERS = {
    "one process": [],
    "two ranks": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
}


@dataclass(frozen=True)
class Options:
    """Time `train` as one process and on two ranks."""

    out: Path = Path("bench/ranks-by-rows")
    """Folder for the tables and the figures."""
    rows: tuple[int, ...] = (20_000, 100_000, 500_000)
    """Training rows of each table, which has a tenth as many test rows."""
    turns: int = 2
    """Number of runs of each."""
    prepare: bool = False
    """Prepare the tables and stop."""


def table(options: Options, rows: int) -> Path:
    """Returns a prepared table with `rows` training rows, created if it does not exist."""
    prepared = options.out / f"table-{rows}"
    if not prepared.exists():
        shape = TableShape("ranks", rows + rows // 10, dense=8, heavy=3, ids=(20_000, 3_000, 100))
        frame = generated_table(shape, seed=0)
        prepare_table(
            prepared,
            train=frame[:rows],
            test=frame[rows:],
            click="click",
            conversion="conversion",
            ids=[name for name in frame if name.startswith("id")],
            dense=[name for name in frame if name.startswith("dense")],
        )
    return prepared


def seconds(prepared: Path, out: Path, launcher: list[str]) -> float:
    """Returns the wall time of a `train` command of one pass."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", *launcher, "esmm_torchrec", "train", "--epochs", "1"]
    command += ["--data", str(prepared), "--out", str(out), "--device", "cpu"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main(options: Options) -> None:
    """Times every table in turns."""
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {rows: table(options, rows) for rows in options.rows}
    if options.prepare:
        return
    found = {}
    for rows, prepared in tables.items():
        times: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
        for _ in range(options.turns):
            for name, launcher in LAUNCHERS.items():
                times[name].append(seconds(prepared, options.out / "run", launcher))
        one, two = (statistics.median(of) for of in times.values())
        print(f"{rows:>9,} rows: one process {one:.1f} s, two ranks {two:.1f} s, {one / two:.2f}")
        found[rows] = times
    (options.out / "ranks_by_rows.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
