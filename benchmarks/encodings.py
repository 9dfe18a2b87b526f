"""Cost of Parquet encodings, compressions and row groups: disk, and CPU to write and to read.

    python benchmarks/encodings.py [--impressions 500000] [--out encodings.json]

Measured on the impressions of `write_impressions` (23 single ids each) and the users of
`write_histories` (613 weighted ids each). A prepared data set has ids as byte planes under zstd,
weights with a dictionary, and 131 072 impressions or 8 192 users per row group.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from alternate import publish
from impressions import write_histories, write_impressions

from esmm_torchrec.data.prepared import PreparedDataSet

ENCODINGS = ("dictionary", "plain", "byte planes", "delta")
COMPRESSIONS = ("none", "snappy", "lz4", "zstd")
ROW_GROUPS = {"impressions": (1 << 15, 1 << 17, 1 << 19), "users": (1 << 11, 1 << 13, 1 << 15)}
CHOSEN = {"impressions": 1 << 17, "users": 1 << 13}


@dataclass(frozen=True)
class Options:
    """Measure encodings."""

    impressions: int = 500_000
    """Number of impressions; there are 1/58 as many users."""
    repeats: int = 5
    """Number of times that each is written and read, in turns; the median counts."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True)
class Choice:
    """One way to write a table."""

    encoding: str
    compression: str
    row_group: int

    def settings(self, columns: pa.Schema) -> dict[str, Any]:
        """Returns the arguments for `pyarrow.parquet.write_table`."""
        leaves = {
            f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name: column
            for column in columns
        }
        given: dict[str, Any] = {"compression": self.compression, "row_group_size": self.row_group}
        if self.encoding == "dictionary":
            return given
        few_values = [
            leaf
            for leaf, column in leaves.items()
            if pa.types.is_int8(column.type) or column.name.endswith("__weight")
        ]
        encoding = {
            "plain": "PLAIN",
            "byte planes": "BYTE_STREAM_SPLIT",
            "delta": "DELTA_BINARY_PACKED",
        }[self.encoding]
        return given | {
            "use_dictionary": few_values,
            "column_encoding": {leaf: encoding for leaf in leaves if leaf not in few_values},
        }


def choices(kind: str) -> list[Choice]:
    """Returns the library's way of writing, and every way that differs from it in one respect."""
    row_group = CHOSEN[kind]
    ways = [Choice(encoding, "zstd", row_group) for encoding in ENCODINGS]
    ways += [Choice("byte planes", compression, row_group) for compression in COMPRESSIONS]
    ways += [Choice("byte planes", "zstd", rows) for rows in ROW_GROUPS[kind]]
    return list(dict.fromkeys(ways))


def measure(kind: str, table: pa.Table, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Writes and reads a table in every way."""
    ways = choices(kind)
    seconds: dict[Choice, list[tuple[float, float]]] = {way: [] for way in ways}
    sizes = {}
    for _ in range(repeats):
        for way in ways:
            file = folder / "table.parquet"
            started = time.process_time()
            pq.write_table(table, file, **way.settings(table.schema))
            written = time.process_time()
            pq.read_table(file)
            seconds[way].append((written - started, time.process_time() - written))
            sizes[way] = file.stat().st_size
    print(f"\n{len(table):,} {kind}, CPU seconds for a million")
    print(f"{'encoding':14}{'compression':13}{'row group':>10}{'bytes each':>12}", end="")
    print(f"{'write':>9}{'read':>9}")
    rows = []
    for way in ways:
        write, read = (
            statistics.median(part) / len(table) * 1e6 for part in zip(*seconds[way], strict=True)
        )
        row = asdict(way) | {"bytes_each": sizes[way] / len(table)}
        rows.append(row | {"write_cpu_seconds": write, "read_cpu_seconds": read})
        print(
            f"{way.encoding:14}{way.compression:13}{way.row_group:>10,}"
            f"{row['bytes_each']:>12,.1f}{write:>9.2f}{read:>9.2f}"
        )
    return rows


def main(options: Options) -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, write in (("impressions", write_impressions), ("users", write_histories)):
            dataset: PreparedDataSet = write(folder / kind, train=options.impressions, test=1000)
            split = "train"
            files = (
                dataset.impression_files(split)
                if kind == "impressions"
                else dataset.shared_files(split)
            )
            table = pa.concat_tables(pq.read_table(file) for file in files)
            figures[kind] = measure(kind, table, folder, options.repeats)
    print()
    publish(figures, options.out, pyarrow=pa.__version__)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
