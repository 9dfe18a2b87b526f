"""The results of a comparison for a person: one HTML page, a table as CSV and Markdown, plots."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esmm_torchrec.models.methods import METHODS
from esmm_torchrec.training.comparison_plots import draw_plots
from esmm_torchrec.training.comparison_results import BASELINES, fraction_key

PAPER = {
    "BASE": ((66.00, 0.37), (62.07, 0.45)),
    "AMAN": ((65.21, 0.59), (63.53, 0.57)),
    "OVERSAMPLING": ((67.18, 0.32), (63.05, 0.48)),
    "UNBIAS": ((66.65, 0.28), (63.56, 0.70)),
    "DIVISION": ((67.56, 0.48), (63.62, 0.09)),
    "ESMM-NS": ((68.25, 0.44), (64.44, 0.62)),
    "ESMM": ((68.56, 0.37), (65.32, 0.49)),
}
"""CVR and CTCVR AUC in % on the paper's Public data set (Ma et al., SIGIR 2018, table 2)."""

Results = Mapping[str, Any]
Rows = list[list[str]]

_TITLES = {
    "cvr_auc": "CVR AUC on clicks",
    "ctcvr_auc_common_ctr": "CTCVR AUC",
    "ctcvr_auc": "CTCVR AUC, own pCTR",
    "ctr_auc": "CTR AUC",
    "cvr_auc_entire_space": "CVR AUC, entire space",
    "cvr_auc_entire_space_within_ctr_strata": "the same within pCTR strata",
    "cvr_excess_log_loss_entire_space": "excess log loss, entire space",
    "cvr_pcoc_entire_space": "PCOC, all",
    "cvr_pcoc_clicked": "PCOC, clicked",
    "cvr_pcoc_unclicked": "PCOC, unclicked",
    "cvr_pcoc": "PCOC on clicks",
    "cvr_ne": "CVR NE on clicks",
    "cvr_ece": "CVR ECE on clicks",
    "cvr_ece_entire_space": "CVR ECE, entire space",
    "cvr_share_above_one": "pCVR above 1",
}


def write_report(results: Results, out: Path) -> None:
    """Writes report.html, table.csv, table.md and plots/ below `out`."""
    captions = draw_plots(results, out / "plots")
    (out / "table.csv").write_text(csv_table(results))
    (out / "table.md").write_text(markdown_table(results) + "\n")
    (out / "report.html").write_text(_page(results, out / "plots", captions), encoding="utf-8")


def _largest(results: Results) -> str:
    return fraction_key(results["protocol"]["fractions"][-1])


def _figure(
    results: Results, name: str, metric: str, *, digits: int = 4, factor: float = 1.0
) -> str:
    figure = results["methods"][name][_largest(results)].get(metric)
    return _mean_std(figure, digits=digits, factor=factor)


def _mean_std(figure: Mapping[str, Any] | None, *, digits: int = 4, factor: float = 1.0) -> str:
    if figure is None or figure["mean"] is None:
        return "–"
    text = f"{figure['mean'] * factor:.{digits}f}"
    return text if figure["std"] is None else f"{text} ± {figure['std'] * factor:.{digits}f}"


def _paper(name: str, column: int) -> str:
    if name not in PAPER:
        return "–"
    mean, std = PAPER[name][column]
    return f"{mean:.2f} ± {std:.2f}"


def headline_rows(results: Results) -> Rows:
    """The paper's table: CVR and CTCVR AUC in %, beside those of the paper."""
    rows = [
        [
            "method",
            "CVR AUC %",
            "CTCVR AUC %",
            "CTCVR AUC %, own pCTR",
            "paper: CVR AUC %",
            "paper: CTCVR AUC %",
        ]
    ]
    for name in results["methods"]:
        ours = [
            _figure(results, name, metric, digits=2, factor=100)
            for metric in ("cvr_auc", "ctcvr_auc_common_ctr", "ctcvr_auc")
        ]
        rows.append([name, *ours, _paper(name, 0), _paper(name, 1)])
    return rows


def reference_rows(results: Results) -> Rows:
    """What is no method: other probabilities used as the conversion score, and the oracle."""
    rows = [
        ["used as the conversion score", "CVR AUC on clicks", "entire space", "within pCTR strata"]
    ]
    wanted = ("cvr_auc", "cvr_auc_entire_space", "cvr_auc_entire_space_within_ctr_strata")
    for name, metrics in results["references"][_largest(results)].items():
        label = f"{name} (the oracle)" if name == "true pCVR" else name
        label = f"{label} of the common network" if name == "pCTR" else label
        rows.append([label, *(_mean_std(metrics.get(metric)) for metric in wanted)])
    return rows


def difference_rows(results: Results, metric: str, fraction: str) -> Rows:
    """Each method minus each baseline, with the interval and what Holm's correction leaves."""
    of_metric = results["differences"][fraction].get(metric, {})
    users = any("low_users" in row for rows in of_metric.values() for row in rows.values())
    rows = [["method", "minus", "difference", "95 % interval", "p, Holm"]]
    rows[0] += ["95 % over users", "p over users, Holm"] if users else []
    rows[0] += [""]
    for baseline in BASELINES:
        for name, row in of_metric.get(baseline, {}).items():
            line = [name, baseline, _signed(row["mean"])]
            line.append(
                "–" if row["low"] is None else f"{_signed(row['low'])} to {_signed(row['high'])}"
            )
            line.append("–" if row["p_value_holm"] is None else f"{row['p_value_holm']:.3f}")
            if users:
                resampled = "low_users" in row
                line.append(
                    f"{_signed(row['low_users'])} to {_signed(row['high_users'])}"
                    if resampled
                    else "–"
                )
                line.append(f"{row['p_value_users_holm']:.3f}" if resampled else "–")
            rows.append([*line, _verdict(row)])
    return rows


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _verdict(row: Mapping[str, Any]) -> str:
    if row["within_noise"] is None:
        return "no verdict"
    if row["within_noise"]:
        return "within the noise"
    return "higher" if row["mean"] > 0 else "lower"


def format_table(results: Results) -> str:
    """The headline for a terminal."""
    rows = headline_rows(results)
    text = _aligned(rows)
    seeds = results["protocol"]["seeds"]
    lines = [text, "", *findings(results)]
    if seeds == 1:
        lines.append("One seed: no interval; give --seeds 5 for one.")
    return "\n".join(lines)


def findings(results: Results) -> list[str]:
    """What the differences from BASE and from ESMM say, a sentence each."""
    sentences = []
    of_fraction = results["differences"][_largest(results)]
    for metric in ("cvr_auc", "ctcvr_auc_common_ctr", "cvr_auc_entire_space"):
        for baseline, rows in of_fraction.get(metric, {}).items():
            groups: dict[str, list[str]] = {"higher": [], "lower": [], "within the noise": []}
            for name, row in rows.items():
                verdict = _verdict(row)
                if verdict in groups:
                    shown = name
                    if verdict != "within the noise":
                        shown += f" ({_signed(row['mean'])})"
                    groups[verdict].append(shown)
            parts = [f"{verdict}: {', '.join(names)}" for verdict, names in groups.items() if names]
            if parts:
                sentences.append(f"{_TITLES[metric]}, against {baseline} – {'; '.join(parts)}.")
    return sentences


def _aligned(rows: Rows) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    )


def csv_table(results: Results) -> str:
    """Every figure of every method and fraction: method, fraction, metric, mean, std, runs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = range(results["protocol"]["seeds"])
    writer.writerow(["method", "fraction", "metric", "mean", "std", *(f"seed_{n}" for n in seeds)])
    for name, fractions in results["methods"].items():
        for fraction, metrics in fractions.items():
            for metric, figure in metrics.items():
                values = [figure["mean"], figure["std"], *figure["runs"]]
                writer.writerow(
                    [name, fraction, metric, *("" if value is None else value for value in values)]
                )
    return text.getvalue()


def markdown_table(results: Results) -> str:
    """The headline table and the differences, as Markdown."""
    parts = [_markdown(headline_rows(results)), f"{_data_sentence(results)} {_PAPER_SENTENCE}"]
    for metric in ("cvr_auc", "ctcvr_auc_common_ctr"):
        rows = difference_rows(results, metric, _largest(results))
        if rows[1:]:
            parts += [f"{_TITLES[metric]}, paired differences:", _markdown(rows)]
    return "\n\n".join(parts)


def _markdown(rows: Rows) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


_PAPER_SENTENCE = (
    "The paper’s columns are from another data set (its Public one, a 1 % sample of Taobao’s "
    "logs): compare the order of methods and their distances, not the levels."
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e3e3;
         white-space: nowrap; }
th { border-bottom: 2px solid #999; font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.noise { color: #777; } figure { margin: 1rem 0; } img { max-width: 100%; }
figcaption, .note { color: #555; font-size: .92rem; } div.wide { overflow-x: auto; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
"""


def _page(results: Results, plots: Path, captions: Mapping[str, str]) -> str:
    largest = _largest(results)
    parts = [
        "<h1>Conversion methods compared</h1>",
        _paragraph(_data_sentence(results)),
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in findings(results)) + "</ul>",
    ]
    if results["protocol"]["seeds"] == 1:
        parts.append(_paragraph("One seed: no interval can be given.", note=True))
    parts += [
        "<h2>The table of the paper</h2>",
        _table(headline_rows(results)),
        _paragraph(
            "AUC counts ties one half. CVR AUC is over clicked test impressions. CTCVR AUC is over "
            "all of them, scored by pCTR · pCVR with pCTR from one click network for every method, "
            "as in the paper; “own pCTR” uses the method’s own where it has one. Mean ± standard "
            f"deviation over {results['protocol']['seeds']} seeds. {_PAPER_SENTENCE}",
            note=True,
        ),
        _picture(plots, captions, "runs.png"),
        "<h2>Differences, and which of them are noise</h2>",
    ]
    for metric in ("cvr_auc", "ctcvr_auc_common_ctr", "cvr_auc_entire_space"):
        rows = difference_rows(results, metric, largest)
        if rows[1:]:
            parts += [f"<h3>{_TITLES[metric]}</h3>", _table(rows)]
    parts.append(
        _paragraph(
            "Runs with one seed share data and are compared in pairs (Student’s t). p is corrected "
            "by Holm’s method for the number of methods compared with that baseline; above .05 a "
            "difference counts as noise."
            + (
                " “Over users” resamples the test half’s users: all seeds share one data set, and "
                "a difference must stand on both sides."
                if "data" in results["source"]
                else ""
            ),
            note=True,
        )
    )
    if "volume.png" in captions:
        parts += ["<h2>Volume of training data</h2>", _picture(plots, captions, "volume.png")]
    parts += ["<h2>Calibration</h2>", _picture(plots, captions, "calibration.png")]
    parts.append(_metrics_table(results, ("cvr_pcoc", "cvr_ne", "cvr_ece")))
    parts += _truth(results, plots, captions)
    parts += [
        "<h2>What else could be the conversion score</h2>",
        _table(reference_rows(results)),
        _paragraph(
            "Where clicks and conversions go together, knowing pCTR alone ranks conversions: a "
            "method that drifts towards pCTCVR gains entire-space AUC that way, which AUC within "
            "strata of pCTR does not reward.",
            note=True,
        ),
        "<h2>What each method trained on</h2>",
        _training_table(results),
        _unseen(results),
        "<h2>Settings</h2>",
        _tuning_table(results),
        _paragraph(_rule(results), note=True),
        "<h2>How this was made</h2>",
        _details(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<title>Conversion methods compared</title>"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _data_sentence(results: Results) -> str:
    anyone = next(iter(results["methods"].values()))[_largest(results)]
    counts = {name: anyone[name]["mean"] for name in ("impressions", "clicks", "conversions")}
    rows = max(of[_largest(results)]["training_rows"] for of in results["training"].values())
    protocol = results["protocol"]
    if "world" in results["source"]:
        world = results["source"]["world"]
        where = (
            f"{protocol['seeds']} generated worlds, one a seed (correlation of the tastes for "
            f"clicking and converting {world['correlation']:g}, hidden confounding "
            f"{world['confounding']:g})"
        )
    else:
        where = f"{protocol['seeds']} seeds on {Path(results['source']['data']).name}"
    return (
        f"{where}: {rows:,.0f} training impressions; tested on {counts['impressions']:,.0f} "
        f"impressions with {counts['clicks']:,.0f} clicks and {counts['conversions']:,.0f} "
        f"conversions. Embeddings of {protocol['embedding_dim']}, towers of "
        f"{'–'.join(map(str, protocol['tower']))}."
    )


def _truth(results: Results, plots: Path, captions: Mapping[str, str]) -> list[str]:
    if "entire-space.png" not in captions:
        return [
            "<h2>Against the truth</h2>",
            _paragraph(
                "The data set has no columns true_ctr and true_cvr, so nothing can be said of the "
                "impressions that were not clicked.",
                note=True,
            ),
        ]
    ranking = (
        "cvr_auc_entire_space",
        "cvr_auc_entire_space_within_ctr_strata",
        "cvr_excess_log_loss_entire_space",
    )
    fit = (
        "cvr_pcoc_entire_space",
        "cvr_pcoc_clicked",
        "cvr_pcoc_unclicked",
        "cvr_ece_entire_space",
    )
    parts = [
        "<h2>Against the truth, over the entire space</h2>",
        _picture(plots, captions, "entire-space.png"),
        _metrics_table(results, ranking),
        _metrics_table(results, fit),
        _paragraph(
            "The generator knows the conversion rate of every impression, clicked or not. AUC with "
            "the true rate as a soft label has no label noise. Excess log loss is what is lost "
            "against the true rate. PCOC is Σ predicted / Σ true.",
            note=True,
        ),
    ]
    if "division.png" in captions:
        parts += ["<h2>Why not division</h2>", _picture(plots, captions, "division.png")]
        share = results["methods"]["DIVISION"][_largest(results)].get("cvr_share_above_one")
        parts.append(
            _paragraph(f"Share of test impressions with pCTCVR above pCTR: {_mean_std(share)}.")
        )
    return parts


def _metrics_table(results: Results, metrics: Sequence[str]) -> str:
    known = [
        metric
        for metric in metrics
        if any(metric in of[_largest(results)] for of in results["methods"].values())
    ]
    rows = [["method", *(_TITLES[metric] for metric in known)]]
    for name in results["methods"]:
        rows.append([name, *(_figure(results, name, metric) for metric in known)])
    return _table(rows)


_TRAINING_COLUMNS = (
    "training_rows",
    "batch_size",
    "updates_per_pass",
    "passes",
    "unknown_share",
    "train_seconds",
    "seconds",
)


def _training_table(results: Results) -> str:
    notes = list(
        dict.fromkeys(
            note
            for of in results["training"].values()
            for note in of[_largest(results)]
            if note not in _TRAINING_COLUMNS
        )
    )
    rows = [
        [
            "method",
            "rows",
            "rows an update",
            "updates a pass",
            "passes",
            "test ids unknown to it",
            *(n.replace("_", " ") for n in notes),
            "training",
        ]
    ]
    for name, of in results["training"].items():
        figures = of[_largest(results)]
        rows.append(
            [
                name,
                *(
                    f"{figures[column]:,.0f}"
                    for column in ("training_rows", "batch_size", "updates_per_pass", "passes")
                ),
                f"{figures['unknown_share']:.2%}",
                *(f"{figures[note]:,.4g}" if note in figures else "–" for note in notes),
                f"{figures['train_seconds']:.1f} s",
            ]
        )
    summaries = {method.name: method.summary for method in METHODS.values()}
    described = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(summaries[name])}</li>"
        for name in results["methods"]
        if name in summaries
    )
    return _table(rows) + f"<ul>{described}</ul>"


def _unseen(results: Results) -> str:
    largest = _largest(results)
    wanted = ("cvr_auc", "ctcvr_auc_common_ctr", "cvr_auc_entire_space")
    rows = [["method", *(f"{_TITLES[m]}: {how}" for m in wanted for how in ("unknown", "random"))]]
    for name, of in results["random_unseen_ids"].items():
        if of[largest]:
            cells = []
            for metric in wanted:
                cells += [
                    _mean_std(results["methods"][name][largest].get(metric)),
                    _mean_std(of[largest].get(metric)),
                ]
            rows.append([name, *cells])
    if not rows[1:]:
        return ""
    return (
        "<h3>Ids a method never saw</h3>"
        + _table(rows)
        + _paragraph(
            "A method that trains on few rows never trains the embeddings of the other ids. They "
            "count as the unknown id for it (left), which the tables of this page show; left at "
            "their random start (right) they would handicap it for the wrong reason.",
            note=True,
        )
    )


def _tuning_table(results: Results) -> str:
    rows = [
        [
            "method",
            "trials",
            "tables’ rate",
            "towers’ rate",
            "towers’ weight decay",
            "own rate",
            "passes",
            "score",
        ]
    ]
    names = {method.name: method for method in METHODS.values()}
    for name, tuning in results["tuning"].items():
        chosen = tuning["chosen"]
        trials = len(
            {
                tuple(v for k, v in t.items() if k not in ("epochs", "score"))
                for t in tuning["tried"]
            }
        )
        rate = "–"
        if chosen["rate"] is not None:
            rate = f"{chosen['rate']:g} ({names[name].rate_name})"
        rows.append(
            [
                name,
                str(trials),
                f"{chosen['sparse_lr']:g}",
                f"{chosen['dense_lr']:g}",
                f"{chosen['weight_decay']:g}",
                rate,
                str(chosen["epochs"]),
                f"{chosen['score']:.4f}",
            ]
        )
    return _table(rows)


def _rule(results: Results) -> str:
    protocol = results["protocol"]
    apart = " in a world of its own" if "world" in results["source"] else ""
    return (
        f"The rule: {protocol['validation_share']:.0%} of the training users (drawn by hash) are "
        f"held out; every method gets {protocol['trials']} trials from one list of settings, a "
        "method with a rate of its own going through its rates at the same time; each trial is "
        f"measured after each of {protocol['epochs']} passes over the method’s own training rows. "
        "Chosen is the best mean of CVR AUC on clicks and CTCVR AUC with the common click network "
        f"(the click network itself: CTR AUC), once, with one seed{apart}, at full volume. Every "
        "method is then retrained with it on all training users, or a part of them, for each seed, "
        "and the test half is scored by these models alone. Where a part of the users is taken, "
        "ids too rare in it are unknown for every method."
    )


def _details(results: Results) -> str:
    rows: Rows = [["", ""]]
    rows.append(["command", results["command"]])
    for part in ("source", "protocol", "environment"):
        for name, value in results[part].items():
            items = value.items() if isinstance(value, dict) else [(name, value)]
            for key, item in items:
                shown = ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)
                rows.append([f"{part}: {key.replace('_', ' ')}", shown])
    seconds = sum(
        figures["seconds"] * results["protocol"]["seeds"]
        for of in results["training"].values()
        for figures in of.values()
    )
    rows.append(["trainings and scoring after tuning", f"{seconds / 60:.1f} minutes"])
    return _table(rows, heading=False)


def _paragraph(text: str, *, note: bool = False) -> str:
    return f"<p{' class=note' if note else ''}>{html.escape(text)}</p>"


def _table(rows: Rows, *, heading: bool = True) -> str:
    head, *body = rows
    lines = ['<div class="wide"><table>']
    if heading:
        lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
    for row in body:
        quiet = ' class="noise"' if row[-1] == "within the noise" else ""
        lines.append(
            "<tr>" + "".join(f"<td{quiet}>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        )
    return "\n".join([*lines, "</table></div>"])


def _picture(plots: Path, captions: Mapping[str, str], name: str) -> str:
    data = base64.b64encode((plots / name).read_bytes()).decode()
    caption = html.escape(captions[name])
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
