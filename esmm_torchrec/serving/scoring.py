"""Scores of every impression of a split or of raw rows, by the sharded model of a run on any number
of ranks.

The impressions keep their order. Memory is bounded by a batch: rows are mapped from disk and
scores are written as they come.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.data.sources.raw_tables import BadRows, Frame
from esmm_torchrec.errors import DataError, RunError
from esmm_torchrec.metrics.calibration import Calibration
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.schema import SAMPLE_ID, IdFeature
from esmm_torchrec.serving.score_files import refuse_existing, score_file_schema, score_writer
from esmm_torchrec.serving.scored_rows import (
    Counts,
    Written,
    score_columns,
    with_columns,
)
from esmm_torchrec.serving.scorer import Scores, score_stream
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.tasks import TaskChain

_BAD = "__bad"
_SIDE_FILE = "kept.arrow"


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


class LaidOutRows(NamedTuple):
    """Raw rows that were encoded and laid out for a run's model."""

    folder: Path
    """What `MappedSplit.map` maps, and a file of what is kept beside the scores."""
    written: Written

    def kept(self) -> Iterator[pa.Table]:
        """Columns to keep and `_BAD`, block by block."""
        with pa.memory_map(str(self.folder / _SIDE_FILE)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)])


def encode_rows(
    run: RunFolder,
    rows: Frame | Sequence[Frame],
    folder: Path,
    *,
    keep: Sequence[str] = (),
    bad_rows: BadRows | None = None,
) -> LaidOutRows:
    """Lays out raw rows for a run's model, encoded as its training data were.

    Args:
        run: whose vocabularies and statistics are used.
        rows: files, DataFrames or Arrow tables, one or several; no labels needed.
        folder: to be made, for the rows laid out.
        keep: further columns of the rows.
        bad_rows: counts the rows that cannot be scored; None allows none.

    Raises:
        DataError: a column is missing, a value cannot be used, or there is no row.
        RunError: the run folder lacks what encodes raw rows.
    """
    check_preprocessing(run)
    encoder = RowEncoder.load(run.preprocessing)
    written = Written()
    side: list[pa.ipc.RecordBatchFileWriter] = []
    partial = folder.with_name(f"{folder.name}.{_SIDE_FILE}")

    def blocks() -> Iterator[pa.RecordBatch]:
        for read in encoder.read_blocks(rows, keep=keep, bad_rows=bad_rows):
            encoded = encoder.encode_rows(read)
            kept = read.kept.append_column(_BAD, pa.array(read.bad))
            if not side:
                side.append(pa.ipc.new_file(str(partial), kept.schema))
            side[0].write_table(kept)
            written.impressions += len(encoded)
            good = encoded.filter(pa.array(~read.bad))
            features = encoder.schema.id_features
            written.add({feature.name: _counts(good, feature) for feature in features})
            yield from encoded.combine_chunks().to_batches()

    encoded_blocks = blocks()
    try:
        first = next(encoded_blocks, None)
        if first is None:
            raise DataError(f"{_named(rows)} has no rows")
        MappedSplit.write(
            folder,
            schema=run.schema,
            impressions=chain([first], encoded_blocks),
            written_out=True,
            history_weights=run.config["options"]["history_weights"],
        )
        side[0].close()
        partial.rename(folder / _SIDE_FILE)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        partial.unlink(missing_ok=True)
    return LaidOutRows(folder, written)


def _named(rows: Frame | Sequence[Frame]) -> str:
    if isinstance(rows, str | Path):
        return str(rows)
    if isinstance(rows, Sequence) and rows and all(isinstance(one, str | Path) for one in rows):
        return str(rows[0])
    return "the table"


def _counts(encoded: pa.Table, feature: IdFeature) -> Counts:
    column = encoded.column(feature.name).combine_chunks()
    if feature.multi_valued:
        rows = column.flatten().to_numpy()
        missing = int((column.value_lengths().to_numpy(zero_copy_only=False) == 0).sum())
    else:
        rows, missing = column.drop_null().to_numpy(), column.null_count
    return Counts(len(column), missing, len(rows), int((rows == 0).sum()))


def score_table(
    scores: Scores, tasks: TaskChain, sample_ids: np.ndarray, bad: np.ndarray | None = None
) -> pa.Table:
    """Scores by name as the columns of `score_columns`."""
    by_column = {
        column: scores[name].probability
        for name, column, *_ in tasks.probabilities
        if name in scores
    }
    return score_columns(by_column, tasks, sample_ids, bad)


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
    """Writes sample_id, pctr, pcvr and pctcvr of every impression; every rank calls it.

    Args:
        model: as `runs.restore.restore` gives it.
        split: what to score.
        out: a file to be made by rank 0.
        ranks: this process among the others.
        batch_size: impressions per rank and step.
        rows: what the split was laid out from, for the columns to keep; None: none. Only rank 0
            needs it.
        calibration: applied to the scores; None: none is.

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
    steps = score_stream(model, reader, ranks)
    if not ranks.is_first:
        for _ in steps:
            pass
        return
    kept = _Blocks(rows.kept() if rows is not None else iter(()))
    schema = score_file_schema(tasks, kept.schema)
    with (
        score_writer(out, schema) as writer,
        progress_bar("Scoring", split.impressions, "rows") as bar,
    ):
        starts = range(0, split.impressions, reader.global_batch_size)
        for start, scores in zip(starts, steps, strict=True):
            assert scores is not None
            if calibration is not None:
                scores = calibration.apply(scores, tasks)  # noqa: PLW2901
            ids = sample_ids[start : start + reader.global_batch_size]
            beside, bad = kept.take(len(ids))
            table = score_table(scores, tasks, ids, bad)
            writer.write_table(with_columns(table, beside).cast(schema))
            bar.update(len(ids))


class _Blocks:
    """Rows in blocks of one size, given in blocks of another."""

    def __init__(self, blocks: Iterator[pa.Table]) -> None:
        self._blocks = blocks
        self._waiting = next(blocks, None)
        self.is_empty = self._waiting is None
        names = pa.schema([]) if self._waiting is None else self._waiting.schema
        self.schema = pa.schema([one for one in names if one.name != _BAD])

    def take(self, size: int) -> tuple[pa.Table, np.ndarray | None]:
        """The next rows without `_BAD`, and what that was."""
        if self._waiting is None:
            return pa.table({}), None
        while len(self._waiting) < size:
            self._waiting = pa.concat_tables([self._waiting, next(self._blocks)])
        taken, self._waiting = self._waiting.slice(0, size), self._waiting.slice(size)
        bad = taken.column(_BAD).to_numpy()
        return taken.drop_columns([_BAD]), bad


def remove(folder: Path) -> None:
    """Removes rows that `encode_rows` laid out, even if it did not finish."""
    for there in (folder, folder.with_name(f"{folder.name}.partial")):
        shutil.rmtree(there, ignore_errors=True)
