"""Validation: held-out impressions of the training split, measured while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import SharedFeatures
from esmm_torchrec.data.subsets import only_ids_of, rows_between
from esmm_torchrec.errors import DataError
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.schema import TIMESTAMP
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.tasks import TaskChain
from esmm_torchrec.training.averaging import AverageWeights
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import ValidationOption

MIN_ROWS_BETWEEN = 1_000_000
"""Minimum number of training rows between two measurements within a pass."""

MIN_ROWS_PER_HELD_OUT = 4
"""Minimum number of training rows between two measurements, per held-out row: measuring a row takes
a third of the time of training on it."""

MAX_MEASUREMENTS_PER_PASS = 10


@dataclass(frozen=True)
class HeldOut:
    """Division of the training split into training rows and held-out rows."""

    kept: np.ndarray
    """Rows to train on, int64, ascending."""
    rows: np.ndarray
    """Held-out rows, int64 (H,), ascending."""


def hold_out(split: MappedSplit, *, share: float, by: ValidationOption) -> HeldOut:
    """Divides the training split.

    Args:
        share: share of the rows to hold out, in (0, 1); it is met on average (hash), or exceeded by
            at most the rows of one timestamp (time).
        by: choice of the held-out rows.

    Raises:
        DataError: the rows have no timestamps, or one side is empty.
    """
    if by == "hash":
        held_out = rows_between(split, 0.0, share, purpose="validation")
        kept = rows_between(split, share, 1.0, purpose="validation")
    else:
        times = split.scalars.get(TIMESTAMP)
        if times is None:
            raise DataError(
                "the data set has no timestamps to validate by; prepare it with `timestamp`, or "
                "use `validation` hash"
            )
        place = min(int(len(times) * (1 - share)), len(times) - 1)
        is_late = times >= np.partition(times, place)[place]
        held_out, kept = np.flatnonzero(is_late), np.flatnonzero(~is_late)
    if not (len(held_out) and len(kept)):
        raise DataError(
            f"holding out {share:g} of {split.impressions:,} training impressions by {by} leaves "
            f"{len(kept):,} to train on and {len(held_out):,} to validate on; choose another "
            "`validation_share`"
        )
    return HeldOut(kept, held_out)


def mean_normalised_entropy(figures: Mapping[str, Any], tasks: TaskChain) -> float | None:
    """Returns the mean of the normalised entropies of all probabilities that the model predicts and
    that can be measured; None if there is none. It determines when training stops.

    Args:
        figures: "test" of `metrics.report.measure`.
    """
    keys = [f"{probability.name}_ne" for probability in tasks.probabilities]
    values = [figures[key] for key in keys if figures.get(key) is not None]
    return math.fsum(values) / len(values) if values else None


class Validate(Callback):
    """Measures the model on held-out impressions after each pass, and within long passes.

    Ids that do not occur in the training rows are replaced by the unknown id, as in test data.

    Args:
        held_out: rows to train on, and rows to measure on.
        patience: number of passes after the best one until training stops; None: no early stopping.
        shared_features: form of the shared features in a batch.
        average: average of the weights to measure; None: the model's weights are measured.
        on_best: called with the loop if a measurement is the best so far.
        log: called on rank 0 with the step and the figures of each measurement.
    """

    def __init__(
        self,
        split: MappedSplit,
        held_out: HeldOut,
        *,
        patience: int | None,
        shared_features: SharedFeatures = "once",
        average: AverageWeights | None = None,
        on_best: Callable[[TrainingLoop], None] | None = None,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.curve: list[dict[str, Any]] = []
        """Measurements so far, on every rank: "step", "epoch" (passes, with a fraction within a
        pass), "mean_ne", and the figures of `metrics.report.measure`."""
        self._split = only_ids_of(split, split, held_out.kept)
        self._rows = held_out.rows
        self._patience = patience
        self._shared_features: SharedFeatures = shared_features
        self._average = average
        self._on_best = on_best
        self._log = log
        self._every: int | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """Measurement with the lowest mean normalised entropy; None if there is none."""
        known = [entry for entry in self.curve if entry["mean_ne"] is not None]
        return min(known, key=lambda entry: entry["mean_ne"], default=None)

    def report(self) -> dict[str, Any]:
        """Returns the figures of the best measurement, and the "curve" of all."""
        short = [key for key in (self.curve or [{}])[0] if key.endswith(("_auc", "_ne"))]
        names = ("step", "epoch", *short)
        best = self.best or (self.curve or [{}])[-1]
        return dict(best) | {
            "curve": [{name: entry[name] for name in names} for entry in self.curve]
        }

    def on_start(self, loop: TrainingLoop) -> None:
        """Measures if the run was interrupted just before a measurement."""
        rows = loop.reader.num_rows
        between = max(
            MIN_ROWS_BETWEEN,
            MIN_ROWS_PER_HELD_OUT * len(self._rows),
            rows // MAX_MEASUREMENTS_PER_PASS,
        )
        self._every = between // loop.reader.global_batch_size if 2 * between <= rows else None
        if loop.step and (self._pass_ended(loop) or self._is_due(loop)):
            self._measure(loop)

    def on_step(self, loop: TrainingLoop, output: object) -> None:  # noqa: ARG002
        """Requests a pause if a measurement is due."""
        if self._is_due(loop):
            loop.pause()

    def on_pause(self, loop: TrainingLoop) -> None:
        """Measures the model."""
        self._measure(loop)

    def on_end(self, loop: TrainingLoop) -> None:
        """Measures the model if the last step is within a pass."""
        if loop.step == loop.last_step:
            self._measure(loop)

    def stop_if_done(self, loop: TrainingLoop) -> None:
        """Stops training at the end of a pass if the last `patience` passes were no improvement."""
        if self._patience is None or not self.curve or not self._pass_ended(loop):
            return
        best = self.best
        if best is None or loop.reader.epoch - math.ceil(best["epoch"]) >= self._patience:
            loop.stop()

    def rank_state(self) -> dict[str, Any]:
        """Returns the measurements so far."""
        return {"curve": self.curve}

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restores the measurements."""
        self.curve = list(states[0]["curve"])

    def _is_due(self, loop: TrainingLoop) -> bool:
        return self._every is not None and loop.step % self._every == 0

    @staticmethod
    def _pass_ended(loop: TrainingLoop) -> bool:
        return loop.reader.steps_left == loop.reader.steps_per_epoch

    def _measure(self, loop: TrainingLoop) -> None:
        if not self.curve or self.curve[-1]["step"] < loop.step:
            with nullcontext() if self._average is None else self._average.in_model():
                scored = score_split(
                    loop.trainer.model,
                    self._split,
                    loop.ranks,
                    shared_features=self._shared_features,
                    rows=self._rows,
                    progress=False,
                )

            def figures() -> dict[str, Any]:
                assert scored is not None
                found = measure(scored)["test"]
                return {"mean_ne": mean_normalised_entropy(found, scored.tasks)} | found

            entry = {
                "step": loop.step,
                "epoch": round(loop.reader.rows_done / loop.reader.num_rows, 4),
            } | loop.ranks.from_first(figures)
            self.curve.append(entry)
            if self._log is not None and loop.ranks.is_first:
                self._log(loop.step, _numbers(entry))
            if self._on_best is not None and entry is self.best:
                self._on_best(loop)
        self.stop_if_done(loop)


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a measurement that are logged to history.jsonl and TensorBoard."""
    return {
        "epoch": entry["epoch"],
        **{
            f"validation_{key}": value
            for key, value in entry.items()
            if key.endswith(("_auc", "_ne", "_calibration")) and value is not None
        },
    }
