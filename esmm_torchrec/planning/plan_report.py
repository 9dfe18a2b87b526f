"""report.html of an experiment with sharding plans: one self-contained page.

Its readers decide which hardware to rent and have not seen the code. It states the question, the
plans that fit, the time of a step, why other plans do not fit, and what the numbers leave out.
"""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from esmm_torchrec.planning.experiment import (
    Experiment,
    milliseconds,
    placements,
    rate,
)
from esmm_torchrec.planning.plan_plots import TABLES_NAMED, draw_plots, ranks_plot_name
from esmm_torchrec.sharding.search import gib

MAX_TABLES_LISTED = 50

STRATEGY_TEXT = {
    "auto": "TorchRec's planner chooses for each table: table_wise, row_wise, or on several hosts "
    "table_row_wise.",
    "table_wise": "Each table whole on one {rank}. Least traffic; a large table must fit one "
    "{rank}, and a busy one makes its {rank} the slowest.",
    "row_wise": "Each table's rows spread over all {ranks}. Even memory; every {rank} sends "
    "partial sums for every impression, so traffic grows with the number of {ranks}.",
    "column_wise": "Each table's columns spread over some {ranks}, in shards of at least "
    "{width} columns; narrower tables stay whole. With row-wise Adagrad it trains slightly "
    "differently.",
    "table_row_wise": "Each table on one host, its rows spread over that host's {ranks}: partial "
    "sums stay inside the host. On a single host the same as row_wise.",
    "grid_shard": "Columns spread over hosts, rows over the {ranks} of each: for tables too large "
    "for one host.",
    "data_parallel": "A copy of each table on every {rank}, gradients all-reduced: for small "
    "tables only, and not with a fused optimiser.",
}


def write_report(experiment: Experiment, out: Path) -> None:
    """Writes `report.html` and `plots/*.png` into an existing folder."""
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    images = draw_plots(experiment)
    for name, image in images.items():
        (plots / f"{name}.png").write_bytes(image)
    (out / "report.html").write_text(_page(experiment, images), encoding="utf-8")


def _page(experiment: Experiment, images: dict[str, bytes]) -> str:
    environment = Environment(
        loader=PackageLoader("esmm_torchrec.planning"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    placed = [e for e in experiment.estimates if e.placed]
    return environment.get_template("plans.html.jinja").render(
        experiment=experiment,
        tables=sorted(experiment.scenario.tables.tables, key=lambda table: -table.nbytes),
        images={name: base64.b64encode(image).decode() for name, image in images.items()},
        prefetched=any(e.placed and e.placed.parts.prefetch > 0 for e in placed),
        cut_strategies=dict.fromkeys(e.strategy for e in placed if e.placed and e.placed.warnings),
        hardware_rows=_hardware_rows(experiment),
        strategy_text=STRATEGY_TEXT,
        max_tables=MAX_TABLES_LISTED,
        tables_named=TABLES_NAMED,
        gib=gib,
        milliseconds=milliseconds,
        placements=placements,
        ranks_plot_name=ranks_plot_name,
        rate=rate,
    )


def _hardware_rows(experiment: Experiment) -> list[tuple[str, str]]:
    hardware, noun = experiment.scenario.hardware, experiment.noun
    rows = [
        (f"memory of a {noun}", f"{hardware.memory_gib:,.0f} GiB"),
        (f"bandwidth of that memory for one {noun}", f"{hardware.memory_gb_s:,.0f} GB/s"),
        (f"from a {noun} to others of its host", f"{hardware.intra_host_gb_s:,.4g} GB/s"),
        (f"from a {noun} to other hosts", f"{hardware.inter_host_gb_s:,.4g} GB/s"),
        (f"{noun}s per host", str(hardware.ranks_per_host)),
        (
            "matrix products, float32 / bfloat16",
            f"{hardware.float32_tflops:,.4g} / {hardware.bfloat16_tflops:,.4g} TFLOP/s at peak",
        ),
        ("share of that peak for the towers", f"{hardware.tower_efficiency:.0%} (assumed)"),
    ]
    if hardware.device == "cuda":
        rows[2:2] = [
            ("host memory per GPU", f"{hardware.host_memory_gib:,.0f} GiB"),
            ("between GPU and host memory", f"{hardware.host_to_device_gb_s:,.0f} GB/s"),
        ]
    return rows
