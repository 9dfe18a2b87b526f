"""One self-contained HTML page on a run: its data, its training, what its scores are worth."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from esmm_torchrec.data.field_values import FieldValues
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS
from esmm_torchrec.metrics.probability import fit, reliability_curve
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.metrics.slices import measure_slices
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.training.importance import Importance
from esmm_torchrec.training.plots import CALIBRATION_BINS

MAX_VALUES = 12
"""Values of a field that are shown, those with the most impressions."""

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
    """The page.

    Args:
        run: the run.
        dataset: its data.
        scored: the test half.
        step: of the checkpoint that scored it.
        fields: by name, the values that figures are shown for.
        importances: of the features.
    """
    environment = Environment(
        loader=PackageLoader("esmm_torchrec.training"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["figure"] = _figure
    return environment.get_template("run.html.jinja").render(
        run=run,
        step=step,
        dataset=dataset,
        splits=SPLITS,
        tasks=scored.tasks,
        metrics=measure(scored)["test"],
        probabilities=[p for p in scored.tasks.probabilities if p.name in scored.scores],
        pictures={
            "Learning curves": _inline(_learning(run, scored)),
            "ROC": _inline(_roc(scored)),
            "Calibration": _inline(_calibration(scored)),
            "Scores": _inline(_histograms(scored)),
        },
        slices={name: _by_value(scored, values) for name, values in fields.items()},
        importances=importances,
        plan=_json(run, "plan.json"),
        config=json.dumps(run.config, indent=2),
    )


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _json(run: RunFolder, name: str) -> str | None:
    path = run.path / name
    return json.dumps(json.loads(path.read_text()), indent=1) if path.exists() else None


def _inline(figure: Figure) -> Markup:
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    content = base64.b64encode(buffer.getvalue()).decode()
    return Markup(f'<img alt="" src="data:image/svg+xml;base64,{content}">')


def _spaces(scored: ScoredImpressions) -> list[tuple[str, Any, np.ndarray, np.ndarray | None]]:
    """(title, prediction, labels, weights) in the space of each probability."""
    found = []
    for probability in scored.tasks.probabilities:
        name, _, task, given = probability
        prediction = scored.scores.get(name)
        if prediction is None or not np.isfinite(prediction.values).all():
            continue
        rows = np.ones(scored.size, np.bool_) if given is None else scored.happened(given.name)
        label = scored.happened(task.name)[rows]
        weights = None if scored.weight is None else scored.weight[rows]
        found.append((scored.tasks.describe(probability), prediction[rows], label, weights))
    return found


def _panels(number: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(3.3 * max(number, 1), 3.2), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, max(number, 1))))


def _learning(run: RunFolder, scored: ScoredImpressions) -> Figure:
    """Loss and AUCs of history.jsonl; held-out AUCs where a validation was measured."""
    lines = []
    if run.history.exists():
        lines = [json.loads(line) for line in run.history.read_text().splitlines()]
    figure, (loss, aucs) = _panels(2)
    known = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if known:
        loss.plot(*zip(*known, strict=True), color="tab:gray")
    loss.set(title="training loss", xlabel="step")
    for number, probability in enumerate(scored.tasks.probabilities):
        name, label = probability.name, scored.tasks.describe(probability)
        before = [(line["step"], line[f"{name}_auc"]) for line in lines if f"{name}_auc" in line]
        if before:
            aucs.plot(*zip(*before, strict=True), color=f"C{number}", label=label)
        held = [
            (line["step"], line["validation"][f"{name}_auc"])
            for line in lines
            if (line.get("validation") or {}).get(f"{name}_auc") is not None
        ]
        if held:
            points = zip(*held, strict=True)
            aucs.plot(*points, "o--", color=f"C{number}", label=f"{label}, held out", markersize=3)
    aucs.set(title="AUC just before a step", xlabel="step")
    if aucs.lines:
        aucs.legend(frameon=False, fontsize=7)
    return figure


def _roc(scored: ScoredImpressions) -> Figure:
    spaces = _spaces(scored)
    figure, panels = _panels(len(spaces))
    for axes, (title, prediction, label, weights) in zip(panels, spaces, strict=False):
        own = np.ones(len(label)) if weights is None else weights.astype(np.float64)
        order = np.argsort(-prediction.values, kind="stable")
        values, hit, mass = prediction.values[order], label[order], own[order]
        last_of_tie = np.r_[values[1:] != values[:-1], True] if len(values) else np.zeros(0, bool)
        true = np.cumsum(mass * hit)[last_of_tie]
        false = np.cumsum(mass * ~hit)[last_of_tie]
        if len(true) and true[-1] > 0 and false[-1] > 0:
            places = np.unique(np.linspace(0, len(true) - 1, _CURVE_POINTS).round().astype(int))
            axes.plot(
                np.r_[0, false[places] / false[-1]], np.r_[0, true[places] / true[-1]], color="C0"
            )
        axes.plot([0, 1], [0, 1], color="tab:gray", linewidth=0.8, linestyle=":")
        value = auc(prediction.values, label, weights)
        shown = "–" if value is None else f"{value:.4f}"
        axes.set(title=f"{title}\nAUC {shown}", xlabel="false positive rate")
        axes.title.set_fontsize(9)
    panels[0].set_ylabel("true positive rate")
    return figure


def _calibration(scored: ScoredImpressions) -> Figure:
    spaces = _spaces(scored)
    figure, panels = _panels(len(spaces))
    for axes, (title, prediction, label, weights) in zip(panels, spaces, strict=False):
        curve = reliability_curve(prediction, label, weights, num_bins=CALIBRATION_BINS)
        if curve.rows.size:
            predicted, observed = curve.mean_prediction, curve.mean_target
            axes.plot(predicted, observed, "o-", color="C1", markersize=3)
            top = max(float(predicted.max()), float(observed.max()))
            axes.plot([0, top], [0, top], color="tab:gray", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="mean prediction")
        axes.title.set_fontsize(9)
    panels[0].set_ylabel("observed rate")
    return figure


def _histograms(scored: ScoredImpressions) -> Figure:
    spaces = _spaces(scored)
    figure, panels = _panels(len(spaces))
    for axes, (title, prediction, label, _) in zip(panels, spaces, strict=False):
        probability = prediction.probability
        edges = np.linspace(0, float(probability.max()) if len(probability) else 1.0, 41)
        for value, colour in ((False, "C7"), (True, "C2")):
            axes.hist(
                probability[label == value],
                edges,
                density=True,
                alpha=0.6,
                color=colour,
                label=str(int(value)),
            )
        axes.set(title=title, xlabel="score", yticks=[])
        axes.title.set_fontsize(9)
    panels[0].legend(title="label", frameon=False, fontsize=7, title_fontsize=7)
    return figure


def _by_value(scored: ScoredImpressions, values: FieldValues) -> list[dict[str, Any]]:
    """AUC, NE and PCOC of each probability for the most frequent values."""
    counts = np.bincount(values.codes, minlength=len(values.names))
    calibration = {
        name: {one["value"]: one for one in found}
        for name, found in measure_slices(scored, values.codes, values.names).items()
    }
    rows = []
    for code in np.argsort(-counts)[:MAX_VALUES]:
        if counts[code] == 0:
            continue
        row: dict[str, Any] = {"value": values.names[code], "impressions": int(counts[code])}
        for name, _, task, given in scored.tasks.probabilities:
            prediction = scored.scores.get(name)
            if prediction is None:
                continue
            inside = values.codes == code
            if given is not None:
                inside &= scored.happened(given.name)
            label = scored.happened(task.name)[inside]
            weights = None if scored.weight is None else scored.weight[inside]
            sums = fit(prediction[inside], label, weights) if len(label) else None
            entropy = None if sums is None else sums.normalised_entropy
            row[f"{name} auc"] = auc(prediction.values[inside], label, weights)
            row[f"{name} ne"] = entropy if entropy is None or math.isfinite(entropy) else None
            row[f"{name} pcoc"] = calibration[name].get(values.names[code], {}).get("pcoc")
        rows.append(row)
    return rows
