"""A small prepared data set with every kind of feature, for tests of what comes after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import impression_columns
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.data.storage import Location
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.schema import IdFeature

ROWS = {"item": 60, "category": 9, "tag": 25, "cross": 31, "user": 45, "age": 6, "history": 28}
"""Kept ids of each table; its rows are one more."""

FEATURES = (
    IdFeature("item", "item"),
    IdFeature("user", "user", shared=True),
    IdFeature("category", "category"),
    IdFeature("tags", "tag", multi_valued=True),
    IdFeature("second_tags", "tag", multi_valued=True),
    IdFeature("cross", "cross", weighted=True),
    IdFeature("age", "age", shared=True),
    IdFeature("history", "history", multi_valued=True, weighted=True, shared=True),
)
"""One table serves two features; the kinds are mixed in order on purpose."""

DENSE = {"price": (2.0, 4.0), "recency": (-1.0, 0.5)}
"""Dense feature → the mean and standard deviation it was standardised with."""


def description_of(path: Path) -> dict[str, Any]:
    """The content of a dataset.json without its checksum, so that it can be changed and written."""
    description = json.loads((path / "dataset.json").read_text())
    description.pop("crc32", None)
    return description


def record_changed_file(path: Path, name: str) -> None:
    """Makes the description of a data set fit a file that was written anew."""
    description = description_of(path)
    file = path / name
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    parts = [
        part
        for split in description["splits"].values()
        for part in (*split["impression_parts"], *split["shared_parts"])
        if part["file"] == name
    ]
    for part in parts:
        part |= {"bytes": file.stat().st_size, "row_groups": groups}
    description["checksums"][name] = Location.of(file).sha256()
    (path / "dataset.json").write_text(json.dumps(description))


def encode(encoder: RowEncoder, rows: Any) -> pa.Table:
    """All rows at once, encoded as those of a data set."""
    blocks = [encoder.encode_rows(read) for read in encoder.read_blocks(rows)]
    return pa.concat_tables([impression_columns(encoder.schema).empty_table(), *blocks])


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
    offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values))


def _scalar(rng: np.random.Generator, rows: int, size: int, missing: float) -> pa.Array:
    ids = rng.integers(0, rows + 1, size).astype(np.int32)
    return pa.array(ids, mask=rng.random(size) < missing)


def prepare_log(path: Path, log: pd.DataFrame, **options: Any) -> None:
    """Prepares a log with the columns "click" and "buy", which is both halves."""
    prepare_table(path, train=log, test=log, click="click", conversion="buy", **options)


def write_data_set(
    path: Path | str, *, train: int = 700, test: int = 333, users: int = 40, seed: int = 0
) -> PreparedDataSet:
    """Impressions whose labels depend on item and age; a user's impressions are adjacent."""
    rng = np.random.default_rng(seed)
    with PreparedWriter(
        path,
        id_features=FEATURES,
        dense_features=tuple(DENSE),
        columns=("group_id", "true_ctr", "true_cvr"),
        source={"kind": "test"},
        min_count=1,
    ) as writer:
        for table, rows in ROWS.items():
            vocabulary = Vocabulary.from_counts(np.arange(rows), np.full(rows, 3), 1)
            writer.write_vocabulary(table, vocabulary)
        for name, (mean, std) in DENSE.items():
            writer.record_dense(name, DenseTransform("standard", mean, std))
        for split, size in (("train", train), ("test", test)):
            ages = rng.integers(0, ROWS["age"] + 1, users).astype(np.int32)
            lengths = rng.integers(0, 9, users)
            histories = rng.integers(0, ROWS["history"] + 1, lengths.sum()).astype(np.int32)
            weights = rng.uniform(0.1, 3.0, lengths.sum()).astype(np.float32)
            shared = {
                "user": _scalar(rng, ROWS["user"], users, 0.05),
                "age": pa.array(ages, mask=rng.random(users) < 0.1),
                "history": _lists(histories, lengths),
                "history__weight": _lists(weights, lengths),
            }
            writer.write_shared(split, pa.table(shared))
            owner = np.sort(rng.integers(0, users, size)).astype(np.int32)
            item = rng.integers(0, ROWS["item"] + 1, size).astype(np.int32)
            true_ctr = 1 / (1 + np.exp(-((item % 5) - 2.0)))
            true_cvr = 1 / (1 + np.exp(-(ages[owner] - 3.0)))
            click = (rng.random(size) < true_ctr).astype(np.int8)
            conversion = click * (rng.random(size) < true_cvr).astype(np.int8)
            cross = _scalar(rng, ROWS["cross"], size, 0.3)
            cross_weights = rng.uniform(0.1, 3.0, size).astype(np.float32)
            tags, second = rng.integers(0, 5, size), rng.integers(0, 3, size)
            columns = {
                "click": click,
                "conversion": conversion,
                "sample_id": np.arange(1, size + 1),
                "shared_row": owner,
                "group_id": owner.astype(np.int64) * 7,
                "true_ctr": true_ctr.astype(np.float32),
                "true_cvr": true_cvr.astype(np.float32),
                "item": pa.array(item),
                "category": _scalar(rng, ROWS["category"], size, 0.2),
                "tags": _lists(rng.integers(0, 26, tags.sum()).astype(np.int32), tags),
                "second_tags": _lists(rng.integers(0, 26, second.sum()).astype(np.int32), second),
                "cross": cross,
                "cross__weight": pa.array(
                    cross_weights, mask=cross.is_null().to_numpy(zero_copy_only=False)
                ),
                "price": rng.normal(size=size).astype(np.float32),
                "recency": rng.normal(size=size).astype(np.float32),
            }
            writer.write_impressions(split, pa.table(columns))
    return PreparedDataSet.open(path)
