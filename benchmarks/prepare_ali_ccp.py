"""Speed and memory of `esmm-torchrec prepare ali-ccp`.

    python benchmarks/prepare_ali_ccp.py --megabytes 1000 --out prepare_ali_ccp.json

Writes raw files in the proportions of the real ones (600 features per common row, 58 impressions
that share it, 13 features each), prepares them in a separate process and prints MB of raw text per
second and the peak resident set size of that process. The raw files are removed afterwards.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from alternate import publish

IMPRESSIONS_PER_COMMON_ROW = 58
COMMON_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class Field:
    """One field of the raw data: its range of ids and its occurrence in rows."""

    name: str
    first_id: int
    distinct: int
    share: float
    """Share of rows that have the field."""
    mean_values: float = 1.0
    weighted: bool = False


COMMON = (
    Field("101", 1, 400_000, 0.998),
    Field("109_14", 450_000, 9_000, 0.991, 70, True),
    Field("110_14", 1_400_000, 400_000, 0.991, 252, True),
    Field("127_14", 3_490_000, 330_000, 0.990, 155, True),
    Field("150_14", 3_870_000, 70_000, 0.998, 136, True),
    Field("121", 3_438_658, 98, 0.870),
    Field("122", 3_438_758, 14, 0.870),
    Field("124", 3_438_775, 2, 0.870),
    Field("125", 3_438_780, 7, 0.870),
    Field("126", 3_438_790, 3, 0.416),
    Field("127", 3_438_795, 3, 0.870),
    Field("128", 3_864_885, 2, 0.870),
    Field("129", 3_864_890, 4, 0.637),
)
SKELETON = (
    Field("205", 4_900_000, 1_600_000, 1.0),
    Field("206", 8_300_000, 8_000, 1.0),
    Field("207", 8_400_000, 400_000, 1.0),
    Field("210", 9_030_000, 80_000, 1.0, 6.1),
    Field("216", 9_110_000, 200_000, 0.711),
    Field("508", 9_355_000, 8_000, 0.696, 1, True),
    Field("509", 9_363_000, 160_000, 0.221, 1, True),
    Field("702", 9_523_000, 100_000, 0.224, 1, True),
    Field("853", 9_623_000, 60_000, 0.410, 3.4, True),
    Field("301", 9_351_665, 3, 1.0),
)


def _writer_of(fields: tuple[Field, ...]) -> Callable[[np.random.Generator, int], list[str]]:
    """Returns a function (random numbers, rows) → `feature_num,feature_list` of each row."""
    texts = [
        np.array([f"{f.name}\x02{f.first_id + i}\x03" for i in range(f.distinct)], object)
        for f in fields
    ]
    weights = np.array([f"{np.log1p(n):.5f}\x01" for n in range(1, 200)], object)

    def write(random: np.random.Generator, rows: int) -> list[str]:
        parts: list[list[str]] = [[] for _ in range(rows)]
        for f, text in zip(fields, texts, strict=True):
            counts = (random.random(rows) < f.share).astype(np.int64)
            if f.mean_values > 1:
                counts *= 1 + random.poisson(random.exponential(f.mean_values - 1, rows))
            total = int(counts.sum())
            # A long tail: low numbers are common, most of the range is rare.
            picks = text[(f.distinct * random.random(total) ** 4).astype(np.int64)]
            if f.weighted:
                values = picks + weights[random.geometric(0.2, total).clip(max=len(weights)) - 1]
            else:
                values = picks + "1.0\x01"
            ends = np.cumsum(counts)
            for row in np.flatnonzero(counts):
                parts[row].extend(values[ends[row] - counts[row] : ends[row]])
        return [f"{len(part)},{''.join(part)[:-1]}" for part in parts]

    return write


def write_raw(folder: Path, *, megabytes: int, seed: int = 0) -> int:
    """Writes the four raw files, half of the bytes for training; returns their bytes."""
    random = np.random.default_rng(seed)
    common, skeleton = _writer_of(COMMON), _writer_of(SKELETON)
    total = 0
    for split in ("train", "test"):
        written, sample_id = 0, 0
        with (
            (folder / f"common_features_{split}.csv").open("w") as common_file,
            (folder / f"sample_skeleton_{split}.csv").open("w") as skeleton_file,
        ):
            while written < megabytes * 500_000:
                rows = COMMON_ROWS_AT_ONCE
                index = [f"{i:016x}" for i in random.integers(0, 2**63, rows)]
                lines = zip(index, common(random, rows), strict=True)
                written += common_file.write("".join(f"{i},{text}\n" for i, text in lines))
                rows *= IMPRESSIONS_PER_COMMON_ROW
                click = random.random(rows) < 0.039
                buy = click & (random.random(rows) < 0.0055)
                parts = []
                for row, text in enumerate(skeleton(random, rows)):
                    sample_id += 1
                    of = index[row // IMPRESSIONS_PER_COMMON_ROW]
                    parts.append(f"{sample_id},{click[row]:d},{buy[row]:d},{of},{text}\n")
                written += skeleton_file.write("".join(parts))
        total += written
    return total


@dataclass(frozen=True)
class Options:
    """Measure esmm-torchrec prepare ali-ccp."""

    megabytes: int = 1000
    """Megabytes of raw text to write and read."""
    folder: Path | None = None
    """Folder for the raw files; a temporary one if not given."""
    out: Path | None = None
    """JSON file for the figures."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        raw, prepared = Path(scratch, "raw"), Path(scratch, "prepared")
        raw.mkdir()
        size = write_raw(raw, megabytes=options.megabytes)
        command = [sys.executable, "-m", "esmm_torchrec", "prepare", "ali-ccp", raw, prepared]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak, cpu_seconds = used.ru_maxrss * 1024, used.ru_utime + used.ru_stime
        written = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
    print(f"{'raw text':<12}{size / 1e6:>10.0f} MB")
    print(f"{'prepared':<12}{written / 1e6:>10.0f} MB")
    print(f"{'time':<12}{seconds:>10.1f} s")
    print(f"{'CPU time':<12}{cpu_seconds:>10.1f} s")
    print(f"{'speed':<12}{size / 1e6 / seconds:>10.0f} MB/s of raw text")
    print(f"{'peak memory':<12}{peak / 2**20:>10.0f} MiB")
    figures = {
        "raw_megabytes": size / 1e6,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "megabytes_per_second": size / 1e6 / seconds,
        "peak_rss_bytes": peak,
        "prepared_megabytes": written / 1e6,
    }
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
