"""Counts of the training rows of a table, and encoding and writing of its rows block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.dense import DenseFitter
from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared_form import SPLITS, SplitName, impression_columns
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.table_rows import KEY, RawBlock, Skipped, TableRows
from esmm_torchrec.data.vocabulary import IdCounter, Vocabulary
from esmm_torchrec.progress import progress_bar

BAD_ROWS = "bad rows"
"""Reason under which bad rows are recorded as dropped."""


class Counted(NamedTuple):
    """Result of counting all training rows."""

    vocabularies: Mapping[str, Vocabulary | HashedIds]
    """Vocabulary or hash, by table."""
    fitter: DenseFitter


class TrainingCount(NamedTuple):
    """Result of counting some of the training rows."""

    counters: dict[str, IdCounter]
    """Id counters, by table whose ids are not hashed."""
    fitter: DenseFitter


class EncodedBlock(NamedTuple):
    """Impressions as a prepared data set stores them."""

    impressions: pa.Table
    key: np.ndarray | None
    """uint64 (n,), hash by which the impressions are stored; None without a key."""


def encode_block(
    rows: TableRows,
    block: RawBlock,
    encoder: RowEncoder,
    types: pa.Schema,
    *,
    skipped: Skipped,
) -> EncodedBlock:
    """Encodes the usable rows of a block into the columns `types`.

    `skipped` counts left-out rows and missing values.

    Raises:
        DataError: a row cannot be used and may not be skipped, or a value cannot be encoded.
    """
    usable = rows.usable(block, encoder.features, skipped)
    with block.table.named_in_errors():
        columns = usable.scalars | encoder.encode_features(usable.features)
    arrays = [pa.array(columns[column.name], column.type) for column in types]
    for name, values in usable.features.dense.items():
        skipped.missing_dense[name] += int(np.count_nonzero(np.isnan(values)))
    return EncodedBlock(pa.table(arrays, schema=types), columns.get(KEY))


def write_table(
    writer: PreparedWriter,
    rows: TableRows,
    encoder: RowEncoder,
    *,
    progress: bool,
) -> None:
    """Encodes and writes all rows, block by block, and records what was left out. `writer` must
    already have the vocabularies and the transforms."""
    types, bad_rows = impression_columns(writer.schema, writer.columns), BadRows(rows.max_bad_rows)
    writer.source["unclicked_conversion_rows"] = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        total = rows.rows_given.get(split)
        with (
            noted(writer, rows, split, bad_rows) as skipped,
            progress_bar(f"encode {split}", total, "rows", disable=not progress) as bar,
        ):
            for block in rows.blocks(split, bad_rows):
                encoded = encode_block(rows, block, encoder, types, skipped=skipped)
                writer.write_impressions(split, encoded.impressions, key=encoded.key)
                bar.update(len(block.rows))
    writer.source["train_rows"] = rows.rows_read("train")


@contextmanager
def noted(
    writer: PreparedWriter, rows: TableRows, split: SplitName, bad_rows: BadRows
) -> Iterator[Skipped]:
    """Collects what is left out or missing in a split while it is written, then records it in
    `writer`."""
    skipped, count, examples = Skipped(bad_rows), bad_rows.count, len(bad_rows.examples)
    yield skipped
    for name, missing in skipped.missing_dense.items():
        writer.record_missing_dense(split, name, missing)
    if bad_rows.count > count:
        writer.record_dropped(split, BAD_ROWS, bad_rows.count - count, bad_rows.examples[examples:])
    unclicked = skipped.unclicked_conversions
    if rows.unclicked_conversions == "drop" and unclicked:
        writer.record_dropped(split, writer.schema.tasks.out_of_order, unclicked)
    writer.source["unclicked_conversion_rows"][split] = unclicked
