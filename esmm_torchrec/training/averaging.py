"""Average of the weights of the latest steps, used in place of the weights of the last step.

At a constant learning rate, the weights carry the noise of the latest batches, and the noise grows
as the number of rows shrinks. An average of the weights carries less noise (Polyak and Juditsky,
"Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30, 1992). The
average is exponential, as in torch.optim.swa_utils. It needs a copy of the model and updates the
copy every few steps, so it suits models trained on few rows.
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
"""Decay of the average per step, reached after enough steps."""

STEPS_BETWEEN = 4
"""Number of steps between two updates of the average."""


class AverageWeights(Callback):
    """Averages the weights while a model trains, and copies the average to the model at the end.

    This callback must come before those that measure or save the model.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._began = self._step = 0
        self._saved: Sequence[Mapping[str, Any]] | None = None

    def on_start(self, loop: TrainingLoop) -> None:
        """Starts with the weights of the model, or continues from a checkpoint, which may have been
        written on any number of ranks and with any placement."""
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
        """Updates the average every few steps; after the last step, copies it to the model."""
        if loop.step == loop.last_step:
            self._finish(loop.step)
        elif loop.step % STEPS_BETWEEN == 0:
            self._add(loop.step)

    def _add(self, step: int) -> None:
        # Early on, the decay is stronger, so that the average does not keep the first weights.
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
        """Swaps the average into the model for the duration of the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def rank_state(self) -> dict[str, Any]:
        """Returns the average of this rank's parts of the weights, each with its offset."""
        average: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
        for part in self._parts:
            average.setdefault(part.key, []).append((part.place, part.average))
        return {"average": average, "began": self._began, "step": self._step}

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Stores the states of all ranks; `on_start` picks this rank's parts from them."""
        self._saved = states

    def _exchange(self) -> None:
        for part in self._parts:
            kept = part.weight.clone()
            part.weight.copy_(part.average)
            part.average.copy_(kept)


class _Part(NamedTuple):
    """A part of a weight, stored on this rank."""

    key: str
    """Key of the weight in the model's `state_dict`."""
    place: tuple[int, ...]
    """Offset of the part in the weight: its first index in every dimension."""
    weight: torch.Tensor
    average: torch.Tensor


def _copy_overlap(
    to: torch.Tensor, place: Sequence[int], saved: torch.Tensor, saved_place: Sequence[int]
) -> None:
    """Copies the overlap of two parts of the same weight from `saved` to `to`."""
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
