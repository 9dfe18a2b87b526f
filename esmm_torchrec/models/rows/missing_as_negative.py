"""Clicked impressions and a sample of the unclicked ones, taken for negatives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.parts import LoggedImpressions, Rows, TrainingRows


@dataclass(frozen=True)
class MissingAsNegativeRows(Rows):
    """Train on clicked impressions and sampled unclicked ones.

    AMAN, "all missing as negative" (Pan et al., "One-Class Collaborative Filtering", ICDM 2008).

    Raises:
        OptionError: the rate is not in (0, 1].
    """

    rate: float = 0.1
    """Share of the unclicked impressions that are sampled."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise OptionError(f"`rows.rate` {self.rate:g} is not a share above 0 and up to 1")

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """All clicked impressions and `rate` of the others, in their order."""
        clicked = impressions.clicked
        return TrainingRows(
            np.flatnonzero(clicked | (impressions.uniform(len(clicked)) < self.rate))
        )
