"""One training run: prepared data in, a run folder out."""

from __future__ import annotations

import json
import platform
import resource
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from esmm_torchrec.checkpoints.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from esmm_torchrec.checkpoints.run_folder import RunFolder
from esmm_torchrec.data.encoding import copy_preprocessing
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.windowed import metric_module, windowed_figures
from esmm_torchrec.models.methods import METHODS
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.sharding.plan_file import write_plan
from esmm_torchrec.sharding.plan_text import format_plan, plan_warnings
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.evaluation import known_tasks, score_split, windowed_output
from esmm_torchrec.training.fit import build_trainer, out_of_fold_pctr, training_part
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.plots import plot_calibration, plot_history
from esmm_torchrec.training.trainer import Trainer

LOG_EVERY = 20
"""Steps between lines of history.jsonl, at most."""

LOGGED_AT_LEAST = 10
"""Lines of history.jsonl in a run that has as many steps."""

WINDOW_SIZE = 200_000
"""Impressions of the metrics that are shown while training."""

_NOT_IDENTITY = ("resume", "device", "checkpoint_every", "sharding", "plan", "shared_features")
"""Options that two runs of the same model may differ in."""


def train(data: Path, out: Path, options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    """Trains on a prepared data set and measures the result on its test half.

    Every rank calls it; rank 0 writes `out` and prints.

    Returns:
        the content of metrics.json.

    Raises:
        DataError: the data set cannot be read.
        PlanError: the options ask for a sharding that does not exist or does not fit.
        RunError: `out` holds something else.
    """
    dataset = PreparedDataSet.open(data)
    config = _config(dataset, options, ranks)
    # Looked at now, so that a refusal costs no time, and made when all else is known to work.
    ranks.from_first(lambda: RunFolder.find(out, config, resume=options.resume))
    counts = dataset.splits["train"]
    test = dataset.splits["test"]
    splits = {
        name: MappedSplit.open(dataset, name, history_weights=options.history_weights)
        for name in ("train", "test")
    }
    workload = Workload(options.batch_size, dataset.statistics.mean_values_per_bag)
    pctr = None
    if METHODS[options.method].needs_pctr:
        pctr = out_of_fold_pctr(splits["train"], options, ranks, workload=workload)
    part = training_part(splits["train"], options, pctr=pctr)
    trainer = build_trainer(splits["train"], options, ranks, part=part, workload=workload)
    run = ranks.from_first(lambda: RunFolder.start(out, config, resume=options.resume))
    reader = ImpressionReader(
        splits["train"],
        batch_size=options.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=options.seed,
        shuffle_chunk=options.shuffle_chunk,
        selection=part.selection,
        shared_features=options.shared_features,
    )
    if ranks.is_first:
        copy_preprocessing(dataset.path, run.preprocessing)
        write_plan(trainer.plan, run.path / "plan.json")
        print(format_plan(trainer.plan))
        for warning in plan_warnings(trainer.plan, optimizer=options.sparse_optimizer):
            print(f"warning: {warning}")
        print(
            f"{options.method} on {ranks.world_size} {ranks.device.type} "
            f"{'rank' if ranks.world_size == 1 else 'ranks'}: "
            f"{counts.impressions:,} impressions, {counts.clicks:,} clicks, "
            f"{counts.conversions:,} conversions to train on, {test.impressions:,} to test on; "
            f"{options.sparse_optimizer} for tables, adam for towers",
            flush=True,
        )
        if part.selection is not None:
            notes = "".join(f", {name} {value:,.4g}" for name, value in part.notes.items())
            print(f"{options.method} trains on {reader.num_rows:,} rows of them{notes}", flush=True)
    throughput = _fit(trainer, reader, run, options, ranks)
    scored = score_split(
        trainer.model,
        splits["test"],
        ranks,
        batch_size=options.batch_size,
        shared_features=options.shared_features,
    )

    def report() -> dict[str, Any]:
        assert scored is not None
        metrics = measure(scored) | {"throughput": throughput}
        run.write_json("metrics.json", metrics)
        plot_history(run.history, run.path / "plots" / "history.png")
        plot_calibration(scored, run.path / "plots" / "calibration.png")
        return metrics

    return ranks.from_first(report)


def _config(dataset: PreparedDataSet, options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    values = asdict(options) | {"plan": None if options.plan is None else str(options.plan)}
    return {
        "identity": {name: value for name, value in values.items() if name not in _NOT_IDENTITY}
        | {"data": dataset.fingerprint},
        "options": values,
        "data": str(dataset.path.resolve()),
        "model": asdict(options.model),
        "schema": dataset.schema.to_dict(),
        "mean_values_per_bag": dict(dataset.statistics.mean_values_per_bag),
        "ranks": ranks.world_size,
        "device": ranks.device.type,
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads_per_rank": torch.get_num_threads(),
        }
        | {name: version(name) for name in ("torch", "torchrec", "esmm_torchrec")},
    }


def _fit(
    trainer: Trainer,
    reader: ImpressionReader,
    run: RunFolder,
    options: TrainOptions,
    ranks: Ranks,
) -> dict[str, Any]:
    """Trains to the end, from the checkpoint asked for where there is one."""
    step, seconds, rows = 0, 0.0, 0
    checkpoint = None
    if options.resume != "never":
        wanted = int(options.resume) if options.resume.isdigit() else None
        checkpoint = find_checkpoint(run.checkpoints, wanted)
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, model=trainer.model, optimizer=trainer.optimizer)
        reader.load_state_dict(progress["reader"])
        step, seconds, rows = progress["step"], progress["seconds"], reader.rows_done
        if ranks.is_first:
            print(f"going on from step {step} ({checkpoint})", flush=True)
    last_saved = step

    def save() -> None:
        save_checkpoint(
            run.checkpoints,
            step=step,
            model=trainer.model,
            optimizer=trainer.optimizer,
            progress={"reader": reader.state_dict(), "seconds": seconds},
            ranks=ranks,
        )

    window = metric_module(
        batch_size=options.batch_size,
        world_size=ranks.world_size,
        rank=ranks.rank,
        device=ranks.device,
        window_size=max(WINDOW_SIZE, reader.global_batch_size),
    )
    log = _Log(run, after=step) if ranks.is_first else None
    total = options.epochs * reader.steps_per_epoch
    total = total if options.max_steps is None else min(total, options.max_steps)
    every = max(1, min(LOG_EVERY, total // LOGGED_AT_LEAST))
    losses: list[torch.Tensor] = []
    to_train = min(total * reader.global_batch_size, options.epochs * reader.num_rows)
    with progress_bar(
        "Training", to_train, "rows", initial=rows, disable=not ranks.is_first
    ) as bar:
        while step < total and reader.epoch < options.epochs:
            started = time.perf_counter()
            for output in trainer.steps(reader, min(reader.steps_left, total - step)):
                step += 1
                rows, taken = reader.rows_done, reader.rows_done - rows
                losses.append(output.loss)
                window.update(windowed_output(output))
                seconds += time.perf_counter() - started
                bar.update(taken)
                if step % every == 0 or step == total:
                    known = known_tasks(output.logits)
                    figures = {
                        name: value
                        for name, value in windowed_figures(window.compute()).items()
                        if name.partition("_")[0] in known
                    }
                    loss = torch.stack(losses).mean()
                    dist.all_reduce(loss)
                    losses.clear()
                    if log is not None:
                        figures = {
                            "epoch": reader.epoch,
                            "loss": loss.item() / ranks.world_size,
                            "samples_per_second": rows / seconds,
                        } | figures
                        log.write(step, figures)
                        bar.set_postfix(_short(figures), refresh=False)
                if options.checkpoint_every and step % options.checkpoint_every == 0:
                    save()
                    last_saved = step
                started = time.perf_counter()
    if last_saved < step:
        save()
    if log is not None:
        log.close()
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        "train_samples_per_second": rows / seconds if seconds else None,
        "train_seconds": seconds,
        "peak_rss_bytes": int(peak),
    }


class _Log:
    """history.jsonl and TensorBoard, on rank 0.

    Args:
        run: whose history is written.
        after: the step that training goes on from; what an interrupted run noted of later ones is
            dropped, as they are done again.
    """

    def __init__(self, run: RunFolder, *, after: int) -> None:
        run.drop_history(after)
        self._history = run.history.open("a")
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=after + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._history.write(json.dumps({"step": step} | figures) + "\n")
        self._history.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._history.close()
        self._board.close()


def _short(figures: dict[str, float]) -> dict[str, str]:
    """What of the figures goes beside the progress bar."""
    names = ("loss", "ctr_auc", "cvr_auc", "ctcvr_auc")
    return {name: f"{figures[name]:.4f}" for name in names if name in figures}
