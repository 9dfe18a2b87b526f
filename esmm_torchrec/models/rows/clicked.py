"""Clicked impressions: alone (as in BASE), with copies of the conversions, or with a sample of the
unclicked impressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from esmm_torchrec.choices import Range
from esmm_torchrec.models.parts import LoggedImpressions, Rows, TrainingRows


@dataclass(frozen=True)
class ClickedRows(Rows):
    """Train on clicked impressions only."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects each clicked impression once."""
        return TrainingRows(np.flatnonzero(impressions.clicked))


@dataclass(frozen=True)
class OversampledRows(Rows):
    """Train on clicked impressions with each conversion repeated.

    This biases pCVR: the odds of a conversion are `rate` times too high.
    """

    rate: Annotated[
        int, Range("a whole number above 0", lambda rate: rate >= 1 and rate % 1 == 0)
    ] = 2
    """Number of times that each conversion occurs, including the original."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects the clicked impressions, `rate` times if they converted and else once."""
        clicked = np.flatnonzero(impressions.clicked)
        return TrainingRows(
            np.repeat(clicked, np.where(impressions.converted[clicked], self.rate, 1))
        )


@dataclass(frozen=True)
class MissingAsNegativeRows(Rows):
    """Train on clicked impressions and sampled unclicked ones.

    AMAN, "all missing as negative" (Pan et al., "One-Class Collaborative Filtering", ICDM 2008).
    """

    rate: Annotated[float, Range("a number above 0 and up to 1", lambda rate: 0 < rate <= 1)] = 0.1
    """Share of the unclicked impressions that are sampled."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects all clicked impressions and a share `rate` of the others, in order."""
        clicked = impressions.clicked
        return TrainingRows(
            np.flatnonzero(clicked | (impressions.uniform(len(clicked)) < self.rate))
        )
