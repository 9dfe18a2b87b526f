"""Callbacks of the training loop that a run uses: logging, the progress bar, checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.metrics.metric_module import RecMetricModule
from tqdm import tqdm

from esmm_torchrec.checkpoints.checkpoint import save_checkpoint
from esmm_torchrec.checkpoints.run_folder import RunFolder
from esmm_torchrec.metrics.windowed import metric_module, windowed_figures
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.training.evaluation import known_tasks, windowed_output
from esmm_torchrec.training.history import History
from esmm_torchrec.training.loop import Callback, TrainingLoop

MAX_STEPS_PER_LINE = 20
"""Steps between two lines of history.jsonl, at most."""

MIN_LINES = 10
"""Lines of history.jsonl in a run with at least as many steps."""

WINDOW_SIZE = 200_000
"""Impressions that the running figures cover."""


class LogFigures(Callback):
    """Logs the loss, the speed and TorchRec's windowed metrics of the tasks that the model has.

    Args:
        run: whose history is written.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._history: History | None = None
        self._window: RecMetricModule | None = None
        self._every = 1
        self._losses: list[torch.Tensor] = []

    def on_start(self, loop: TrainingLoop) -> None:
        """Opens the history behind the step to start from."""
        ranks = loop.ranks
        self._every = max(1, min(MAX_STEPS_PER_LINE, loop.last_step // MIN_LINES))
        self._window = metric_module(
            batch_size=loop.reader.batch_size,
            world_size=ranks.world_size,
            rank=ranks.rank,
            device=ranks.device,
            window_size=max(WINDOW_SIZE, loop.reader.global_batch_size),
        )
        if ranks.is_first:
            self._history = History(self._run, after=loop.step)

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:
        """Adds to the window, and writes a line now and then and after the last step."""
        assert self._window is not None
        self._losses.append(output.loss)
        self._window.update(windowed_output(output))
        if loop.step % self._every == 0 or loop.step == loop.last_step:
            seconds = loop.seconds
            with loop.off_the_clock():
                self._write(loop, output, seconds)

    def _write(self, loop: TrainingLoop, output: TrainOutput, seconds: float) -> None:
        assert self._window is not None
        known = known_tasks(output.logits)
        figures = {
            name: value
            for name, value in windowed_figures(self._window.compute()).items()
            if name.partition("_")[0] in known
        }
        loss = torch.stack(self._losses).mean()
        dist.all_reduce(loss)
        self._losses.clear()
        if self._history is not None:
            loop.figures = {
                "epoch": loop.reader.epoch,
                "loss": loss.item() / loop.ranks.world_size,
                "samples_per_second": loop.reader.rows_done / seconds,
            } | figures
            self._history.write(loop.step, loop.figures)

    def close(self) -> None:
        """Ends the history."""
        if self._history is not None:
            self._history.close()


class ProgressBar(Callback):
    """A bar over the rows to train on, with the latest figures beside it; on rank 0."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._rows = 0
        self._shown: dict[str, float] | None = None

    def on_start(self, loop: TrainingLoop) -> None:
        """Opens the bar at the rows that are done."""
        reader = loop.reader
        self._rows = reader.rows_done
        self._shown = loop.figures
        total = min(
            self._rows + (loop.last_step - loop.step) * reader.global_batch_size,
            loop.epochs * reader.num_rows,
        )
        self._bar = progress_bar(
            "Training", total, "rows", initial=self._rows, disable=not loop.ranks.is_first
        )

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        """Moves the bar."""
        assert self._bar is not None
        self._rows, rows = loop.reader.rows_done, loop.reader.rows_done - self._rows
        self._bar.update(rows)
        if loop.figures is not self._shown:
            self._shown = loop.figures
            self._bar.set_postfix_str(_short(loop.figures), refresh=False)

    def close(self) -> None:
        """Ends the bar, without a last word if there is an error to report."""
        if self._bar is not None:
            self._bar.__exit__(*sys.exc_info())


class SaveCheckpoints(Callback):
    """Saves a checkpoint every few steps and after the last one.

    Args:
        folder: of the checkpoints.
        every: steps between checkpoints; 0: only at the end.
    """

    def __init__(self, folder: Path, *, every: int) -> None:
        self._folder = folder
        self._every = every
        self._last_saved = 0

    def on_start(self, loop: TrainingLoop) -> None:
        """Takes the step to start from as saved."""
        self._last_saved = loop.step

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        """Saves if it is time."""
        if self._every and loop.step % self._every == 0:
            self._save(loop)

    def on_end(self, loop: TrainingLoop) -> None:
        """Saves the end."""
        if self._last_saved < loop.step:
            self._save(loop)

    def _save(self, loop: TrainingLoop) -> None:
        with loop.off_the_clock():
            progress = loop.state_dict()
            save_checkpoint(
                self._folder,
                step=loop.step,
                model=loop.trainer.model,
                optimizer=loop.trainer.optimizer,
                progress={name: progress[name] for name in ("reader", "seconds")},
                ranks=loop.ranks,
            )
        self._last_saved = loop.step


def _short(figures: dict[str, float]) -> str:
    """The figures beside the progress bar."""
    tasks = [
        f"{task} {figures[f'{task}_auc']:.3f}/{figures[f'{task}_ne']:.3f}"
        for task in ("ctr", "cvr", "ctcvr")
        if f"{task}_auc" in figures and f"{task}_ne" in figures
    ]
    measured = f", AUC/NE {' '.join(tasks)}" if tasks else ""
    return f"loss {figures['loss']:.4f}{measured}"
