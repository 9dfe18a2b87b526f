"""Data sets of the benchmarks.

`write_impressions`: 23 single-valued features. Tables halve in size, 3.4 million rows in all; ids
are Zipf-distributed; clicks and conversions depend on them, so that AUCs show whether two programs
learn the same.

`write_histories`: users with four weighted histories as long as Ali-CCP's, in tables as large as
the ranges of its ids, an upper bound of their sizes. Labels are random.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SplitName
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.schema import IdFeature, weight_column

NUM_FEATURES = 23
IMPRESSIONS_PER_USER = 58
HISTORIES = {
    "109_14": (12_000, 70),
    "110_14": (400_000, 252),
    "127_14": (330_000, 155),
    "150_14": (70_000, 136),
}
"""Feature → rows of its table, mean length of its histories."""
LARGEST_TABLE = 1_700_000
ROWS_PER_BLOCK = 1 << 17


def write_impressions(path: Path, *, train: int, test: int, seed: int = 0) -> PreparedDataSet:
    """Writes the prepared data set, as zstd Parquet like any other, and opens it."""
    random = np.random.default_rng(seed)
    sizes = {f"f{i:02}": max(10, LARGEST_TABLE >> i) for i in range(NUM_FEATURES)}
    effects = {name: random.normal(0, 0.35, (2, size + 1)) for name, size in sizes.items()}

    def block(size: int, first: int) -> pa.Table:
        ids = {
            name: np.minimum(rows ** random.random(size), rows).astype(np.int32)
            for name, rows in sizes.items()
        }
        click_logit, conversion_logit = (
            base + sum(effects[name][part][rows] for name, rows in ids.items())
            for part, base in enumerate((-3.5, -3.0))
        )
        click = random.random(size) < 1 / (1 + np.exp(-click_logit))
        conversion = click & (random.random(size) < 1 / (1 + np.exp(-conversion_logit)))
        return pa.table(
            {
                "click": click.astype(np.int8),
                "conversion": conversion.astype(np.int8),
                "sample_id": np.arange(first, first + size),
                **ids,
            }
        )

    with PreparedWriter(
        path,
        id_features=[IdFeature(name, table=name) for name in sizes],
        source={"kind": "benchmark"},
        min_count=1,
    ) as writer:
        for name, rows in sizes.items():
            counts = Vocabulary.from_counts(np.arange(rows), np.ones(rows, np.int64), 1)
            writer.write_vocabulary(name, counts)
        splits: dict[SplitName, int] = {"train": train, "test": test}
        for split, impressions in splits.items():
            for first in range(0, impressions, ROWS_PER_BLOCK):
                size = min(ROWS_PER_BLOCK, impressions - first)
                writer.write_impressions(split, block(size, first))
    return PreparedDataSet.open(path)


def write_histories(path: Path, *, train: int, test: int, seed: int = 0) -> PreparedDataSet:
    """Writes the prepared data set and opens it."""
    random = np.random.default_rng(seed)

    def zipf(rows: int, size: int) -> np.ndarray:
        return np.minimum((rows + 1) ** random.random(size), rows).astype(np.int32)

    def history(name: str, users: int) -> dict[str, pa.Array]:
        rows, mean = HISTORIES[name]
        offsets = pa.array(np.r_[0, random.poisson(mean, users).cumsum()], pa.int32())
        size = offsets[-1].as_py()
        weights = random.uniform(0.5, 3.0, size).astype(np.float32)
        return {
            name: pa.ListArray.from_arrays(offsets, pa.array(zipf(rows, size))),
            weight_column(name): pa.ListArray.from_arrays(offsets, pa.array(weights)),
        }

    own = {f"f{i:02}": max(10, 200_000 >> i) for i in range(NUM_FEATURES - len(HISTORIES))}
    features = [IdFeature(name, table=name) for name in own]
    features += [
        IdFeature(name, table=name, multi_valued=True, weighted=True, shared=True)
        for name in HISTORIES
    ]
    rows = own | {name: size for name, (size, _) in HISTORIES.items()}
    with PreparedWriter(
        path, id_features=features, source={"kind": "benchmark"}, min_count=1
    ) as writer:
        for name, size in rows.items():
            counts = Vocabulary.from_counts(np.arange(size), np.ones(size, np.int64), 1)
            writer.write_vocabulary(name, counts)
        splits: dict[SplitName, int] = {"train": train, "test": test}
        for split, size in splits.items():
            users = -(-size // IMPRESSIONS_PER_USER)
            histories = [history(name, users) for name in HISTORIES]
            writer.write_shared(
                split, pa.table({key: column for each in histories for key, column in each.items()})
            )
            click = (random.random(size) < 0.06).astype(np.int8)
            columns = {
                "click": click,
                "conversion": click * (random.random(size) < 0.1).astype(np.int8),
                "sample_id": np.arange(size),
                "shared_row": (np.arange(size) // IMPRESSIONS_PER_USER).astype(np.int32),
            }
            columns |= {name: zipf(rows, size) for name, rows in own.items()}
            writer.write_impressions(split, pa.table(columns))
    return PreparedDataSet.open(path)
