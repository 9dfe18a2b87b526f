"""Computes the scores by which impressions are ranked from the logits of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.division import joint_name
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


class Score(NamedTuple):
    """Probabilities of B impressions, in a form that neither underflows nor clips."""

    values: torch.Tensor
    """Logits or log-probabilities, float32 (B,)."""
    form: Literal["logit", "log_probability"]
    """Form of the values. The quotient of two networks is a log-probability, which may exceed 0."""

    @property
    def probability(self) -> torch.Tensor:
        """Probabilities, float32 (B,); a quotient is not clipped at 1."""
        return torch.sigmoid(self.values) if self.form == "logit" else torch.exp(self.values)


def read_scores(
    logits: Mapping[str, torch.Tensor], tasks: TaskChain = DEFAULT_TASKS
) -> dict[str, Score]:
    """Computes all scores that a model's logits determine, by `Task.rate` and `Task.joint`.

    A logit with the name of a task is that of P(task | given); a logit called `joint_name(task)`
    is that of P(task and all tasks before it). The other scores are derived: a product of
    conditional probabilities as its exact logit, a quotient of joint ones as its logarithm.

    Args:
        logits: name → float32 (B,). Other logits (of auxiliary towers) are ignored.
        tasks: the chain.

    Returns:
        "ctr", "cvr" and "ctcvr" for the default chain, without those that the logits do not
        determine.
    """
    scores: dict[str, Score] = {}
    for task in tasks:
        conditional = [logits.get(other.name) for other in tasks.prefix(task)]
        joint = None if task.given is None else logits.get(joint_name(task))
        before = tasks.given(task)
        joint_before = None if before is None else logits.get(joint_name(before))
        own = conditional[-1]
        if own is not None:
            scores[task.rate] = Score(own, "logit")
        elif joint is not None and joint_before is not None:
            ratio = losses.log_conversion_ratio(joint, joint_before)
            scores[task.rate] = Score(ratio, "log_probability")
        if task.given is None:
            continue
        if joint is not None:
            scores[task.joint] = Score(joint, "logit")
        elif all(logit is not None for logit in conditional):
            product = losses.product_logit([logit for logit in conditional if logit is not None])
            scores[task.joint] = Score(product, "logit")
    return scores


def probabilities(
    logits: Mapping[str, torch.Tensor], tasks: TaskChain = DEFAULT_TASKS
) -> dict[str, torch.Tensor]:
    """Returns the scores of `read_scores` as probabilities, float32 (B,): "ctr", "cvr", "ctcvr"."""
    return {name: score.probability for name, score in read_scores(logits, tasks).items()}
