"""Plots and one self-contained HTML page of an experiment with sharding plans.

Written for somebody who has to decide what to rent and has not seen the code: what was asked, what
fits, what it would cost per step, why something does not fit, and what the numbers leave out.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from esmm_torchrec.planning.estimates import Estimate, Placed
from esmm_torchrec.planning.scenario import STRATEGIES, Scenario, Strategy
from esmm_torchrec.sharding.search import GIB, gib

TABLES_NAMED = 8
"""Tables, or families of tables alike, with a colour of their own in a panel of a plot; the others
share one."""

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

STRATEGY_TEXT = {
    "auto": "TorchRec's planner chooses for each table: table_wise, row_wise, on several hosts "
    "table_row_wise, and where the optimiser is not row-wise Adagrad also column_wise and on "
    "several hosts of GPUs grid_shard. Never data_parallel; no table with mean pooling grid_shard.",
    "table_wise": "Each table whole on one {rank}. Least traffic; a large table must fit one "
    "{rank}, and a busy one makes its {rank} the slowest.",
    "row_wise": "Each table's rows spread over all {ranks}. Even memory; every {rank} sends "
    "partial sums for every impression, so traffic grows with the number of {ranks}.",
    "column_wise": "Each table's columns spread over some {ranks}, in strips of at least "
    "{width} columns; narrower tables stay whole. With row-wise Adagrad it trains slightly "
    "otherwise.",
    "table_row_wise": "Each table on one host, its rows spread over that host's {ranks}: partial "
    "sums stay inside the host. On a single host the same as row_wise.",
    "grid_shard": "Columns spread over hosts, rows over the {ranks} of each: for tables too large "
    "for one host.",
    "data_parallel": "A copy of each table on every {rank}, gradients all-reduced: for small "
    "tables only, and not with a fused optimiser.",
}


NARROW_TABLES = """<li>TorchRec charges tables of fewer than 32 columns as if they had 32, and those
of fewer than 128 a penalty, under table_wise and column_wise but not under row_wise: compare these
with care on narrow tables.</li>
"""


@dataclass(frozen=True)
class Experiment:
    """A scenario and what was found for it."""

    scenario: Scenario
    estimates: tuple[Estimate, ...]

    @property
    def counts(self) -> list[int]:
        """Numbers of ranks, ascending."""
        return sorted({estimate.world_size for estimate in self.estimates})

    @property
    def strategies(self) -> list[Strategy]:
        """Strategies, in their usual order."""
        tried = {estimate.strategy for estimate in self.estimates}
        return [strategy for strategy in STRATEGIES if strategy in tried]

    @property
    def noun(self) -> str:
        """What a rank is called."""
        return "GPU" if self.scenario.hardware.device == "cuda" else "rank"

    def ranks(self, count: int) -> str:
        """A number of ranks with their name."""
        return f"{count} {self.noun}" if count == 1 else f"{count} {self.noun}s"

    def of(self, strategy: str, count: int) -> Estimate:
        """The estimate of a strategy on a number of ranks."""
        return next(e for e in self.estimates if e.strategy == strategy and e.world_size == count)

    def fastest(self, count: int) -> Estimate | None:
        """The feasible estimate with the shortest step on a number of ranks."""
        feasible = [e for e in self.estimates if e.placed and e.world_size == count]
        return min(feasible, key=lambda e: e.step_ms, default=None)


def plan_file_name(estimate: Estimate) -> str:
    """Name of the file with the plan of an estimate."""
    return f"plan-{estimate.strategy}-{estimate.world_size}.json"


def milliseconds(value: float) -> str:
    """A time for a person."""
    if math.isinf(value):
        return "no plan"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def rate(value: float) -> str:
    """Impressions per second for a person."""
    return f"{value / 1e6:,.1f} M/s" if value >= 1e6 else f"{value / 1e3:,.0f} k/s"


def comparison(experiment: Experiment) -> str:
    """The estimates as plain text, a line each."""
    header: tuple[str, ...] = (
        experiment.noun + "s",
        "strategy",
        "step",
        "impressions",
        f"memory a {experiment.noun}",
        "imbalance",
        "tables",
    )
    lines: list[tuple[str, ...]] = [header]
    for count in experiment.counts:
        fastest = experiment.fastest(count)
        for strategy in experiment.strategies:
            estimate = experiment.of(strategy, count)
            mark = " *" if estimate is fastest else ""
            if estimate.placed is None:
                lines.append((str(count), strategy, "no plan", "", "", "", ""))
                continue
            placed = estimate.placed
            lines.append(
                (
                    str(count),
                    strategy + mark,
                    milliseconds(estimate.step_ms),
                    rate(estimate.impressions_per_second),
                    f"{gib(_fullest(estimate))} of {gib(estimate.capacity.total)}",
                    f"{placed.memory_imbalance:.2f} memory, {placed.time_imbalance:.2f} time",
                    _placements(placed),
                )
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(text)


def _placements(placed: Placed) -> str:
    return "; ".join(f"{number} {kind}" for kind, number in placed.placements.items())


def _fullest(estimate: Estimate) -> int:
    """Bytes in use on the fullest rank, the reserve not counted."""
    assert estimate.placed is not None
    return int(estimate.placed.table_bytes.sum(axis=0).max()) + estimate.capacity.towers


def write_report(experiment: Experiment, out: Path) -> None:
    """Writes `report.html` and `plots/*.png` into a folder that is there."""
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    images: dict[str, bytes] = {
        "step-by-strategy": _png(_heat_map(experiment)),
        "parts-of-a-step": _png(_parts_plot(experiment)),
    }
    if sum(experiment.fastest(count) is not None for count in experiment.counts) > 1:
        images["scaling"] = _png(_scaling_plot(experiment))
    for estimate in experiment.estimates:
        if estimate.placed is not None:
            name = f"ranks-{estimate.strategy}-{estimate.world_size}"
            images[name] = _png(_ranks_plot(estimate, experiment))
    for name, image in images.items():
        (plots / f"{name}.png").write_bytes(image)
    (out / "report.html").write_text(_page(experiment, images), encoding="utf-8")


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
    # Strategies often coincide: the first is drawn broadest, the last on top and thinnest.
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
    """Memory and time of every rank, stacked by table."""
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
    rows[-1].set_ylabel("ms a step")
    rows[-1].set_title(
        "Estimated time for the tables (the step waits for the highest)", loc="left", fontsize=11
    )
    rows[-1].set_xlabel(noun)
    rows[-1].set_xlim(-0.6, estimate.world_size - 0.4)
    if estimate.world_size <= 16:
        rows[-1].set_xticks(range(estimate.world_size))
    for axes in rows:
        # From the top of the stack down, as the bars are read.
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
    """Tables of one entry of the list, drawn as one."""

    label: str
    rows: list[int]
    colour: str


def _families(experiment: Experiment, placed: Placed) -> list[_Family]:
    """The families of the placed tables, each with the same colour in all panels."""
    named = {table.name: table.family or table.name for table in experiment.scenario.tables.tables}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(placed.names):
        rows.setdefault(named[name], []).append(row)
    measures = (placed.table_bytes, placed.table_host_bytes, placed.table_ms)

    def share(family: str) -> float:
        return max(v[rows[family]].sum() / v.sum() if v.any() else 0.0 for v in measures)

    # Beyond the colours that can be told apart, the small ones take turns with them, paler.
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
    """A colour half way to white."""
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{(channel + 255) // 2:02x}" for channel in channels)


def _stack(
    axes: Axes, families: Sequence[_Family], values: np.ndarray, *, start: float = 0.0
) -> None:
    """Bars of every rank, stacked by family: those with the most of these values by name."""
    x = np.arange(values.shape[1])
    width = 0.8 if len(x) <= 32 else 1.0
    base = np.zeros(len(x))
    if start:
        axes.bar(x, start, width, color=TOWERS_COLOUR, label="towers")
        base += start
    of_family = {family.label: values[family.rows].sum(axis=0) for family in families}
    held = [family for family in families if of_family[family.label].any()]
    held.sort(key=lambda family: -of_family[family.label].sum())
    named = held if len(held) <= TABLES_NAMED + 1 else held[:TABLES_NAMED]
    for family in named:
        amount = of_family[family.label]
        axes.bar(x, amount, width, bottom=base, color=family.colour, label=family.label)
        base += amount
    others = held[len(named) :]
    if others:
        rest = np.sum([of_family[family.label] for family in others], axis=0)
        label = f"{sum(len(family.rows) for family in others)} other tables"
        axes.bar(x, rest, width, bottom=base, color=OTHERS_COLOUR, label=label)


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


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.lead { font-size: 1.05rem; } .note { color: #666; font-size: .9rem; }
table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0; }
th, td { padding: .25rem .5rem; text-align: left; border-bottom: 1px solid #ddd;
         vertical-align: top; }
th { background: #f5f5f5; } td.n, th.n { text-align: right; }
td.n, td.w { white-space: nowrap; }
tr.best td { background: #eef7ee; font-weight: 600; } tr.misfit td { color: #888; }
.scroll { overflow-x: auto; } img { max-width: 100%; }
code { background: #f3f3f3; padding: .05rem .25rem; border-radius: 3px; }
pre { background: #f3f3f3; padding: .6rem; overflow-x: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""


def _page(experiment: Experiment, images: Mapping[str, bytes]) -> str:
    scenario = experiment.scenario
    noun = experiment.noun
    tables = scenario.tables
    sections = [
        "<h1>Sharding plans, estimated</h1>",
        f'<p class="lead">Where could {len(tables.tables)} embedding tables with '
        f"{tables.num_embeddings:,} rows ({gib(tables.nbytes)} of weights) be placed on "
        f"{_list(experiment.counts)} {noun}s of the kind <b>{_text(scenario.hardware.name)}</b>, "
        f"at {scenario.batch_size:,} impressions per {noun} and step?</p>",
        '<p class="note">Every time and every byte on this page is an <b>estimate</b>, made '
        "without any of these machines. Use it to rule plans out and to choose what to measure "
        "first, not as a promise.</p>",
        "<h2>Answer</h2>",
        _answer(experiment),
        _image(images, "step-by-strategy"),
        "<h2>Comparison</h2>",
        _comparison_table(experiment),
    ]
    misfits = [e for e in experiment.estimates if e.placed is None]
    if misfits:
        sections += ["<h2>Without a plan, and what would help</h2>", _misfit_table(misfits, noun)]
    sections += [
        "<h2>Where the time goes</h2>",
        _image(images, "parts-of-a-step"),
    ]
    if "scaling" in images:
        sections += ["<h2>Adding machines</h2>", _image(images, "scaling")]
    warned = list(
        dict.fromkeys(e.strategy for e in experiment.estimates if e.placed and e.placed.warnings)
    )
    if warned:
        sections.append(
            f"<h2>Mind</h2><p>{_text(_list(warned, 'and'))} cut tables into columns here, and "
            "rowwise_adagrad keeps one momentum per row and strip: the model trains slightly "
            "otherwise than uncut. adagrad does not have this effect.</p>"
        )
    sections += [
        f"<h2>{noun} by {noun}</h2>",
        f"<p>Memory and time of each {noun}, stacked by table, those of one <code>count</code> as "
        f"one; the {TABLES_NAMED} largest of each panel have their own colour. Even bars are good; "
        "the step takes as long as the highest.</p>",
    ]
    for count in experiment.counts:
        fastest = experiment.fastest(count)
        for strategy in experiment.strategies:
            estimate = experiment.of(strategy, count)
            if estimate.placed is None:
                continue
            opened = " open" if estimate is fastest else ""
            sections.append(
                f"<details{opened}><summary>{_text(strategy)}, {experiment.ranks(count)}: "
                f"{milliseconds(estimate.step_ms)}</summary>"
                f"{_image(images, f'ranks-{strategy}-{count}')}</details>"
            )
    words = {"rank": noun, "ranks": f"{noun}s", "width": scenario.column_width}
    sections += [
        "<h2>The strategies</h2><dl>",
        *(
            f"<dt><code>{_text(s)}</code></dt><dd>{_text(STRATEGY_TEXT[s].format(**words))}</dd>"
            for s in experiment.strategies
        ),
        "</dl>",
        "<h2>What the numbers contain</h2>",
        _assumptions(experiment),
        "<h2>The tables</h2>",
        _tables_table(experiment),
    ]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<title>Sharding plans, estimated</title>"
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _list(values: Iterable[object], last: str = "or") -> str:
    names = [str(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _image(images: Mapping[str, bytes], name: str) -> str:
    data = base64.b64encode(images[name]).decode()
    return f'<p><img alt="{_text(name)}" src="data:image/png;base64,{data}"></p>'


def _answer(experiment: Experiment) -> str:
    noun = experiment.noun
    items: list[str] = []
    for count in experiment.counts:
        fastest = experiment.fastest(count)
        if fastest is None:
            items.append(f"<li><b>{experiment.ranks(count)}</b>: nothing fits.</li>")
            continue
        assert fastest.placed is not None
        placed = fastest.placed
        items.append(
            f"<li><b>{experiment.ranks(count)}</b>: {_text(fastest.strategy)}, "
            f"{milliseconds(fastest.step_ms)} a step, "
            f"{rate(fastest.impressions_per_second)} impressions, the fullest {noun} holding "
            f"{gib(_fullest(fastest))} of {gib(fastest.capacity.total)} "
            f"({_text(_placements(placed))}): {_plan_link(fastest)}.</li>"
        )
    return (
        f"<ul>{''.join(items)}</ul><p>To train with a plan: <code>torchrun … -m esmm_torchrec "
        "train --data PREPARED --out RUN --plan PLAN</code>, on as many ranks as it is for.</p>"
    )


def _comparison_table(experiment: Experiment) -> str:
    noun = experiment.noun
    fetched = any(e.placed and e.placed.parts.prefetch > 0 for e in experiment.estimates)
    head = (
        f"<tr><th class=n>{noun}s</th><th>strategy</th><th class=n>step</th>"
        "<th class=n>impressions</th><th class=n>look-ups and<br>updates</th>"
        "<th class=n>traffic</th>"
        + ("<th class=n>prefetch</th>" if fetched else "")
        + f"<th class=n>towers</th><th class=n>fullest {noun}</th>"
        "<th class=n>imbalance of<br>memory / time</th><th>tables</th><th>plan</th></tr>"
    )
    rows: list[str] = []
    for count in experiment.counts:
        fastest = experiment.fastest(count)
        for strategy in experiment.strategies:
            estimate = experiment.of(strategy, count)
            name = f"<td class=n>{count}</td><td>{_text(strategy)}</td>"
            if estimate.placed is None:
                rows.append(
                    f"<tr class=misfit>{name}<td class=n>no plan</td><td colspan=9></td></tr>"
                )
                continue
            placed, parts = estimate.placed, estimate.placed.parts
            numbers = [
                parts.forward + parts.backward,
                parts.forward_comms + parts.backward_comms,
                *([parts.prefetch] if fetched else []),
                parts.towers + parts.towers_all_reduce,
            ]
            best = " class=best" if estimate is fastest else ""
            rows.append(
                f"<tr{best}>{name}<td class=n>{milliseconds(estimate.step_ms)}</td>"
                f"<td class=n>{rate(estimate.impressions_per_second)}</td>"
                + "".join(f"<td class=n>{value:.3g}</td>" for value in numbers)
                + f"<td class=n>{gib(_fullest(estimate))}</td>"
                f"<td class=n>{placed.memory_imbalance:.2f} / {placed.time_imbalance:.2f}</td>"
                f"<td class=w>{'<br>'.join(map(_text, _placements(placed).split('; ')))}</td>"
                f"<td>{_plan_link(estimate)}</td></tr>"
            )
    capacity = experiment.estimates[0].capacity
    return (
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
        f'<p class="note">Parts in ms on the slowest {noun}. Of {gib(capacity.total)} on a {noun}, '
        f"{gib(capacity.reserved)} are left to what nobody counts and {gib(capacity.towers)} are "
        "estimated for the towers. Imbalance: the highest over the mean; 1 is even. "
        "Highlighted: the shortest step for that number.</p>"
    )


def _plan_link(estimate: Estimate) -> str:
    name = _text(plan_file_name(estimate))
    return f'<a href="{name}"><code>{name.removesuffix(".json")}</code></a>'


def _misfit_table(misfits: Sequence[Estimate], noun: str) -> str:
    counts: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for e in misfits:
        counts.setdefault((e.strategy, e.reason or "", e.remedies), []).append(str(e.world_size))
    rows = "".join(
        f"<tr><td class=n>{', '.join(numbers)}</td><td>{_text(strategy)}</td>"
        f"<td>{_text(reason)}</td>"
        f"<td>{'<br>'.join(map(_text, remedies)) or 'nothing that was tried'}</td></tr>"
        for (strategy, reason, remedies), numbers in counts.items()
    )
    return (
        f'<div class="scroll"><table><tr><th class=n>{noun}s</th><th>strategy</th><th>why not</th>'
        f"<th>each of these alone would do (tried)</th></tr>{rows}</table></div>"
    )


def _assumptions(experiment: Experiment) -> str:
    scenario, noun = experiment.scenario, experiment.noun
    hardware = scenario.hardware
    towers = experiment.estimates[0].towers
    widths = "-".join(map(str, (scenario.tables.tower_width, *scenario.towers, 1)))
    numbers = [
        (f"memory of a {noun}", f"{hardware.memory_gib:,.0f} GiB"),
        (f"bandwidth of that memory for one {noun}", f"{hardware.memory_gb_s:,.0f} GB/s"),
        (f"from a {noun} to others of its host", f"{hardware.intra_host_gb_s:,.4g} GB/s"),
        (f"from a {noun} to other hosts", f"{hardware.inter_host_gb_s:,.4g} GB/s"),
        (f"{noun}s a host", str(hardware.ranks_per_host)),
        (
            "matrix products, float32 / bfloat16",
            f"{hardware.float32_tflops:,.4g} / {hardware.bfloat16_tflops:,.4g} TFLOP/s at peak",
        ),
        ("share of that peak for the towers", f"{hardware.tower_efficiency:.0%} (assumed)"),
    ]
    if hardware.device == "cuda":
        numbers[2:2] = [
            ("host memory for each GPU", f"{hardware.host_memory_gib:,.0f} GiB"),
            ("between GPU and host memory", f"{hardware.host_to_device_gb_s:,.0f} GB/s"),
        ]
    rows = "".join(f"<tr><td>{_text(k)}</td><td class=n>{_text(v)}</td></tr>" for k, v in numbers)
    sources = "".join(f"<li>{_text(source)}</li>" for source in hardware.sources)
    return f"""
<ul>
<li>Tables: TorchRec's planner. Memory is weights, the state of {_text(scenario.sparse_optimizer)},
for dense kernels the gradient, and one batch of ids and pooled embeddings. Time is bytes over
bandwidths.</li>
<li>Towers: the planner does not count them. Two of {_text(widths)} in
{_text(scenario.tower_dtype)} ({towers.parameters:,} parameters) are replicated on every {noun}:
{milliseconds(towers.compute_ms)} a step and {gib(towers.memory_bytes)}, estimated beside it and
added.</li>
<li>Nothing overlaps: parts are added up, although a good pipeline hides some behind others. Sending
ids to the tables is not in the sum, since TorchRec's pipeline does it during the step before.</li>
<li>Latencies of kernels and collectives are left out. Steps far below a millisecond per table
group, and small messages among many {noun}s, will take longer than said here.</li>
<li>Ids are taken as spread evenly over rows, bags as long as their mean.</li>
{NARROW_TABLES if hardware.device == "cuda" else ""}</ul>
<table><tr><th colspan=2>{_text(hardware.name)}</th></tr>{rows}</table>
<p class="note">Sources of these numbers (peaks, one direction):</p><ul class="note">{sources}</ul>
<p>To check an estimate where you have machines: <code>torchrun … benchmarks/sharding.py</code>
measures what was estimated and can write the measured bandwidths as a file for
<code>--hardware</code>.</p>"""


def _tables_table(experiment: Experiment) -> str:
    tables = sorted(experiment.scenario.tables.tables, key=lambda table: -table.nbytes)
    shown = tables[:50]
    rows = "".join(
        f"<tr><td>{_text(t.name)}</td><td class=n>{t.num_embeddings:,}</td>"
        f"<td class=n>{t.embedding_dim}</td><td class=n>{gib(t.nbytes)}</td>"
        f"<td>{_text(t.data_type)}</td><td class=n>{len(t.features)}</td>"
        f"<td class=n>{sum(f.pooling_factor for f in t.features):,.4g}</td>"
        f"<td class=n>{t.shared_by:,.4g}</td></tr>"
        for t in shown
    )
    rest = "" if len(shown) == len(tables) else f"<p>… and {len(tables) - len(shown)} more.</p>"
    return (
        '<div class="scroll"><table><tr><th>table</th><th class=n>rows</th><th class=n>columns</th>'
        "<th class=n>weights</th><th>type</th><th class=n>features</th>"
        "<th class=n>ids per impression</th><th class=n>impressions<br>that share a bag</th></tr>"
        f"{rows}</table></div>{rest}"
    )
