"""Tables for a terminal, and the figures of a run as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = (
    ("click, all impressions", "ctr", "ctr_auc"),
    ("conversion, clicked impressions", "cvr", "cvr_auc"),
    ("click and conversion, all impressions", "ctcvr", "ctcvr_auc"),
)
_ENTIRE = "conversion, entire space"
_SIGNS = frozenset("+-−–")


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """AUC, normalised entropy and calibration of the three tasks, beside the oracle's AUC where
    the data knows the true probabilities, and the conversion score over the entire space."""
    test, truth = metrics["test"], metrics.get("truth")
    heading = ["test half", "AUC", "NE", "calibration"] + (["oracle AUC"] if truth else [])
    rows: list[list[Any]] = [heading]
    for label, task, auc in ROWS:
        row = [label, test[auc], test[f"{task}_ne"], test[f"{task}_calibration"]]
        rows.append([*row, *([truth["oracle"][auc]] if truth else [])])
    if truth:
        auc = "cvr_auc_entire_space"
        rows.append(
            [_ENTIRE, truth[auc], None, truth["cvr_pcoc_entire_space"], truth["oracle"][auc]]
        )
    lines = aligned([[_cell(value) for value in row] for row in rows])
    counts = (
        f"{test['impressions']:,} impressions, {test['clicks']:,} clicks, "
        f"{test['conversions']:,} conversions"
    )
    # Many figures share a reason.
    return "\n".join([*lines, counts, *dict.fromkeys(test["reasons"].values())])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width: the first and any of words to the left, numbers to the
    right. A column is of numbers where a cell begins like one."""
    columns = []
    for column in zip(*rows, strict=True):
        width = max(map(len, column))
        to_left = not columns or not any(
            cell[:1].isdigit() or cell[:1] in _SIGNS for cell in column
        )
        columns.append([f"{cell:<{width}}" if to_left else f"{cell:>{width}}" for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def percentage(part: int, whole: int) -> str:
    """A share with three decimals; "-" of nothing."""
    return f"{part / whole:.3%}" if whole else "-"


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4f}"
