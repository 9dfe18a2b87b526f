"""Three methods on a grid of worlds: when is ESMM worth it?

    python benchmarks/methods_grid.py --settings paper --out bench/methods-grid

The worlds differ in conversions per click, in the correlation of the tastes for clicking and
converting, and in volume, counted in training conversions. Every method keeps the settings that
`compare` chose for it in the folder of --settings, so that a cell shows the effect of the world,
not the luck of tuning on few conversions. Writes grid.json, grid.md and a map of each pair of
methods. Rerun the command to resume a stopped run or to add seeds.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esmm_torchrec.cli.main import configure_threads
from esmm_torchrec.comparison.data import DEFAULT_WORLD
from esmm_torchrec.comparison.options import ComparisonOptions
from esmm_torchrec.comparison.processes import helped_by
from esmm_torchrec.comparison.statistics import Difference, paired_difference
from esmm_torchrec.comparison.study import compare
from esmm_torchrec.comparison.work import Job, do_all
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.sharding.host import usable_cores
from esmm_torchrec.sharding.process_group import Ranks, process_group

METRICS = {
    "cvr_auc": "CVR AUC on clicks",
    "cvr_auc_entire_space": "CVR AUC, entire space",
    "cvr_excess_log_loss_entire_space": "excess log loss",
}
DRAWN = ("cvr_auc", "cvr_auc_entire_space")
PAIRS = (("ESMM", "BASE"), ("ESMM", "shared-bottom"))


@dataclass(frozen=True)
class Options:
    """Compare methods on a grid of worlds."""

    out: Path
    """Output folder."""
    cvrs: tuple[float, ...] = (0.005, 0.02, 0.08, 0.18)
    """Conversions per click."""
    correlations: tuple[float, ...] = (-0.3, 0.0, 0.3, 0.6, 0.9)
    """Correlations of the tastes for clicking and converting."""
    conversions: tuple[int, ...] = (600, 2500)
    """Expected training conversions."""
    methods: tuple[str, ...] = ("base", "esmm", "shared-bottom")
    """Methods to compare."""
    seeds: int = 3
    """Number of worlds per cell."""
    settings: Path = Path("paper")
    """Folder of the comparison whose settings are used."""
    processes: int = usable_cores()
    """Number of processes that share the cells."""
    world: World = DEFAULT_WORLD
    """Settings that the worlds share."""


@dataclass(frozen=True)
class Cell:
    """A cell of the grid."""

    cvr: float
    correlation: float
    conversions: int

    @property
    def name(self) -> str:
        return f"cvr-{self.cvr:g}-correlation-{self.correlation:g}-conversions-{self.conversions}"

    def world(self, options: Options, seed: int) -> World:
        """Returns a world with the cell's expected number of training conversions."""
        impressions = 2 * round(self.conversions / (options.world.ctr * self.cvr))
        return replace(
            options.world,
            cvr=self.cvr,
            correlation=self.correlation,
            impressions=impressions,
            seed=options.world.seed + seed,
        )


def cells_of(options: Options) -> list[Cell]:
    """Returns the cells of the grid, small worlds first."""
    return [
        Cell(cvr, correlation, conversions)
        for conversions in sorted(options.conversions)
        for cvr in sorted(options.cvrs, reverse=True)
        for correlation in options.correlations
    ]


def work(ranks: Ranks, options: Options) -> None:
    """Compares in every cell, one seed after the other; the processes share the cells."""
    settings = json.loads((options.settings / "results.json").read_text())
    comparison = ComparisonOptions(methods=options.methods, seeds=1, processes=1)

    def job(cell: Cell, seed: int) -> Job:
        out = folder_of(options, cell, seed)

        def run() -> None:
            compare(
                comparison,
                out,
                ranks,
                data=None,
                world=cell.world(options, seed),
                command=shlex.join(sys.argv),
                settings=settings,
            )

        return Job(f"{cell.name}, seed {seed}", out / "results.json", run)

    jobs = [job(cell, seed) for seed in range(options.seeds) for cell in cells_of(options)]
    do_all(
        jobs,
        ranks,
        on_start=lambda job: print(job.label, flush=True),
        on_done=lambda job: None,  # noqa: ARG005
    )


def folder_of(options: Options, cell: Cell, seed: int) -> Path:
    """Returns the folder of the comparison on a world."""
    return options.out / cell.name / f"seed-{seed}"


def read_cells(options: Options) -> list[dict[str, Any]]:
    """Returns the figures of each cell, with one run per seed."""
    cells = []
    for cell in cells_of(options):
        of_seeds = [
            json.loads((folder_of(options, cell, seed) / "results.json").read_text())["methods"]
            for seed in range(options.seeds)
        ]
        titles = list(of_seeds[0])
        cells.append(
            asdict(cell)
            | {
                "methods": {
                    title: {
                        metric: [methods[title]["1"][metric]["mean"] for methods in of_seeds]
                        for metric in METRICS
                    }
                    for title in titles
                }
            }
        )
    return cells


def difference(cell: dict[str, Any], metric: str, pair: tuple[str, str]) -> Difference:
    """Returns the difference of the first method from the second, over the worlds of a cell."""
    first, second = (cell["methods"][name][metric] for name in pair)
    return paired_difference(first, second)


def markdown(cells: Sequence[dict[str, Any]]) -> str:
    """Formats differences and their 95 % intervals as Markdown, one row per cell."""
    titles = [f"{a} − {b}, {title}" for a, b in PAIRS for title in METRICS.values()]
    lines = [
        "| CVR | conversions | correlation | " + " | ".join(titles) + " |",
        "|" + " --- |" * (3 + len(titles)),
    ]
    for cell in cells:
        figures = []
        for pair in PAIRS:
            for metric in METRICS:
                found = difference(cell, metric, pair)
                interval = "" if found.low is None else f" ({found.low:+.4f} to {found.high:+.4f})"
                figures.append(f"{found.mean:+.4f}{interval}")
        head = f"{cell['cvr']:g} | {cell['conversions']:,} | {cell['correlation']:g}"
        lines.append(f"| {head} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def plot(
    cells: Sequence[dict[str, Any]], options: Options, pair: tuple[str, str], out: Path
) -> None:
    """Draws a map of the mean differences of a pair: a column per metric, a row per volume."""
    volumes = sorted(options.conversions)
    figure = Figure(figsize=(8.2, 2.7 * len(volumes) + 0.9), layout="constrained")
    grid = figure.subplots(len(volumes), len(DRAWN), squeeze=False)
    found = {
        (metric, cell["conversions"], cell["correlation"], cell["cvr"]): difference(
            cell, metric, pair
        )
        for metric in DRAWN
        for cell in cells
    }
    reach = max(abs(of.mean) for of in found.values()) or 1.0
    for row, conversions in enumerate(volumes):
        for column, metric in enumerate(DRAWN):
            axes = grid[row, column]
            panel = [
                [found[metric, conversions, correlation, cvr] for cvr in options.cvrs]
                for correlation in options.correlations
            ]
            _panel(axes, panel, options, reach=reach)
            volume = f", {conversions:,} conversions" if len(volumes) > 1 else ""
            axes.set_title(f"{METRICS[metric]}{volume}", fontsize=10)
        grid[row, 0].set_ylabel(
            "correlation of the tastes for\nclicking and converting", fontsize=9
        )
    for axes in grid[-1]:
        axes.set_xlabel("conversions per click", fontsize=9)
    figure.suptitle(
        f"{pair[0]} minus {pair[1]}, points of AUC: blue where {pair[0]} is better", fontsize=12
    )
    FigureCanvasAgg(figure)
    figure.savefig(out, dpi=130)


def _panel(
    axes: Axes, panel: Sequence[Sequence[Difference]], options: Options, *, reach: float
) -> None:
    values = np.array([[of.mean for of in row] for row in panel])
    axes.imshow(values, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(values):
        of = panel[row][column]
        clear = of.low is not None and of.high is not None and of.low * of.high > 0
        axes.text(
            column,
            row,
            f"{100 * value:+.1f}".replace("-", "−"),
            ha="center",
            va="center",
            fontsize=10,
            weight="bold" if clear else "normal",
            color="white" if abs(value) > 0.6 * reach else "black",
        )
    axes.set_xticks(range(len(options.cvrs)), [f"{cvr:.3g}" for cvr in options.cvrs], fontsize=9)
    axes.set_yticks(
        range(len(options.correlations)), [f"{of:g}" for of in options.correlations], fontsize=9
    )


def main() -> None:
    """Compares, then writes the results."""
    configure_threads()
    options = tyro.cli(Options)
    with (
        helped_by(options.processes - 1, "cpu", work, options),
        process_group("cpu") as ranks,
    ):
        work(ranks, options)
    cells = read_cells(options)
    written = {"world": asdict(options.world), "cells": cells}
    (options.out / "grid.json").write_text(json.dumps(written, indent=1) + "\n")
    (options.out / "grid.md").write_text(markdown(cells) + "\n")
    for pair in PAIRS:
        plot(cells, options, pair, options.out / f"{'-'.join(pair).lower()}.png")
    print(markdown(cells))


if __name__ == "__main__":
    main()
