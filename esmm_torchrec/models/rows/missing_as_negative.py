"""Clicked impressions and a sample of the unclicked ones, taken for negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from esmm_torchrec.choices import Range
from esmm_torchrec.models.parts import LoggedImpressions, Rows, TrainingRows


@dataclass(frozen=True)
class MissingAsNegativeRows(Rows):
    """Train on clicked impressions and sampled unclicked ones.

    AMAN, "all missing as negative" (Pan et al., "One-Class Collaborative Filtering", ICDM 2008).
    """

    rate: Annotated[float, Range("above 0 and up to 1", lambda rate: 0 < rate <= 1)] = 0.1
    """Share of the unclicked impressions that are sampled."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """All clicked impressions and `rate` of the others, in their order."""
        clicked = impressions.clicked
        return TrainingRows(
            np.flatnonzero(clicked | (impressions.uniform(len(clicked)) < self.rate))
        )
