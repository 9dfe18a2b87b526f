"""Formats tables, and the metrics of a run as tables, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain, TaskProbability

MAX_SLICES = 10
"""Maximum number of values of a field that a table shows."""

_SIGNS = frozenset("+-−–")


def format_metrics(metrics: Mapping[str, Any], tasks: TaskChain = DEFAULT_TASKS) -> str:
    """Formats the AUC, normalised entropy and calibration of each probability, and, if the true
    probabilities are known, the oracle's AUC and the conversion score over the entire space."""
    test, truth = metrics["test"], metrics.get("truth")
    names = [probability.name for probability in tasks.probabilities]
    # A figure that the data or the command does not allow has no column.
    optional = {
        "GAUC": [test.get(f"gauc_{name}") for name in names],
        "RelaImpr": [test.get(f"{name}_relaimpr") for name in names],
        "oracle AUC": [truth["oracle"][f"{name}_auc"] if truth else None for name in names],
    }
    optional = {
        title: values
        for title, values in optional.items()
        if any(value is not None for value in values)
    }
    heading = ["test split", "AUC", "NE", "calibration", *optional]
    rows: list[list[Any]] = [heading]
    for place, probability in enumerate(tasks.probabilities):
        name = probability.name
        space = "" if probability.given else ", all impressions"
        row = [tasks.describe(probability) + space]
        row += [test[f"{name}_{figure}"] for figure in ("auc", "ne", "calibration")]
        rows.append([*row, *(values[place] for values in optional.values())])
    if truth:
        auc = "cvr_auc_entire_space"
        pcoc = truth["cvr_pcoc_entire_space"]
        entire = "conversion, all impressions"
        others = [truth["oracle"][auc] if title == "oracle AUC" else None for title in optional]
        rows.append([entire, truth[auc], None, pcoc, *others])
    lines = aligned([[_cell(value) for value in row] for row in rows])
    counts = ", ".join(
        f"{test[name]:,} {name}" for name in ("impressions", *(f"{t.name}s" for t in tasks))
    )
    means = filter(None, (_mean_and_rate(of, test, tasks) for of in tasks.probabilities))
    # Several figures may be null for the same reason.
    return "\n".join([*lines, counts, *means, *dict.fromkeys(test["reasons"].values())])


def _mean_and_rate(probability: TaskProbability, test: Mapping[str, Any], tasks: TaskChain) -> str:
    """Compares the mean of a conditional probability over all impressions with the observed rate of
    its label; empty if one of the two is not known."""
    mean = test.get(f"{probability.name}_mean_entire_space")
    rate = test.get(f"{probability.name}_base_rate")
    if mean is None or rate is None or probability.given is None:
        return ""
    return (
        f"{tasks.describe(probability)}: {mean:.4g} predicted over all impressions, {rate:.4g} "
        f"observed after a {probability.given.name}"
    )


def format_slices(field: str, slices: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Formats the calibration by value of a field that `metrics.slices.measure_slices` returns: for
    each probability, the values that deviate most."""
    tables = []
    for name, values in slices.items():
        rows = [[f"{name} by {field}", "impressions", "observed", "predicted", "PCOC", "ECE", "z"]]
        for of_value in values[:MAX_SLICES]:
            figures = [of_value[key] for key in ("observed", "predicted", "pcoc", "ece")]
            z = of_value["z"]
            name_and_size = [str(of_value["value"]), f"{of_value['impressions']:,}"]
            rows.append([*name_and_size, *map(_cell, figures), "–" if z is None else f"{z:+.1f}"])
        further = len(values) - MAX_SLICES
        lines = aligned(rows)
        if further > 0:
            lines.append(f"and {further:,} further values")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines with aligned columns: numeric columns to the right; the first column and those
    of words to the left. A column is numeric if a cell begins like a number."""
    columns = []
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        to_left = not columns or not any(
            cell[:1].isdigit() or cell[:1] in _SIGNS for cell in column
        )
        columns.append([f"{cell:<{width}}" if to_left else f"{cell:>{width}}" for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def percentage(part: int, whole: int) -> str:
    """Formats a share as a percentage with three decimals; "-" if the whole is 0."""
    return f"{part / whole:.3%}" if whole else "-"


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4f}"
