"""Tables of a comparison, built from results.json alone: rows of text, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from esmm_torchrec.comparison.results import TRAINING_FIGURES, fraction_key
from esmm_torchrec.comparison.selection import shown
from esmm_torchrec.comparison.verdicts import FIGURES, regime, signed, verdict_of, verdicts

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

TITLES = FIGURES | {
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


PAPER_SENTENCE = (
    "The paper’s columns come from another data set (its Public one, a 1 % sample of Taobao’s "
    "logs). Compare the order of the methods and the distances between them, not the levels."
)


def largest_fraction(results: Results) -> str:
    """Returns the key of the largest fraction of the training users."""
    return fraction_key(results["protocol"]["fractions"][-1])


def knows_truth(results: Results) -> bool:
    """Returns whether the true probabilities of the test split are known."""
    return _is_known(results, "cvr_auc_entire_space")


def is_generated(results: Results) -> bool:
    """Returns whether the methods were compared on generated worlds."""
    return "world" in results["source"]


def _is_known(results: Results, metric: str) -> bool:
    """Returns whether a figure was measured for some method."""
    largest = largest_fraction(results)
    return any(metric in of[largest] for of in results["methods"].values())


def _figure(
    results: Results, name: str, metric: str, *, digits: int = 4, factor: float = 1.0
) -> str:
    figure = results["methods"][name][largest_fraction(results)].get(metric)
    return _mean_std(figure, digits=digits, factor=factor)


def _mean_std(figure: Mapping[str, Any] | None, *, digits: int = 4, factor: float = 1.0) -> str:
    if figure is None or figure["mean"] is None:
        return "–"
    text = f"{figure['mean'] * factor:.{digits}f}"
    return text if figure["std"] is None else f"{text} ± {figure['std'] * factor:.{digits}f}"


def _relative_improvement(results: Results, name: str) -> str:
    """Returns RelaImpr of the mean CVR AUC over that of BASE, (AUC − .5) / (AUC of BASE − .5) − 1
    (Yan et al., "Coupled Group Lasso", ICML 2014)."""
    largest = largest_fraction(results)
    own, base = (results["methods"][of][largest]["cvr_auc"]["mean"] for of in (name, "BASE"))
    if own is None or base is None or base == 0.5:
        return "–"
    return f"{(own - 0.5) / (base - 0.5) - 1:+.1%}".replace("-", "−")


def _paper(name: str, column: int) -> str:
    if name not in PAPER:
        return "–"
    mean, std = PAPER[name][column]
    return f"{mean:.2f} ± {std:.2f}"


def headline_rows(results: Results, *, truth: bool = True) -> Rows:
    """Returns the paper's table: CVR and CTCVR AUC in %.

    Args:
        results: the content of results.json.
        truth: whether to add figures over the entire space, if the true probabilities are known.

    Returns:
        the heading and a row per method; for generated worlds with the paper's own figures.
    """
    columns = [
        ("cvr_auc", "CVR AUC %", 100),
        ("gauc_cvr", "CVR GAUC %", 100),
        ("ctcvr_auc_common_ctr", "CTCVR AUC %", 100),
        ("ctcvr_auc", "CTCVR AUC %, own pCTR", 100),
    ]
    columns = [column for column in columns if _is_known(results, column[0])]
    if truth and knows_truth(results):
        columns += [
            ("cvr_auc_entire_space", "entire-space CVR AUC %", 100),
            ("cvr_auc_entire_space_within_ctr_strata", "the same within pCTR strata", 100),
            ("cvr_excess_log_loss_entire_space", "excess log loss, 10⁻³ nats", 1000),
            ("cvr_pcoc_entire_space", "PCOC, entire space", 1),
        ]
    improved = "BASE" in results["methods"]
    rows = [["method", *(title for _, title, _ in columns)]]
    if improved:
        rows[0].insert(2, "RelaImpr")
    if is_generated(results):
        rows[0] += ["paper: CVR AUC %", "paper: CTCVR AUC %"]
    for name in results["methods"]:
        row = [name]
        row += [
            _figure(results, name, metric, digits=2, factor=factor) for metric, _, factor in columns
        ]
        if improved:
            row.insert(2, _relative_improvement(results, name))
        if is_generated(results):
            row += [_paper(name, 0), _paper(name, 1)]
        rows.append(row)
    return rows


def reference_rows(results: Results) -> Rows:
    """Returns rows for the oracle and for other probabilities used as the conversion score."""
    rows = [
        ["used as the conversion score", "CVR AUC on clicks", "entire space", "within pCTR strata"]
    ]
    wanted = ("cvr_auc", "cvr_auc_entire_space", "cvr_auc_entire_space_within_ctr_strata")
    for name, metrics in results["references"][largest_fraction(results)].items():
        rows.append(
            [_reference_label(name), *(_mean_std(metrics.get(metric)) for metric in wanted)]
        )
    return rows


def _reference_label(name: str) -> str:
    named = {"true pCVR": "true pCVR (the oracle)", "pCTR": "pCTR of the common click network"}
    return named.get(name, name)


def difference_rows(results: Results, metric: str, fraction: str) -> Rows:
    """Returns the comparisons made on one figure: differences, 95 % intervals and verdicts."""
    of_metric = results["differences"][fraction].get(metric, {})
    users = any("low_users" in row for rows in of_metric.values() for row in rows.values())
    heading = ["method", "compared with", "difference", "95 % interval", "p, Holm"]
    heading += ["95 % over test users", "p over test users, Holm"] if users else []
    rows = [[*heading, "verdict"]]
    for baseline, of_baseline in of_metric.items():
        for name, row in of_baseline.items():
            line = [name, baseline, signed(row["mean"]), _interval(row, "low", "high")]
            line.append(_p_value(row, "p_value_holm"))
            if users:
                line.append(_interval(row, "low_users", "high_users"))
                line.append(_p_value(row, "p_value_users_holm"))
            rows.append([*line, verdict_of(row, metric)])
    return rows


def _interval(row: Mapping[str, Any], low: str, high: str) -> str:
    if row.get(low) is None:
        return "–"
    return f"{signed(row[low])} to {signed(row[high])}"


def _p_value(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def csv_table(results: Results) -> str:
    """Returns every figure and every difference as CSV, one row each.

    Columns: method, baseline (empty for a figure of the method itself), fraction, metric, mean,
    std, low and high (95 % interval of a difference), p_value, p_value_holm, the same over
    resampled test users, verdict, and the value of each seed. Other probabilities that were used as
    the conversion score are named "reference: …".
    """
    text = io.StringIO()
    seeds = [f"seed_{n}" for n in range(results["protocol"]["seeds"])]
    columns = ["method", "baseline", "fraction", "metric", "mean", "std", *_OF_DIFFERENCES]
    writer = csv.DictWriter(text, [*columns, "verdict", *seeds], lineterminator="\n")
    writer.writeheader()

    def write(runs: Sequence[float | None], **row: Any) -> None:
        writer.writerow(row | dict(zip(seeds, runs, strict=False)))

    methods = results["methods"]
    by_name = {name: dict(of) for name, of in methods.items()}
    for fraction, of_fraction in results["references"].items():
        for name, metrics in of_fraction.items():
            by_name.setdefault(f"reference: {_reference_label(name)}", {})[fraction] = metrics
    for name, fractions in by_name.items():
        for fraction, metrics in fractions.items():
            for metric, of in metrics.items():
                mean, std = of["mean"], of["std"]
                write(of["runs"], method=name, fraction=fraction, metric=metric, mean=mean, std=std)
    for fraction, of_fraction in results["differences"].items():
        for metric, of_metric in of_fraction.items():
            for baseline, of_baseline in of_metric.items():
                for name, row in of_baseline.items():
                    pairs = zip(
                        methods[name][fraction][metric]["runs"],
                        methods[baseline][fraction][metric]["runs"],
                        strict=True,
                    )
                    write(
                        [mine - other for mine, other in pairs],
                        method=name,
                        baseline=baseline,
                        fraction=fraction,
                        metric=metric,
                        mean=row["mean"],
                        verdict=verdict_of(row, metric),
                        **{column: row.get(column) for column in _OF_DIFFERENCES},
                    )
    return text.getvalue()


_OF_DIFFERENCES = (
    "low",
    "high",
    "p_value",
    "p_value_holm",
    "low_users",
    "high_users",
    "p_value_users",
    "p_value_users_holm",
)


def markdown_table(results: Results) -> str:
    """Returns the headline table, the verdicts and the reference rows as Markdown."""
    sentences = [regime(results)]
    if is_generated(results):
        sentences.append(PAPER_SENTENCE)
    parts = [_markdown(headline_rows(results)), " ".join(sentences)]
    said = verdicts(results)
    if said:
        parts.append("\n".join(f"- {sentence}" for sentence in said))
    return "\n\n".join([*parts, _markdown(reference_rows(results))])


def _markdown(rows: Rows) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def metric_rows(results: Results, metrics: Sequence[str]) -> Rows:
    """Returns mean and standard deviation of those `metrics` that are known."""
    known = [metric for metric in metrics if _is_known(results, metric)]
    rows = [["method", *(TITLES[metric] for metric in known)]]
    for name in results["methods"]:
        rows.append([name, *(_figure(results, name, metric) for metric in known)])
    return rows


def training_rows(results: Results) -> Rows:
    """Returns rows, batch size, updates and passes of each method at the largest fraction."""
    largest = largest_fraction(results)
    of_largest = {name: of[largest] for name, of in results["training"].items()}
    notes = list(
        dict.fromkeys(
            note for of in of_largest.values() for note in of if note not in TRAINING_FIGURES
        )
    )
    rows = [
        [
            "method",
            "rows",
            "rows per update",
            "updates per pass",
            "passes",
            "test ids unknown to it",
            *(note.replace("_", " ") for note in notes),
            "training",
        ]
    ]
    for name, figures in of_largest.items():
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
    return rows


def tuning_rows(results: Results) -> Rows:
    """Returns the tuned settings of each method; * marks a value at the end of its range."""
    settings = ("sparse_lr", "dense_lr", "weight_decay", "min_count", "init_scale")
    rows = [["method", "trials", "table lr", "tower lr", "tower weight decay", "min count"]]
    rows[0] += ["init scale", "own options", "passes", "score"]
    for name, tuning in results["tuning"].items():
        chosen = tuning["chosen"]
        own = [f"{k} {shown(v)}{_mark(tuning, k)}" for k, v in chosen["own"].items()]
        trials = sum(one["round"] == 0 and one["epochs"] == 1 for one in tuning["tried"])
        rows.append(
            [
                name,
                str(trials),
                *(f"{chosen[setting]:g}{_mark(tuning, setting)}" for setting in settings),
                ", ".join(own) or "–",
                f"{chosen['epochs']}{_mark(tuning, 'epochs')}",
                f"{chosen['score']:.4f}",
            ]
        )
    return rows


def _mark(tuning: Mapping[str, Any], setting: str) -> str:
    return "*" if setting in tuning["at_edge"] else ""


def time_rows(results: Results) -> Rows:
    """Returns minutes of training and scoring; drawing worlds is not included."""
    seconds = results["seconds"]
    rows = [["minutes", "tuning", "retraining, all seeds and fractions", "together"]]

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


def detail_rows(results: Results) -> Rows:
    """Returns command, source, protocol and environment, without a heading."""
    rows: Rows = [["command", results["command"]]]
    for group in ("source", "protocol", "environment"):
        for name, value in results[group].items():
            items = value.items() if isinstance(value, dict) else [(name, value)]
            for key, item in items:
                shown = ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)
                rows.append([f"{group}: {key.replace('_', ' ')}", shown])
    return rows
