"""Tables for a terminal, and the metrics of a run as such a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain

_SIGNS = frozenset("+-−–")


def format_metrics(metrics: Mapping[str, Any], tasks: TaskChain = DEFAULT_TASKS) -> str:
    """AUC, normalised entropy and calibration of each probability, beside the oracle's AUC if the
    true probabilities are known, and the conversion score over the entire space."""
    test, truth = metrics["test"], metrics.get("truth")
    heading = ["test half", "AUC", "NE", "calibration"] + (["oracle AUC"] if truth else [])
    rows: list[list[Any]] = [heading]
    for probability in tasks.probabilities:
        name = probability.name
        space = "" if probability.given else ", all impressions"
        row = [tasks.describe(probability) + space]
        row += [test[f"{name}_{figure}"] for figure in ("auc", "ne", "calibration")]
        rows.append([*row, *([truth["oracle"][f"{name}_auc"]] if truth else [])])
    if truth:
        auc = "cvr_auc_entire_space"
        pcoc = truth["cvr_pcoc_entire_space"]
        entire = "conversion, all impressions"
        rows.append([entire, truth[auc], None, pcoc, truth["oracle"][auc]])
    lines = aligned([[_cell(value) for value in row] for row in rows])
    counts = ", ".join(
        f"{test[name]:,} {name}" for name in ("impressions", *(f"{t.name}s" for t in tasks))
    )
    # Many figures have the same reason.
    return "\n".join([*lines, counts, *dict.fromkeys(test["reasons"].values())])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width: the first column and those of words to the left, numbers
    to the right. A column is of numbers if a cell begins like one."""
    columns = []
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        to_left = not columns or not any(
            cell[:1].isdigit() or cell[:1] in _SIGNS for cell in column
        )
        columns.append([f"{cell:<{width}}" if to_left else f"{cell:>{width}}" for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def percentage(part: int, whole: int) -> str:
    """A share with three decimals; "-" if there is no whole."""
    return f"{part / whole:.3%}" if whole else "-"


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4f}"
