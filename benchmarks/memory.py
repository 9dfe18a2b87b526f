"""Memory of a training run, which does not grow over ten thousand steps.

    python benchmarks/memory.py [--steps 10000] [--out memory.json]

Runs `esmm-torchrec train` in a separate process and samples its anonymous resident memory, which
excludes the pages of the mapped data set, along with its current step. The expected memory is that
of the tables, the state of their optimiser, and one GiB for Python, torch and the batches.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro
from alternate import publish
from impressions import write_impressions

from esmm_torchrec.sharding.planner import SparseOptimizerOption

GIB = 1 << 30
STATE_VALUES = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 16, "adam": 32}
"""Values of optimiser state per row, in addition to its 16 weights."""


@dataclass(frozen=True)
class Options:
    """Measure the memory of training."""

    steps: int = 10_000
    """Number of steps to train."""
    batch_size: int = 256
    """Impressions per step."""
    sparse_optimizer: SparseOptimizerOption = "adagrad"
    """Optimiser of the tables."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True)
class Sample:
    """Step and memory of the process at one moment."""

    step: int
    anonymous_bytes: int


def run(data: Path, folder: Path, options: Options) -> list[Sample]:
    """Trains, and samples several times per second until the process ends."""
    command = [sys.executable, "-m", "esmm_torchrec", "train", "--data", str(data)]
    command += ["--out", str(folder), "--batch-size", str(options.batch_size)]
    command += ["--sparse-optimizer", options.sparse_optimizer, "--device", "cpu", "--epochs", "1"]
    samples = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            samples.append(Sample(_step(folder / "history.jsonl"), _anonymous(process.pid)))
            time.sleep(0.3)
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(process.stderr.read().decode()[-2000:])
    return samples


def _step(history: Path) -> int:
    try:
        return json.loads(history.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError):
        return 0


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) << 10 if lines else 0


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = options.steps * options.batch_size
        dataset = write_impressions(folder / "prepared", train=rows, test=10_000)
        table_rows = sum(table.num_embeddings for table in dataset.schema.tables)
        samples = run(folder / "prepared", folder / "run", options)
    tables, state = (
        4 * table_rows * values for values in (16, STATE_VALUES[options.sparse_optimizer])
    )
    needed = tables + state + GIB
    peak = max(sample.anonymous_bytes for sample in samples)
    tenths = []
    for tenth in range(1, 10):
        first, last = (options.steps * part // 10 for part in (tenth, tenth + 1))
        of_tenth = [s.anonymous_bytes for s in samples if first <= s.step < last]
        if of_tenth:
            tenths.append({"step": first, "anonymous_bytes": mean(of_tenth)})
            print(f"from step {first:>7,}: {mean(of_tenth) / GIB:.3f} GiB")
    print(
        f"\npeak {peak / GIB:.2f} GiB, {peak / needed:.2f} of tables {tables / GIB:.2f} + "
        f"{options.sparse_optimizer} {state / GIB:.2f} + 1 GiB"
    )
    figures = {"peak_bytes": peak, "needed_bytes": needed, "tenths": tenths}
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
