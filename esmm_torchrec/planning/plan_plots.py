"""Plots of an experiment with sharding plans, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from esmm_torchrec.planning.estimates import Estimate, Placed
from esmm_torchrec.planning.experiment import Experiment, milliseconds, rate
from esmm_torchrec.sharding.search import GIB, gib

TABLES_NAMED = 8
"""Maximum number of tables, or families of equal tables, with a separate colour in a panel of a
plot; the others share one colour."""

DOTS_PER_INCH = 110

STRATEGY_COLOURS = {
    "auto": "#111111",
    "table_wise": "#4269d0",
    "row_wise": "#ff725c",
    "column_wise": "#3ca951",
    "table_row_wise": "#a463f2",
    "grid_shard": "#efb118",
    "data_parallel": "#9c6b4e",
}
TABLE_COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
)
OTHERS_COLOUR = "#bbbbbb"
TOWERS_COLOUR = "#7a6a58"

PARTS = (
    ("embedding forward", "forward", "#97bbf5"),
    ("embeddings to their impressions", "forward_comms", "#4269d0"),
    ("embedding backward and update", "backward", "#ffb3a5"),
    ("gradients to their rows", "backward_comms", "#ff725c"),
    ("prefetch from host memory", "prefetch", "#efb118"),
    ("towers", "towers", "#c9b79c"),
    ("all-reduce of the towers", "towers_all_reduce", "#7a6a58"),
)


def draw_plots(experiment: Experiment) -> dict[str, bytes]:
    """Returns name → PNG: steps, parts of a step, throughput, and a plot per feasible estimate."""
    images = {
        "step-by-strategy": _png(_heat_map(experiment)),
        "parts-of-a-step": _png(_parts_plot(experiment)),
    }
    if sum(experiment.fastest(count) is not None for count in experiment.counts) > 1:
        images["scaling"] = _png(_scaling_plot(experiment))
    for estimate in experiment.estimates:
        if estimate.placed is not None:
            name = ranks_plot_name(estimate)
            images[name] = _png(_ranks_plot(estimate, experiment))
    return images


def ranks_plot_name(estimate: Estimate) -> str:
    """Returns the name of the plot with memory and time of every rank."""
    return f"ranks-{estimate.strategy}-{estimate.world_size}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={})
    return buffer.getvalue()


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _heat_map(experiment: Experiment) -> Figure:
    strategies, counts = experiment.strategies, experiment.counts
    steps = np.array([[experiment.of(s, n).step_ms for n in counts] for s in strategies])
    figure = Figure(figsize=(2.6 + 1.5 * len(counts), 1.4 + 0.5 * len(strategies)))
    axes = figure.subplots()
    finite = steps[np.isfinite(steps)]
    axes.set_facecolor("#eeeeee")
    if finite.size:
        norm = LogNorm(finite.min(), max(finite.max(), finite.min() * 1.5))
        shown = np.ma.masked_invalid(steps)
        axes.imshow(shown, norm=norm, cmap="YlGnBu", aspect="auto")
        middle = math.sqrt(norm.vmin * norm.vmax) if norm.vmin and norm.vmax else math.inf
    else:
        axes.set_xlim(-0.5, len(counts) - 0.5)
        axes.set_ylim(len(strategies) - 0.5, -0.5)
        middle = math.inf
    for row in range(len(strategies)):
        for column in range(len(counts)):
            value = steps[row, column]
            fits = bool(np.isfinite(value))
            best = fits and value == np.min(steps[:, column])
            axes.text(
                column,
                row,
                milliseconds(float(value)),
                ha="center",
                va="center",
                color="white" if fits and value > middle else "black" if fits else "#888888",
                fontweight="bold" if best else "normal",
                fontsize=10 if fits else 8,
            )
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_yticks(range(len(strategies)), strategies)
    axes.set_xlabel(f"{experiment.noun}s")
    axes.set_title("Estimated time of a step (bold: shortest)", loc="left", fontsize=11)
    axes.tick_params(length=0)
    return figure


def _parts_plot(experiment: Experiment) -> Figure:
    counts, strategies = experiment.counts, experiment.strategies
    figure = Figure(figsize=(8, 1.2 + 0.27 * len(counts) * (len(strategies) + 0.6)))
    axes = figure.subplots()
    labels: list[str] = []
    position = 0.0
    positions: list[float] = []
    longest = max((e.step_ms for e in experiment.estimates if e.placed), default=1.0)
    for count in counts:
        for strategy in strategies:
            estimate = experiment.of(strategy, count)
            labels.append(f"{strategy}, {count}")
            positions.append(position)
            left = 0.0
            if estimate.placed is None:
                axes.text(0, position, " no plan", va="center", color="#888888", fontsize=8)
            else:
                for _, name, colour in PARTS:
                    width = getattr(estimate.placed.parts, name)
                    axes.barh(position, width, left=left, color=colour, height=0.8)
                    left += width
                axes.text(
                    left + longest * 0.008,
                    position,
                    milliseconds(left),
                    va="center",
                    fontsize=8,
                )
            position += 1
        position += 0.6
    axes.set_yticks(positions, labels, fontsize=8)
    axes.set_ylim(position - 0.9, -0.7)
    axes.set_xlim(0, longest * 1.14)
    axes.set_xlabel("estimated ms, nothing overlapping")
    axes.set_title(f"Parts of a step on the slowest {experiment.noun}", loc="left", fontsize=11)
    handles = [
        Patch(color=colour, label=label)
        for label, name, colour in PARTS
        if any(e.placed and getattr(e.placed.parts, name) > 0 for e in experiment.estimates)
    ]
    if handles:
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            fontsize=8,
            frameon=False,
        )
    _bare(axes)
    return figure


def _scaling_plot(experiment: Experiment) -> Figure:
    figure = Figure(figsize=(7.5, 4.6))
    axes = figure.subplots()
    counts = experiment.counts
    # Lines of strategies often coincide: the first is the widest, the last, on top, the thinnest.
    widths = np.linspace(5, 1.5, len(experiment.strategies))
    for strategy, width in zip(experiment.strategies, widths, strict=True):
        points = [
            (n, experiment.of(strategy, n).impressions_per_second)
            for n in counts
            if experiment.of(strategy, n).placed
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                marker="o",
                markersize=width + 3,
                linewidth=width,
                color=STRATEGY_COLOURS[strategy],
                label=strategy,
            )
    best = [(n, e.impressions_per_second) for n in counts if (e := experiment.fastest(n))]
    if best:
        first, speed = best[0]
        axes.plot(
            [first, counts[-1]],
            [speed, speed * counts[-1] / first],
            linestyle="--",
            color="#999999",
            linewidth=1,
            label=f"if {experiment.ranks(first)} at best scaled",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    axes.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: rate(value) if f"{value:e}"[0] in "25" else "")
    )
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set_xlabel(f"{experiment.noun}s")
    axes.set_ylabel("estimated impressions per second")
    axes.set_title("Throughput as machines are added", loc="left", fontsize=11)
    axes.grid(alpha=0.3, which="major")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _bare(axes)
    return figure


def _ranks_plot(estimate: Estimate, experiment: Experiment) -> Figure:
    """Plots memory and time of every rank, stacked by table."""
    placed, capacity = estimate.placed, estimate.capacity
    assert placed is not None
    in_host = placed.table_host_bytes.any()
    panels = 3 if in_host else 2
    figure = Figure(figsize=(9, 2.7 * panels + 0.6))
    rows = list(figure.subplots(panels, 1, sharex=True))
    families = _families(experiment, placed)
    noun = experiment.noun
    _stack(rows[0], families, placed.table_bytes / GIB, start=capacity.towers / GIB)
    _limit(rows[0], capacity.for_tables + capacity.towers, f"left after {_percent(experiment)}")
    _limit(rows[0], capacity.total, f"memory of a {noun}")
    rows[0].set_ylabel("GiB")
    rows[0].set_title(
        f"{estimate.strategy} on {experiment.ranks(estimate.world_size)}: "
        f"estimated memory of each {noun}",
        loc="left",
        fontsize=11,
    )
    if in_host:
        _stack(rows[1], families, placed.table_host_bytes / GIB)
        _limit(rows[1], capacity.host_for_tables, f"left after {_percent(experiment)}")
        rows[1].set_ylabel("GiB")
        rows[1].set_title(f"Estimated host memory for each {noun}", loc="left", fontsize=11)
    _stack(rows[-1], families, placed.table_ms)
    rows[-1].set_ylabel("ms per step")
    rows[-1].set_title(
        "Estimated time for the tables (the step waits for the highest)", loc="left", fontsize=11
    )
    rows[-1].set_xlabel(noun)
    rows[-1].set_xlim(-0.6, estimate.world_size - 0.4)
    if estimate.world_size <= 16:
        rows[-1].set_xticks(range(estimate.world_size))
    for axes in rows:
        # The legend lists families from the top of the stack down.
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1],
            labels[::-1],
            loc="upper left",
            bbox_to_anchor=(1.01, 1.02),
            fontsize=8,
            frameon=False,
        )
    for axes in rows:
        _bare(axes)
    return figure


def _percent(experiment: Experiment) -> str:
    return f"the reserve of {experiment.scenario.reserve:.0%}"


@dataclass(frozen=True)
class _Family:
    """Tables of one entry of the list, plotted together."""

    label: str
    rows: list[int]
    colour: str


def _families(experiment: Experiment, placed: Placed) -> list[_Family]:
    """Returns the families of the placed tables. A family has the same colour in all panels."""
    named = {table.name: table.family or table.name for table in experiment.scenario.tables.tables}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(placed.names):
        rows.setdefault(named[name], []).append(row)
    measures = (placed.table_bytes, placed.table_host_bytes, placed.table_ms)

    def share(family: str) -> float:
        return max(v[rows[family]].sum() / v.sum() if v.any() else 0.0 for v in measures)

    # There are only so many distinguishable colours: small families reuse them, paler.
    ordered = sorted(rows, key=share, reverse=True)
    colours = (*TABLE_COLOURS, *(_paler(colour) for colour in TABLE_COLOURS))
    return [
        _Family(
            f"{family} ({len(rows[family])} tables)" if len(rows[family]) > 1 else family,
            rows[family],
            colours[number % len(colours)],
        )
        for number, family in enumerate(ordered)
    ]


def _paler(colour: str) -> str:
    """Returns a colour half way to white."""
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{(channel + 255) // 2:02x}" for channel in channels)


def _stack(
    axes: Axes, families: Sequence[_Family], values: np.ndarray, *, start: float = 0.0
) -> None:
    """Plots values of every rank, stacked by family; only the families with the largest totals are
    named. There is one patch per family, as a bar per rank takes seconds for 128 ranks."""
    edges = np.arange(values.shape[1] + 1) - 0.5
    base = np.zeros(values.shape[1])

    def add(amount: np.ndarray, label: str, colour: str) -> None:
        axes.stairs(base + amount, edges, baseline=base, fill=True, color=colour, label=label)
        base[:] = base + amount

    if start:
        add(np.full(len(base), start), "towers", TOWERS_COLOUR)
    of_family = {family.label: values[family.rows].sum(axis=0) for family in families}
    held = [family for family in families if of_family[family.label].any()]
    held.sort(key=lambda family: -of_family[family.label].sum())
    named = held if len(held) <= TABLES_NAMED + 1 else held[:TABLES_NAMED]
    for family in named:
        add(of_family[family.label], family.label, family.colour)
    others = held[len(named) :]
    if others:
        rest = np.sum([of_family[family.label] for family in others], axis=0)
        number = sum(len(family.rows) for family in others)
        add(rest, f"{number} other tables", OTHERS_COLOUR)


def _limit(axes: Axes, nbytes: float, label: str) -> None:
    value = nbytes / GIB
    axes.axhline(value, color="#333333", linewidth=1, linestyle="--")
    axes.annotate(
        f"{label}: {gib(nbytes)}",
        (0.995, value),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=7,
        color="#333333",
    )
    axes.set_ylim(0, max(axes.get_ylim()[1], value * 1.12))
