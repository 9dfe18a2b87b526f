"""Findings of a comparison, in sentences.

The verdict of a difference follows its p-value after Holm's correction, never its own interval. "No
difference found" is not "equal": two methods are called equal only if the whole interval of their
difference lies within `EQUAL_WITHIN`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esmm_torchrec.comparison.results import DIFFERENCES, fraction_key

Results = Mapping[str, Any]

FIGURES = {
    "cvr_auc": "CVR AUC on clicks",
    "ctcvr_auc_common_ctr": "CTCVR AUC",
    "ctcvr_auc": "CTCVR AUC, own pCTR",
    "cvr_auc_entire_space": "CVR AUC, entire space",
    "cvr_auc_entire_space_within_ctr_strata": "CVR AUC, entire space, within pCTR strata",
    "cvr_excess_log_loss_entire_space": "Excess log loss of pCVR, entire space (lower is better)",
}

LOWER_IS_BETTER = frozenset({"cvr_excess_log_loss_entire_space"})

EQUAL_WITHIN = 0.005
"""Maximum AUC difference of equal methods; about the effect of a seed alone on Ali-CCP (.004)."""

NO_DIFFERENCE = "no difference found"
NO_VERDICT = "no verdict"


def verdict_of(row: Mapping[str, Any], metric: str) -> str:
    """Returns better, worse, no difference found, or no verdict if there is no p-value."""
    if row["within_noise"] is None:
        return NO_VERDICT
    if row["within_noise"]:
        return NO_DIFFERENCE
    return "better" if (row["mean"] > 0) == (metric not in LOWER_IS_BETTER) else "worse"


def regime(results: Results) -> str:
    """Describes the data that the verdicts hold for, in one or two sentences."""
    largest = fraction_key(results["protocol"]["fractions"][-1])
    anyone = next(iter(results["methods"].values()))[largest]
    counts = {name: anyone[name]["mean"] for name in ("impressions", "clicks", "conversions")}
    rows = max(of[largest]["training_rows"] for of in results["training"].values())
    protocol, source = results["protocol"], results["source"]
    if "world" in source:
        world = source["world"]
        where = (
            f"{protocol['seeds']} generated worlds, CTR {world['ctr']:g}, CVR of clicks "
            f"{world['cvr']:g}, correlation of the tastes for clicking and converting "
            f"{world['correlation']:g}, hidden confounding {world['confounding']:g}; each with "
        )
    else:
        where = (
            f"{Path(source['data']).name} with {protocol['seeds']} seeds, CTR "
            f"{counts['clicks'] / counts['impressions']:.2g}, CVR of clicks "
            f"{counts['conversions'] / counts['clicks']:.2g} in the test split; "
        )
    return (
        f"{where}{rows:,.0f} training impressions, tested on {counts['impressions']:,.0f} "
        f"impressions with {counts['clicks']:,.0f} clicks and {counts['conversions']:,.0f} "
        f"conversions. Embedding dim {protocol['embedding_dim']}, towers "
        f"{'–'.join(map(str, protocol['tower']))}."
    )


def verdicts(results: Results, metrics: Sequence[str] = DIFFERENCES) -> list[str]:
    """Returns a sentence for each figure and baseline, at the largest fraction."""
    sentences = []
    of_fraction = results["differences"][fraction_key(results["protocol"]["fractions"][-1])]
    for metric in metrics:
        for baseline, rows in of_fraction.get(metric, {}).items():
            known = {name: row for name, row in rows.items() if row["within_noise"] is not None}
            if not known:
                continue
            said = (
                _of_pair(baseline, known, metric)
                if baseline != "BASE" and set(known) == {"shared-bottom"}
                else _of_family(baseline, known, metric)
            )
            sentences.append(f"{FIGURES[metric]}: {said}.")
    return sentences


def _of_family(baseline: str, rows: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    by_verdict: dict[str, list[str]] = {}
    for name, row in rows.items():
        by_verdict.setdefault(verdict_of(row, metric), []).append(name)
    clauses = []
    for verdict in ("better", "worse"):
        names = by_verdict.get(verdict, [])
        named = [f"{name} {_by_how_much(rows[name])}" for name in names]
        clauses.append(f"{verdict} than {baseline}: {', '.join(named) or 'none'}")
    if NO_DIFFERENCE in by_verdict:
        clauses.append(
            f"no difference from {baseline} found: {', '.join(by_verdict[NO_DIFFERENCE])}"
        )
    return "; ".join(clauses)


def _of_pair(baseline: str, rows: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    ((name, row),) = rows.items()
    verdict = verdict_of(row, metric)
    if verdict != NO_DIFFERENCE:
        return f"{name} is {verdict} than {baseline}, {_by_how_much(row)}"
    low, high = _widest(row)
    if metric not in LOWER_IS_BETTER and max(abs(low), abs(high)) <= EQUAL_WITHIN:
        return f"{name} equals {baseline} to within {EQUAL_WITHIN:g}, {_by_how_much(row)}"
    return f"no difference between {name} and {baseline} found, {_by_how_much(row)}"


def _widest(row: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the outer ends of the interval over seeds and that over test users."""
    low, high = row["low"], row["high"]
    if "low_users" in row:
        low, high = min(low, row["low_users"]), max(high, row["high_users"])
    return low, high


def _by_how_much(row: Mapping[str, Any]) -> str:
    low, high = _widest(row)
    p_value = max(row["p_value_holm"], row.get("p_value_users_holm") or 0.0)
    shown = "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
    return f"{signed(row['mean'])} (95 % interval {signed(low)} to {signed(high)}, p {shown})"


def signed(value: float) -> str:
    """Formats a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")
