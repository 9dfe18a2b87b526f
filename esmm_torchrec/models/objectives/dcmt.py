"""DCMT: a counterfactual conversion tower for the unclicked impressions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import NotNegative
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.esmm import heads_of_two
from esmm_torchrec.models.objectives.propensity import (
    PropensityObjective,
    click_loss,
    conversion_loss,
    ctcvr_loss,
    share_of,
)
from esmm_torchrec.models.parts import Head
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain

COUNTERFACTUAL = "counterfactual"
"""Name of the logit of r*, the probability of no conversion, learned on unclicked impressions."""


@dataclass(frozen=True)
class DcmtObjective(PropensityObjective):
    """w₁·{Σ_O BCE(z, r)/q / Σ_O 1/q + Σ_N BCE(1, r*)/q̄ / Σ_N 1/q̄ + λ·mean |1 − r − r*|}
    + mean BCE(y, pCTR) + w₂·mean BCE(y·z, pCTR · r), r = pCVR, N the unclicked impressions.

    DCMT (Zhu et al., "DCMT: A Direct Entire-Space Causal Multi-Task Framework for Post-Click
    Conversion Estimation", ICDE 2023), whose authors published no code.
    q̄ = max(1 − sg o, ε̄), ε̄ the same quantile over the unclicked. Every unclicked impression counts
    as one that would not have converted, which biases r downwards: check PCOC.
    """

    conversion_loss_weight: NotNegative = 1.0
    """w₁."""
    ctcvr_loss_weight: NotNegative = 1.0
    """w₂."""
    counterfactual_weight: NotNegative = 0.001
    """λ."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for r*, and one for each of the two tasks."""
        return (Head(COUNTERFACTUAL), *heads_of_two(tasks, "dcmt"))

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the weighted sum of the terms, normalised over the global batch."""
        click, conversion = tasks
        clicked = batch.labels[click.label]
        unclicked = 1 - clicked
        factual = share_of(
            conversion_loss(logits, batch, tasks),
            self.inverse(logits[click.name], clicked, batch.weight),
            batch,
        )
        counterfactual = share_of(
            losses.binary_cross_entropy(logits[COUNTERFACTUAL], torch.ones_like(clicked)),
            self.inverse(-logits[click.name], unclicked, batch.weight),
            batch,
        )
        # 1 − r − r*
        gap = torch.sigmoid(-logits[conversion.name]) - torch.sigmoid(logits[COUNTERFACTUAL])
        rest = click_loss(logits, batch, tasks)
        rest = rest + self.ctcvr_loss_weight * ctcvr_loss(logits, batch, tasks)
        rest = rest + self.conversion_loss_weight * self.counterfactual_weight * gap.abs()
        mean = losses.weighted_mean(rest, batch.weight, batch.mean_weight)
        return mean + self.conversion_loss_weight * (factual + counterfactual)
