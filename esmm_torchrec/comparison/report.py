"""The results of a comparison for a person: one HTML page, a table as CSV and Markdown, plots."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esmm_torchrec.comparison.plots import draw_plots
from esmm_torchrec.comparison.results import (
    BASELINES,
    DIFFERENCES,
    TRAINING_FIGURES,
    fraction_key,
)
from esmm_torchrec.models.methods import METHODS
from esmm_torchrec.training.table import aligned

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
    "cvr_auc_entire_space_within_ctr_strata": "CVR AUC, entire space, within pCTR strata",
    "cvr_excess_log_loss_entire_space": "excess log loss of pCVR, entire space",
    "cvr_pcoc_entire_space": "PCOC, all",
    "cvr_pcoc_clicked": "PCOC, clicked",
    "cvr_pcoc_unclicked": "PCOC, unclicked",
    "cvr_pcoc": "PCOC on clicks",
    "cvr_ne": "CVR NE on clicks",
    "cvr_ece": "CVR ECE on clicks",
    "cvr_ne_entire_space": "NE, all",
    "cvr_ne_clicked": "NE, clicked",
    "cvr_ne_unclicked": "NE, unclicked",
    "cvr_ece_entire_space": "ECE, all",
    "cvr_ece_clicked": "ECE, clicked",
    "cvr_ece_unclicked": "ECE, unclicked",
}

LOWER_IS_BETTER = frozenset({"cvr_excess_log_loss_entire_space"})
"""Of the figures whose differences are given."""

_FIRST = ("cvr_auc", "ctcvr_auc_common_ctr", "cvr_auc_entire_space")
"""What a terminal says of differences."""


def write_report(results: Results, out: Path) -> None:
    """Writes report.html, table.csv, table.md and plots/ below `out`."""
    captions = draw_plots(results, out / "plots")
    (out / "table.csv").write_text(csv_table(results))
    (out / "table.md").write_text(markdown_table(results) + "\n")
    (out / "report.html").write_text(_page(results, out / "plots", captions), encoding="utf-8")


def _largest(results: Results) -> str:
    return fraction_key(results["protocol"]["fractions"][-1])


def _title(metric: str) -> str:
    lower = " (lower is better)" if metric in LOWER_IS_BETTER else ""
    return f"{_TITLES[metric]}{lower}"


def _fractions(results: Results) -> list[str]:
    """The largest first."""
    return [fraction_key(fraction) for fraction in reversed(results["protocol"]["fractions"])]


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


def headline_rows(results: Results, *, truth: bool = True) -> Rows:
    """The paper's table: CVR and CTCVR AUC in %, beside those of the paper; with `truth`, and
    where it is known, what it says of the entire space."""
    columns = [
        ("cvr_auc", "CVR AUC %", 100),
        ("ctcvr_auc_common_ctr", "CTCVR AUC %", 100),
        ("ctcvr_auc", "CTCVR AUC %, own pCTR", 100),
    ]
    if truth and _knows_truth(results):
        columns += [
            ("cvr_auc_entire_space", "entire-space CVR AUC %", 100),
            ("cvr_auc_entire_space_within_ctr_strata", "the same within pCTR strata", 100),
            ("cvr_excess_log_loss_entire_space", "excess log loss, 10⁻³ nats", 1000),
        ]
    rows = [["method", *(title for _, title, _ in columns)]]
    rows[0] += ["paper: CVR AUC %", "paper: CTCVR AUC %"]
    for name in results["methods"]:
        ours = [
            _figure(results, name, metric, digits=2, factor=factor) for metric, _, factor in columns
        ]
        rows.append([name, *ours, _paper(name, 0), _paper(name, 1)])
    return rows


def _knows_truth(results: Results) -> bool:
    return any(
        "cvr_auc_entire_space" in of[_largest(results)] for of in results["methods"].values()
    )


def reference_rows(results: Results) -> Rows:
    """What is no method: other probabilities used as the conversion score, and the oracle."""
    rows = [
        ["used as the conversion score", "CVR AUC on clicks", "entire space", "within pCTR strata"]
    ]
    wanted = ("cvr_auc", "cvr_auc_entire_space", "cvr_auc_entire_space_within_ctr_strata")
    for name, metrics in results["references"][_largest(results)].items():
        rows.append(
            [_reference_label(name), *(_mean_std(metrics.get(metric)) for metric in wanted)]
        )
    return rows


def _reference_label(name: str) -> str:
    named = {"true pCVR": "true pCVR (the oracle)", "pCTR": "pCTR of the common click network"}
    return named.get(name, name)


def difference_rows(results: Results, metric: str, fractions: Sequence[str]) -> Rows:
    """Each method minus each baseline, with the interval and what Holm's correction leaves."""
    several = len(results["protocol"]["fractions"]) > 1
    known = {f: results["differences"][f].get(metric, {}) for f in fractions}
    users = any(
        "low_users" in row
        for of_metric in known.values()
        for rows in of_metric.values()
        for row in rows.values()
    )
    rows = [["method", *(["users"] if several else []), "minus", "difference"]]
    rows[0] += ["95 % interval", "p, Holm"]
    rows[0] += ["95 % over test users", "p over test users, Holm"] if users else []
    rows[0] += [""]
    for fraction, of_metric in known.items():
        for baseline in BASELINES:
            for name, row in of_metric.get(baseline, {}).items():
                line = [name, *([f"{float(fraction):.0%}"] if several else []), baseline]
                line += [_signed(row["mean"]), _interval(row, "low", "high")]
                line.append(_p_value(row, "p_value_holm"))
                if users:
                    line.append(_interval(row, "low_users", "high_users"))
                    line.append(_p_value(row, "p_value_users_holm"))
                rows.append([*line, _verdict(row, metric)])
    return rows


def _interval(row: Mapping[str, Any], low: str, high: str) -> str:
    if row.get(low) is None:
        return "–"
    return f"{_signed(row[low])} to {_signed(row[high])}"


def _p_value(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _verdict(row: Mapping[str, Any], metric: str) -> str:
    if row["within_noise"] is None:
        return "no verdict"
    if row["within_noise"]:
        return "within the noise"
    return "better" if (row["mean"] > 0) == (metric not in LOWER_IS_BETTER) else "worse"


def format_table(results: Results) -> str:
    """The headline for a terminal."""
    rows = headline_rows(results, truth=False)
    text = "\n".join(aligned(rows))
    seeds = results["protocol"]["seeds"]
    lines = [text, "", *findings(results, _FIRST)]
    if seeds == 1:
        lines.append("One seed: no interval; give --seeds 5 for one.")
    return "\n".join(lines)


def findings(results: Results, metrics: Sequence[str] = DIFFERENCES) -> list[str]:
    """What the differences from BASE and from ESMM say at the largest volume, a sentence for each
    figure and baseline."""
    sentences = []
    of_fraction = results["differences"][_largest(results)]
    for metric in metrics:
        for baseline, rows in of_fraction.get(metric, {}).items():
            groups: dict[str, list[str]] = {"better": [], "worse": [], "within the noise": []}
            for name, row in rows.items():
                verdict = _verdict(row, metric)
                if verdict in groups:
                    shown = name
                    if verdict != "within the noise":
                        shown += f" ({_signed(row['mean'])})"
                    groups[verdict].append(shown)
            parts = [f"{verdict}: {', '.join(names)}" for verdict, names in groups.items() if names]
            if parts:
                sentences.append(f"{_title(metric)}, against {baseline} – {'; '.join(parts)}.")
    return sentences


def csv_table(results: Results) -> str:
    """Every figure of every method and fraction: method, fraction, metric, mean, std, runs. What
    was used as the conversion score and is no method is there as "reference: …"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = range(results["protocol"]["seeds"])
    writer.writerow(["method", "fraction", "metric", "mean", "std", *(f"seed_{n}" for n in seeds)])
    by_name = dict(results["methods"])
    for fraction, of_fraction in results["references"].items():
        for name, metrics in of_fraction.items():
            of_name = by_name.setdefault(f"reference: {_reference_label(name)}", {})
            of_name[fraction] = metrics
    for name, fractions in by_name.items():
        for fraction, metrics in fractions.items():
            for metric, figure in metrics.items():
                values = [figure["mean"], figure["std"], *figure["runs"]]
                writer.writerow(
                    [name, fraction, metric, *("" if value is None else value for value in values)]
                )
    return text.getvalue()


def markdown_table(results: Results) -> str:
    """The headline table, the reference rows and all differences, as Markdown."""
    parts = [
        _markdown(headline_rows(results)),
        f"{_data_sentence(results)} {_PAPER_SENTENCE}",
        _markdown(reference_rows(results)),
    ]
    for metric in DIFFERENCES:
        rows = difference_rows(results, metric, _fractions(results))
        if rows[1:]:
            parts += [f"{_title(metric)}, paired differences:", _markdown(rows)]
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
    parts.append(_paragraph(_noise_sentence(results), note=True))
    for metric in DIFFERENCES:
        rows = difference_rows(results, metric, [largest])
        if rows[1:]:
            parts += [f"<h3>{_title(metric)}</h3>", _table(rows)]
            smaller = difference_rows(results, metric, _fractions(results)[1:])
            if smaller[1:]:
                parts.append(
                    f"<details><summary>{_title(metric)}, with fewer training users</summary>"
                    f"{_table(smaller)}</details>"
                )
    if "volume.png" in captions:
        parts += ["<h2>Volume of training data</h2>", _picture(plots, captions, "volume.png")]
    parts += ["<h2>Calibration</h2>", _picture(plots, captions, "calibration.png")]
    parts.append(_metrics_table(results, ("cvr_pcoc", "cvr_ne", "cvr_ece")))
    parts += _truth(results, plots, captions)
    parts += _why_not_division(results, plots, captions)
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
        "<h2>How long it took</h2>",
        _table(time_rows(results)),
        "<h2>How this was made</h2>",
        _details(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<title>Conversion methods compared</title>"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _noise_sentence(results: Results) -> str:
    sentence = (
        "Runs with one seed share data and are compared in pairs: the 95 % interval is Student’s t "
        "of each difference by itself. p is corrected by Holm’s method for the number of methods "
        "compared with that baseline on that figure; above .05 a difference counts as noise, also "
        "where its own interval leaves 0 out. The verdict follows the corrected p. Tuning was done "
        "once and is shared by all seeds, so that no interval holds its variance."
    )
    if "data" in results["source"]:
        sentence += (
            " All seeds share one data set and say nothing of other data: “over test users” "
            "resamples the users of the test half, and a difference must stand on both sides."
        )
    return sentence


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
    spaces = ("entire_space", "clicked", "unclicked")
    parts = [
        "<h2>Against the truth, over the entire space</h2>",
        _picture(plots, captions, "entire-space.png"),
        _metrics_table(results, ranking),
        _metrics_table(results, [f"cvr_pcoc_{space}" for space in spaces]),
        _metrics_table(results, [f"cvr_{of}_{space}" for of in ("ne", "ece") for space in spaces]),
        _paragraph(
            "The generator knows the conversion rate of every impression, clicked or not. AUC with "
            "the true rate as a soft label has no label noise. Excess log loss is what is lost "
            "against the true rate. PCOC is Σ predicted / Σ true, NE the cross entropy with the "
            "true rate over the entropy of its mean, ECE the mean distance of predicted and true "
            "rate in 15 bins; each over all impressions, the clicked and the unclicked.",
            note=True,
        ),
    ]
    return parts


def _why_not_division(results: Results, plots: Path, captions: Mapping[str, str]) -> list[str]:
    if "DIVISION" not in results["methods"]:
        return []
    share = results["methods"]["DIVISION"][_largest(results)]["cvr_share_above_one"]
    parts = ["<h2>Why not division</h2>"]
    if "division.png" in captions:
        parts.append(_picture(plots, captions, "division.png"))
    sentence = f"pCTCVR exceeds pCTR, so that their quotient is no probability, {_share(share)}."
    return [*parts, _paragraph(sentence)]


def _share(figure: Mapping[str, Any]) -> str:
    """Of test impressions; small ones in scientific form."""
    if not figure["mean"]:
        return "for no test impression"
    form = ".2e" if figure["mean"] < 1e-3 else ".4f"
    spread = "" if figure["std"] is None else f" ± {figure['std']:{form}}"
    return f"for a share of {figure['mean']:{form}}{spread} of the test impressions"


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


def _training_table(results: Results) -> str:
    notes = list(
        dict.fromkeys(
            note
            for of in results["training"].values()
            for note in of[_largest(results)]
            if note not in TRAINING_FIGURES
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
            rate = f"{chosen['rate']:g}{_mark(tuning, 'rate')} ({names[name].rate_name})"
        rows.append(
            [
                name,
                str(trials),
                *(
                    f"{chosen[part]:g}{_mark(tuning, part)}"
                    for part in ("sparse_lr", "dense_lr", "weight_decay")
                ),
                rate,
                f"{chosen['epochs']}{_mark(tuning, 'epochs')}",
                f"{chosen['score']:.4f}",
            ]
        )
    return _table(rows) + _paragraph(
        "* at the end of what was searched: more passes, or a value beyond, might do better.",
        note=True,
    )


def _mark(tuning: Mapping[str, Any], part: str) -> str:
    return "*" if part in tuning["at_edge"] else ""


def _rule(results: Results) -> str:
    protocol = results["protocol"]
    apart = " in a world of its own" if "world" in results["source"] else ""
    shared = " and shared by all worlds" if "world" in results["source"] else ""
    return (
        f"The rule: {protocol['validation_share']:.0%} of the training users (drawn by hash) are "
        f"held out; every method gets {protocol['trials']} trials from one list of settings. A "
        "method with R rates of its own goes through them in the same trials, trial n taking rate "
        "n + ⌊R/2⌋·⌊n/R⌋ modulo R, so that a rate meets other settings in each round. Each trial "
        f"is measured after each of {protocol['epochs']} passes over the method’s own training "
        "rows. A pass takes the same number of optimiser updates for every method and every part "
        f"of the data: that of batches of {protocol['batch_size']:,} over all training "
        "impressions; fewer rows make smaller batches. Chosen is the best mean of CVR AUC on "
        "clicks and CTCVR AUC with the common click network (the click network itself: CTR AUC), "
        f"once, with one seed{apart}, at full volume{shared}: intervals over seeds do not hold the "
        "variance of this choice, and a method’s own pCTR was not tuned for. Every method is then "
        "retrained with it on all training users, or a part of them, for each seed, and the test "
        "half is scored by these models alone. Where a part of the users is taken, ids too rare in "
        "it are unknown for every method. The conversion term of shared-bottom is a mean over "
        "clicks and so pulls about 1 / CTR times as hard as that of ESMM, a mean over impressions; "
        "neither was weighted."
    )


def time_rows(results: Results) -> Rows:
    """Minutes of training and scoring; worlds that were generated are not in it."""
    seconds = results["seconds"]
    rows = [["minutes", "tuning", "retraining, all seeds and parts", "together"]]

    def line(name: str, tuning: float | None, retraining: float | None) -> list[str]:
        both = (tuning or 0) + (retraining or 0)
        return [name, *("–" if s is None else f"{s / 60:.1f}" for s in (tuning, retraining, both))]

    for name, tuning in seconds["tuning"].items():
        retraining = seconds["methods"].get(name)
        rows.append(line(name, tuning, retraining and sum(retraining.values())))
    rows.append(line("common click network, once tuned", None, seconds["common_ctr"]))
    if seconds["out_of_fold_pctr"]:
        rows.append(line("pCTR out of fold, for UNBIAS", None, seconds["out_of_fold_pctr"]))
    rows.append(["everything", "", "", f"{seconds['total'] / 60:.1f}"])
    return rows


def _details(results: Results) -> str:
    rows: Rows = [["", ""]]
    rows.append(["command", results["command"]])
    for part in ("source", "protocol", "environment"):
        for name, value in results[part].items():
            items = value.items() if isinstance(value, dict) else [(name, value)]
            for key, item in items:
                shown = ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)
                rows.append([f"{part}: {key.replace('_', ' ')}", shown])
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
