"""ESM²: an optional action between the click and the last task.

Wen et al., "Entire Space Multi-Task Modeling via Post-Click Behavior Decomposition for Conversion
Rate Prediction", SIGIR 2020. Impression → click → {cart or wish | nothing} → order:

    P(order | click) = y₂·y₃ + (1 − y₂)·y₄        y₂ = P(cart | click), y₃ = P(order | cart),
                                                  y₄ = P(order | click without a cart)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from esmm_torchrec.batch import BatchFeatures
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.objectives.esmm import EsmmObjective, task_heads
from esmm_torchrec.models.parts import Head
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import Task, TaskChain


@torch.fx.wrap
def mixture_logit(
    chosen: torch.Tensor, if_chosen: torch.Tensor, if_not: torch.Tensor
) -> torch.Tensor:
    """Returns the exact logit of σ(chosen)·σ(if_chosen) + (1 − σ(chosen))·σ(if_not).

    The probability and its complement are both sums of two products, so that their logarithms
    need no subtraction.

    Args:
        chosen: (B,), logit of taking the branch; any float dtype, as for the others.
        if_chosen: (B,), logit on the branch.
        if_not: (B,), logit off the branch.

    Returns:
        float32 (B,).
    """
    chosen, if_chosen, if_not = chosen.float(), if_chosen.float(), if_not.float()
    on, beside = F.logsigmoid(chosen), F.logsigmoid(-chosen)
    happens = torch.logaddexp(on + F.logsigmoid(if_chosen), beside + F.logsigmoid(if_not))
    does_not = torch.logaddexp(on + F.logsigmoid(-if_chosen), beside + F.logsigmoid(-if_not))
    return happens - does_not


class BranchedModel(nn.Module):
    """Adds the logit of the last task, computed from its branches, to the logits of a model.

    Args:
        model: returns a logit for each of the heads of `Esm2Objective`.
        tasks: the chain.
    """

    def __init__(self, model: nn.Module, tasks: TaskChain) -> None:
        super().__init__()
        self.model = model
        _, action, last = tasks
        self._action, self._last = action.name, last.name
        self._branches = _branches(action, last)

    def forward(self, features: BatchFeatures) -> Logits:
        """Returns the logits of the model and that of the last task, float32 (B,) each."""
        logits = self.model(features)
        last = mixture_logit(logits[self._action], *(logits[name] for name in self._branches))
        return _with(logits, self._last, last)


@torch.fx.wrap
def _with(logits: Logits, name: str, logit: torch.Tensor) -> Logits:
    return Logits({**logits, name: logit})


def _branches(action: Task, last: Task) -> tuple[str, str]:
    return f"{last.name}_given_{action.name}", f"{last.name}_given_no_{action.name}"


@dataclass(frozen=True)
class Esm2Objective(EsmmObjective):
    """mean BCE(click, y₁) + mean BCE(cart, y₁·y₂) + mean BCE(order, y₁·(y₂·y₃ + (1 − y₂)·y₄)).

    All means are over all impressions; `detach_click` also keeps the third term from training y₁.
    The chain consists of a click and two tasks conditional on it, such as
    `TaskChain.of("click", "cart", "order:click")`.
    """

    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns the logits of the click, the action, and the last task with and without it.

        Raises:
            OptionError: the chain does not have this form.
        """
        if [task.given for task in tasks] != [None, tasks[0].name, tasks[0].name]:
            raise OptionError(
                "the objective esm2 needs a chain of three tasks whose second and third are given "
                "the first; prepare the data with `actions` such as click cart order:click"
            )
        first, action, last = tasks
        # The base rates of the branches are unknown; that of the last task is between them.
        of_branches = (Head(name, last.label, first.label) for name in _branches(action, last))
        return (*task_heads(tasks)[:2], *of_branches)

    def complete(self, model: nn.Module, tasks: TaskChain) -> BranchedModel:
        """Adds the logit of the last task."""
        return BranchedModel(model, tasks)
