"""The data set behind the benchmarks of training and reading: 23 single-valued features.

Tables halve in size, 3.4 million rows in all; ids are Zipf-distributed; clicks and conversions
depend on them, so that an AUC says whether two programs learn the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.prepared import PreparedDataSet, PreparedWriter, SplitName
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.schema import IdFeature

NUM_FEATURES = 23
LARGEST_TABLE = 1_700_000
ROWS_PER_BLOCK = 1 << 17


def write_impressions(path: Path, *, train: int, test: int, seed: int = 0) -> PreparedDataSet:
    """Writes the prepared data set, zstd Parquet like any other, and opens it."""
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
