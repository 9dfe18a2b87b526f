"""Inverse propensity scoring of clicks."""

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
)
from esmm_torchrec.models.parts import Head
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain


@dataclass(frozen=True)
class IpsObjective(PropensityObjective):
    """mean BCE(y, pCTR) + λ꜀·mean y·BCE(z, pCVR)/q + λ₉·mean BCE(y·z, pCTR · pCVR), all over D.

    ESCM²-IPS (Wang et al., "ESCM²: Entire Space Counterfactual Multi-Task Model", SIGIR 2022);
    with λ₉ = 0 Multi-IPW (Zhang et al., "Large-scale Causal Approaches to Debiasing Post-click
    Conversion Rate Estimation", WWW 2020). The authors of ESCM² clip q at .1; at a CTR of .04,
    nearly every weight would then be 10, so q is clipped at a quantile of pCTR here.
    """

    conversion_loss_weight: NotNegative = 0.1
    """λ꜀."""
    ctcvr_loss_weight: NotNegative = 1.0
    """λ₉."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for each of the two tasks."""
        return heads_of_two(tasks, "ips")

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the weighted sum of the terms, each a mean over all impressions."""
        click = tasks[0]
        weights = self.inverse(logits[click.name], batch.labels[click.label], batch.weight)
        total = click_loss(logits, batch, tasks)
        total = total + self.conversion_loss_weight * weights * conversion_loss(
            logits, batch, tasks
        )
        total = total + self.ctcvr_loss_weight * ctcvr_loss(logits, batch, tasks)
        return losses.weighted_mean(total, batch.weight, batch.mean_weight)
