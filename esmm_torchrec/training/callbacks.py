"""Callbacks that a run adds to its training loop: logging, the progress bar, checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.running_figures import RunningFigures

MIN_STEPS_PER_LINE = 20
"""Minimum number of steps between two lines of history.jsonl in a long run."""

MIN_LINES = 10
"""Minimum number of lines of history.jsonl in a run with at least this many steps."""

WINDOW_SIZE = 100_000
"""Number of impressions that the running figures cover."""

ROWS_PER_LINE = 400_000
"""Number of impressions between two lines in a long run. Computing the figures of a window costs
as much as a training step of 4096 rows on a CPU, 1 % of the time between two lines."""


class LogFigures(Callback):
    """Logs the loss, the speed and TorchRec's windowed metrics of the model's tasks to
    history.jsonl and TensorBoard.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._history: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._figures: RunningFigures | None = None
        self._states: Sequence[Mapping[str, Any]] = ()
        self._every = 1

    def on_start(self, loop: TrainingLoop) -> None:
        """Opens the history at the starting step. An interrupted run may have logged later steps;
        their lines are dropped because the steps are repeated."""
        rows = loop.reader.global_batch_size
        every = max(MIN_STEPS_PER_LINE, -(-ROWS_PER_LINE // rows))
        self._every = max(1, min(every, loop.last_step // MIN_LINES))
        self._figures = RunningFigures(
            loop.ranks, loop.reader.schema.tasks, window_size=max(WINDOW_SIZE, rows)
        )
        if self._states:
            self._figures.load_state_dicts(self._states)
        if loop.ranks.is_first:
            self._run.drop_history(loop.step)
            self._history = self._run.history.open("a")
            board = str(self._run.path / "tensorboard")
            self._board = SummaryWriter(board, purge_step=loop.step + 1)

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:
        """Adds the step to the window; writes a line if one is due, and after the last step."""
        assert self._figures is not None
        self._figures.add(output)
        if loop.step % self._every and loop.step != loop.last_step:
            return
        tasks = loop.reader.schema.tasks
        figures = self._figures.compute() | {
            name: value.item()
            for name, value in loop.trainer.objective.figures(
                output.logits, output.labels, tasks
            ).items()
        }
        if self._history is not None:
            loop.figures = {
                "epoch": loop.reader.epoch,
                "samples_per_second": loop.reader.rows_done / loop.seconds,
            } | figures
            self.write(loop.step, loop.figures)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Appends a line to the history; to be called on rank 0."""
        assert self._history is not None
        assert self._board is not None
        self._history.write(json.dumps({"step": step} | dict(figures), allow_nan=False) + "\n")
        self._history.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def rank_state(self) -> dict[str, Any]:
        """Returns the state of the running figures, so that a resumed run logs the same lines as an
        uninterrupted run."""
        return {} if self._figures is None else self._figures.state_dict()

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Stores the states of the running figures; `on_start` continues from them."""
        self._states = states

    def close(self) -> None:
        """Closes history.jsonl and the TensorBoard writer."""
        for file in (self._history, self._board):
            if file is not None:
                file.close()


class ProgressBar(Callback):
    """Shows a progress bar over the training rows, with the latest figures next to it, on rank
    0."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_start(self, loop: TrainingLoop) -> None:
        """Opens the bar at the number of rows already trained on."""
        reader = loop.reader
        total = min(
            reader.rows_done + (loop.last_step - loop.step) * reader.global_batch_size,
            loop.epochs * reader.num_rows,
        )
        self._bar = progress_bar(
            "Training", total, "rows", initial=reader.rows_done, disable=not loop.ranks.is_first
        )

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        """Advances the bar."""
        assert self._bar is not None
        self._bar.update(loop.reader.rows_done - self._bar.n)
        if loop.figures:
            self._bar.set_postfix_str(_short(loop.figures), refresh=False)

    def close(self) -> None:
        """Closes the bar, without a final line if there is an error to report."""
        if self._bar is not None:
            self._bar.__exit__(*sys.exc_info())


class SaveCheckpoints(Callback):
    """Saves a checkpoint every few steps and after the last one.

    Args:
        checkpoints: manager of the run's checkpoints.
        every: number of steps between checkpoints; 0: only at the end.
    """

    def __init__(self, checkpoints: CheckpointManager, *, every: int) -> None:
        self._checkpoints = checkpoints
        self._every = every
        self._last_saved = 0

    def on_start(self, loop: TrainingLoop) -> None:
        """Marks the starting step as saved."""
        self._last_saved = loop.step

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        """Saves the step if a checkpoint is due."""
        if self._every and loop.step % self._every == 0:
            self.save(loop)

    def on_end(self, loop: TrainingLoop) -> None:
        """Saves the last step, unless it is saved already."""
        if self._last_saved < loop.step:
            self.save(loop)

    def save(self, loop: TrainingLoop, *, best: bool = False) -> None:
        """Saves the current step.

        Raises:
            RunError: the checkpoint cannot be written, or the loss or a weight is not finite.
        """
        with loop.off_the_clock():
            loop.check()
            self._checkpoints.save(
                step=loop.step,
                model=loop.trainer.model,
                optimizer=loop.trainer.optimizer,
                progress=loop.state_dict(),
                rank_state=loop.rank_state(),
                best=best,
            )
        self._last_saved = loop.step


def _short(figures: dict[str, float]) -> str:
    """Formats the figures shown next to the progress bar."""
    names = [key.removesuffix("_auc") for key in figures if key.endswith("_auc")]
    tasks = [
        f"{name} {figures[f'{name}_auc']:.3f}/{figures[f'{name}_ne']:.3f}"
        for name in names
        if f"{name}_ne" in figures
    ]
    loss = f"loss {figures['loss']:.4f}" if "loss" in figures else "loss not finite"
    measured = f", AUC/NE {' '.join(tasks)}" if tasks else ""
    return f"{loss}{measured}"
