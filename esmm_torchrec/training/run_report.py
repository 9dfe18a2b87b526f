"""Self-contained HTML page on a run: its data, its training and the quality of its scores."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from esmm_torchrec.data.field_values import FieldValues
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions, Space
from esmm_torchrec.metrics.slices import figures_by_value
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.training.importance import Importance
from esmm_torchrec.training.plots import draw_calibration, points, read_history

MAX_VALUES = 12
"""Maximum number of values of a field on the page; those with the most impressions are shown."""

_CURVE_POINTS = 400


def run_report(
    run: RunFolder,
    dataset: PreparedDataSet,
    scored: ScoredImpressions,
    *,
    step: int,
    fields: Mapping[str, FieldValues],
    importances: Sequence[Importance],
) -> str:
    """Returns the HTML of the page.

    Args:
        fields: name → values of a field, for each of which the page shows figures.
        importances: importances of the features.
    """
    environment = Environment(
        loader=PackageLoader("esmm_torchrec.training"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["figure"] = _figure
    plan = run.path / "plan.json"
    return environment.get_template("run.html.jinja").render(
        run=run,
        step=step,
        dataset=dataset,
        splits=SPLITS,
        tasks=scored.tasks,
        metrics=measure(scored)["test"],
        probabilities=[p for p in scored.tasks.probabilities if p.name in scored.scores],
        pictures={
            title: _inline(figures, title)
            for title, figures in {
                "Learning curves": _learning(run, scored),
                "ROC": _roc(scored),
                "Calibration": _calibration(scored),
                "Scores": _histograms(scored),
            }.items()
        },
        slices={
            name: figures_by_value(
                scored,
                values.codes,
                values.names,
                most=MAX_VALUES,
                in_order=values.are_ranges,
            )
            for name, values in fields.items()
        },
        importances=importances,
        plan=plan.read_text() if plan.exists() else None,
        config=json.dumps(run.config, indent=2),
    )


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _inline(figures: Sequence[Figure], title: str) -> list[Markup]:
    pictures = []
    for figure in figures:
        buffer = io.BytesIO()
        with rc_context({"svg.fonttype": "none"}):
            FigureCanvasSVG(figure).print_svg(buffer)
        content = base64.b64encode(buffer.getvalue()).decode()
        alt = f"{title}: {figure.axes[0].get_title()}".replace("\n", ", ")
        pictures.append(
            Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(alt, content)
        )
    return pictures


def _spaces(scored: ScoredImpressions) -> list[tuple[str, Prediction, Space]]:
    """Returns (title, scores, space) of each probability whose scores are finite."""
    found = []
    for probability in scored.tasks.probabilities:
        space = scored.space(probability.task, probability.given)
        prediction = space.of(scored.scores.get(probability.name))
        if prediction is not None and np.isfinite(prediction.values).all():
            found.append((scored.tasks.describe(probability), prediction, space))
    return found


def _panel(title: str, **labels: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.6, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.set_title(title, fontsize=9)
    return figure, axes


def _learning(run: RunFolder, scored: ScoredImpressions) -> list[Figure]:
    """Plots the loss, AUC and NE of history.jsonl, with the AUC and NE of the validation."""
    lines = read_history(run.history) if run.history.exists() else []
    figure, loss = _panel("training loss", xlabel="step")
    loss.plot(*np.array(points(lines, "loss")).reshape(-1, 2).T, color="tab:gray")
    figures = [figure]
    for key, title in (("auc", "AUC"), ("ne", "normalised entropy")):
        figure, axes = _panel(f"{title} just before a step", xlabel="step")
        for number, probability in enumerate(scored.tasks.probabilities):
            name, label = probability.name, scored.tasks.describe(probability)
            if before := points(lines, f"{name}_{key}"):
                axes.plot(*zip(*before, strict=True), color=f"C{number}", label=label)
            if held := points(lines, f"validation_{name}_{key}"):
                label = f"{label}, held out"
                axes.plot(
                    *zip(*held, strict=True), "o--", color=f"C{number}", label=label, markersize=3
                )
        if axes.lines:
            axes.legend(frameon=False, fontsize=7)
        figures.append(figure)
    return figures


def _roc(scored: ScoredImpressions) -> list[Figure]:
    figures = []
    for title, prediction, space in _spaces(scored):
        value = auc(prediction.values, space.label, space.weights)
        shown = "undefined: only one class" if value is None else f"{value:.4f}"
        figure, axes = _panel(
            f"{title}\nAUC {shown}", xlabel="false positive rate", ylabel="true positive rate"
        )
        axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=0.8, linestyle=":")
        if value is not None:
            axes.plot(*_roc_curve(prediction.values, space.label, space.weights), color="C0")
        figures.append(figure)
    return figures


def _roc_curve(
    values: np.ndarray, label: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    own = np.ones(len(label)) if weights is None else weights.astype(np.float64)
    order = np.argsort(-values, kind="stable")
    values, hit, mass = values[order], label[order], own[order]
    last_of_tie = np.r_[values[1:] != values[:-1], True]
    true = np.cumsum(mass * hit)[last_of_tie]
    false = np.cumsum(mass * ~hit)[last_of_tie]
    places = np.unique(np.linspace(0, len(true) - 1, _CURVE_POINTS).round().astype(int))
    return np.r_[0, false[places] / false[-1]], np.r_[0, true[places] / true[-1]]


def _calibration(scored: ScoredImpressions) -> list[Figure]:
    figures = []
    for title, prediction, space in _spaces(scored):
        figure, axes = _panel(title)
        draw_calibration(axes, prediction, space, colour="C1")
        figures.append(figure)
    return figures


def _histograms(scored: ScoredImpressions) -> list[Figure]:
    figures = []
    for title, prediction, space in _spaces(scored):
        figure, axes = _panel(title, xlabel="score")
        probability = prediction.probability
        top = float(probability.max(initial=0.0))
        for value, colour in ((False, "C7"), (True, "C2")):
            own = probability[space.label == value]
            if len(own):
                edges = np.linspace(0, top if top > 0 else 1.0, 41).tolist()
                shown = f"label {int(value)}"
                axes.hist(own, edges, density=True, alpha=0.6, color=colour, label=shown)
        axes.set(yticks=[])
        if axes.patches:
            axes.legend(frameon=False, fontsize=7)
        figures.append(figure)
    return figures
