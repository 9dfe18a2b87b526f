"""What is reported of rows that were scored: their scores as columns, and what ids they held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.encoding import RowsToEncode
from esmm_torchrec.schema import SAMPLE_ID
from esmm_torchrec.tasks import TaskChain

MIN_IDS = 100
"""Fewer ids of a feature say nothing about the share of unknown ones."""


class Counts(NamedTuple):
    """What some impressions hold of one id feature."""

    impressions: int = 0
    missing: int = 0
    """Impressions without a value."""
    ids: int = 0
    unknown: int = 0
    """Ids that training did not see, or too rarely."""

    def plus(self, other: Counts) -> Counts:
        """The counts of both."""
        return Counts(*map(sum, zip(self, other, strict=True)))


class ScoredRows(NamedTuple):
    """A block of n raw rows and their scores."""

    read: RowsToEncode
    scores: dict[str, np.ndarray]
    """By column, float32 (n,); arbitrary for bad rows."""
    counts: dict[str, Counts]
    """By id feature, of the rows that are not bad."""


@dataclass
class Written:
    """What was scored."""

    impressions: int = 0
    """Bad ones included."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """By id feature, of the rows that are not bad."""

    def add(self, counts: Mapping[str, Counts]) -> None:
        """Adds the counts of further rows."""
        for name, of_feature in counts.items():
            self.counts[name] = self.counts.get(name, Counts()).plus(of_feature)


def score_columns(
    scores: dict[str, np.ndarray],
    tasks: TaskChain,
    sample_ids: np.ndarray,
    bad: np.ndarray | None = None,
) -> pa.Table:
    """Columns sample_id int64 and, for each probability of the chain, float32: by default pctr,
    pcvr and pctcvr. A score that the model does not give is NaN; a quotient of probabilities
    (DIVISION's pcvr) may exceed 1.

    Args:
        scores: by column, float32 (n,).
        tasks: the chain.
        sample_ids: int64 (n,).
        bad: bool (n,), rows without scores, which are null; None: none.
    """
    columns = {SAMPLE_ID: pa.array(sample_ids, pa.int64(), mask=bad)}
    for _, column, *_ in tasks.probabilities:
        values = scores.get(column)
        if values is None:
            values = np.full(len(sample_ids), np.nan, np.float32)
        columns[column] = pa.array(values, pa.float32(), mask=bad)
    return pa.table(columns)


def score_schema(tasks: TaskChain) -> pa.Schema:
    """Names and types of the columns that `score_columns` gives."""
    return score_columns({}, tasks, np.zeros(0, np.int64)).schema


def unknown_warnings(
    counts: Mapping[str, Counts], expected: Mapping[str, float], *, factor: float = 2.0
) -> list[str]:
    """A sentence on each feature with far more unknown ids than the test split of the training data
    had: over `factor` times the share, and over 5 percentage points more.

    Args:
        counts: by id feature, of the rows scored.
        expected: by id feature, the share of unknown ids in the test split.
        factor: see above.
    """
    sentences = []
    for name, of_feature in counts.items():
        if of_feature.ids < MIN_IDS:
            continue
        share, usual = of_feature.unknown / of_feature.ids, expected[name]
        if share > factor * usual and share > usual + 0.05:
            sentences.append(
                f"{share:.1%} of the ids of {name!r} are unknown to the model, but {usual:.1%} in "
                "the test split of its training data; check that the column holds the same ids"
            )
    return sentences


def with_columns(table: pa.Table, beside: pa.Table) -> pa.Table:
    """The columns of both."""
    for name in beside.column_names:
        table = table.append_column(name, beside.column(name))
    return table
