"""Speed and memory of `esmm-torchrec score` on a folder of Parquet files, against training.

    python benchmarks/score_files.py [--rows 400000] [--files 8] [--out score_files.json]

The model and its data are those of serving.py; training is one pass in batches of `--batch-size`.
Each model scores the folder in this process, then one file and all files in separate processes:
memory must not grow with the number of rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from alternate import publish  # noqa: E402
from serving import impressions, prepared_models  # noqa: E402

from esmm_torchrec.cli.main import main as command  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Score a day's log."""

    rows: int = 400_000
    """Number of impressions to train on, and to score."""
    files: int = 8
    """Number of files with the impressions to score."""
    batch_size: int = 4096
    """Batch size of training."""
    out: Path | None = None
    """JSON file for the figures."""


def peak_megabytes(arguments: list[str]) -> float:
    """Runs a command in a separate process and returns its peak memory."""
    program = subprocess.Popen(
        [sys.executable, "-m", "esmm_torchrec", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(program.pid, 0)
    assert status == 0
    return usage.ru_maxrss / 1e3


def main(options: Options) -> None:
    """Measures, prints and writes the figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = prepared_models(
            folder, options.rows, (360, 200, 80), "--batch-size", str(options.batch_size)
        )
        metrics = json.loads((models["run"] / "metrics.json").read_text())
        training = metrics["throughput"]["train_samples_per_second"]
        log = folder / "log"
        log.mkdir()
        each = options.rows // options.files
        for number in range(options.files):
            impressions(each, 2 + number).to_parquet(log / f"{number}.parquet")
        figures: dict[str, Any] = {"train_rows_per_second": training}
        for name, model in models.items():
            score = ["score", str(model), "--input"]
            start = time.perf_counter()
            command([*score, str(log), "--out", str(folder / f"{name}-scores")])
            rate = each * options.files / (time.perf_counter() - start)
            one = [*score, str(log / "0.parquet"), "--out", str(folder / f"{name}-one")]
            every = [*score, str(log), "--out", str(folder / f"{name}-all")]
            figures[name] = {
                "rows_per_second": rate,
                "ratio_to_training": rate / training,
                "peak_megabytes_one_file": peak_megabytes(one),
                "peak_megabytes_all_files": peak_megabytes(every),
            }
    print(json.dumps(figures, indent=2))
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
