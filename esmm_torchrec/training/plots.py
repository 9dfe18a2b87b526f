"""Pictures of a run: how training went, and how well predicted and observed rates agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    """Loss and TorchRec's windowed AUCs over the steps of history.jsonl, as a PNG.

    The AUCs are of scores given just before a step trains on the impressions: up to the end of the
    first epoch these were never seen, behind it they were. Dashed lines part the epochs.
    """
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    borders = epoch_borders(lines)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, auc = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    loss.plot(steps, [line["loss"] for line in lines], color="tab:gray")
    loss.set(xlabel="step", title="Training loss")
    for task, (label, colour) in TASKS.items():
        known = [(line["step"], line[f"{task}_auc"]) for line in lines if f"{task}_auc" in line]
        if known:
            auc.plot(*zip(*known, strict=True), label=label, color=colour)
    for number, border in enumerate(borders):
        loss.axvline(border, color="tab:gray", linewidth=0.8, linestyle="--")
        auc.axvline(
            border,
            color="tab:gray",
            linewidth=0.8,
            linestyle="--",
            label=None if number else "from here on seen before",
        )
    first_epoch = "AUC on impressions before they are trained on"
    auc.set(xlabel="step", title="AUC just before each step" if borders else first_epoch)
    if auc.lines:
        auc.legend(frameon=False)
    auc.axhline(0.5, color="tab:gray", linewidth=0.8, linestyle=":")
    _save(figure, out)


def epoch_borders(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """The steps at which epochs after the first begin, as far as lines of a history tell: half way
    between the last line of one and the first of the next. A line's "epoch" is that of the step
    to come, so a change in the last line begins nothing."""
    pairs = pairwise(lines[:-1])
    return [
        (before["step"] + after["step"]) / 2
        for before, after in pairs
        if after["epoch"] != before["epoch"]
    ]


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
        if np.isfinite(prediction.values[kept]).all():
            _calibration(axes, prediction[kept], label[kept], colour=TASKS[task][1])
        else:
            axes.text(0.5, 0.5, "scores are not finite", ha="center", transform=axes.transAxes)
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
