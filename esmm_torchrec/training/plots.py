"""Pictures of a run: how training went, and how well predicted and observed rates agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esmm_torchrec.metrics.probability import Prediction, reliability_curve
from esmm_torchrec.metrics.report import ScoredImpressions

TASKS = {
    "ctr": ("click", "tab:blue"),
    "cvr": ("conversion, of clicked", "tab:orange"),
    "ctcvr": ("click and conversion", "tab:green"),
}
CALIBRATION_BINS = 15


def plot_history(history: Path, out: Path) -> None:
    """Loss and TorchRec's windowed AUCs over the steps of history.jsonl, as a PNG."""
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, auc = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    loss.plot(steps, [line["loss"] for line in lines], color="tab:gray")
    loss.set(xlabel="step", title="Training loss")
    for task, (label, colour) in TASKS.items():
        known = [(line["step"], line[f"{task}_auc"]) for line in lines if f"{task}_auc" in line]
        if known:
            auc.plot(*zip(*known, strict=True), label=label, color=colour)
    auc.axhline(0.5, color="tab:gray", linewidth=0.8, linestyle=":")
    auc.set(xlabel="step", title="AUC on impressions before they are trained on")
    if auc.lines[1:]:
        auc.legend(frameon=False)
    _save(figure, out)


def plot_calibration(scored: ScoredImpressions, out: Path) -> None:
    """Observed against predicted rates in bins of equal size, one panel a task, as a PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    clicked = scored.clicked
    panels = (
        ("ctr", scored.ctr, scored.click, None),
        ("cvr", scored.cvr, scored.conversion, clicked),
        ("ctcvr", scored.ctcvr, scored.converted, None),
    )
    for axes, (task, prediction, label, rows) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.set_title(f"{TASKS[task][0]}")
        if prediction is None:
            continue
        kept = slice(None) if rows is None else rows
        _calibration(axes, prediction[kept], label[kept], colour=TASKS[task][1])
    _save(figure, out)


def _calibration(axes: Axes, prediction: Prediction, label: np.ndarray, *, colour: str) -> None:
    curve = reliability_curve(prediction, label, num_bins=CALIBRATION_BINS)
    predicted, observed = curve.mean_prediction, curve.mean_target
    top = max(predicted.max(initial=0.0), observed.max(initial=0.0)) * 1.05 or 1.0
    axes.plot([0, top], [0, top], color="tab:gray", linewidth=0.8, linestyle=":")
    axes.plot(predicted, observed, marker="o", markersize=4, color=colour)
    axes.set(xlabel="predicted rate", ylabel="observed rate", xlim=(0, top), ylim=(0, top))


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(out))
