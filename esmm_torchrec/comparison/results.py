"""results.json: the runs of a comparison, their means and the differences between methods.

methods            {method: {fraction: {metric: {"mean", "std", "runs": [one per seed]}}}},
                   metric names as in metrics.json (`metrics.report`)
differences        {fraction: {metric: {baseline: {method: {"mean", "low", "high", "p_value",
                   "p_value_holm", "within_noise"}}}}}: method minus baseline over paired runs
                   with the 95 % interval of Student's t. The comparisons made on one figure
                   (`compared_pairs`) are one family, whose p-values are corrected together, so
                   that no two verdicts contradict each other. On one data set also "low_users",
                   "high_users", "p_value_users", "p_value_users_holm": the same over resampled
                   test users. "within_noise" is null if there is no p-value
references         {fraction: {name of another conversion score: {metric: …}}}
training           {method: {fraction: {"training_rows", "batch_size" (over all ranks),
                   "updates_per_pass", "passes", "unknown_share", "train_seconds", "seconds",
                   notes: …}}}: means over seeds
seconds            {"tuning": {method: …}, "methods": {method: {fraction: …}} (all seeds),
                   "common_ctr", "out_of_fold_pctr", "total"}: time to train and to score
curves, points     {method: …} at the largest fraction: calibration of the first seed, and a
                   sample of its pCVR along with the truth
train_commands     {method: the `train` command with the settings chosen for it}
tuning             {method: {"chosen", "tried" (a row per trial, round and number of passes),
                   "at_edge": choices at the end of their searched range, "seconds"}}
protocol, source, environment, command
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from esmm_torchrec.comparison.handover import (
    batch_size_on_all_rows,
    chosen_options,
    train_command,
)
from esmm_torchrec.comparison.options import ComparisonOptions
from esmm_torchrec.comparison.selection import Chosen
from esmm_torchrec.comparison.statistics import (
    CONFIDENCE,
    bootstrap_interval,
    bootstrap_p_value,
    holm,
    paired_difference,
    summary,
)
from esmm_torchrec.models.methods import METHODS

DIFFERENCES = (
    "cvr_auc",
    "ctcvr_auc_common_ctr",
    "ctcvr_auc",
    "cvr_auc_entire_space",
    "cvr_auc_entire_space_within_ctr_strata",
    "cvr_excess_log_loss_entire_space",
)
"""Figures whose differences between methods are computed."""

TRAINING_FIGURES = (
    "training_rows",
    "batch_size",
    "updates_per_pass",
    "passes",
    "unknown_share",
    "train_seconds",
    "seconds",
)
"""Figures in the record of every training; a method may add notes of its own."""

Records = Sequence[Mapping[str, Any]]


def fraction_key(fraction: float) -> str:
    """Returns the key of a fraction in results.json."""
    return f"{fraction:g}"


def assemble(
    options: ComparisonOptions,
    records: Records,
    *,
    chosen: Mapping[str, Chosen],
    tuning: Mapping[str, Any],
    tuning_networks: Mapping[str, float],
    source: Mapping[str, Any],
    environment: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """Returns the content of results.json, from the records of all trainings.

    Args:
        options: options of the comparison.
        records: one record per method, seed and fraction.
        chosen: title of a method → result of tuning.
        tuning: title of a method → what was tried and chosen.
        tuning_networks: name of a network that tuning needed → its seconds.
        source: {"world": settings} or {"data": folder}.
        environment: versions and machine.
        command: command line of the comparison.
    """
    names = [METHODS[method].title for method in options.chosen_methods]
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
            f: _differences(
                {name: by_run[name, f] for name in names}, one_data_set="data" in source
            )
            for f in fractions
        },
        "references": {
            f: _references({name: by_run[name, f] for name in names}) for f in fractions
        },
        "training": each(_training),
        "curves": {name: by_run[name, largest][0]["curves"] for name in names},
        "points": {name: by_run[name, largest][0]["points"] for name in names},
        "train_commands": {
            METHODS[method].title: train_command(
                chosen_options(
                    options,
                    method,
                    chosen[METHODS[method].title],
                    batch_size=batch_size_on_all_rows(by_run[METHODS[method].title, largest][0]),
                ),
                str(source.get("data", "PREPARED")),
            )
            for method in options.chosen_methods
        },
        "tuning": dict(tuning),
        "seconds": _seconds(each, tuning, [tuning_networks, *(r["networks"] for r in records)]),
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
    mean = {name: fmean(run[name] for run in runs) for name in TRAINING_FIGURES}
    notes = {name: fmean(run["notes"][name] for run in runs) for name in runs[0]["notes"]}
    return mean | notes


def _seconds(
    each: Callable[[Callable[[list[Mapping[str, Any]]], float]], dict[str, dict[str, float]]],
    tuning: Mapping[str, Any],
    networks: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    once = {name: seconds for part in networks for name, seconds in part.items()}

    def of_networks(kind: str) -> float:
        return sum(seconds for name, seconds in once.items() if name.startswith(kind))

    methods = each(lambda runs: sum(run["seconds"] for run in runs))
    of_tuning = {name: of["seconds"] for name, of in tuning.items()}
    retrained = sum(value for of in methods.values() for value in of.values())
    return {
        "tuning": of_tuning,
        "methods": methods,
        "common_ctr": of_networks("click-logits"),
        "out_of_fold_pctr": of_networks("clicked-pctr"),
        "total": sum(of_tuning.values()) + retrained + sum(once.values()),
    }


def _references(runs: Mapping[str, Records]) -> dict[str, Any]:
    """Returns the figures of rows that are not methods. A model's own pCTCVR comes from the CTCVR
    network of DIVISION, or else from ESMM."""
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


def compared_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the comparisons made on each figure, (method, baseline): every method with BASE, and
    shared-bottom with ESMM; every method with ESMM if BASE is not compared."""
    baseline = next((name for name in ("BASE", "ESMM") if name in names), None)
    pairs = [(name, baseline) for name in names if baseline and name != baseline]
    if baseline == "BASE" and {"ESMM", "shared-bottom"} <= set(names):
        pairs.append(("shared-bottom", "ESMM"))
    return pairs


def _differences(runs: Mapping[str, Records], *, one_data_set: bool) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for metric in DIFFERENCES:
        family = {
            (method, baseline): row
            for method, baseline in compared_pairs(list(runs))
            if (row := _difference(runs[method], runs[baseline], metric)) is not None
        }
        _correct(family, one_data_set=one_data_set)
        for (method, baseline), row in family.items():
            differences.setdefault(metric, {}).setdefault(baseline, {})[method] = row
    return differences


def _difference(runs: Records, baseline: Records, metric: str) -> dict[str, Any] | None:
    values = [run["metrics"].get(metric) for run in runs]
    others = [run["metrics"].get(metric) for run in baseline]
    if None in values or None in others:
        return None
    row = paired_difference(values, others)._asdict()  # pyright: ignore[reportArgumentType]
    if "bootstrap" in runs[0] and metric in runs[0]["bootstrap"]:
        # Resampling r draws the same users for every model, so seeds are averaged first.
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
            row["p_value_users"] = bootstrap_p_value(resampled)
    return row


def _correct(family: dict[tuple[str, str], dict[str, Any]], *, one_data_set: bool) -> None:
    """Adds p-values with Holm's correction over all comparisons of a figure, and whether a
    difference is within the noise: over seeds and, on one data set, also over its users, since
    seeds on the same data carry no information about other data."""
    kinds = ("p_value", "p_value_users") if one_data_set else ("p_value",)
    for kind in kinds:
        known = {pair: row[kind] for pair, row in family.items() if row.get(kind) is not None}
        corrected = holm(known)
        for pair, row in family.items():
            row[f"{kind}_holm"] = corrected.get(pair)
    for row in family.values():
        corrected = [row[f"{kind}_holm"] for kind in kinds]
        row["within_noise"] = None if None in corrected else max(corrected) > 1 - CONFIDENCE
