"""The average of the weights of the latest steps, in place of those of the last step.

At a constant learning rate the weights carry the noise of the latest batches. With few rows that
noise is large, and an average of the weights is better than those of any step (Polyak and Juditsky,
"Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992); here it
is an exponential one, as in torch.optim.swa_utils. It takes a copy of the model, and a pass over
it every few steps, so it is for models of few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.nonfinite import local_tensors

DECAY = 0.999
"""Weight of the average against those of a step, once there are enough steps."""

STEPS_BETWEEN = 4
"""Steps between two additions to the average."""


class AverageWeights(Callback):
    """Averages the weights while a model trains, and leaves the average in the model at the end.

    It must come before callbacks that measure or save the model.
    """

    def __init__(self) -> None:
        self._weights: list[torch.Tensor] = []
        self._average: list[torch.Tensor] = []
        self._step = 0
        self._saved: Mapping[str, Any] | None = None

    def on_start(self, loop: TrainingLoop) -> None:
        """Starts with the weights of the model, or continues from a checkpoint on as many ranks. On
        another number of ranks the average begins anew with the weights of the checkpoint."""
        self._weights = [
            part.detach()
            for value in loop.trainer.model.state_dict().values()
            for part in local_tensors(value)
        ]
        self._average = [weight.clone() for weight in self._weights]
        self._step = loop.step
        if self._saved is not None:
            for average, saved in zip(self._average, self._saved["average"], strict=True):
                average.copy_(saved)
            self._step = self._saved["step"]

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        """Adds the weights of some steps; after the last one the model has the average."""
        is_last = loop.step == loop.last_step
        if loop.step % STEPS_BETWEEN == 0 or is_last:
            # Early on the average forgets faster, so that it does not keep the first weights.
            decay = min(DECAY, (1 + loop.step) / (10 + loop.step)) ** (loop.step - self._step)
            for average, weight in zip(self._average, self._weights, strict=True):
                average.lerp_(weight, 1 - decay)
            self._step = loop.step
        if is_last:
            for average, weight in zip(self._average, self._weights, strict=True):
                weight.copy_(average)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block, the model has the average and the average is put aside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def rank_state(self) -> dict[str, Any]:
        """The average of this rank's part of the weights."""
        return {"average": self._average, "step": self._step}

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the average of this rank, if there were as many ranks."""
        ranks = torch.distributed.get_world_size()
        self._saved = states[torch.distributed.get_rank()] if len(states) == ranks else None

    def _exchange(self) -> None:
        for average, weight in zip(self._average, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
