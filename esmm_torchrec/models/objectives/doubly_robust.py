"""Doubly robust: an imputed error over all impressions, corrected on the clicks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

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

IMPUTATION = "imputation"
"""Name of the logit of the imputed error ê = softplus(logit), which is not a probability."""


@dataclass(frozen=True)
class DoublyRobustObjective(PropensityObjective):
    """mean BCE(y, pCTR) + λ꜀·mean{sg ê + y·(e − sg ê)/q + v·(sg e − ê)²}
    + λ₉·mean BCE(y·z, pCTR · pCVR), all over D, e = BCE(z, pCVR).

    v = y/q: ESCM²-DR (Wang et al., SIGIR 2022), and with λ₉ = 0 Multi-DR (Zhang et al., WWW 2020).
    v = y·(1 − q)/q² and λ₉ = 0: MRDR (Guo et al., "Enhanced Doubly Robust Learning for Debiasing
    Post-Click Conversion Rate Estimation", SIGIR 2021).

    The input of the imputation tower is the features, not pCVR. Hence the conversion tower has the
    gradient of the IPS objective, and the imputation affects it through shared embeddings only.
    """

    conversion_loss_weight: NotNegative = 0.1
    """λ꜀."""
    ctcvr_loss_weight: NotNegative = 1.0
    """λ₉."""
    imputation: Literal["dr", "mrdr"] = "dr"
    """Weights of the imputation's errors: dr weights by 1/q, mrdr by (1 − q)/q²."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for the imputed error, and one for each of the two tasks."""
        return (Head(IMPUTATION), *heads_of_two(tasks, "doubly-robust"))

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the weighted sum of the terms, each a mean over all impressions."""
        click = tasks[0]
        weights = self.inverse(logits[click.name], batch.labels[click.label], batch.weight)
        imputed = F.softplus(logits[IMPUTATION])
        error = conversion_loss(logits, batch, tasks)
        robust = imputed.detach() + weights * (error - imputed.detach())
        # (1 − q)/q² = (1/q − 1)/q
        certainty = weights * (weights - 1) if self.imputation == "mrdr" else weights
        robust = robust + certainty * (error.detach() - imputed).square()
        total = click_loss(logits, batch, tasks) + self.conversion_loss_weight * robust
        total = total + self.ctcvr_loss_weight * ctcvr_loss(logits, batch, tasks)
        return losses.weighted_mean(total, batch.weight, batch.mean_weight)
