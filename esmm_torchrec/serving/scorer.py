"""Scores a stream of impressions with a sharded model, in the order of the stream.

Evaluation, `score` and `compare` get their scores from here. This module strips padding and gathers
the scores of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

from esmm_torchrec.data.batch_reader import BatchReader
from esmm_torchrec.data.batches import SharedFeatures
from esmm_torchrec.data.reader import ImpressionReader, Selection
from esmm_torchrec.data.stream import Split, StreamedSplit, StreamReader
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.scored import ScoredImpressions, concatenated
from esmm_torchrec.models.scores import read_scores
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import GROUP_ID, TRUE_CTR, TRUE_CVR, WEIGHT
from esmm_torchrec.sharding.process_group import RankExchange, Ranks
from esmm_torchrec.tasks import TaskChain

MAX_GATHERED = 1 << 26
"""Maximum number of impressions of a streamed split that rank 0 gathers and measures, at 28 bytes
each and with several copies on arrival. For larger splits, all ranks together compute the metrics
of `metrics.in_parts`."""

BATCH_SIZE = 8192
"""Default number of impressions scored per rank and step."""

Scores = dict[str, Prediction]
"""Scores by `TaskProbability.name` ("ctr", "cvr", "ctcvr"), except those not predicted."""


def scores_of(logits: Logits, tasks: TaskChain, size: int) -> Scores:
    """Computes the scores of the first `size` impressions of a batch; the others are padding. The
    logits are float32 (B,), on the CPU."""
    return {
        name: Prediction(values[:size].numpy(), form)
        for name, (values, form) in read_scores(logits, tasks).items()
    }


def score_stream(
    model: DistributedModelParallel, reader: ImpressionReader, ranks: Ranks
) -> Iterator[Scores | None]:
    """Scores the rows of a reader in evaluation mode. The reader must be at its first row and not
    shuffle; every rank must exhaust the iterator.

    Yields:
        on rank 0, for each step, the scores of the rows of all ranks; on the other ranks None.
    """
    rows_left = reader.num_rows
    for own in _logits(model, reader, ranks):
        stacked = torch.stack(list(own.values())).cpu()
        parts = [torch.empty_like(stacked) for _ in range(ranks.world_size)]
        dist.gather(stacked, parts if ranks.is_first else None, dst=0)
        size = min(rows_left, reader.global_batch_size)
        rows_left -= size
        if ranks.is_first:
            gathered = Logits(dict(zip(own, torch.cat(parts, dim=1), strict=True)))
            yield scores_of(gathered, reader.schema.tasks, size)
        else:
            yield None


def _logits(model: DistributedModelParallel, reader: BatchReader, ranks: Ranks) -> Iterator[Logits]:
    """Yields the logits of each batch, on the device, padding included."""
    was_training = model.training
    model.eval()
    pipeline = EvalPipelineSparseDist(model, model.fused_optimizer, ranks.device)
    stream = iter(reader)
    try:
        while True:
            try:
                with torch.no_grad():
                    output = pipeline.progress(stream)
            except StopIteration:
                break
            yield output.logits
        # Not after an error: within a step, detaching fails and hides the original error.
        pipeline.detach()
    finally:
        model.train(was_training)


def own_scores(
    model: DistributedModelParallel, reader: StreamReader, ranks: Ranks
) -> Iterator[Scores]:
    """Scores the rows of this rank; otherwise the same as `score_stream`.

    Yields:
        for each step, the scores of the rows of this rank, possibly no rows.
    """
    for size, logits in zip(reader.own_rows(), _logits(model, reader, ranks), strict=True):
        on_cpu = Logits({name: values.cpu() for name, values in logits.items()})
        yield scores_of(on_cpu, reader.schema.tasks, size)


def score_split(
    model: DistributedModelParallel,
    split: Split,
    ranks: Ranks,
    *,
    batch_size: int = BATCH_SIZE,
    shared_features: SharedFeatures = "once",
    rows: np.ndarray | None = None,
    progress: bool = True,
) -> ScoredImpressions | None:
    """Scores impressions of a split; every rank must call it.

    Args:
        batch_size: maximum number of rows per rank and step.
        rows: int (M,), indices of the impressions to score; None: all.

    Returns:
        on rank 0, the scores that the model predicts and the labels, in the order of `rows`; on the
        other ranks None. If `is_in_parts`, each rank gets those of its own part of the split.
    """
    tasks = split.schema.tasks
    if isinstance(split, StreamedSplit):
        assert rows is None
        first, last = split.stretch(ranks.rank)
        size, shown_at_once = last - first, ranks.world_size
        reader = streamed_reader(
            split, ranks, batch_size=batch_size, shared_features=shared_features
        )
        steps = own_scores(model, reader, ranks)
    else:
        size, shown_at_once = split.impressions if rows is None else len(rows), 1
        reader = ImpressionReader(
            split,
            batch_size=max(1, min(batch_size, -(-size // ranks.world_size))),
            rank=ranks.rank,
            world_size=ranks.world_size,
            shuffle=False,
            shared_features=shared_features,
            selection=None if rows is None else Selection(rows),
            pin_memory=ranks.device.type == "cuda",
        )
        steps = filter(None, score_stream(model, reader, ranks))
    scores: Scores = {}
    done = 0
    with progress_bar(
        "Evaluating", reader.num_rows, "rows", disable=not (progress and ranks.is_first)
    ) as bar:
        for step in steps:
            step_size = 0
            for name, part in step.items():
                if name not in scores:
                    scores[name] = Prediction(np.empty(size, np.float32), part.form)
                step_size = len(part.values)
                scores[name].values[done : done + step_size] = part.values
            done += step_size
            bar.update(step_size * shown_at_once)
    if isinstance(split, StreamedSplit):
        names = [*tasks.labels, WEIGHT, GROUP_ID, TRUE_CTR, TRUE_CVR]
        own = scored_impressions(scores, split.columns(names, *split.stretch(ranks.rank)), tasks)
        return own if is_in_parts(split) else _gathered(own, ranks)
    if not ranks.is_first:
        return None
    return scored_impressions(scores, split.scalars, tasks, rows)


def streamed_reader(
    split: StreamedSplit,
    ranks: Ranks,
    *,
    batch_size: int,
    shared_features: SharedFeatures = "once",
) -> StreamReader:
    """Creates a reader of a split that has a lane for each rank, in stored order, with at most
    `batch_size` rows per rank and step."""
    rows_per_rank = max(1, min(batch_size, split.window, -(-split.impressions // split.lanes)))
    return StreamReader(
        split,
        rows_per_step=rows_per_rank * ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle=False,
        shared_features=shared_features,
        pin_memory=ranks.device.type == "cuda",
        exchange=RankExchange(),
    )


def is_in_parts(split: Split) -> bool:
    """Whether a split has too many scores for rank 0; `metrics.in_parts` then measures them."""
    return isinstance(split, StreamedSplit) and split.impressions > MAX_GATHERED


def _gathered(own: ScoredImpressions, ranks: Ranks) -> ScoredImpressions | None:
    """Gathers the impressions of all ranks on rank 0, in stored order."""
    if ranks.world_size == 1:
        return own
    parts: list[ScoredImpressions] | None = None
    if ranks.is_first:
        parts = [own] * ranks.world_size
    dist.gather_object(own, parts, dst=0)
    return None if parts is None else concatenated(parts)


def scored_impressions(
    scores: Scores,
    columns: Mapping[str, np.ndarray],
    tasks: TaskChain,
    rows: np.ndarray | None = None,
) -> ScoredImpressions:
    """Joins the scores of N impressions with columns of their split, by name. `rows`, int (N,), are
    the indices of the impressions if the columns have more rows."""
    if rows is not None:
        columns = {name: column[rows] for name, column in columns.items()}
    return ScoredImpressions(
        labels={label: columns[label] for label in tasks.labels},
        scores=scores,
        tasks=tasks,
        weight=columns.get(WEIGHT),
        group_id=columns.get(GROUP_ID),
        true_ctr=columns.get(TRUE_CTR),
        true_cvr=columns.get(TRUE_CVR),
    )
