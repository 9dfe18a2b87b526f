"""Plots of a comparison, each drawn from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from esmm_torchrec.comparison.results import fraction_key

DPI = 130
COLOURS = {
    "BASE": "#1b1b1b",
    "AMAN": "#8c564b",
    "OVERSAMPLING": "#7f7f7f",
    "UNBIAS": "#bcbd22",
    "UNBIAS-weighted": "#e0a800",
    "DIVISION": "#9467bd",
    "ESMM-NS": "#2ca02c",
    "ESMM": "#d62728",
    "shared-bottom": "#1f77b4",
}
MARKERS = dict(zip(COLOURS, "oXsvDP^*d", strict=True))
OTHER_COLOUR, OTHER_MARKER = "#17becf", "."
"""Style of a method that is not listed above."""

FALLS_OUT = "DIVISION"
"""Method that may drop below the panels of the volume figure: with few conversions it is so far
below that the others would merge into one line."""

WITH_BAND = ("BASE", "ESMM", "shared-bottom")
"""Methods drawn thick and with a band in the volume figure."""

HEADLINE = {
    "cvr_auc": "CVR AUC, clicked impressions",
    "ctcvr_auc_common_ctr": "CTCVR AUC, all impressions",
}

Results = Mapping[str, Any]


def draw_plots(results: Results, folder: Path) -> dict[str, str]:
    """Draws the plots that the results allow.

    Returns:
        name of each PNG file in `folder` → its caption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[Figure, str]] = {
        "runs.png": (
            _runs(results),
            "Each run of each method (dots, one colour per seed) and their mean (bar). Runs of one "
            "colour share their data: compare methods within a colour.",
        )
    }
    if results["methods"].keys() > {"BASE"} and results["protocol"]["seeds"] > 1:
        plots["differences.png"] = (
            _from_base(results),
            "Paired difference of each method from BASE, and its own 95 % interval; filled "
            "if it is significant after Holm’s correction.",
        )
    if len(results["protocol"]["fractions"]) > 1:
        plots["volume.png"] = (
            _volume(results),
            "Above: mean over seeds by the part of the training users used; the bands of "
            f"{', '.join(WITH_BAND)} are one standard deviation over seeds, which share their data "
            "(those of the others are only in table.csv, to keep the lines readable). Below: "
            "paired difference from BASE with its own 95 % interval; a marker is filled if the "
            "difference is significant after Holm’s correction, as in the tables. "
            f"{FALLS_OUT} may lie below a panel; its figures are then written there.",
        )
    plots["calibration.png"] = (
        _calibration(results),
        "Predicted against observed conversion rate in bins of equal size, first seed: of clicked "
        "impressions against labels, over the entire space against the truth if it is known.",
    )
    if _has_truth(results):
        plots["entire-space.png"] = (
            _entire_space(results),
            "Against the true conversion rate of every impression, clicked or not: mean and runs. "
            "The dotted line is what the true rate itself reaches.",
        )
        if "DIVISION" in results["points"]:
            plots["division.png"] = (
                _division(results),
                _division_caption(results),
            )
    for name, (figure, _) in plots.items():
        FigureCanvasAgg(figure)
        figure.savefig(folder / name, dpi=DPI)
    return {name: caption for name, (_, caption) in plots.items()}


def _has_truth(results: Results) -> bool:
    return all(points is not None for points in results["points"].values())


def _largest(results: Results) -> str:
    return fraction_key(results["protocol"]["fractions"][-1])


def _plain(axes: Axes, *, grid: str = "x") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)


def _dots(
    axes: Axes, results: Results, metric: str, names: Sequence[str], *, colour_by_seed: bool
) -> None:
    """Draws runs as dots and their mean as a bar, one row per method."""
    for place, name in enumerate(names):
        figure = results["methods"][name][_largest(results)].get(metric)
        if figure is None or figure["mean"] is None:
            continue
        runs = figure["runs"]
        colours = [f"C{seed % 10}" for seed in range(len(runs))]
        axes.scatter(
            runs,
            [place] * len(runs),
            s=18,
            c=colours if colour_by_seed else "#9a9a9a",
            alpha=0.8,
            zorder=2,
        )
        axes.plot([figure["mean"]] * 2, [place - 0.3, place + 0.3], color="black", lw=2, zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _plain(axes)


def _runs(results: Results) -> Figure:
    names = list(results["methods"])
    figure = Figure(figsize=(9.5, 0.36 * len(names) + 1.2), layout="constrained")
    for axes, (metric, title) in zip(
        figure.subplots(1, 2, sharey=True), HEADLINE.items(), strict=True
    ):
        _dots(axes, results, metric, names, colour_by_seed=True)
        axes.set_title(title, fontsize=10)
    return figure


def _from_base(results: Results) -> Figure:
    """Draws each method minus BASE, in points of AUC."""
    of_metric = results["differences"][_largest(results)]
    titles = {"cvr_auc": "CVR AUC on clicks", "cvr_auc_entire_space": "CVR AUC, entire space"}
    shown = {metric: title for metric, title in titles.items() if metric in of_metric}
    names = [name for name in results["methods"] if name != "BASE"]
    figure = Figure(figsize=(4.6 * len(shown), 0.3 * len(names) + 1.2), layout="constrained")
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (metric, title) in zip(grid, shown.items(), strict=True):
        for place, name in enumerate(names):
            row = of_metric[metric]["BASE"].get(name)
            if row is None:
                continue
            low, mean, high = (100 * row[key] for key in ("low", "mean", "high"))
            colour = COLOURS.get(name, OTHER_COLOUR)
            filled = "white" if row["within_noise"] else colour
            axes.plot([low, high], [place, place], color=colour, lw=1.8, zorder=2)
            axes.plot(mean, place, "o", ms=7, mec=colour, mfc=filled, mew=1.8, zorder=3)
        axes.axvline(0, color="black", lw=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("minus BASE, points of AUC", fontsize=9)
        _plain(axes)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _line(name: str) -> dict[str, Any]:
    return {
        "color": COLOURS.get(name, OTHER_COLOUR),
        "marker": MARKERS.get(name, OTHER_MARKER),
    }


def _volume(results: Results) -> Figure:
    fractions = results["protocol"]["fractions"]
    figure = Figure(figsize=(9.5, 7.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for column, (metric, title) in enumerate(HEADLINE.items()):
        levels, differences = grid[0, column], grid[1, column]
        drawn: dict[str, np.ndarray] = {}
        drawn_differences: dict[str, np.ndarray] = {}
        for place, name in enumerate(results["methods"]):
            of_method = results["methods"][name]
            figures = [of_method[fraction_key(fraction)][metric] for fraction in fractions]
            if any(item["mean"] is None for item in figures):
                continue
            style = {**_line(name), "markersize": 5}
            strong = name in WITH_BAND
            mean = np.array([item["mean"] for item in figures])
            levels.plot(fractions, mean, label=name, lw=2.2 if strong else 1.2, **style)
            drawn[name] = np.array([mean, mean, mean])
            if strong and all(item["std"] is not None for item in figures):
                std = np.array([item["std"] for item in figures])
                drawn[name] = np.array([mean, mean - std, mean + std])
                levels.fill_between(
                    fractions, mean - std, mean + std, color=style["color"], alpha=0.1
                )
            reach = _difference_line(differences, results, metric, name, place, strong=strong)
            if reach is not None:
                drawn_differences[name] = reach
        _fit_to_the_others(levels, fractions, drawn)
        _fit_to_the_others(differences, fractions, drawn_differences)
        levels.set_title(title, fontsize=10)
        differences.axhline(0, color=COLOURS["BASE"], lw=1)
        differences.set_xlabel("part of the training users")
        for axes in (levels, differences):
            axes.set_xscale("log")
            axes.set_xticks(fractions)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            axes.xaxis.set_minor_locator(NullLocator())
            _plain(axes, grid="y")
    grid[0, 0].set_ylabel("AUC, mean over seeds")
    grid[1, 0].set_ylabel("AUC minus that of BASE")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _fit_to_the_others(
    axes: Axes, fractions: Sequence[float], drawn: Mapping[str, np.ndarray]
) -> None:
    """Limits a panel to the methods other than `FALLS_OUT`, and writes that method's hidden values.

    Args:
        axes: the panel.
        fractions: values of the x axis.
        drawn: method → (3, fractions): its line, and the lower and upper end of its band.
    """
    others = [reach for name, reach in drawn.items() if name != FALLS_OUT]
    if FALLS_OUT not in drawn or not others:
        return
    low, high = float(np.min(others)), float(np.max(others))
    bottom = low - 0.15 * (high - low)
    line = drawn[FALLS_OUT][0]
    if line.min() >= bottom:
        return
    axes.set_ylim(bottom, high + 0.05 * (high - low))
    below = [
        f"{value:.3f} at {fraction:.0%}".replace("-", "−")
        for fraction, value in zip(fractions, line, strict=True)
        if value < bottom
    ]
    axes.text(
        0.02,
        0.02,
        f"{FALLS_OUT}: {', '.join(below)}",
        transform=axes.transAxes,
        fontsize=8,
        color=COLOURS[FALLS_OUT],
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        zorder=10,
    )


def _difference_line(
    axes: Axes, results: Results, metric: str, name: str, place: int, *, strong: bool
) -> np.ndarray | None:
    """Draws the paired differences of a method from BASE; returns the line and its ends, (3,
    fractions), or None if there is no line."""
    fractions = results["protocol"]["fractions"]
    rows = [
        results["differences"][fraction_key(fraction)].get(metric, {}).get("BASE", {}).get(name)
        for fraction in fractions
    ]
    if any(row is None for row in rows):
        return None
    # Shifted sideways, so that the intervals do not hide one another.
    spread = np.array(fractions) * 1.03 ** (place - 4)
    mean = np.array([row["mean"] for row in rows])
    half = np.zeros(len(rows))
    if all(row["low"] is not None for row in rows):
        half = mean - np.array([row["low"] for row in rows])
    axes.errorbar(
        spread,
        mean,
        yerr=half if half.any() else None,
        color=_line(name)["color"],
        lw=2.0 if strong else 1.0,
        elinewidth=1,
        capsize=2,
    )
    for place_on_axis, value, row in zip(spread, mean, rows, strict=True):
        stands = row["within_noise"] is False
        axes.plot(
            [place_on_axis],
            [value],
            **_line(name),
            markersize=6,
            markerfacecolor=_line(name)["color"] if stands else "white",
            ls="",
            zorder=4,
        )
    return np.array([mean, mean - half, mean + half])


def _calibration(results: Results) -> Figure:
    names = list(results["curves"])
    columns = 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(9.5, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        curves = results["curves"][name]
        for space, colour, marker in (
            ("clicked", "#d98200", "o"),
            ("entire space", "#1f77b4", "s"),
        ):
            if space in curves:
                curve = curves[space]
                axes.plot(
                    curve["predicted"],
                    curve["observed"],
                    color=colour,
                    marker=marker,
                    markersize=3.5,
                    lw=1.2,
                    label=space,
                )
        top = max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([0, top], [0, top], color="gray", lw=0.8, ls=":")
        axes.set(xlim=(0, top), ylim=(0, top))
        axes.set_title(name, fontsize=10)
        _plain(axes, grid="both")
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("observed")
    for axes in grid[-1]:
        axes.set_xlabel("predicted")
    grid[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _entire_space(results: Results) -> Figure:
    names = list(results["methods"])
    figure = Figure(figsize=(9.5, 0.36 * len(names) + 1.3), layout="constrained")
    panels = (
        ("cvr_auc_entire_space", "AUC"),
        ("cvr_auc_entire_space_within_ctr_strata", "AUC within pCTR strata"),
        ("cvr_excess_log_loss_entire_space", "excess log loss (nats)"),
        ("cvr_pcoc_entire_space", "Σ predicted / Σ true"),
    )
    oracle = results["references"][_largest(results)]["true pCVR"]
    for axes, (metric, title) in zip(
        figure.subplots(1, len(panels), sharey=True), panels, strict=True
    ):
        _dots(axes, results, metric, names, colour_by_seed=False)
        best = {"cvr_excess_log_loss_entire_space": 0.0, "cvr_pcoc_entire_space": 1.0}.get(metric)
        best = oracle[metric]["mean"] if best is None and metric in oracle else best
        if best is not None:
            axes.axvline(best, color="black", ls=":", lw=1)
        axes.set_title(title, fontsize=10)
    return figure


def _division(results: Results) -> Figure:
    shown = [name for name in ("DIVISION", "ESMM") if name in results["points"]]
    figure = Figure(figsize=(4.75 * len(shown), 4.2), layout="constrained")
    titles = {"DIVISION": "DIVISION: pCTCVR / pCTR", "ESMM": "ESMM: pCVR of its own tower"}
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        points = results["points"][name]
        true, predicted = np.array(points["true"]), np.array(points["predicted"])
        above = predicted > 1
        axes.scatter(true[~above], predicted[~above], s=5, alpha=0.35, color="#1f77b4", lw=0)
        axes.scatter(true[above], predicted[above], s=9, alpha=0.8, color="#d62728", lw=0)
        axes.set(xscale="log", yscale="log", xlabel="true conversion rate", xlim=(3e-3, 1.2))
        axes.set_title(f"{titles[name]} ({above.sum()} of {len(above):,} above 1)", fontsize=10)
        _plain(axes, grid="both")
    low, high = 3e-3, max(1.2, panels[0].get_ylim()[1])
    for axes in panels:
        axes.plot([low, 1], [low, 1], color="black", lw=0.8, ls=":")
        axes.axhline(1, color="#d62728", lw=0.8)
        axes.set_ylim(low, high)
    panels[0].set_ylabel("predicted conversion rate")
    return figure


def _division_caption(results: Results) -> str:
    """Describes the plot from its own points."""
    sentences = ["A sample of test impressions of the first seed against their true rate."]
    for name, what in (("DIVISION", "quotient pCTCVR / pCTR"), ("ESMM", "pCVR of ESMM’s tower")):
        if name not in results["points"]:
            continue
        points = results["points"][name]
        true, predicted = np.array(points["true"]), np.array(points["predicted"])
        ratio = predicted[true > 0] / true[true > 0]
        low, high = np.quantile(ratio, [0.05, 0.95])
        above = int((predicted > 1).sum())
        sentences.append(
            f"The {what} is between {low:.2g} and {high:.2g} times the true rate for nine in ten, "
            f"and above 1 for {above or 'none'} of {len(predicted):,}."
        )
    return " ".join(sentences)
