"""The figures of a run as a small table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = (
    ("click, all impressions", "ctr", "ctr_auc"),
    ("conversion, clicked impressions", "cvr", "cvr_auc"),
    ("click and conversion, all impressions", "ctcvr", "ctcvr_auc"),
)
_ENTIRE = "conversion, entire space"


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
    text = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in text) for column in range(len(heading))]
    lines = []
    for label, *figures in text:
        cells = [cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *cells]))
    counts = (
        f"{test['impressions']:,} impressions, {test['clicks']:,} clicks, "
        f"{test['conversions']:,} conversions"
    )
    # Many figures share a reason.
    return "\n".join([*lines, counts, *dict.fromkeys(test["reasons"].values())])


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4f}"
