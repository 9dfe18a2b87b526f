"""Scores of every impression of a split or a file, written to Parquet by any number of ranks.

The impressions keep their order. Memory is bounded by a batch: rows are mapped from disk and
scores are written as they come.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.data.sources.raw_tables import Frame
from esmm_torchrec.errors import DataError, RunError
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.schema import SAMPLE_ID
from esmm_torchrec.serving.scorer import Scores, score_stream
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.tasks import TaskChain


def score_table(scores: Scores, tasks: TaskChain, sample_ids: np.ndarray) -> pa.Table:
    """Columns sample_id int64 and, for each probability of the chain, float32: by default pctr,
    pcvr and pctcvr. A score that the model does not give is NaN; a quotient of probabilities
    (DIVISION's pcvr) may exceed 1."""
    size = len(sample_ids)
    columns = {SAMPLE_ID: pa.array(sample_ids, pa.int64())}
    for name, column, *_ in tasks.probabilities:
        score = scores.get(name)
        values = np.full(size, np.nan, np.float32) if score is None else score.probability
        columns[column] = pa.array(values, pa.float32())
    return pa.table(columns)


def check_preprocessing(run: RunFolder) -> None:
    """Makes sure that a run has what encodes raw rows, as it was in training.

    Raises:
        RunError: it has not.
    """
    if not run.preprocessing.is_dir():
        raise RunError(
            f"{run.path} has lost its {run.preprocessing.name}/, which encodes raw rows; copy it "
            "from a run on the same data, or score a prepared data set"
        )
    run.check_preprocessing()


def encode_rows(run: RunFolder, rows: Frame | Sequence[Frame], folder: Path) -> MappedSplit:
    """Lays out raw rows for a run's model, encoded as its training data were.

    Args:
        run: whose vocabularies and statistics are used.
        rows: files, DataFrames or Arrow tables, one or several; no labels needed.
        folder: to be made, for the rows laid out.

    Raises:
        DataError: a column is missing, a value cannot be used, or there is no row.
        RunError: the run folder lacks what encodes raw rows.
    """
    check_preprocessing(run)
    encoder = RowEncoder.load(run.preprocessing)
    blocks = (
        batch
        for block in encoder.encode_blocks(rows)
        for batch in block.combine_chunks().to_batches()
    )
    first = next(blocks, None)
    if first is None:
        raise DataError(f"{rows if isinstance(rows, str | Path) else 'the table'} has no row")
    return MappedSplit.write(
        folder,
        schema=run.schema,
        impressions=chain([first], blocks),
        written_out=True,
        history_weights=run.config["options"]["history_weights"],
    )


def score(
    model: DistributedModelParallel,
    split: MappedSplit,
    out: Path,
    ranks: Ranks,
    *,
    batch_size: int,
) -> None:
    """Writes sample_id, pctr, pcvr and pctcvr of every impression; every rank calls it.

    Args:
        model: as `runs.restore.restore` gives it.
        split: what to score.
        out: a Parquet file to be made by rank 0.
        ranks: this process among the others.
        batch_size: impressions per rank and step.

    Raises:
        RunError: `out` exists.
    """
    ranks.from_first(lambda: refuse_existing(out))
    reader = ImpressionReader(
        split,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle=False,
        pin_memory=ranks.device.type == "cuda",
    )
    tasks = split.schema.tasks
    sample_ids = split.scalars[SAMPLE_ID]
    partial = out.with_name(f"{out.name}.partial")
    steps = score_stream(model, reader, ranks)
    if not ranks.is_first:
        for _ in steps:
            pass
        return
    schema = score_table({}, tasks, sample_ids[:0]).schema
    try:
        with (
            pq.ParquetWriter(partial, schema, compression="zstd") as writer,
            progress_bar("Scoring", split.impressions, "rows") as bar,
        ):
            starts = range(0, split.impressions, reader.global_batch_size)
            for start, scores in zip(starts, steps, strict=True):
                assert scores is not None
                rows = sample_ids[start : start + reader.global_batch_size]
                writer.write_table(score_table(scores, tasks, rows))
                bar.update(len(rows))
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(out: Path) -> None:
    """Raises RunError where `out` is; makes the folder that it is to be in."""
    if out.exists():
        raise RunError(f"{out} exists already; remove it or choose another `out`")
    out.parent.mkdir(parents=True, exist_ok=True)


def remove(folder: Path) -> None:
    """Removes rows that `encode_rows` laid out, also where it did not come to its end."""
    for there in (folder, folder.with_name(f"{folder.name}.partial")):
        shutil.rmtree(there, ignore_errors=True)
