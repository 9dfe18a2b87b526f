"""NISE: the entropy of pCVR as the loss of impressions without a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.choices import NotNegative
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives import propensity
from esmm_torchrec.models.objectives.esmm import heads_of_two
from esmm_torchrec.models.parts import Head, Objective
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain


@dataclass(frozen=True)
class NiseObjective(Objective):
    """mean BCE(y, pCTR) + w·mean{y·BCE(z, r) + (1 − y)·BCE(r, r)}, both over D, r = pCVR.

    NISE ("Utilizing Non-click Samples via Semi-supervised Learning for Conversion Rate Prediction",
    RecSys 2024). BCE(r, r) is the entropy of r; the gradient flows through the target too, because
    with a detached target it would be 0. w is the quotient of the two means of the global batch,
    without gradient.
    """

    max_conversion_weight: NotNegative = 50.0
    """Maximum of w."""

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns a logit for each of the two tasks."""
        return heads_of_two(tasks, "nise")

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the click term plus the weighted conversion term, each a mean over D."""
        clicked = batch.labels[tasks[0].label]
        click = losses.weighted_mean(
            propensity.click_loss(logits, batch, tasks), batch.weight, batch.mean_weight
        )
        each = clicked * propensity.conversion_loss(logits, batch, tasks)
        each = each + (1 - clicked) * losses.entropy(logits[tasks[-1].name])
        conversion = losses.weighted_mean(each, batch.weight, batch.mean_weight)
        over_all = [propensity.mean_over_ranks(mean) for mean in (click, conversion)]
        smallest = torch.finfo(torch.float32).tiny
        weight = (over_all[0] / over_all[1].clamp(min=smallest)).clamp(
            max=self.max_conversion_weight
        )
        return click + weight * conversion
