"""Figures of a model by value of a field, for its model card: a part of the test split is scored by
the program itself, whose tables may be in files."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from esmm_torchrec.data.field_values import field_values, usual_fields
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.reader import ImpressionReader, Selection
from esmm_torchrec.errors import EsmmTorchrecError
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.metrics.slices import figures_by_value
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.program import Program
from esmm_torchrec.serving.scorer import BATCH_SIZE, scored_impressions

MAX_IMPRESSIONS = 200_000
MAX_FIELDS = 4
MAX_VALUES = 8


class CardFigures(NamedTuple):
    """Of the test split of a run's data."""

    impressions: int
    """That were scored."""
    by_field: dict[str, list[dict[str, Any]]]
    """As `figures_by_value` gives them."""


def card_figures(run: RunFolder, program: Program) -> CardFigures | str:
    """The figures by a program on the CPU, of at most `MAX_IMPRESSIONS`, equally spaced; a sentence
    on why there are none if the data are not where the run found them."""
    path = run.config["history"][-1]["data"]["path"]
    try:
        dataset = PreparedDataSet.open(path)
        run.check_data(path, dataset.description())
        split = MappedSplit.open(dataset, "test", history_weights=run.history_weights)
    except (EsmmTorchrecError, OSError) as error:
        return f"Not available: {error}."
    size = min(MAX_IMPRESSIONS, split.impressions)
    rows = np.arange(size) * split.impressions // size
    scored = _scored(program, split, rows)
    by_field = {}
    for name in usual_fields(dataset, MAX_FIELDS):
        values = field_values(dataset, split, name)
        by_field[name] = figures_by_value(
            scored, values.codes[rows], values.names, most=MAX_VALUES, in_order=values.are_ranges
        )
    return CardFigures(size, by_field)


def _scored(program: Program, split: MappedSplit, rows: np.ndarray) -> ScoredImpressions:
    reader = ImpressionReader(
        split,
        batch_size=min(BATCH_SIZE, len(rows)),
        shuffle=False,
        shared_features="expanded",
        selection=Selection(rows),
    )
    with torch.inference_mode():
        parts = [program.scores(batch.features) for batch in reader]
    scores = {}
    for name, first in parts[0].items():
        values = torch.cat([part[name].values for part in parts])[: len(rows)]
        scores[name] = Prediction(values.cpu().numpy(), first.form)
    return scored_impressions(scores, split.scalars, split.schema.tasks, rows)
