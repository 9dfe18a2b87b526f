"""Delayed conversions: a click without a conversion is not a negative yet.

Each objective learns p = P(conversion | click) = σ(x) on the rows of a part of `rows.delayed`.
Weights are constants: no gradient flows through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.esmm import joint_label
from esmm_torchrec.models.objectives.single import ConversionObjective
from esmm_torchrec.models.parts import Head
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import TaskChain

_RATE = "delay_rate"
_LATE, _REAL = "delayed_positive", "real_negative"


@torch.fx.wrap
def _of_rows(batch: ImpressionBatch, name: str) -> torch.Tensor:
    """Returns a label of the rows part, float32 (B,); 0 in a batch that is only scored, whose
    loss is not used."""
    found = batch.labels.get(name)
    return torch.zeros_like(next(iter(batch.labels.values()))) if found is None else found


@dataclass(frozen=True)
class DelayedFeedbackObjective(ConversionObjective):
    """DFM (Chapelle, KDD 2014): the delay is exponentially distributed with its own rate λ(x).

    Converted after d days: −log p − log λ + λd. Not converted e days after the click:
    −log(1 − p + p·e^{−λe}). For the rows part "observed".
    """

    needs_labels: ClassVar[frozenset[str]] = frozenset({"elapsed", "delay"})

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns the logit of the last task, and h with λ = softplus(h) per day."""
        return (*super().heads(tasks), Head(_RATE))

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the mean over the rows of the global batch."""
        loss = dfm_loss(
            logits[tasks[-1].name],
            logits[_RATE],
            joint_label(batch, tasks.labels),
            elapsed=_of_rows(batch, "elapsed"),
            delay=_of_rows(batch, "delay"),
        )
        return losses.weighted_mean(loss, batch.weight, batch.mean_weight)


@torch.fx.wrap
def dfm_loss(
    logit: torch.Tensor,
    rate_logit: torch.Tensor,
    converted: torch.Tensor,
    *,
    elapsed: torch.Tensor,
    delay: torch.Tensor,
) -> torch.Tensor:
    """Computes DFM's loss per impression, float32 (B,).

    Args:
        logit: (B,), x.
        rate_logit: (B,), h.
        converted: (B,), 1 if a conversion was observed.
        elapsed: (B,), e in days.
        delay: (B,), d in days; used only where converted is 1.
    """
    rate = F.softplus(rate_logit)
    # softplus(h) is exp(h) to the last bit there, and would underflow further down.
    low = rate_logit < -20
    log_rate = torch.where(low, rate_logit, F.softplus(rate_logit.clamp_min(-20)).log())
    happened = F.softplus(-logit) - log_rate + rate * delay
    pending = -torch.logaddexp(-F.softplus(logit), -F.softplus(-logit) - rate * elapsed)
    return torch.where(converted > 0, happened, pending)


@dataclass(frozen=True)
class FakeNegativeObjective(ConversionObjective):
    """FNW, fake negative weighted (Ktena et al., RecSys 2019): z(1 + p)·−log p +
    (1 − z)(1 − p)(1 + p)·−log(1 − p). For the rows part "fake-negative"."""

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the mean over the rows of the global batch."""
        logit, label = logits[tasks[-1].name], joint_label(batch, tasks.labels)
        p = torch.sigmoid(logit).detach()
        loss = label * (1 + p) * F.softplus(-logit)
        loss = loss + (1 - label) * (1 - p) * (1 + p) * F.softplus(logit)
        return losses.weighted_mean(loss, batch.weight, batch.mean_weight)


@dataclass(frozen=True)
class ElapsedTimeObjective(ConversionObjective):
    """ES-DFM (Yang et al., AAAI 2021): z(1 + p_dp)·−log p + (1 − z)(1 + p_dp)·p_rn·−log(1 − p).

    p_dp is the probability that a click converts after it was observed, p_rn the probability that
    a click observed as a negative is one. The paper pretrains their networks on a log with final
    outcomes; here they are trained jointly, on the clicks whose outcome has become final.
    For the rows part "elapsed-time".
    """

    needs_labels: ClassVar[frozenset[str]] = frozenset(
        {"matured", "observed_negative", _LATE, _REAL}
    )

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns the logits of p_dp, of p_rn and of the last task."""
        (last,) = super().heads(tasks)
        return (
            Head(_LATE, _LATE, "matured"),
            Head(_REAL, _REAL, "observed_negative"),
            last._replace(given=tasks[0].label),
        )

    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Returns the mean over the rows of the global batch."""
        logit = logits[tasks[-1].name]
        label = joint_label(batch, tasks.labels)
        late, real = (torch.sigmoid(logits[name]).detach() for name in (_LATE, _REAL))
        positive = label * (1 + late) * F.softplus(-logit)
        negative = (1 - label) * (1 + late) * real * F.softplus(logit)
        loss = batch.labels[tasks[0].label] * (positive + negative)
        for name, space in ((_LATE, "matured"), (_REAL, "observed_negative")):
            entropy = losses.binary_cross_entropy(logits[name], _of_rows(batch, name))
            loss = loss + _of_rows(batch, space) * entropy
        return losses.weighted_mean(loss, batch.weight, batch.mean_weight)
