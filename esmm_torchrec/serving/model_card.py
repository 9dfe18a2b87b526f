"""What a person should know of an exported model."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, Split
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.card_figures import CardFigures
from esmm_torchrec.serving.package import EXAMPLE, PROGRAM
from esmm_torchrec.serving.signature import MISSING_ROW, Input, Signature
from esmm_torchrec.tasks import TaskChain

_LICENCES = {
    "ali-ccp": "the terms of Ali-CCP on its Tianchi page, which permit research only; read them",
}
"""By kind of source."""


def model_card(
    run: RunFolder,
    step: int,
    signature: Signature,
    figures: CardFigures | str,
    calibration: str | None,
) -> str:
    """The card, as Markdown, with figures by value of a field or the reason why there are none."""
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
        *_by_value(figures, tasks),
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
    """A table in Markdown."""
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


def _by_value(figures: CardFigures | str, tasks: TaskChain) -> list[str]:
    if isinstance(figures, str):
        return [figures]
    names = [name for name, *_ in tasks.probabilities]
    lines = [
        f"Of {figures.impressions:,} impressions of the test split. `report` shows further fields.",
    ]
    for field, rows in figures.by_field.items():
        shown = [key for name in names for key in (f"{name} auc", f"{name} pcoc") if key in rows[0]]
        cells = [
            [
                str(row["value"]).replace("|", "\\|"),
                f"{row['impressions']:,}",
                *("–" if row[key] is None else f"{row[key]:.4f}" for key in shown),
            ]
            for row in rows
        ]
        lines += ["", *_table([field, "impressions", *shown], *cells)]
    return lines


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
