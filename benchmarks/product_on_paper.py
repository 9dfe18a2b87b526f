"""The paper's Product data set on 64 GPUs, calculated from measured rates.

    python benchmarks/product_on_paper.py [--gpus 64] [--rows-per-cpu-second 300000] …

Nothing of this size is run. Each rate is an option whose description names the source of its
default.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Options:
    """Bytes, minutes and cores for data of a size that one machine cannot hold."""

    impressions: float = 8.95e9
    """Training impressions (the paper's table 1: 8 950 million)."""
    users_and_items: float = 48e6 + 23.5e6
    """Distinct users and items (the same table)."""
    gpus: int = 64
    """Number of ranks."""
    gpus_per_node: int = 8
    """Ranks per machine."""
    parquet_bytes: float = 34.3
    """Bytes per impression of 10 ids, 2 lists of 11 ids and 3 dense features, zstd byte planes."""
    mapped_bytes: float = 190.7
    """Bytes of the mapped copy per such impression."""
    spark_core_seconds: float = 24.0
    """Core seconds per million impressions prepared by Spark in local mode, with JVM warm-up."""
    prepare_rows_per_second: float = 285_000
    """Rate of `prepare table`, one thread."""
    layout_rows_per_second: float = 508_000
    """Rate of writing the mapped copy, one thread."""
    rows_per_cpu_second: float = 300_000
    """Rate of the streaming reader, from Parquet to batches (docs/scale.md, the lower figure)."""
    rows_per_gpu_second: float = 300_000
    """Training rate of one GPU: an assumption, not measured at this scale."""
    lanes: int = 64
    """Lanes of the stream."""
    window: int = 1 << 20
    """Window of the stream."""
    embedding_dim: int = 20
    """Embedding dimension of each table."""
    checkpoint_bytes_per_second: float = 500e6
    """Rate at which one rank writes to shared storage; an assumption."""


def rows(options: Options) -> list[tuple[str, str]]:
    """Returns each requirement with its amount."""
    nodes = options.gpus / options.gpus_per_node
    impressions = options.impressions
    stored, mapped = impressions * options.parquet_bytes, impressions * options.mapped_bytes
    spark = impressions / 1e6 * options.spark_core_seconds
    epoch = impressions / (options.rows_per_gpu_second * options.gpus)
    rows_of_window = options.lanes / options.gpus * options.window
    window = 2 * rows_of_window * options.mapped_bytes
    first = rows_of_window / options.rows_per_cpu_second
    # Rows are float32, with one float32 of row-wise Adagrad state each.
    tables = options.users_and_items * (options.embedding_dim + 1) * 4
    written = tables / options.gpus
    from_store = f"{stored / 1e9:,.0f} GB, {stored / epoch / 1e9:.2f} GB/s"
    cores = options.rows_per_gpu_second / options.rows_per_cpu_second
    return [
        ("prepared data", f"{stored / 1e9:,.0f} GB"),
        ("  by `prepare table`, one thread", _hours(impressions / options.prepare_rows_per_second)),
        ("  by Spark", f"{spark / 3600:,.0f} core hours"),
        ("  by Spark on 256 cores", _minutes(spark / 256)),
        ("mapped copy, every machine", f"{mapped / 1e12:.2f} TB"),
        ("  written before the first step", _hours(impressions / options.layout_rows_per_second)),
        ("streamed instead: windows of a rank", f"{window / 1e9:.2f} GB"),
        ("  of a machine", f"{window * options.gpus_per_node / 1e9:.1f} GB"),
        ("  first batch of a rank", f"{first:.1f} s"),
        ("an epoch", _minutes(epoch)),
        ("  read from the store by all ranks", from_store),
        ("  by a machine", f"{stored / epoch / nodes / 1e6:,.0f} MB/s"),
        ("  cores that the reader of a rank takes", f"{cores:.2f}"),
        ("checkpoint: tables and optimiser state", f"{tables / 1e9:.1f} GB"),
        ("  written by each rank", f"{written / 1e6:,.0f} MB"),
        ("  in", f"{written / options.checkpoint_bytes_per_second:.1f} s"),
    ]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    for name, amount in rows(tyro.cli(Options, description=__doc__)):
        print(f"{name:42}{amount:>24}")
