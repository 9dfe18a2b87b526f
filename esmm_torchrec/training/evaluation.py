"""What a trained model measures on a split."""

from __future__ import annotations

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader, Selection, SharedFeatures
from esmm_torchrec.metrics.report import ScoredImpressions
from esmm_torchrec.metrics.windowed import model_output
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.models.scores import Score, read_scores
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import CLICK, CONVERSION, GROUP_ID, TRUE_CTR, TRUE_CVR
from esmm_torchrec.sharding.prediction import predict
from esmm_torchrec.sharding.process_group import Ranks

BATCH_SIZE = 8192
"""Impressions per rank and step that are scored at a time, unless the caller says otherwise."""


def score_split(
    model: DistributedModelParallel,
    split: MappedSplit,
    ranks: Ranks,
    *,
    batch_size: int = BATCH_SIZE,
    shared_features: SharedFeatures = "once",
    rows: np.ndarray | None = None,
    progress: bool = True,
) -> ScoredImpressions | None:
    """Scores impressions of a split; to be called on every rank.

    Args:
        model: a sharded train task.
        split: where the impressions are.
        ranks: this process among the others.
        batch_size: rows per rank and step, at most.
        shared_features: how a batch carries shared features.
        rows: int (M,), which impressions; None: all.
        progress: whether to show a progress bar.

    Returns:
        on rank 0 the scores the model has and the labels, in the order of `rows`; on the other
        ranks None.
    """
    num_rows = split.impressions if rows is None else len(rows)
    reader = ImpressionReader(
        split,
        batch_size=max(1, min(batch_size, -(-num_rows // ranks.world_size))),
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle=False,
        shared_features=shared_features,
        selection=None if rows is None else Selection(rows),
        pin_memory=ranks.device.type == "cuda",
    )
    scores = _Columns(reader.num_rows)
    with progress_bar(
        "Evaluating", reader.num_rows, "rows", disable=not (progress and ranks.is_first)
    ) as bar:
        for logits in predict(model, reader, ranks):
            if logits is not None:
                bar.update(scores.append(read_scores(logits)))
    if not ranks.is_first:
        return None
    columns = {
        name: column if rows is None else column[rows] for name, column in split.scalars.items()
    }
    return ScoredImpressions(
        **scores.columns,
        click=columns[CLICK],
        conversion=columns[CONVERSION],
        group_id=columns.get(GROUP_ID),
        true_ctr=columns.get(TRUE_CTR),
        true_cvr=columns.get(TRUE_CVR),
    )


_COLUMNS = {"ctr": "click_logit", "cvr": "conversion_logit", "ctcvr": "ctcvr_score"}


class _Columns:
    """Scores of batches one behind the other, by the names of ScoredImpressions."""

    def __init__(self, num_rows: int) -> None:
        self.columns: dict[str, np.ndarray] = {}
        self._num_rows = num_rows
        self._done = 0

    def append(self, scores: dict[str, Score]) -> int:
        """Takes the rows that are not padding, and says how many."""
        size = 0
        for rate, (score, form) in scores.items():
            name = _COLUMNS[rate] if form == "logit" else "log_pcvr"
            if name not in self.columns:
                self.columns[name] = np.empty(self._num_rows, np.float32)
            size = min(len(score), self._num_rows - self._done)
            self.columns[name][self._done : self._done + size] = score[:size].numpy()
        self._done += size
        return size


def windowed_output(output: TrainOutput) -> dict[str, torch.Tensor]:
    """What TorchRec's windowed metrics take of a training step; scores that the method does not
    have are 0 there, see `known_tasks`."""
    logits, labels = output.logits, output.labels
    nothing = torch.zeros_like(labels.click)
    return model_output(
        logits.get("click", nothing),
        logits.get("conversion", nothing),
        labels.click,
        labels.conversion,
        labels.get("weight"),
    )


def known_tasks(logits: Logits) -> frozenset[str]:
    """The tasks of the windowed metrics that a method's logits speak of."""
    known = {"ctr": "click", "cvr": "conversion"}
    tasks = {task for task, logit in known.items() if logit in logits}
    return frozenset(tasks | {"ctcvr"} if len(tasks) == len(known) else tasks)
