"""Training loop: passes of steps, with callbacks.

The loop counts steps and time; callbacks do everything else that happens while a model trains.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from esmm_torchrec.data.batch_reader import BatchReader
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.trainer import Trainer


class Callback:
    """Base class of callbacks of a training loop; methods that are not overridden do nothing.

    Every rank calls the same method at the same step, so a callback may use collectives. Callbacks
    are called in the order in which they were passed to the loop.
    """

    def on_start(self, loop: TrainingLoop) -> None:
        """Called before the first step, once the starting position is known."""

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:
        """Called after each step. TorchRec's pipeline is using the model, so it must not be
        called."""

    def on_pause(self, loop: TrainingLoop) -> None:
        """Called between two steps, at the end of each pass and after `TrainingLoop.pause`. The
        model may be called."""

    def on_end(self, loop: TrainingLoop) -> None:
        """Called after the last step, but not after an error."""

    def check(self, loop: TrainingLoop) -> None:
        """Called before a checkpoint is saved; raises if the state must not be saved."""

    def rank_state(self) -> dict[str, Any]:
        """Returns this rank's state for a checkpoint: tensors, numbers, strings and containers of
        them; empty for a callback without state."""
        return {}

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restores the state from a checkpoint, before `on_start`. `states` has the `rank_state` of
        each rank that saved it, which may be more or fewer ranks than now."""

    def close(self) -> None:
        """Called at the end in any case, also after an error."""


class TrainingLoop:
    """Trains a model for a number of passes or steps; every rank runs the same loop.

    Args:
        epochs: number of passes over the impressions.
        max_steps: step to stop after, regardless of the passes; None: no limit.
    """

    def __init__(
        self,
        trainer: Trainer,
        reader: BatchReader,
        ranks: Ranks,
        *,
        epochs: int,
        max_steps: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.trainer = trainer
        self.reader = reader
        self.ranks = ranks
        self.epochs = epochs
        self.max_steps = max_steps
        self.callbacks = callbacks
        self.step = 0
        """Number of steps done."""
        self.figures: dict[str, float] = {}
        """Latest running figures, on rank 0; see `callbacks.LogFigures`."""
        self._seconds = 0.0
        self._started: float | None = None
        self._pausing = False
        self._stopped = False

    @property
    def last_step(self) -> int:
        """Number of the last step. Earlier steps may have had another size, so only the steps to
        come are computed from the number of rows."""
        if self._stopped:
            return self.step
        to_come = 0
        if self.reader.epoch < self.epochs:
            later_epochs = self.epochs - self.reader.epoch - 1
            to_come = self.reader.steps_left + later_epochs * self.reader.steps_per_epoch
        last = self.step + to_come
        return last if self.max_steps is None else max(self.step, min(last, self.max_steps))

    @property
    def seconds(self) -> float:
        """Seconds spent training so far, up to the end of the device's current step."""
        if self._started is None:
            return self._seconds
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)  # to time steps, not kernel launches
        return self._seconds + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and the training time as JSON-compatible values."""
        return {"step": self.step, "seconds": self.seconds, "reader": self.reader.state_dict()}

    def rank_state(self) -> dict[str, Any]:
        """Returns class name → state of this rank's callback; to be called on every rank."""
        states = {type(callback).__name__: callback.rank_state() for callback in self.callbacks}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(
        self, state: Mapping[str, Any], rank_states: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Restores a `state_dict` on any number of ranks.

        Args:
            state: position and training time.
            rank_states: `rank_state` of each rank that saved `state`, if known.
        """
        self.step, self._seconds = state["step"], state["seconds"]
        self.reader.load_state_dict(state["reader"])
        for callback in self.callbacks:
            name = type(callback).__name__
            if rank_states and all(name in own for own in rank_states):
                callback.load_rank_states([own[name] for own in rank_states])

    def check(self) -> None:
        """Checks that the current state may be saved; see `Callback.check`."""
        for callback in self.callbacks:
            callback.check(self)

    def stop(self) -> None:
        """Ends training after the current step; to be called on every rank."""
        self._stopped = True

    def pause(self) -> None:
        """Requests `Callback.on_pause` after the current step; to be called on every rank."""
        self._pausing = True

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Excludes the time spent inside the block from the training time."""
        running = self._started is not None
        self._stop_clock()
        try:
            yield
        finally:
            if running:
                self._started = time.perf_counter()

    def run(self) -> None:
        """Trains from the current position to the end."""
        for _ in self.steps():
            pass

    def steps(self) -> Generator[None, None, None]:
        """Trains like `run`, one step per `next`; time spent between two calls counts as training
        time."""
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            yield from self._train()
            for callback in self.callbacks:
                callback.on_end(self)
        finally:
            for callback in self.callbacks:
                callback.close()

    def _train(self) -> Generator[None, None, None]:
        self._started = time.perf_counter()
        while self.step < self.last_step:
            epoch = self.reader.epoch
            steps = min(self.reader.steps_left, self.last_step - self.step)
            outputs = self.trainer.steps(self.reader, steps)
            for output in outputs:
                self.step += 1
                for callback in self.callbacks:
                    callback.on_step(self, output)
                if self._pausing or self._stopped:
                    outputs.close()
                    break
                yield
            if self._pausing or self.reader.epoch != epoch:
                self._pausing = False
                with self.off_the_clock():
                    for callback in self.callbacks:
                        callback.on_pause(self)
        self._stop_clock()

    def _stop_clock(self) -> None:
        self._seconds = self.seconds
        self._started = None
