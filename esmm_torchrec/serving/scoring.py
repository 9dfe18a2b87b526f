"""Scores every impression of a split or of raw rows with the sharded model of a run, on any number
of ranks.

The impressions keep their order. Memory is bounded by a batch: rows are mapped or read from disk,
and scores are written as they are computed, by rank 0 to one file or by each rank to its own file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.data.encoding import RowEncoder, RowsToEncode
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.raw_tables import Frame
from esmm_torchrec.data.storage import HashedOutput, Location
from esmm_torchrec.data.stream import StreamedSplit
from esmm_torchrec.errors import RunError
from esmm_torchrec.metrics.calibration import Calibration
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.schema import SAMPLE_ID
from esmm_torchrec.serving.score_files import refuse_existing, write_scores
from esmm_torchrec.serving.scored_rows import Counts, Written, read_rows, score_columns
from esmm_torchrec.serving.scorer import own_scores, score_stream, streamed_reader
from esmm_torchrec.sharding.process_group import Ranks, on_every_rank
from esmm_torchrec.tasks import TaskChain

DESCRIPTION = "scores.json"
"""File that lists the files of a folder in the order of their rows; it is written last."""

_BAD = "__bad"


def check_preprocessing(run: RunFolder) -> None:
    """Checks that a run has the preprocessing of raw rows, unchanged since training.

    Raises:
        RunError: it is missing or was changed.
    """
    if not run.preprocessing.is_dir():
        raise RunError(
            f"{run.path} has lost its {run.preprocessing.name}/, which encodes raw rows; copy it "
            "from a run on the same data, or score a prepared data set"
        )
    run.check_preprocessing()


class LaidOutRows(NamedTuple):
    """Raw rows, encoded and laid out for the model of a run."""

    folder: Path
    """Folder for `MappedSplit.map`."""
    written: Written

    def beside(self) -> pa.Table:
        """Maps the columns to keep and `_BAD` into memory."""
        return pa.ipc.open_file(pa.memory_map(str(_side_file(self.folder)))).read_all()


def encode_rows(
    run: RunFolder,
    rows: Frame | Sequence[Frame],
    folder: Path,
    *,
    keep: Sequence[str] = (),
    bad_rows: BadRows | None = None,
) -> LaidOutRows:
    """Encodes raw rows like the training data of a run and lays them out for its model. `remove`
    deletes them, also after an error.

    Args:
        rows: one or several files, DataFrames or Arrow tables; labels are not needed.
        folder: folder to create for the encoded rows.
        bad_rows: counter of the rows that cannot be scored; None allows none.

    Raises:
        DataError: a column is missing, a value is invalid, or there are no rows.
        RunError: the run folder lacks the preprocessing of raw rows.
    """
    check_preprocessing(run)
    encoder = RowEncoder.load(run.preprocessing)
    blocks = read_rows(encoder, rows, keep=keep, bad_rows=bad_rows)
    first = next(blocks)
    written = Written()

    def impressions(side: pa.ipc.RecordBatchFileWriter) -> Iterator[pa.RecordBatch]:
        for read in chain([first], blocks):
            side.write_table(_beside(read))
            encoded = encoder.encode_rows(read)
            good = encoded.filter(pa.array(~read.bad))
            names = [feature.name for feature in encoder.schema.id_features]
            counts = {name: Counts.of(good.column(name).combine_chunks()) for name in names}
            written.add(len(encoded), counts)
            yield from encoded.combine_chunks().to_batches()

    with pa.ipc.new_file(str(_side_file(folder)), _beside(first).schema) as side:
        MappedSplit.write(
            folder,
            schema=run.schema,
            impressions=impressions(side),
            written_out=True,
            history_weights=run.history_weights,
        )
    return LaidOutRows(folder, written)


def _beside(read: RowsToEncode) -> pa.Table:
    return read.kept.append_column(_BAD, pa.array(read.bad))


def _side_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.beside")


def remove(folder: Path) -> None:
    """Removes rows that `encode_rows` laid out, even if it did not finish."""
    shutil.rmtree(folder, ignore_errors=True)
    _side_file(folder).unlink(missing_ok=True)


def _score_table(
    scores: Mapping[str, Prediction],
    tasks: TaskChain,
    sample_ids: np.ndarray,
    *,
    calibration: Calibration | None,
    beside: pa.Table | None = None,
) -> pa.Table:
    """Arranges scores by name as in `score_columns`, calibrated if `calibration` is given.
    `beside` has the same rows of `LaidOutRows.beside`."""
    if calibration is not None:
        scores = calibration.apply(scores, tasks)
    by_column = {
        column: scores[name].probability
        for name, column, *_ in tasks.probabilities
        if name in scores
    }
    if beside is None:
        return score_columns(by_column, tasks, sample_ids)
    bad, kept = beside.column(_BAD).to_numpy(), beside.drop_columns([_BAD])
    return score_columns(by_column, tasks, sample_ids, bad, kept)


def score(
    model: DistributedModelParallel,
    split: MappedSplit,
    out: Path,
    ranks: Ranks,
    *,
    batch_size: int,
    rows: LaidOutRows | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Writes sample_id, pctr, pcvr and pctcvr of every impression; every rank must call it.

    Args:
        out: file that rank 0 writes.
        batch_size: number of impressions per rank and step.
        rows: rows from which the split was laid out, for the columns to keep; None: no such
            columns. Only rank 0 needs it.

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
    steps = score_stream(model, reader, ranks)
    if not ranks.is_first:
        for _ in steps:
            pass
        return
    beside = None if rows is None else rows.beside()

    def tables() -> Iterator[pa.Table]:
        size = reader.global_batch_size
        for start, scores in zip(range(0, split.impressions, size), steps, strict=True):
            assert scores is not None
            yield _score_table(
                scores,
                split.schema.tasks,
                split.scalars[SAMPLE_ID][start : start + size],
                calibration=calibration,
                beside=None if beside is None else beside.slice(start, size),
            )

    write_scores(out, tables(), rows=split.impressions)


def score_streamed(
    model: DistributedModelParallel,
    split: StreamedSplit,
    out: Path | str,
    ranks: Ranks,
    *,
    batch_size: int,
    calibration: Calibration | None = None,
) -> None:
    """Writes the scores of every impression of a split, which has a lane for each rank, to a folder
    or its URI, one file per rank; every rank must call it. A rank keeps at most a batch of scores
    and the sample ids of its rows in memory.

    Raises:
        RunError: `out` already contains scores.
        DataError: a file of the split is missing, broken or cannot be read.
    """
    folder = Location.of(out)

    def refuse() -> None:
        if (folder / DESCRIPTION).size() is not None:
            raise RunError(f"{folder} holds scores already; remove it or choose another `out`")

    ranks.from_first(refuse)
    reader = streamed_reader(split, ranks, batch_size=batch_size)
    tasks = split.schema.tasks
    first, last = split.stretch(ranks.rank)
    sample_ids = split.columns([SAMPLE_ID], first, last)[SAMPLE_ID]
    name = f"scores-{ranks.rank:05d}-of-{ranks.world_size:05d}.parquet"
    output = HashedOutput(folder / name)
    done = 0
    try:
        with (
            pq.ParquetWriter(
                output, score_columns({}, tasks, sample_ids[:0]).schema, compression="zstd"
            ) as writer,
            progress_bar("Scoring", len(sample_ids), "rows", disable=not ranks.is_first) as bar,
        ):
            for scores in own_scores(model, reader, ranks):
                size = len(next(iter(scores.values())).values)
                ids = sample_ids[done : done + size]
                writer.write_table(_score_table(scores, tasks, ids, calibration=calibration))
                done += size
                bar.update(size)
        output.close()
    except BaseException:
        with suppress(OSError):
            output.close()
            (folder / name).delete()
        raise
    files = on_every_rank(lambda: {"file": name, "rows": done, "sha256": output.checksum})

    def describe() -> None:
        (folder / DESCRIPTION).write_bytes(json.dumps({"files": files}, indent=2).encode() + b"\n")

    ranks.from_first(describe)
