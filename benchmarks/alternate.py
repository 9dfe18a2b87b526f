"""Times programs against each other in one run.

The speed of a machine drifts with its load and temperature by more than the differences of
interest, so contenders take turns, and ratios are taken within each turn.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timings:
    """Work done per second by each contender in each turn."""

    rates: Mapping[str, list[float]]
    cpu_seconds: Mapping[str, list[float]]
    """CPU seconds of all threads of this process per million units of work."""
    load_average: tuple[float, float]
    """One-minute load averages before and after."""

    def rate(self, name: str) -> float:
        """Returns the median over the turns."""
        return statistics.median(self.rates[name])

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Returns the ratio in each turn."""
        pairs = zip(self.rates[name], self.rates[baseline], strict=True)
        return [rate / base for rate, base in pairs]

    def table(self, baseline: str, *, unit: str) -> str:
        """Formats the median rate of each contender, its ratio to the baseline (median, lowest to
        highest), and CPU seconds per million, which the load of the machine affects least."""
        width = max(map(len, self.rates)) + 2
        lines = [f"{'':{width}}{unit:>16}{'ratio':>8}{'spread':>14}{'CPU s/M':>9}"]
        for name in self.rates:
            ratios = self.ratios(name, baseline)
            lines.append(
                f"{name:{width}}{self.rate(name):>16,.0f}{statistics.median(ratios):>8.2f}"
                f"{f'{min(ratios):.2f} to {max(ratios):.2f}':>14}"
                f"{statistics.median(self.cpu_seconds[name]):>9.1f}"
            )
        return "\n".join(lines)

    def to_dict(self, baseline: str) -> dict[str, Any]:
        """Returns the timings for JSON."""
        return {
            "rates": dict(self.rates),
            "cpu_seconds_per_million": dict(self.cpu_seconds),
            "baseline": baseline,
            "median_ratios": {
                name: statistics.median(self.ratios(name, baseline)) for name in self.rates
            },
            "load_average": self.load_average,
        }


def alternate(contenders: Mapping[str, Callable[[], int]], *, turns: int) -> Timings:
    """Lets each contender work once in every turn, in an order that rotates.

    Args:
        contenders: name → function that does a piece of work and returns its amount.
        turns: number of turns.
    """
    before = os.getloadavg()[0]
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started, cpu_started = time.perf_counter(), time.process_time()
            work = contenders[name]()
            rates[name].append(work / (time.perf_counter() - started))
            cpu_seconds[name].append((time.process_time() - cpu_started) / work * 1e6)
    return Timings(rates, cpu_seconds, (before, os.getloadavg()[0]))


PEAK_SIZE = 2048
"""Rows and columns of the matrices that `matrix_peak` multiplies."""


def matrix_peak(dtype: torch.dtype) -> float:
    """Returns this process's peak GFLOP/s in a large matrix product, the best of three."""
    left, right = (torch.rand(PEAK_SIZE, PEAK_SIZE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * PEAK_SIZE**3 / min(seconds) / 1e9


def environment() -> dict[str, Any]:
    """Describes hardware and software. The peaks are measured now: other tenants of a machine lower
    them as they lower the other figures."""
    capabilities = torch.cpu.get_capabilities()
    wanted = ("avx512_f", "avx512_bf16", "amx_bf16", "bf16")
    return {
        "cpu": _cpu(),
        "instructions": " ".join(name for name in wanted if capabilities.get(name)) or "no AVX-512",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "float32_peak_gflops": round(matrix_peak(torch.float32)),
        "bfloat16_peak_gflops": round(matrix_peak(torch.bfloat16)),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "torchrec", "esmm_torchrec")}


def publish(figures: Mapping[str, Any], out: Path | None, **also: str) -> None:
    """Prints the environment of the figures, and writes both as JSON.

    Args:
        figures: results of a benchmark.
        out: output file; None writes none.
        also: versions of other programs that took part.
    """
    facts = environment() | also
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if out is not None:
        out.write_text(json.dumps({**figures, "environment": facts}, indent=2) + "\n")


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
