"""Results of a comparison for readers: report.html, table.csv, table.md and plots/."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from esmm_torchrec.cli.terminal import aligned
from esmm_torchrec.comparison import tables
from esmm_torchrec.comparison.options import rounds_of
from esmm_torchrec.comparison.plots import draw_plots
from esmm_torchrec.comparison.results import DIFFERENCES
from esmm_torchrec.comparison.verdicts import regime, verdicts
from esmm_torchrec.models.methods import METHODS

Results = Mapping[str, Any]

_ON_A_TERMINAL = ("cvr_auc", "ctcvr_auc_common_ctr", "cvr_auc_entire_space")
"""Figures whose verdicts are printed."""

_SPACES = ("entire_space", "clicked", "unclicked")


def write_report(results: Results, out: Path) -> None:
    """Writes report.html, table.csv, table.md and plots/ to `out`."""
    captions = draw_plots(results, out / "plots")
    (out / "table.csv").write_text(tables.csv_table(results))
    (out / "table.md").write_text(tables.markdown_table(results) + "\n")
    (out / "report.html").write_text(_page(results, out / "plots", captions), encoding="utf-8")


def format_table(results: Results) -> str:
    """Formats the headline table and the verdicts for a terminal."""
    lines = [*aligned(tables.headline_rows(results, truth=False)), "", regime(results)]
    lines += verdicts(results, _ON_A_TERMINAL)
    lines += ["", "To train each with what was chosen for it:"]
    lines += [f"  {command}" for command in results["train_commands"].values()]
    if results["protocol"]["seeds"] == 1:
        lines.append("One seed gives no interval and no verdict; use --seeds 5 for them.")
    return "\n".join(lines)


def _page(results: Results, plots: Path, captions: Mapping[str, str]) -> str:
    environment = Environment(
        loader=PackageLoader("esmm_torchrec.comparison"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    largest = tables.largest_fraction(results)
    summaries = {method.title: method.summary for method in METHODS.values()}
    division = results["methods"].get("DIVISION")
    return environment.get_template("report.html.jinja").render(
        tables=tables,
        results=results,
        regime=regime(results),
        verdicts=verdicts(results),
        differences={
            tables.TITLES[metric]: rows
            for metric in DIFFERENCES
            if len(rows := tables.difference_rows(results, metric, largest)) > 1
        },
        pictures={name: _inline(plots / name, caption) for name, caption in captions.items()},
        one_data_set="data" in results["source"],
        ranking_metrics=(
            "cvr_auc_entire_space",
            "cvr_auc_entire_space_within_ctr_strata",
            "cvr_excess_log_loss_entire_space",
        ),
        pcoc_metrics=[f"cvr_pcoc_{space}" for space in _SPACES],
        calibration_metrics=[f"cvr_{of}_{space}" for of in ("ne", "ece") for space in _SPACES],
        above_one=_share(division[largest]["cvr_share_above_one"]) if division else None,
        summaries={name: summaries[name] for name in results["methods"] if name in summaries},
        rule=_rule(results),
    )


def _inline(path: Path, caption: str) -> Markup:
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup(
        '<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        "<figcaption>{caption}</figcaption></figure>"
    ).format(caption=caption, data=data)


def _share(figure: Mapping[str, Any]) -> str:
    """Formats a share of test impressions; small ones in scientific notation."""
    if not figure["mean"]:
        return "for no test impression"
    form = ".2e" if figure["mean"] < 1e-3 else ".4f"
    spread = "" if figure["std"] is None else f" ± {figure['std']:{form}}"
    return f"for a share of {figure['mean']:{form}}{spread} of the test impressions"


def _rule(results: Results) -> str:
    protocol = results["protocol"]
    rounds = rounds_of(protocol["trials"], protocol["epochs"])
    apart = " in a world of its own" if "world" in results["source"] else ""
    shared = ", and shared by all worlds" if "world" in results["source"] else ""
    first, *last = rounds
    return (
        f"{protocol['validation_share']:.0%} of the training users (drawn by hash) are held out. "
        f"Every method gets {protocol['trials']} trials from one list of settings; a method with "
        "options of its own goes through their values in the same trials. "
        + (
            f"In a first round each trains for one pass on {first.share:.1%} of the other users, "
            f"with {first.updates:.0%} of the updates; "
            f"the best {last[0].trials} then train on {last[0].share:.0%} of them and are measured "
            f"after each of {last[0].epochs} passes over the method’s own training rows. "
            if last
            else f"Each is measured after each of {first.epochs} passes over the method’s own "
            "training rows. "
        )
        + "A pass takes the same number of optimiser updates for every method and every "
        f"fraction: that of batches of {protocol['batch_size']:,} over all training "
        "impressions; fewer rows make smaller batches. The trial and the number of passes with "
        "the best mean of CVR AUC on clicks and CTCVR AUC with the common click network (for the "
        f"click network itself: CTR AUC) are chosen once, with one seed{apart}{shared}. "
        "Intervals over seeds therefore do not capture the variance of this "
        "choice, and a method’s own pCTR was not tuned for. Every method is then retrained with "
        "what was chosen, on all training users or a fraction of them, for each seed, and only "
        "these models score the test split. Ids too rare in a fraction are unknown to every method."
    )
