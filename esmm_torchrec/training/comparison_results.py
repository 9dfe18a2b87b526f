"""results.json: the runs of a comparison, their means and the differences between methods.

methods            {method: {fraction: {metric: {"mean", "std", "runs": [one per seed]}}}},
                   metric names as in metrics.json (`metrics.report`)
differences        {fraction: {metric: {baseline: {method: {"mean", "low", "high", "p_value",
                   "p_value_holm", "within_noise"}}}}}: method minus baseline over paired runs
                   with the 95 % interval of Student's t, the p-value corrected for the methods
                   compared with that baseline. On one data set also "low_users",
                   "high_users": the interval over resampled test users
references         {fraction: {what is used as the conversion score: {metric: …}}}
random_unseen_ids  {method: {fraction: {metric: …}}}: as "methods", but with the random
                   embeddings that ids have which a method's training rows never showed
training           {method: {fraction: {"training_rows", "unknown_share", "seconds", notes: …}}}
curves, points     {method: …} at the largest fraction: calibration of the first seed, and a
                   sample of its pCVR beside the truth
tuning, protocol, source, environment, command
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from esmm_torchrec.models.methods import METHODS
from esmm_torchrec.training.comparison_options import ComparisonOptions
from esmm_torchrec.training.comparison_statistics import (
    CONFIDENCE,
    bootstrap_interval,
    holm,
    paired_difference,
    summary,
)

BASELINES = ("BASE", "ESMM")

DIFFERENCES = (
    "cvr_auc",
    "ctcvr_auc_common_ctr",
    "ctcvr_auc",
    "cvr_auc_entire_space",
    "cvr_auc_entire_space_within_ctr_strata",
    "cvr_excess_log_loss_entire_space",
)
"""Figures whose differences between methods are given."""

Records = Sequence[Mapping[str, Any]]


def fraction_key(fraction: float) -> str:
    """How results.json names a fraction."""
    return f"{fraction:g}"


def assemble(
    options: ComparisonOptions,
    records: Records,
    *,
    tuning: Mapping[str, Any],
    source: Mapping[str, Any],
    environment: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """The content of results.json, from the records of all trainings."""
    names = [METHODS[method].name for method in options.chosen_methods]
    by_run: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        by_run.setdefault((record["method"], fraction_key(record["fraction"])), []).append(record)
    fractions = [fraction_key(fraction) for fraction in options.ascending_fractions]

    def each(of: Callable[[list[Mapping[str, Any]]], Any]) -> dict[str, dict[str, Any]]:
        return {name: {f: of(by_run[name, f]) for f in fractions} for name in names}

    largest = fractions[-1]
    return {
        "methods": each(lambda runs: _summaries([run["metrics"] for run in runs])),
        "differences": {
            f: _differences({name: by_run[name, f] for name in names}) for f in fractions
        },
        "references": {
            f: _references({name: by_run[name, f] for name in names}) for f in fractions
        },
        "random_unseen_ids": each(
            lambda runs: _summaries(
                [run["random_unseen_ids"] for run in runs if "random_unseen_ids" in run]
            )
        ),
        "training": each(_training),
        "curves": {name: by_run[name, largest][0]["curves"] for name in names},
        "points": {name: by_run[name, largest][0]["points"] for name in names},
        "tuning": dict(tuning),
        "protocol": asdict(options)
        | {
            "methods": names,
            "fractions": list(options.ascending_fractions),
            "confidence": CONFIDENCE,
        },
        "source": dict(source),
        "environment": dict(environment),
        "command": command,
    }


def _summaries(runs: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    metrics = dict.fromkeys(name for run in runs for name in run)
    return {
        metric: summary([run.get(metric) for run in runs])._asdict()
        | {"runs": [run.get(metric) for run in runs]}
        for metric in metrics
    }


def _training(runs: Records) -> dict[str, Any]:
    mean = {
        name: fmean(run[name] for run in runs)
        for name in ("training_rows", "unknown_share", "train_seconds", "seconds")
    }
    notes = {name: fmean(run["notes"][name] for run in runs) for name in runs[0]["notes"]}
    return mean | notes


def _references(runs: Mapping[str, Records]) -> dict[str, Any]:
    """Rows that are no method. A model's own pCTCVR is that of the CTCVR network of DIVISION, or
    else of ESMM."""
    rows: dict[str, Any] = {}
    anyone = next(iter(runs.values()))
    for name in anyone[0]["references"]:
        if name != "pCTCVR":
            rows[name] = _summaries([run["references"][name] for run in anyone])
    for method in ("DIVISION", "ESMM"):
        if method in runs:
            of_method = [run["references"]["pCTCVR"] for run in runs[method]]
            rows[f"pCTCVR of {method}"] = _summaries(of_method)
            break
    return rows


def _differences(runs: Mapping[str, Records]) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for metric in DIFFERENCES:
        of_metric = {}
        for baseline in BASELINES:
            if baseline in runs:
                rows = {
                    method: row
                    for method in runs
                    if method != baseline
                    and (row := _difference(runs[method], runs[baseline], metric)) is not None
                }
                _correct(rows)
                if rows:
                    of_metric[baseline] = rows
        if of_metric:
            differences[metric] = of_metric
    return differences


def _difference(runs: Records, baseline: Records, metric: str) -> dict[str, Any] | None:
    values = [run["metrics"].get(metric) for run in runs]
    others = [run["metrics"].get(metric) for run in baseline]
    if None in values or None in others:
        return None
    row = paired_difference(values, others)._asdict()  # pyright: ignore[reportArgumentType]
    if "bootstrap" in runs[0] and metric in runs[0]["bootstrap"]:
        # Resampling r drew the same users for every model, so it is averaged over the seeds first.
        mine, theirs = (
            zip(*(run["bootstrap"][metric] for run in of), strict=True) for of in (runs, baseline)
        )
        resampled = [
            fmean(a) - fmean(b)
            for a, b in zip(mine, theirs, strict=True)
            if None not in a and None not in b
        ]
        if resampled:
            row["low_users"], row["high_users"] = bootstrap_interval(resampled)
    return row


def _correct(rows: dict[str, dict[str, Any]]) -> None:
    """Adds Holm's correction, and whether a difference is within the noise: over seeds, and on one
    data set over users as well."""
    known = {name: row["p_value"] for name, row in rows.items() if row["p_value"] is not None}
    corrected = holm(known)
    for name, row in rows.items():
        row["p_value_holm"] = corrected.get(name)
        within = None if name not in corrected else corrected[name] > 1 - CONFIDENCE
        if "low_users" in row:
            within = bool(within) or row["low_users"] <= 0 <= row["high_users"]
        row["within_noise"] = within
