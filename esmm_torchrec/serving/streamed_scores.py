"""Scores of a streamed split: each rank writes those of its stretch of it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.data.storage import HashedOutput, Location
from esmm_torchrec.data.stream import StreamedSplit
from esmm_torchrec.errors import RunError
from esmm_torchrec.metrics.calibration import Calibration
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import SAMPLE_ID
from esmm_torchrec.serving.scored_rows import score_columns
from esmm_torchrec.serving.scorer import own_scores, streamed_reader
from esmm_torchrec.serving.scoring import score_table
from esmm_torchrec.sharding.process_group import Ranks, on_every_rank

DESCRIPTION = "scores.json"
"""Names the files in the order of their rows; it is written last."""


def score_streamed(
    model: DistributedModelParallel,
    split: StreamedSplit,
    out: Path | str,
    ranks: Ranks,
    *,
    batch_size: int,
    calibration: Calibration | None = None,
) -> None:
    """Writes the scores of every impression to a folder or its URI, a file for each rank; every
    rank calls it. No rank holds more than a batch of scores and the ids of its rows.

    Args:
        model: as `runs.restore.restore` gives it.
        split: what to score; its lanes are one for each rank.
        out: the folder to make.
        ranks: this process among the others.
        batch_size: impressions per rank and step.
        calibration: applied to the scores; None: none is.

    Raises:
        RunError: `out` holds scores.
        DataError: a file of the split is missing, broken or cannot be read.
    """
    folder = Location.of(out)
    ranks.from_first(lambda: _refuse_existing(folder))
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
                writer.write_table(score_table(scores, tasks, ids, calibration=calibration))
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


def _refuse_existing(folder: Location) -> None:
    if (folder / DESCRIPTION).size() is not None:
        raise RunError(f"{folder} holds scores already; remove it or choose another `out`")
