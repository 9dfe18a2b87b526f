"""Reads raw rows to score, arranges their scores in columns, and counts their unknown ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.encoding import RowEncoder, RowsToEncode
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.raw_tables import Frame
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import SAMPLE_ID, UNKNOWN_ROW
from esmm_torchrec.tasks import TaskChain

MIN_IDS = 100
"""Minimum number of ids of a feature for a warning about the share of unknown ids."""


class Counts(NamedTuple):
    """Counts of one id feature over some impressions."""

    impressions: int = 0
    missing: int = 0
    """Number of impressions without a value."""
    ids: int = 0
    unknown: int = 0
    """Number of ids that did not occur in training, or too rarely."""

    @classmethod
    def of(cls, encoded: pa.Array) -> Counts:
        """Counts the result of `encode_ids` for a feature: int32 rows, or lists of them."""
        if pa.types.is_list(encoded.type):
            rows = encoded.flatten().to_numpy()
            missing = int((np.diff(encoded.offsets.to_numpy()) == 0).sum())
        else:
            rows, missing = encoded.drop_null().to_numpy(), encoded.null_count
        return cls(len(encoded), missing, len(rows), int((rows == UNKNOWN_ROW).sum()))

    def plus(self, other: Counts) -> Counts:
        """Returns the sum of both counts."""
        return Counts(*map(sum, zip(self, other, strict=True)))


class ScoredRows(NamedTuple):
    """A block of n raw rows and their scores."""

    read: RowsToEncode
    scores: dict[str, np.ndarray]
    """Scores by column, float32 (n,); arbitrary for bad rows."""
    counts: dict[str, Counts]
    """Counts by id feature, without bad rows."""


@dataclass
class Written:
    """Totals over the rows that were scored."""

    impressions: int = 0
    """Number of impressions, including bad rows."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """Counts by id feature, without bad rows."""

    def add(self, impressions: int, counts: Mapping[str, Counts]) -> None:
        """Adds the totals of further rows."""
        self.impressions += impressions
        for name, of_feature in counts.items():
            self.counts[name] = self.counts.get(name, Counts()).plus(of_feature)


def read_rows(
    encoder: RowEncoder,
    rows: Frame | Sequence[Frame],
    *,
    keep: Sequence[str] = (),
    bad_rows: BadRows | None = None,
) -> Iterator[RowsToEncode]:
    """Reads raw rows to score with `RowEncoder.read_blocks`.

    Raises:
        DataError: same as in `read_blocks`, or there are no rows.
    """
    blocks = encoder.read_blocks(rows, keep=keep, bad_rows=bad_rows)
    first = next(blocks, None)
    if first is None:
        given = rows[0] if isinstance(rows, (list, tuple)) else rows
        name = given if isinstance(given, (str, Path)) else "the table"
        raise DataError(f"{name} has no rows")
    yield from chain([first], blocks)


def score_columns(
    scores: Mapping[str, np.ndarray],
    tasks: TaskChain,
    sample_ids: np.ndarray,
    bad: np.ndarray | None = None,
    kept: pa.Table | None = None,
) -> pa.Table:
    """Returns a table of sample_id int64 and a float32 column for each probability of the chain: by
    default pctr, pcvr and pctcvr. A score that the model does not predict is NaN; a quotient of
    probabilities (DIVISION's pcvr) may exceed 1.

    Args:
        scores: scores by column, float32 (n,).
        sample_ids: int64 (n,).
        bad: bool (n,), marks rows without scores, which become null; None: no such rows.
        kept: further columns, with n rows.

    Raises:
        OptionError: a column to keep has the same name as a column of scores.
    """
    columns: dict[str, Any] = {SAMPLE_ID: pa.array(sample_ids, pa.int64(), mask=bad)}
    for _, column, *_ in tasks.probabilities:
        values = scores.get(column)
        if values is None:
            values = np.full(len(sample_ids), np.nan, np.float32)
        columns[column] = pa.array(values, pa.float32(), mask=bad)
    if kept is not None:
        for name in kept.column_names:
            if name in columns:
                raise OptionError(
                    f"`keep` {name} is the name of a column of scores; rename it in the input"
                )
            columns[name] = kept.column(name)
    return pa.table(columns)


def unknown_warnings(counts: Mapping[str, Counts], expected: Mapping[str, float]) -> list[str]:
    """Returns a warning for each feature with far more unknown ids than the test split of the
    training data (`expected`): over twice the share, and over 5 percentage points more."""
    sentences = []
    for name, of_feature in counts.items():
        if of_feature.ids < MIN_IDS:
            continue
        share, usual = of_feature.unknown / of_feature.ids, expected[name]
        if share > 2 * usual and share > usual + 0.05:
            sentences.append(
                f"{share:.1%} of the ids of {name!r} are unknown to the model, but {usual:.1%} in "
                "the test split of its training data; check that the column holds the same ids"
            )
    return sentences
