"""Writes the model card of an exported model. Its metrics by value of a field are measured on a
part of the test split, scored by the program itself, whose tables may be in files."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch

from esmm_torchrec.data.field_values import field_values, usual_fields
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, Split
from esmm_torchrec.data.reader import ImpressionReader, Selection
from esmm_torchrec.errors import EsmmTorchrecError
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.metrics.slices import figures_by_value
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.package import EXAMPLE, PROGRAM
from esmm_torchrec.serving.program import Program
from esmm_torchrec.serving.scorer import BATCH_SIZE, scored_impressions
from esmm_torchrec.serving.signature import MISSING_ROW, Input, Signature
from esmm_torchrec.tasks import TaskChain

MAX_IMPRESSIONS = 200_000
MAX_FIELDS = 4
MAX_VALUES = 8

_LICENCES = {
    "ali-ccp": "the terms of Ali-CCP on its Tianchi page, which permit research only; read them",
}
"""Licence by kind of source."""


def model_card(
    run: RunFolder,
    step: int,
    signature: Signature,
    program: Program,
    calibration: str | None,
) -> str:
    """Returns the card as Markdown. The program is on the CPU; `calibration` is the kind of its
    calibration, or None."""
    data = PreparedDataSet.open(run.preprocessing, data_files=False)
    tasks = data.schema.tasks
    licence = _LICENCES.get(str(data.source.get("kind")), "not known to this library")
    lines = [
        f"# Model card: {run.model_options.method}, step {step}",
        "",
        f"Exported with torch {torch.__version__}.",
        "",
        "## Data",
        "",
        *_table(
            ["split", "impressions", *(f"{task.name}s" for task in tasks)],
            *(_split_row(name, data.splits[name], tasks) for name in SPLITS),
        ),
        "",
        f"Source: {data.source.get('kind')}. Fingerprint: {data.fingerprint}. Licence of the data: "
        f"{licence}.",
        "",
        "## Metrics on the test split",
        "",
        *_metrics(run),
        "",
        "## By value of a field",
        "",
        *_by_value(run, program),
        "",
        "## Inputs of the program",
        "",
        f"`{PROGRAM}` takes these tensors in this order, for B impressions:",
        "",
        *_table(
            ["input", "dtype", "shape", "content"],
            *(_input_row(one, data, signature) for one in signature.inputs),
        ),
        "",
        f"It stops with an error if lengths do not sum to the number of values or an id is outside "
        f"its table. `{EXAMPLE}` holds a request in raw values and its scores.",
        "",
        "## Outputs",
        "",
        "float32 (B,): "
        + ", ".join(f"`{one.column}` P({tasks.describe(one)})" for one in tasks.probabilities)
        + ", without those that the method cannot give. "
        + (
            "They are the model's own probabilities, not calibrated after training."
            if calibration is None
            else f"They are calibrated ({calibration}); the metrics of the whole test split are of "
            "the uncalibrated scores."
        ),
        "",
    ]
    return "\n".join(lines)


def _table(heading: Sequence[str], *rows: Sequence[str]) -> list[str]:
    """Formats a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (heading, *rows)]
    return [lines[0], "|" + "---|" * len(heading), *lines[1:]]


def _split_row(name: str, split: Split, tasks: TaskChain) -> list[str]:
    counts = [split.impressions, *(split.happened[task.name] for task in tasks)]
    return [name, *(f"{count:,}" for count in counts)]


def _metrics(run: RunFolder) -> list[str]:
    path = run.path / "metrics.json"
    if not path.exists():
        return ["The training has not ended; there are none."]
    figures = json.loads(path.read_text())["test"]
    known = [
        [name, f"{value:.4f}"]
        for name, value in figures.items()
        if isinstance(value, float) and name.split("_")[-1] in ("auc", "ne", "calibration", "ece")
    ]
    return _table(["metric", "value"], *known)


def _by_value(run: RunFolder, program: Program) -> list[str]:
    """Returns tables, or why there are none: the data may have moved since the training."""
    path = run.config["history"][-1]["data"]["path"]
    try:
        dataset = PreparedDataSet.open(path)
        run.check_data(path, dataset.description())
        split = MappedSplit.open(dataset, "test", history_weights=run.history_weights)
    except (EsmmTorchrecError, OSError) as error:
        return [f"Not available: {error}."]
    size = min(MAX_IMPRESSIONS, split.impressions)
    rows = np.arange(size) * split.impressions // size
    scored = _scored(program, split, rows)
    lines = [f"Of {size:,} impressions of the test split. `report` shows further fields."]
    for field in usual_fields(dataset, MAX_FIELDS):
        values = field_values(dataset, split, field)
        figures = figures_by_value(
            scored, values.codes[rows], values.names, most=MAX_VALUES, in_order=values.are_ranges
        )
        shown = [
            key
            for name, *_ in scored.tasks.probabilities
            for key in (f"{name} auc", f"{name} pcoc")
            if key in figures[0]
        ]
        cells = [
            [
                str(of_value["value"]).replace("|", "\\|"),
                f"{of_value['impressions']:,}",
                *("–" if of_value[key] is None else f"{of_value[key]:.4f}" for key in shown),
            ]
            for of_value in figures
        ]
        lines += ["", *_table([field, "impressions", *shown], *cells)]
    return lines


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


def _input_row(one: Input, data: PreparedDataSet, signature: Signature) -> list[str]:
    shape = ", ".join("B" if size == "impressions" else str(size) for size in one.dims)
    kind = one.name.rpartition(".")[2] if "." in one.name else ""
    content = {
        "values": "rows in the vocabulary, those of the first impression first; 0: unknown",
        "lengths": "how many of the values each impression has; 0: missing",
        "weights": "weight of each id, as in the raw data",
    }.get(kind, f"row in the vocabulary; 0: unknown, {MISSING_ROW}: missing")
    if one.dtype == "float64":
        content = f"raw values of {', '.join(signature.dense)}; NaN: missing"
    elif not kind:
        table = next(f.table for f in data.schema.id_features if f.name == one.name)
        content += f"; table {table}"
    return [f"`{one.name}`", one.dtype, f"({shape})", content]
