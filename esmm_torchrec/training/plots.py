"""Plots of a run: its learning curves, and its predicted against observed rates."""

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
from esmm_torchrec.metrics.scored import ScoredImpressions, Space
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain

CALIBRATION_BINS = 15


def plot_history(
    history: Path,
    out: Path,
    tasks: TaskChain = DEFAULT_TASKS,
    *,
    held_out: Mapping[str, Any] | None = None,
) -> None:
    """Plots, as a PNG, the loss and TorchRec's windowed AUCs over the steps of history.jsonl, and
    the AUCs of the held-out part over the passes.

    The model scores the impressions of a step just before it trains on them: in the first epoch it
    has not seen them before, in later epochs it has. Dashed lines separate the epochs.

    Args:
        held_out: result of `Validate.report`; None: nothing was held out.
    """
    lines = [line for line in read_history(history) if "loss" in line]
    borders = epoch_borders(lines)
    panels = 2 if held_out is None else 3
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    loss, auc, *others = figure.subplots(1, panels)
    if held_out is not None:
        _held_out(others[0], held_out, tasks)
    loss.plot(*np.array(points(lines, "loss")).reshape(-1, 2).T, color="tab:gray")
    loss.set(xlabel="step", title="Training loss")
    for number, probability in enumerate(tasks.probabilities):
        key = f"{probability.name}_auc"
        if known := points(lines, key):
            label = tasks.describe(probability)
            auc.plot(*zip(*known, strict=True), label=label, color=f"C{number}")
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


def read_history(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of history.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Returns (step, figure) for each line of a history that has the figure."""
    return [(line["step"], line[key]) for line in lines if key in line]


def _held_out(axes: Axes, held_out: Mapping[str, Any], tasks: TaskChain) -> None:
    """Plots the AUCs and the mean normalised entropy of the held-out part, and the best pass."""
    curve = held_out["curve"]
    for number, probability in enumerate(tasks.probabilities):
        known = [(e["epoch"], e[key]) for e in curve if e.get(key := f"{probability.name}_auc")]
        if known:
            axes.plot(*zip(*known, strict=True), marker=".", color=f"C{number}")
    entropy = axes.twinx()
    known = [(e["epoch"], e["mean_ne"]) for e in curve if e.get("mean_ne") is not None]
    if known:
        (line,) = entropy.plot(*zip(*known, strict=True), marker=".", color="black", linewidth=0.8)
        best = axes.axvline(held_out["epoch"], color="tab:gray", linewidth=0.8, linestyle="--")
        axes.legend([line, best], ["mean normalised entropy (right)", "best pass"], frameon=False)
    axes.set(xlabel="passes", title="Held-out part: AUC")


def epoch_borders(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Estimates the steps at which epochs after the first begin: half-way between the last line of
    an epoch and the first line of the next. The "epoch" of a line is that of the following step, so
    a change in the last line is not a border."""
    pairs = pairwise(lines[:-1])
    return [
        (before["step"] + after["step"]) / 2
        for before, after in pairs
        if after["epoch"] != before["epoch"]
    ]


def plot_calibration(scored: ScoredImpressions, out: Path) -> None:
    """Plots observed against predicted rates in bins of equal size, one panel per rate, as a
    PNG."""
    panels = scored.tasks.probabilities
    figure = Figure(figsize=(3.4 * len(panels), 3.6), layout="constrained")
    subplots = figure.subplots(1, len(panels), squeeze=False)[0]
    for number, (axes, probability) in enumerate(zip(subplots, panels, strict=True)):
        axes.set_title(scored.tasks.describe(probability))
        space = scored.space(probability.task, probability.given)
        prediction = space.of(scored.scores.get(probability.name))
        if prediction is None:
            continue
        if not np.isfinite(prediction.values).all():
            axes.text(0.5, 0.5, "scores are not finite", ha="center", transform=axes.transAxes)
            continue
        draw_calibration(axes, prediction, space, colour=f"C{number}")
    _save(figure, out)


def draw_calibration(axes: Axes, prediction: Prediction, space: Space, *, colour: str) -> None:
    """Draws the observed rates of a space against its scores, which must be finite."""
    curve = reliability_curve(prediction, space.label, space.weights, num_bins=CALIBRATION_BINS)
    predicted, observed = curve.mean_prediction, curve.mean_target
    top = max(predicted.max(initial=0.0), observed.max(initial=0.0)) * 1.05 or 1.0
    axes.plot([0, top], [0, top], color="tab:gray", linewidth=0.8, linestyle=":")
    axes.plot(predicted, observed, marker="o", markersize=4, color=colour)
    axes.set(xlabel="predicted rate", ylabel="observed rate", xlim=(0, top), ylim=(0, top))


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(out))
