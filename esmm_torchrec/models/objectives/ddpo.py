"""DDPO: soft labels from a tower that is trained on clicks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import NotNegative
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.esmm import heads_of_two, joint_label
from esmm_torchrec.models.objectives.propensity import (
    PropensityObjective,
    click_loss,
    ctcvr_loss,
    share_of,
)
from esmm_torchrec.models.parts import Head
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain

CLICKED_CONVERSION = "clicked_conversion"
"""Name of the logit of c, the conversion probability learned on clicks only."""


@dataclass(frozen=True)
class DdpoObjective(PropensityObjective):
    """mean BCE(y, pCTR) + mean y·BCE(z, c) + w₂·mean BCE(y·z, pCTR · r)
    + w₁·{Σ_O BCE(min(z + sg c, 1), r)/q / Σ_O 1/q + Σ_N BCE(sg c, r)/q̄ / Σ_N 1/q̄}, r = pCVR, c the
    probability of the tower on clicks, N the unclicked impressions.

    DDPO ("Direct Dual Propensity Optimization for Post-click Conversion Rate Estimation", SIGIR
    2024); q̄ = max(1 − sg o, ε̄), ε̄ the same quantile over the unclicked. The labels of the last two
    terms are soft: if conversions are rare, they exceed the conversion rate of clicks by c itself.
    """

    conversion_loss_weight: NotNegative = 1.0
    """w₁."""
    ctcvr_loss_weight: NotNegative = 1.0
    """w₂."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for c, and one for each of the two tasks."""
        click, conversion = heads_of_two(tasks, "ddpo")
        return (conversion._replace(name=CLICKED_CONVERSION), click, conversion)

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the weighted sum of the terms, normalised over the global batch."""
        click, conversion = tasks
        clicked, converted = batch.labels[click.label], joint_label(batch, tasks.labels)
        own, taught = logits[conversion.name], logits[CLICKED_CONVERSION]
        mean = losses.weighted_mean(
            click_loss(logits, batch, tasks)
            + clicked * losses.binary_cross_entropy(taught, converted)
            + self.ctcvr_loss_weight * ctcvr_loss(logits, batch, tasks),
            batch.weight,
            batch.mean_weight,
        )
        soft = torch.sigmoid(taught.detach())
        on_clicks = share_of(
            losses.binary_cross_entropy(own, (converted + soft).clamp(max=1)),
            self.inverse(logits[click.name], clicked, batch.weight),
            batch,
        )
        unclicked = 1 - clicked
        inverse = self.inverse(-logits[click.name], unclicked, batch.weight)
        on_others = share_of(losses.binary_cross_entropy(own, soft), inverse, batch)
        return mean + self.conversion_loss_weight * (on_clicks + on_others)
