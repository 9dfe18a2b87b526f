"""Delays of conversions in a drawn world: exponential, with a known rate for each impression.

The rate depends on the category of the item, so that it can be learned from the features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.subsets import ids_of
from esmm_torchrec.schema import CLICK, CONVERSION, CONVERSION_TIME, NEVER, TIMESTAMP

CATEGORY = "206"
"""Ali-CCP's field of the item's category."""

DAY = 86_400
"""Seconds per day."""


@dataclass(frozen=True)
class Delays:
    """Distribution of the delays of conversions."""

    days: float = 14.0
    """Length of a split in days; its impressions are spread evenly over it, in their order."""
    mean: float = 2.0
    """Mean delay in the median category, in days."""
    spread: float = 0.7
    """Standard deviation of the logarithm of a category's mean delay."""

    def add_to(self, split: MappedSplit, *, seed: int) -> MappedSplit:
        """Returns the split with the times of impressions and of all conversions, however late.

        Args:
            split: a split of a drawn world.
            seed: seed of the delays; with equal seeds, a category has the same mean delay in both
                splits of a world.
        """
        size = split.impressions
        times = np.linspace(0, self.days * DAY, size, endpoint=False).astype(np.int64)
        delay = np.random.default_rng([seed, size]).exponential(self.mean_of(split, seed=seed))
        converted = split.scalars[CLICK] * split.scalars[CONVERSION] == 1
        later = np.where(converted, times + np.ceil(delay * DAY).astype(np.int64), NEVER)
        return replace(split, scalars=split.scalars | {TIMESTAMP: times, CONVERSION_TIME: later})

    def mean_of(self, split: MappedSplit, *, seed: int) -> npt.NDArray[np.float64]:
        """Returns (impressions,), the mean delay of a conversion in days: 1 / λ."""
        table = next(of.table for of in split.schema.id_features if of.name == CATEGORY)
        rng = np.random.default_rng([seed, 1])
        of_category = rng.normal(0, self.spread, split.schema.table(table).num_embeddings)
        return self.mean * np.exp(of_category[ids_of(split, CATEGORY)])
