"""Clicked impressions, sampled or weighted to follow the distribution of all impressions.

The ESMM paper describes UNBIAS only as "rejection sampling … pCTR is taken as the rejection
probability". The interpretation here: a click is accepted with a probability proportional to
1 / pCTR (p(x | click) ∝ p(click | x)·p(x), so this undoes the selection by clicks). 1 / pCTR is
clipped at a quantile over the clicks, so that a few extreme values do not dominate. pCTR must come
from networks that were not trained on the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.choices import Range
from esmm_torchrec.models.parts import LoggedImpressions, Rows, TrainingRows


@dataclass(frozen=True)
class RejectionSampledRows(Rows):
    """Train on clicks accepted with probability ∝ 1 / pCTR."""

    rate: Annotated[float, Range("a number above 0 and up to 1", lambda rate: 0 < rate <= 1)] = 0.9
    """Quantile over the clicks at which 1 / pCTR is clipped."""

    needs_pctr: ClassVar[bool] = True

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects the accepted clicks."""
        clicked, acceptance = self._acceptance(impressions)
        accepted = impressions.uniform(len(clicked)) < acceptance
        return TrainingRows(
            clicked[accepted],
            notes={
                "acceptance_rate": float(accepted.mean()),
                "effective_sample_size": float(accepted.sum()),
            },
        )

    def _acceptance(
        self, impressions: LoggedImpressions
    ) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
        """Returns the clicked rows and the probability of accepting each."""
        assert impressions.pctr is not None
        clicked = np.flatnonzero(impressions.clicked)
        inverse = 1.0 / impressions.pctr[clicked].astype(np.float64)
        limit = np.quantile(inverse, self.rate, method="higher")
        return clicked, np.minimum(inverse, limit) / limit


@dataclass(frozen=True)
class InversePropensityRows(RejectionSampledRows):
    """Train on every click, with weights ∝ 1 / pCTR instead of rejection."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects all clicks, with weights of mean 1."""
        clicked, acceptance = self._acceptance(impressions)
        weights = (acceptance / acceptance.mean()).astype(np.float32)
        return TrainingRows(
            clicked,
            weights,
            notes={
                "acceptance_rate": float(acceptance.mean()),
                "effective_sample_size": float(acceptance.sum() ** 2 / (acceptance**2).sum()),
            },
        )
