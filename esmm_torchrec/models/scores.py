"""From the logits of a model to the scores by which impressions are ranked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from esmm_torchrec.models import losses
from esmm_torchrec.models.objectives.division import joint_name
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


class Score(NamedTuple):
    """A probability of B impressions, in a form that neither underflows nor clips."""

    values: torch.Tensor
    """float32 (B,)."""
    form: Literal["logit", "log_probability"]
    """A quotient of two networks is a log-probability: it may exceed 0."""

    @property
    def probability(self) -> torch.Tensor:
        """float32 (B,); a quotient is not clipped at 1."""
        return torch.sigmoid(self.values) if self.form == "logit" else torch.exp(self.values)


def read_scores(
    logits: Mapping[str, torch.Tensor], tasks: TaskChain = DEFAULT_TASKS
) -> dict[str, Score]:
    """The scores that a model's logits allow, by the names of `Task.rate` and `Task.joint`.

    A logit called like a task is that of the task given the one before; one called
    `joint_name(task)` is that of the task and all before it. The others follow: a product of
    conditional probabilities by its exact logit, a quotient of joint ones by its logarithm.

    Args:
        logits: name → float32 (B,). Further logits (of auxiliary towers) are ignored.
        tasks: the chain.

    Returns:
        for the default chain "ctr", "cvr" and "ctcvr", without those that the model cannot give.
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
    """The probabilities of `read_scores`, float32 (B,) by the same names: "ctr", "cvr", "ctcvr"."""
    return {name: score.probability for name, score in read_scores(logits, tasks).items()}
