"""Speed of `esmm-torchrec generate`, and its memory, which does not grow with impressions.

    python benchmarks/generate.py --impressions 1000000 4000000 --history-scale 0.07 1.0

Writes worlds with the command itself, each in a separate process, into a temporary folder, and
prints impressions and megabytes of files per second and the peak resident set size. With --out, it
also writes the figures as JSON.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from alternate import publish


@dataclass(frozen=True)
class Options:
    """Measure esmm-torchrec generate."""

    impressions: tuple[int, ...] = (1_000_000, 4_000_000)
    """Numbers of impressions to write."""
    history_scale: tuple[float, ...] = (0.07, 1.0)
    """History scales to write each number with."""
    repeats: int = 3
    """Number of runs of each; the fastest counts."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True)
class Measurement:
    """Figures for one number of impressions and one history scale."""

    impressions: int
    history_scale: float
    megabytes: float
    seconds: float
    """Wall time of the whole process, including the start of Python."""
    impressions_per_second: float
    peak_rss_bytes: int


def measure(impressions: int, history_scale: float, repeats: int) -> Measurement:
    """Runs the command `repeats` times."""
    seconds, peaks, size = [], [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "world"
            options = ["--impressions", str(impressions), "--history-scale", str(history_scale)]
            command = [sys.executable, "-m", "esmm_torchrec", "generate", str(out), *options]
            start = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds.append(time.perf_counter() - start)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            # Kilobytes on Linux, bytes on macOS.
            peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            size = sum(file.stat().st_size for file in out.iterdir())
    return Measurement(
        impressions=impressions,
        history_scale=history_scale,
        megabytes=size / 1e6,
        seconds=min(seconds),
        impressions_per_second=impressions / min(seconds),
        peak_rss_bytes=max(peaks),
    )


def main() -> None:
    options = tyro.cli(Options)
    measurements: list[Measurement] = []
    header = ("impressions", "histories", "MB", "s", "imp./s", "MB/s", "peak MiB")
    print("{:>12} {:>9} {:>8} {:>7} {:>9} {:>6} {:>8}".format(*header))
    for history_scale in options.history_scale:
        for impressions in options.impressions:
            m = measure(impressions, history_scale, options.repeats)
            measurements.append(m)
            print(
                f"{m.impressions:>12,} {m.history_scale:>9} {m.megabytes:>8,.0f} {m.seconds:>7.1f} "
                f"{m.impressions_per_second:>9,.0f} {m.megabytes / m.seconds:>6.0f} "
                f"{m.peak_rss_bytes / 2**20:>8,.0f}",
                flush=True,
            )
    publish({"worlds": [asdict(m) for m in measurements]}, options.out)


if __name__ == "__main__":
    main()
