"""Raw rows that are scored: how they are read, their scores as columns, and what ids they held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.encoding import RowEncoder, RowsToEncode
from esmm_torchrec.data.sources.raw_tables import BadRows, Frame
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import SAMPLE_ID, UNKNOWN_ROW
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

    @classmethod
    def of(cls, encoded: pa.Array) -> Counts:
        """The counts of a feature as `encode_ids` gives it: int32 rows, or lists of them."""
        if pa.types.is_list(encoded.type):
            rows = encoded.flatten().to_numpy()
            missing = int((np.diff(encoded.offsets.to_numpy()) == 0).sum())
        else:
            rows, missing = encoded.drop_null().to_numpy(), encoded.null_count
        return cls(len(encoded), missing, len(rows), int((rows == UNKNOWN_ROW).sum()))

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

    def add(self, impressions: int, counts: Mapping[str, Counts]) -> None:
        """Adds further rows."""
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
    """Raw rows to score, as `RowEncoder.read_blocks` reads them.

    Raises:
        DataError: as that, or there is no row.
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
    """Columns sample_id int64 and, for each probability of the chain, float32: by default pctr,
    pcvr and pctcvr. A score that the model does not give is NaN; a quotient of probabilities
    (DIVISION's pcvr) may exceed 1.

    Args:
        scores: by column, float32 (n,).
        sample_ids: int64 (n,).
        bad: bool (n,), rows without scores, which are null; None: none.
        kept: further columns, of n rows.

    Raises:
        OptionError: a column to keep has the name of one of scores.
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
    """A sentence on each feature with far more unknown ids than the test split of the training data
    had (`expected`): over twice the share, and over 5 percentage points more."""
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
