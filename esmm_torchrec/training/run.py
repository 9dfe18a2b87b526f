"""Training run on a prepared data set, which writes a run folder."""

from __future__ import annotations

import os
import platform
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from esmm_torchrec.checkpoints.files import find_checkpoint, step_of, unmark_best
from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.data.encoding import copy_preprocessing
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import Interrupted, PlanError, RunError
from esmm_torchrec.metrics.in_parts import measure_in_parts
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.runs.lock import RunLock
from esmm_torchrec.runs.run_folder import PASSES, RunFolder
from esmm_torchrec.serving.scorer import is_in_parts, score_split
from esmm_torchrec.sharding.plan_file import PlanFile
from esmm_torchrec.sharding.plan_json import read_plan, write_plan
from esmm_torchrec.sharding.plan_text import compare_plans
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.announcement import announce
from esmm_torchrec.training.averaging import AverageWeights
from esmm_torchrec.training.callbacks import LogFigures, ProgressBar, SaveCheckpoints
from esmm_torchrec.training.fit import build_loop, out_of_fold_pctr, training_part
from esmm_torchrec.training.loop import TrainingLoop
from esmm_torchrec.training.nonfinite import WatchLoss
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.passes import PATIENCE, Passes, choose_passes
from esmm_torchrec.training.plots import plot_calibration, plot_history
from esmm_torchrec.training.reading import open_splits, read_mode
from esmm_torchrec.training.schedule import ScheduleLearningRates
from esmm_torchrec.training.validation import Validate, hold_out
from esmm_torchrec.training.warm_start import source_checkpoint, with_table_rows

SIGNAL_ARRIVES_WITHIN_SECONDS = 0.5

_IDENTITY = ("rows", "table_rows", "sparse_optimizer", "history_weights", "shuffle_chunk", "seed")
"""Options that identify a run, in addition to those of the model: they determine what is trained,
on which rows and in which order. The other options may change when the run is resumed."""


def train(data: Path | str, out: Path | str, options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    """Trains on a prepared data set and measures the model on its test split.

    Every rank calls it; rank 0 writes `out` and prints. A run that exists in `out` is resumed
    according to `options.resume`.

    Args:
        data: folder or URI of the prepared data set.
        out: run folder to create or to resume.
        ranks: this process among the others, from `process_group`.

    Returns:
        the content of metrics.json: "test" and "truth" as described in `metrics.report`,
        "validation" as in `Validate.report`, if rows were held out, and "throughput".

    Raises:
        DataError: the data set cannot be read, or has no impressions for the method to train on.
        Interrupted: by Ctrl-C, or by SIGTERM if torchrun did not start this process; the message
            names the step from which the run can be resumed.
        PlanError: the sharding of the options does not exist or does not fit.
        RunError: `out` contains something else, or a checkpoint cannot be read or written.
    """
    out = Path(out)
    lock = RunLock(out)
    with _interrupts_in_words(out, options.resume), closing(lock):
        return _train(data, out, options, ranks, lock)


def _train(
    data: Path | str, out: Path, options: TrainOptions, ranks: Ranks, lock: RunLock
) -> dict[str, Any]:
    dataset = with_table_rows(PreparedDataSet.open(data), options)
    config = _config(dataset, options, ranks)

    def find() -> RunFolder | None:
        lock.check()
        return RunFolder.find(out, config, resume=options.resume)

    # Check the folder first, so that a refusal costs no time; create it once all else works.
    found = ranks.from_first(find)
    source = None
    if options.start_from is not None:
        earlier_run = options.start_from
        source = ranks.from_first(lambda: source_checkpoint(earlier_run, dataset, options))
    continues = found is not None and found.has_other_data(dataset.fingerprint)
    if found is not None and not found.was_trained_on(dataset.fingerprint):
        found = None  # its pCTR and its search belong to other rows
    splits = open_splits(dataset, options, ranks)
    split, test = splits["train"], splits["test"]
    pctr = held_out = None
    if options.parts.rows.needs_pctr:
        assert isinstance(split, MappedSplit)
        pctr = _pctr(found, split, options, ranks)
    if options.validation_share:
        assert isinstance(split, MappedSplit)
        held_out = hold_out(split, share=options.validation_share, by=options.validation)
    within = None if held_out is None else held_out.kept
    part = training_part(split, options, within=within, pctr=pctr)
    searched = None
    if found is not None and options.epochs == "auto":
        searched = ranks.from_first(found.read_passes)
    passes = choose_passes(
        split,
        options,
        ranks,
        num_rows=part.num_rows,
        pctr=pctr,
        continues=continues or options.start_from is not None,
        found=None if searched is None else Passes(**searched),
    )
    loop = build_loop(split, options, ranks, part=part, epochs=passes.epochs)
    averages = options.average_weights == "on" or (
        options.average_weights == "auto" and passes.search is not None
    )
    average = AverageWeights() if averages else None
    for options_of in (config, config["history"][-1]):
        options_of["options"]["batch_size"] = loop.reader.global_batch_size
        options_of["options"]["average_weights"] = "on" if averages else "off"
        if held_out is None:
            options_of["options"]["epochs"] = passes.epochs

    def start() -> RunFolder:
        run = RunFolder.start(out, config, resume=options.resume, lock=lock)
        if pctr is not None and (found is None or not run.pctr.exists()):
            assert isinstance(split, MappedSplit)
            run.write_pctr(pctr[split.scalars[dataset.schema.tasks[0].label] == 1])
        if passes.search is not None:
            run.write_json(PASSES, asdict(passes))
        return run

    run = ranks.from_first(start)
    checkpoints = CheckpointManager(
        run.checkpoints, ranks=ranks, keep_last=options.keep_checkpoints
    )
    saving = SaveCheckpoints(checkpoints, every=options.checkpoint_every)
    log = LogFigures(run)
    validate = None
    if held_out is not None:
        chooses = options.epochs == "auto"
        assert isinstance(split, MappedSplit)
        validate = Validate(
            split,
            held_out,
            patience=PATIENCE if chooses else None,
            shared_features=options.shared_features,
            average=average,
            on_best=partial(saving.save, best=True) if chooses else None,
            log=log.write,
        )
    loop.callbacks = (
        ScheduleLearningRates(options.lr_schedule, warmup_steps=options.warmup_steps),
        WatchLoss(run.path / "nonfinite", options.on_nonfinite),
        log,
        *(() if average is None else (average,)),
        saving,
        *(() if validate is None else (validate,)),
        ProgressBar(),
    )
    checkpoint = _resume(loop, run, checkpoints, config, options, validate)
    if checkpoint is None and source is not None:
        checkpoints.start_from(source, model=loop.trainer.model, optimizer=loop.trainer.optimizer)
    if ranks.is_first:
        if not run.preprocessing.exists():
            copy_preprocessing(dataset.root, run.preprocessing)
        announce(dataset, loop, options, part=part, passes=passes, held_out=held_out)
        if checkpoint is not None:
            print(f"resuming from step {loop.step} ({checkpoint})", flush=True)
        elif source is not None:
            print(f"starting from the weights and optimiser state of {source}", flush=True)
        _keep_plan(loop.trainer.plan, run.path / "plan.json")
    if validate is None or options.epochs != "auto":
        ranks.from_first(lambda: unmark_best(run.checkpoints))
    with checkpoints:
        loop.run()
        if validate is not None and options.epochs == "auto":
            _take_best(loop, checkpoints, validate)
    throughput = {
        "train_samples_per_second": loop.reader.rows_done / loop.seconds if loop.seconds else None,
        "train_seconds": loop.seconds,
        "peak_rss_bytes": _peak_memory(),
    }
    scored = score_split(loop.trainer.model, test, ranks, shared_features=options.shared_features)
    together: dict[str, Any] | None = None
    if is_in_parts(test):
        assert scored is not None
        together = measure_in_parts(scored)

    def report() -> dict[str, Any]:
        assert scored is not None
        metrics: dict[str, Any] = measure(scored) if together is None else together
        held_out_figures = passes.search if validate is None else validate.report()
        if held_out_figures is not None:
            metrics["validation"] = held_out_figures
        metrics["throughput"] = throughput
        run.write_json("metrics.json", metrics)
        picture = run.path / "plots" / "history.png"
        plot_history(run.history, picture, scored.tasks, held_out=held_out_figures)
        if together is None:  # rank 0 has the scores of all impressions
            plot_calibration(scored, run.path / "plots" / "calibration.png")
        return metrics

    return ranks.from_first(report)


@contextmanager
def _interrupts_in_words(out: Path, resume: str) -> Iterator[None]:
    """Converts interrupts to an Interrupted error that names the step to resume from. SIGTERM
    counts as an interrupt, except under torchrun, which sends it to the remaining ranks when one
    has died."""
    arrived: set[int] = set()

    def interrupt(number: int, _: object) -> None:
        arrived.add(number)
        raise KeyboardInterrupt

    earlier: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            earlier[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
        if "RANK" not in os.environ:
            earlier[signal.SIGTERM] = signal.signal(signal.SIGTERM, interrupt)
    try:
        try:
            yield
        except RuntimeError:
            # A signal to all ranks may end another rank, and thereby a collective, before this
            # rank handles it; or it came where Python ignores exceptions, such as in a finaliser.
            if not arrived:
                time.sleep(SIGNAL_ARRIVES_WITHIN_SECONDS)
            if arrived:
                raise KeyboardInterrupt from None
            raise
    except KeyboardInterrupt as error:
        same = "rerun the same command" if resume == "auto" else "give `resume` auto"
        last = find_checkpoint(out / "checkpoints")
        sentence = (
            f"interrupted; {same} to resume {out} from step {step_of(last)}"
            if last
            else (
                f"interrupted before a checkpoint was written to {out}; {same} to start again, and "
                "set `checkpoint_every` to save checkpoints on the way"
            )
        )
        raise Interrupted(sentence, terminated=signal.SIGTERM in arrived) from error
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _pctr(
    run: RunFolder | None, split: MappedSplit, options: TrainOptions, ranks: Ranks
) -> np.ndarray:
    """Returns the out-of-fold pCTR, float64 (N,). It is read from the run folder if it was saved
    there: networks trained again on another number of ranks would select other rows."""
    if run is not None:
        clicked = split.scalars[split.schema.tasks[0].label] == 1
        kept = ranks.from_first(lambda: run.read_pctr(int(clicked.sum())))
        if kept is not None:
            pctr = np.full(split.impressions, np.nan)
            pctr[clicked] = kept
            return pctr
    return out_of_fold_pctr(split, options, ranks)


def _take_best(loop: TrainingLoop, checkpoints: CheckpointManager, validate: Validate) -> None:
    """Loads the checkpoint that was best on the held-out part, unless it is that of the last
    step."""
    best = validate.best
    if best is None or best["step"] == loop.step:
        return
    checkpoints.wait()
    trainer = loop.trainer
    path = checkpoints.find(best["step"])
    assert path is not None
    checkpoints.load(path, model=trainer.model, optimizer=trainer.optimizer)
    if loop.ranks.is_first:
        print(
            f"the model is from step {best['step']:,} (pass {best['epoch']:g}), the best on the "
            "held-out part",
            flush=True,
        )


def _keep_plan(plan: PlanFile, path: Path) -> None:
    """Writes the plan to the run folder, and prints its differences from the previous plan."""
    try:
        earlier = read_plan(path) if path.exists() else plan
    except PlanError as error:
        # The checkpoint does not depend on the previous plan.
        print(f"warning: {error}; it is replaced by the plan of this run", flush=True)
        earlier = plan
    if earlier != plan:
        differences = indent(compare_plans(earlier, plan), "  ")
        print(f"placed differently from before:\n{differences}", flush=True)
    write_plan(plan, path)


def _config(dataset: PreparedDataSet, options: TrainOptions, ranks: Ranks) -> dict[str, Any]:
    values = options.to_dict() | {
        "sharding": options.sharding if options.plan is None else None,
    }
    model = options.model.to_dict()
    streamed = read_mode(dataset, options) == "stream"
    identity = model | {name: values[name] for name in _IDENTITY}
    identity |= {name: values[name] if streamed else None for name in ("lanes", "window")}
    # Otherwise, a resumed run could validate on rows that it was trained on.
    identity["validation_share"] = options.validation_share
    if options.validation_share:
        identity["validation"] = options.validation
    entry = {
        "step": 0,
        "options": {name: value for name, value in values.items() if name not in identity},
        "data": {"path": dataset.root.absolute, "fingerprint": dataset.fingerprint},
        "ranks": ranks.world_size,
        "device": ranks.device.type,
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads_per_rank": torch.get_num_threads(),
        }
        | {name: version(name) for name in ("torch", "torchrec", "esmm_torchrec")},
    }
    return {
        "identity": identity,
        "options": values,
        "model": model,
        "schema": dataset.schema.to_dict(),
        "mean_values_per_bag": dict(dataset.statistics.mean_values_per_bag),
        "history": [entry],
    }


def _resume(
    loop: TrainingLoop,
    run: RunFolder,
    checkpoints: CheckpointManager,
    config: dict[str, Any],
    options: TrainOptions,
    validate: Validate | None,
) -> Path | None:
    """Loads the checkpoint to resume from, if one exists, and drops what came after it. Returns its
    path."""
    if options.resume == "never":
        return None
    wanted = int(options.resume) if options.resume.isdecimal() else None
    checkpoint = checkpoints.find(wanted)
    if checkpoint is None:
        return None
    trainer, ranks = loop.trainer, loop.ranks
    loaded = checkpoints.load(checkpoint, model=trainer.model, optimizer=trainer.optimizer)
    rank_states = [loaded.rank_state(rank) for rank in range(loaded.num_ranks)]
    state = {"step": loaded.step} | dict(loaded.progress)
    data = config["history"][-1]["data"]
    if run.data_of(loaded.step) != data["fingerprint"]:
        state |= {"reader": loop.reader.state_dict(), "seconds": 0.0}
        for rank_state in rank_states:
            (rank_state or {}).pop(Validate.__name__, None)  # measured on other rows
        if ranks.is_first:
            print(
                f"{data['path']} is not the data that step {loaded.step} was trained on: training "
                "continues with its first row",
                flush=True,
            )
    loop.load_state_dict(
        state, [rank_state for rank_state in rank_states if rank_state is not None]
    )
    if validate is not None:
        validate.stop_if_done(loop)
        if options.epochs == "auto" and validate.best is not None:
            _check_best(validate.best["step"], loop.step, checkpoints)
    if wanted is not None or loop.step < loop.last_step:
        ranks.from_first(lambda: run.resume_from(loop.step, config))
    return checkpoint


def _check_best(best: int, step: int, checkpoints: CheckpointManager) -> None:
    """Raises RunError if the checkpoint of step `best`, the best one at `step`, does not exist."""
    try:
        checkpoints.find(best)
    except RunError:
        raise RunError(
            f"the run cannot be resumed from step {step}, as the checkpoint of step {best}, the "
            "best until then, has been removed; resume from a later step or train again"
        ) from None


def _peak_memory() -> int:
    """Returns the peak resident memory, in bytes, of the rank that used the most."""
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)
