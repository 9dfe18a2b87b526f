"""A trained model in one process: raw rows in, scores out, no process group needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pyarrow as pa
import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.checkpoints.files import find_checkpoint
from esmm_torchrec.checkpoints.state import load_model
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.data.sources.raw_tables import Frame
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.schema import SAMPLE_ID
from esmm_torchrec.serving.chosen_checkpoint import chosen_step
from esmm_torchrec.serving.scorer import scores_of
from esmm_torchrec.serving.scoring import encode_rows, score_table


class Predictor:
    """The model of a run, unsharded.

    Example::

        predictor = Predictor("runs/mine")
        scores = predictor.score(frame)  # columns sample_id, pctr, pcvr, pctcvr

    Args:
        run: the run folder.
        step: of the checkpoint; None: that of the model.
        device: where the model is.

    Raises:
        RunError: it is not a run folder, or it has no such checkpoint.
    """

    def __init__(
        self,
        run: RunFolder | Path | str,
        *,
        step: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.run = run if isinstance(run, RunFolder) else RunFolder.open(Path(run))
        self.step = chosen_step(self.run, step)
        """Of the checkpoint that the model comes from."""
        checkpoint = find_checkpoint(self.run.checkpoints, self.step)
        assert checkpoint is not None
        self.device = torch.device(device)
        self.task = build_train_task(
            self.run.schema, self.run.model_options, embedding_device="cpu"
        )
        load_model(checkpoint, self.task)
        self.task.to(self.device).eval()

    def logits(self, batch: ImpressionBatch) -> Logits:
        """Logits of a batch whose ids are rows of the tables already, on the CPU."""
        with torch.no_grad():
            logits = self.task.model(batch.to(self.device).features)
        return Logits({name: logit.cpu() for name, logit in logits.items()})

    def score(self, rows: Frame | Sequence[Frame], *, batch_size: int = 8192) -> pd.DataFrame:
        """Scores raw rows, in their order.

        Args:
            rows: DataFrames, Arrow tables or files, one or several, as `prepare_table` takes them;
                the columns are those the training data were prepared from, labels not needed.
            batch_size: impressions at a time.

        Returns:
            sample_id int64 (the row number where the data has none), pctr, pcvr and pctcvr
            float32; the index of a DataFrame given is kept.

        Raises:
            DataError: a column is missing or a value cannot be used.
        """
        with TemporaryDirectory() as folder:
            split = encode_rows(self.run, rows, Path(folder) / "rows")
            scored = self._score(split, batch_size)
        if isinstance(rows, pd.DataFrame):
            scored.index = rows.index
        return scored

    def _score(self, split: MappedSplit, batch_size: int) -> pd.DataFrame:
        reader = ImpressionReader(split, batch_size=batch_size, shuffle=False)
        tasks = self.run.schema.tasks
        sample_ids = split.scalars[SAMPLE_ID]
        parts = []
        for batch, start in zip(reader, range(0, split.impressions, batch_size), strict=True):
            rows = sample_ids[start : start + batch_size]
            scores = scores_of(self.logits(batch), tasks, len(rows))
            parts.append(score_table(scores, tasks, rows))
        return pa.concat_tables(parts).to_pandas()
