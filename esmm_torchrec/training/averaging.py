"""The average of the weights of the latest steps, in place of those of the last step.

At a constant learning rate the weights carry the noise of the latest batches, and the fewer rows
there are, the larger that noise is. An average of the weights carries less of it (Polyak and
Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992);
here it is an exponential one, as in torch.optim.swa_utils. It takes a copy of the model, and a
pass over it every few steps, so it is for models of few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.sharding.apply import local_shards
from esmm_torchrec.training.loop import Callback, TrainingLoop

DECAY = 0.999
"""Weight of the average against those of a step, once there are enough steps."""

STEPS_BETWEEN = 4
"""Steps between two additions to the average."""


class AverageWeights(Callback):
    """Averages the weights while a model trains, and leaves the average in the model at the end.

    It must come before callbacks that measure or save the model.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._began = self._step = 0
        self._saved: Sequence[Mapping[str, Any]] | None = None

    def on_start(self, loop: TrainingLoop) -> None:
        """Starts with the weights of the model, or continues from a checkpoint, of any number of
        ranks and any placement."""
        self._parts = [
            _Part(key, place, part.detach(), part.detach().clone())
            for key, value in loop.trainer.model.state_dict().items()
            for part, place in local_shards(value)
        ]
        self._began = self._step = loop.step
        if self._saved is None:
            return
        self._began, self._step = (self._saved[0][name] for name in ("began", "step"))
        for part in self._parts:
            for state in self._saved:
                for place, saved in state["average"].get(part.key, ()):
                    _copy_overlap(part.average, part.place, saved, place)
        self._saved = None
        if loop.step == loop.last_step:
            self._finish(loop.step)

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        """Adds the weights of some steps; after the last one the model has the average."""
        if loop.step == loop.last_step:
            self._finish(loop.step)
        elif loop.step % STEPS_BETWEEN == 0:
            self._add(loop.step)

    def _add(self, step: int) -> None:
        # Early on the average forgets faster, so that it does not keep the first weights.
        steps = step - self._began
        decay = min(DECAY, (1 + steps) / (10 + steps)) ** (step - self._step)
        for part in self._parts:
            part.average.lerp_(part.weight, 1 - decay)
        self._step = step

    def _finish(self, step: int) -> None:
        self._add(step)
        for part in self._parts:
            part.weight.copy_(part.average)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block, the model has the average and the average is put aside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def rank_state(self) -> dict[str, Any]:
        """The average of this rank's parts of the weights, each with its place."""
        average: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
        for part in self._parts:
            average.setdefault(part.key, []).append((part.place, part.average))
        return {"average": average, "began": self._began, "step": self._step}

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Keeps what all ranks saved until the parts of this one are known."""
        self._saved = states

    def _exchange(self) -> None:
        for part in self._parts:
            kept = part.weight.clone()
            part.weight.copy_(part.average)
            part.average.copy_(kept)


class _Part(NamedTuple):
    """A part of a weight that this rank holds."""

    key: str
    """Of the weight in the model's state."""
    place: tuple[int, ...]
    """Its first index in every dimension."""
    weight: torch.Tensor
    average: torch.Tensor


def _copy_overlap(
    to: torch.Tensor, place: Sequence[int], saved: torch.Tensor, saved_place: Sequence[int]
) -> None:
    """Copies what two parts of one weight have in common."""
    own: list[slice] = []
    other: list[slice] = []
    for size, first, saved_size, saved_first in zip(
        to.shape, place, saved.shape, saved_place, strict=True
    ):
        start, stop = max(first, saved_first), min(first + size, saved_first + saved_size)
        if start >= stop:
            return
        own.append(slice(start - first, stop - first))
        other.append(slice(start - saved_first, stop - saved_first))
    to[tuple(own)] = saved[tuple(other)]
