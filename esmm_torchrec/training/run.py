"""One training run: prepared data in, a run folder out."""

from __future__ import annotations

import os
import platform
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from esmm_torchrec.checkpoints.checkpoint import find_checkpoint, step_of
from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.checkpoints.run_folder import RunFolder
from esmm_torchrec.data.encoding import copy_preprocessing
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import Interrupted, PlanError
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.schema import CLICK
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.plan_file import PlanFile
from esmm_torchrec.sharding.plan_json import read_plan, write_plan
from esmm_torchrec.sharding.plan_text import compare_plans, format_plan, plan_warnings
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.callbacks import LogFigures, ProgressBar, SaveCheckpoints
from esmm_torchrec.training.fit import build_loop, out_of_fold_pctr, training_part
from esmm_torchrec.training.loop import TrainingLoop
from esmm_torchrec.training.nonfinite import WatchLoss
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.plots import plot_calibration, plot_history

_NOT_IDENTITY = ("resume", "device", "checkpoint_every", "sharding", "plan", "shared_features")
"""Options that two runs of the same model may differ in."""


def train(data: Path | str, out: Path | str, options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    """Trains on a prepared data set and measures the result on its test half.

    Every rank calls it; rank 0 writes `out` and prints. A run that is in `out` already is gone on
    with, as `options.resume` says.

    Args:
        data: the prepared data set.
        out: the run folder to make or to go on with.
        options: of the run.
        ranks: this process among the others, from `process_group`.

    Returns:
        the content of metrics.json: "test" and "truth" as `metrics.report` describes them, and
        "throughput".

    Raises:
        DataError: the data set cannot be read, or leaves the method nothing to train on.
        Interrupted: by Ctrl-C, or by SIGTERM where torchrun did not start this process; says what
            is saved.
        PlanError: the options ask for a sharding that does not exist or does not fit.
        RunError: `out` holds something else, or a checkpoint cannot be read or written.
    """
    data, out = Path(data), Path(out)
    with _interrupts_in_words(out, options.resume):
        return _train(data, out, options, ranks)


def _train(data: Path, out: Path, options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    dataset = PreparedDataSet.open(data)
    config = _config(dataset, options, ranks)
    # Looked at now, so that a refusal costs no time, and made when all else is known to work.
    found = ranks.from_first(lambda: RunFolder.find(out, config, resume=options.resume))
    splits = {
        name: MappedSplit.open(dataset, name, history_weights=options.history_weights)
        for name in ("train", "test")
    }
    # `build_loop` knows the batch size.
    workload = Workload(1, dataset.statistics.mean_values_per_bag)
    pctr = None
    if options.parts.rows.needs_pctr:
        pctr = _pctr(found, splits["train"], options, ranks, workload=workload)
    part = training_part(splits["train"], options, pctr=pctr)

    loop = build_loop(splits["train"], options, ranks, part=part, workload=workload)
    config["options"]["batch_size"] = loop.reader.global_batch_size

    def start() -> RunFolder:
        run = RunFolder.start(out, config, resume=options.resume)
        if pctr is not None and not run.pctr.exists():
            run.write_pctr(pctr[splits["train"].scalars[CLICK] == 1])
        return run

    run = ranks.from_first(start)
    checkpoints = CheckpointManager(run.checkpoints, ranks=ranks)
    loop.callbacks = (
        WatchLoss(run.path / "nonfinite", options.on_nonfinite),
        LogFigures(run),
        SaveCheckpoints(checkpoints, every=options.checkpoint_every),
        ProgressBar(),
    )
    checkpoint = _resume(loop, run, checkpoints, options)
    if ranks.is_first:
        copy_preprocessing(dataset.path, run.preprocessing)
        _announce(dataset, loop, options)
        if part.selection is not None:
            notes = "".join(f", {name} {value:,.4g}" for name, value in part.notes.items())
            print(f"{options.method} trains on {part.num_rows:,} rows of them{notes}", flush=True)
        if checkpoint is not None:
            print(f"resuming from step {loop.step} ({checkpoint})", flush=True)
        _keep_plan(loop.trainer.plan, run.path / "plan.json")
    with checkpoints:
        loop.run()
    throughput = {
        "train_samples_per_second": loop.reader.rows_done / loop.seconds if loop.seconds else None,
        "train_seconds": loop.seconds,
        "peak_rss_bytes": _peak_memory(),
    }
    scored = score_split(
        loop.trainer.model,
        splits["test"],
        ranks,
        shared_features=options.shared_features,
    )

    def report() -> dict[str, Any]:
        assert scored is not None
        metrics = measure(scored) | {"throughput": throughput}
        run.write_json("metrics.json", metrics)
        plot_history(run.history, run.path / "plots" / "history.png", scored.tasks)
        plot_calibration(scored, run.path / "plots" / "calibration.png")
        return metrics

    return ranks.from_first(report)


@contextmanager
def _interrupts_in_words(out: Path, resume: str) -> Iterator[None]:
    """Says of an interrupt what there is to go on from. SIGTERM counts as one, where nothing else
    deals with it: torchrun sends it to the ranks that are left when one has died."""

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    alone = alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if alone:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        same = "give the same command again" if resume == "auto" else "give --resume auto"
        last = find_checkpoint(out / "checkpoints")
        if last is None:
            raise Interrupted(
                f"interrupted before a checkpoint was written to {out}; {same} to begin anew, and "
                "--checkpoint-every to save on the way"
            ) from interrupt
        raise Interrupted(
            f"interrupted; {same} to go on with {out} from step {step_of(last)}"
        ) from interrupt
    finally:
        if alone:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _pctr(
    run: RunFolder | None,
    split: MappedSplit,
    options: TrainOptions,
    ranks: Ranks,
    *,
    workload: Workload,
) -> np.ndarray:
    """Out-of-fold pCTR, float64 (N,), that of the run where it has gone so far: training the
    networks again on other ranks would choose other rows."""
    if run is not None:
        clicked = split.scalars[CLICK] == 1
        kept = ranks.from_first(lambda: run.read_pctr(int(clicked.sum())))
        if kept is not None:
            pctr = np.full(split.impressions, np.nan)
            pctr[clicked] = kept
            return pctr
    return out_of_fold_pctr(split, options, ranks, workload=workload)


def _announce(dataset: PreparedDataSet, loop: TrainingLoop, options: TrainOptions) -> None:
    """What is about to be trained, and where."""
    trainer, ranks, reader = loop.trainer, loop.ranks, loop.reader
    counts, test = dataset.splits["train"], dataset.splits["test"]
    print(format_plan(trainer.plan))
    if options.plan is not None:
        unused = ""
        if options.sharding != "auto":
            unused = f"; --sharding {options.sharding} is not used beside it"
        print(f"placed as {options.plan} says{unused}")
    for warning in plan_warnings(trainer.plan, optimizer=options.sparse_optimizer):
        print(f"warning: {warning}")
    print(
        f"{options.method} on {ranks.world_size} {ranks.device.type} "
        f"{'rank' if ranks.world_size == 1 else 'ranks'}: "
        f"{counts.impressions:,} impressions, {counts.clicks:,} clicks, "
        f"{counts.conversions:,} conversions to train on, {test.impressions:,} to test on; "
        f"{options.sparse_optimizer} for tables, adam for towers"
    )
    size = f"{reader.global_batch_size:,} impressions per step"
    print(
        f"{size}, {reader.steps_per_epoch:,} steps per pass"
        + (" (chosen by --batch-size auto)" if options.batch_size == "auto" else ""),
        flush=True,
    )


def _keep_plan(plan: PlanFile, path: Path) -> None:
    """Writes the plan to the run folder, and says where it differs from the one that was there."""
    try:
        earlier = read_plan(path) if path.exists() else plan
    except PlanError as error:
        # The checkpoint does not depend on how the tables were placed before.
        print(f"warning: {error}; it is replaced by the plan of this run", flush=True)
        earlier = plan
    if earlier != plan:
        differences = indent(compare_plans(earlier, plan), "  ")
        print(f"placed otherwise than before:\n{differences}", flush=True)
    write_plan(plan, path)


def _config(dataset: PreparedDataSet, options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    placement = _placement(options, ranks)
    values = options.to_dict() | {name: placement[name] for name in ("sharding", "plan")}
    return {
        "identity": {name: value for name, value in values.items() if name not in _NOT_IDENTITY}
        | {"data": dataset.fingerprint},
        "options": values,
        "data": str(dataset.path.resolve()),
        "model": options.model.to_dict(),
        "schema": dataset.schema.to_dict(),
        "mean_values_per_bag": dict(dataset.statistics.mean_values_per_bag),
        "ranks": placement["ranks"],
        "device": placement["device"],
        "environment": placement["environment"],
    }


def _placement(options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    """On what a run is trained; may be other when it goes on."""
    return {
        "ranks": ranks.world_size,
        "device": ranks.device.type,
        "sharding": options.sharding if options.plan is None else None,
        "plan": None if options.plan is None else str(options.plan),
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads_per_rank": torch.get_num_threads(),
        }
        | {name: version(name) for name in ("torch", "torchrec", "esmm_torchrec")},
    }


def _resume(
    loop: TrainingLoop, run: RunFolder, checkpoints: CheckpointManager, options: TrainOptions
) -> Path | None:
    """Loads the checkpoint to resume from, if there is one, and forgets what came after it."""
    if options.resume == "never":
        return None
    wanted = int(options.resume) if options.resume.isdigit() else None
    checkpoint = checkpoints.find(wanted)
    if checkpoint is None:
        return None
    trainer, ranks = loop.trainer, loop.ranks
    loaded = checkpoints.load(checkpoint, model=trainer.model, optimizer=trainer.optimizer)
    rank_states = [loaded.rank_state(rank) for rank in range(loaded.num_ranks)]
    loop.load_state_dict(
        {"step": loaded.step} | dict(loaded.progress),
        [state for state in rank_states if state is not None],
    )
    if wanted is not None or loop.step < loop.last_step:
        ranks.from_first(lambda: run.go_on_from(loop.step, _placement(options, ranks)))
    return checkpoint


def _peak_memory() -> int:
    """Bytes, of the rank that needed most."""
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)
