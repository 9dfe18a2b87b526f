"""Where ESMM wins, where it ties, and what it cannot repair: methods on a grid of worlds.

    python benchmarks/methods_grid.py --out bench/methods-grid

Compares on worlds that differ in the correlation of the tastes for clicking and converting, in
their size, and in a hidden factor that acts on both and is not logged. Methods are tuned once, on
the default world at its full size, and keep those settings everywhere, so that a cell shows the
world and not the luck of a tuning on few conversions. Writes grid.json, grid.md and grid.png; a
stopped run goes on. With `--remembered paper/trials`, and the trials and epochs of `make paper`, it
takes over that tuning.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esmm_torchrec.cli.main import settle_process
from esmm_torchrec.comparison.data import DEFAULT_WORLD
from esmm_torchrec.comparison.options import ComparisonOptions
from esmm_torchrec.comparison.study import compare
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.sharding.process_group import Ranks, process_group

METRICS = {
    "cvr_auc": "CVR AUC, clicks",
    "cvr_auc_entire_space": "CVR AUC, entire space",
}
PAIRS = (("ESMM", "BASE"), ("ESMM", "shared-bottom"))


@dataclass(frozen=True)
class Options:
    """Compare methods on a grid of worlds."""

    out: Path
    """Folder of the results."""
    correlations: tuple[float, ...] = (-0.5, 0.0, 0.6, 0.9)
    """Of the tastes for clicking and converting."""
    impressions: tuple[int, ...] = (72_000, 240_000, 720_000)
    """Sizes of the worlds, both halves together."""
    confoundings: tuple[float, ...] = (0.0, 1.0)
    """Weights of the hidden factor in both logits."""
    methods: tuple[str, ...] = ("base", "division", "esmm-ns", "esmm", "shared-bottom")
    """What is compared."""
    seeds: int = 3
    """Worlds of each cell."""
    trials: int = ComparisonOptions.trials
    """As in compare."""
    epochs: int = ComparisonOptions.epochs
    """As in compare."""
    remembered: Path | None = None
    """Folder of remembered trainings; below --out if not given."""
    base: World = DEFAULT_WORLD
    """What the worlds share, and what is tuned on."""


def run_grid(options: Options, ranks: Ranks) -> list[dict[str, Any]]:
    """Results of each cell."""
    comparison = ComparisonOptions(
        methods=options.methods,
        seeds=options.seeds,
        trials=options.trials,
        epochs=options.epochs,
    )
    cells = []
    for confounding in options.confoundings:
        for correlation in options.correlations:
            for impressions in options.impressions:
                world = replace(
                    options.base,
                    impressions=impressions,
                    correlation=correlation,
                    confounding=confounding,
                )
                name = (
                    f"correlation-{correlation:g}-impressions-{impressions}-hidden-{confounding:g}"
                )
                if ranks.is_first:
                    print(name, flush=True)
                results = compare(
                    comparison,
                    options.out / name,
                    ranks,
                    data=None,
                    world=world,
                    command=shlex.join(sys.argv),
                    tune_on=options.base,
                    trials=options.remembered or options.out / "trials",
                )
                cells.append(
                    {
                        "confounding": confounding,
                        "correlation": correlation,
                        "impressions": impressions,
                        "methods": {
                            method: {metric: of["1"].get(metric) for metric in METRICS}
                            for method, of in results["methods"].items()
                        },
                        "train_conversions": _train_conversions(results),
                    }
                )
    return cells


def _train_conversions(results: dict[str, Any]) -> float:
    """About as many as the test half has, which is as large."""
    test = next(iter(results["methods"].values()))["1"]
    share = results["source"]["world"]["impressions"] / 2 / test["impressions"]["mean"]
    return test["conversions"]["mean"] * share


def differences(cell: dict[str, Any], metric: str, pair: tuple[str, str]) -> list[float]:
    """Of each world of a cell."""
    first, second = (cell["methods"][name][metric]["runs"] for name in pair)
    return [a - b for a, b in zip(first, second, strict=True)]


def markdown(cells: Sequence[dict[str, Any]]) -> str:
    """One row a cell: mean differences, and in how many of the worlds ESMM was ahead."""
    titles = [f"{a} − {b}, {title}" for a, b in PAIRS for title in METRICS.values()]
    lines = [
        "| hidden factor | correlation | conversions | " + " | ".join(titles) + " |",
        "|" + " --- |" * (3 + len(titles)),
    ]
    for cell in cells:
        figures = []
        for pair in PAIRS:
            for metric in METRICS:
                values = differences(cell, metric, pair)
                ahead = sum(value > 0 for value in values)
                figures.append(f"{np.mean(values):+.4f} ({ahead} of {len(values)})")
        head = (
            f"{cell['confounding']:g} | {cell['correlation']:g} | {cell['train_conversions']:,.0f}"
        )
        lines.append(f"| {head} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def plot(cells: Sequence[dict[str, Any]], options: Options, out: Path) -> None:
    """A map of mean differences: a row of panels a hidden factor, a column a pair and metric."""
    columns = [(pair, metric) for pair in PAIRS for metric in METRICS]
    figure = Figure(
        figsize=(3.1 * len(columns), 2.7 * len(options.confoundings) + 0.6), layout="constrained"
    )
    grid = figure.subplots(len(options.confoundings), len(columns), squeeze=False)
    reach = max(
        abs(float(np.mean(differences(cell, metric, pair))))
        for cell in cells
        for pair, metric in columns
    )
    for row, confounding in enumerate(options.confoundings):
        for column, (pair, metric) in enumerate(columns):
            values = np.zeros((len(options.correlations), len(options.impressions)))
            for cell in cells:
                if cell["confounding"] == confounding:
                    place = (
                        options.correlations.index(cell["correlation"]),
                        options.impressions.index(cell["impressions"]),
                    )
                    values[place] = np.mean(differences(cell, metric, pair))
            _panel(grid[row, column], values, options, reach=reach)
            if row == 0:
                grid[row, column].set_title(f"{pair[0]} − {pair[1]}\n{METRICS[metric]}", fontsize=9)
        grid[row, 0].set_ylabel(f"hidden factor {confounding:g}\ncorrelation", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("training impressions", fontsize=9)
    FigureCanvasAgg(figure)
    figure.savefig(out, dpi=130)


def _panel(axes: Axes, values: np.ndarray, options: Options, *, reach: float) -> None:
    axes.imshow(values, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * reach else "black"
        axes.text(column, row, f"{value:+.3f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(
        range(len(options.impressions)),
        [f"{size // 2000}k" for size in options.impressions],
        fontsize=8,
    )
    axes.set_yticks(
        range(len(options.correlations)),
        [f"{value:g}" for value in options.correlations],
        fontsize=8,
    )


def main() -> None:
    """Compares, then writes what was found."""
    settle_process()
    options = tyro.cli(Options)
    with process_group("auto") as ranks:
        cells = run_grid(options, ranks)
        if ranks.is_first:
            (options.out / "grid.json").write_text(json.dumps(cells, indent=1) + "\n")
            (options.out / "grid.md").write_text(markdown(cells) + "\n")
            plot(cells, options, options.out / "grid.png")
            print(markdown(cells))


if __name__ == "__main__":
    main()
