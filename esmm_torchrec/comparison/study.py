"""Comparison of conversion methods: tune each by one rule, retrain it, score once.

    tuning       a part of the training users is held out; every method gets the same number of
                 trials, first on a small part of the other users, then the best on a larger part;
                 the trial and the number of passes are chosen once
    comparison   every method is retrained with what was chosen, on all training users or a
                 part of them, for every seed; only these models score the test split

One click network, tuned and trained separately, supplies pCTR to every method, as in the paper.
Every training is a job that writes a file (`jobs`, `store`, `work`): processes share the jobs, and
a stopped comparison resumes where it was and ends with the same numbers.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from esmm_torchrec.comparison.data import (
    Source,
    prepared_source,
    tuning_world,
    world_of_seed,
    world_source,
)
from esmm_torchrec.comparison.handover import (
    batch_size_on_all_rows,
    best_method,
    chosen_options,
)
from esmm_torchrec.comparison.jobs import Jobs, Run
from esmm_torchrec.comparison.options import (
    CLICK_NETWORK,
    COMPARED,
    FINALISTS,
    ComparisonOptions,
)
from esmm_torchrec.comparison.processes import helped_by
from esmm_torchrec.comparison.results import assemble
from esmm_torchrec.comparison.selection import (
    Chosen,
    Tried,
    best,
    chosen_in,
    described,
    selection_score,
    tuned_line,
)
from esmm_torchrec.comparison.store import TrialStore
from esmm_torchrec.comparison.work import Job, do_all
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.data.subsets import rows_between
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.methods import METHODS
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.sharding.host import usable_cores
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.tasks import TaskChain
from esmm_torchrec.training.run import train

MIN_CONVERSIONS = 10
"""Minimum expected conversions of a fraction of a world; below it, a world may have none."""


def compare(
    options: ComparisonOptions,
    out: Path,
    ranks: Ranks,
    *,
    data: Path | None,
    world: World,
    command: str,
    settings: Mapping[str, Any] | None = None,
    keep_best: Path | None = None,
) -> dict[str, Any]:
    """Compares methods; every rank calls it, and rank 0 writes to `out`.

    Several processes on this machine can work on the same `out`: each does the jobs not done yet.

    Args:
        options: methods to compare, and how.
        out: folder of the results and of finished trainings.
        ranks: this process among the others.
        data: a prepared data set for all seeds; None: a generated world for each.
        world: settings of the worlds; its seed is that of the first.
        command: command line, for the report.
        settings: the content of another comparison's results.json, whose choices are used; None:
            methods are tuned.
        keep_best: run folder to write the best method to, trained with the settings chosen for it;
            requires `data`. The best method is chosen on the held-out users, not on the test split.

    Returns:
        the content of results.json.

    Raises:
        DataError: the data set cannot be read or has nothing to measure.
        OptionError: a fraction has no conversions or is expected to have next to none; or
            `keep_best` contains something other than a run.
        PlanError: the tables do not fit.
    """
    started = time.time()
    if keep_best is not None and not RunFolder.may_be_at(keep_best):
        raise OptionError(
            f"`keep_best` {keep_best} is neither empty nor a run folder; choose another folder"
        )
    if data is None:
        _check_expected_conversions(options, world)
    study = _study(ranks, options, out, data, world, settings)
    options = study.options
    if ranks.is_first and study.store.left_aside:
        print(
            f"{study.store.left_aside} trainings from other versions of the code or libraries "
            "are ignored"
        )
    others = _processes(options, ranks) - 1
    with (
        helped_by(others, options.device, _help, options, out, data, world, settings),
        _one_thread(),
        study.progress(),
    ):
        chosen = study.tune()
        records = study.run(chosen)
    results = assemble(
        options,
        records,
        chosen={METHODS[method].title: of for method, of in chosen.items()},
        tuning=study.tuning,
        tuning_networks=study.tuning_networks,
        source={"data": str(data)} if data is not None else {"world": asdict(world)},
        environment=_environment(ranks),
        command=command,
    )

    text = json.dumps(results, indent=1, allow_nan=False) + "\n"

    def write() -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(text)
        _log_time(out, time.time() - started)

    ranks.from_first(write)
    if keep_best is not None:
        assert data is not None
        method = best_method({method: chosen[method] for method in options.chosen_methods})
        of_method = [one for one in records if one["method"] == METHODS[method].title]
        batch_size = batch_size_on_all_rows(max(of_method, key=lambda one: one["fraction"]))
        train(
            data,
            keep_best,
            chosen_options(options, method, chosen[method], batch_size=batch_size),
            ranks,
        )
        if ranks.is_first:
            print(
                f"{METHODS[method].title}, the best on the held-out users, is kept in {keep_best}"
            )
    return json.loads(text)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread. The small towers of a comparison gain nothing from more, and
    results that depend on the number of cores are not reproducible elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _processes(options: ComparisonOptions, ranks: Ranks) -> int:
    by_torchrun = "RANK" in os.environ
    if options.processes == "auto":
        return 1 if by_torchrun or ranks.device.type == "cuda" else usable_cores()
    if options.processes > 1 and by_torchrun:
        raise OptionError(
            f"`processes` {options.processes} is for a command without torchrun, whose ranks share "
            "each training; leave one of them out"
        )
    return options.processes


def _study(
    ranks: Ranks,
    options: ComparisonOptions,
    out: Path,
    data: Path | None,
    world: World,
    settings: Mapping[str, Any] | None,
) -> _Study:
    """Takes the same arguments as `compare`."""

    def source(of_world: World) -> Source:
        return world_source(
            of_world, out / "worlds", ranks, test_impressions=options.test_impressions
        )

    if data is None:
        tuned_on = source(tuning_world(world))
        compared_on = [source(world_of_seed(world, seed)) for seed in range(options.seeds)]
    else:
        tuned_on = prepared_source(
            data, held_out_by=options.held_out_by, test_impressions=options.test_impressions
        )
        _check_tasks(options, tuned_on.data.train.schema.tasks)
        _check_fractions(options, tuned_on)
        compared_on = [tuned_on] * options.seeds
    return _Study(
        options.for_rows(compared_on[0].impressions),
        TrialStore(out / "trials", ranks),
        ranks,
        tuned_on=tuned_on,
        compared_on=compared_on,
        settings=settings,
    )


def _help(ranks: Ranks, *arguments: Any) -> None:
    """Does the work of an additional process: the same trainings, without results."""
    study = _study(ranks, *arguments)
    with _one_thread(), study.progress(shown=False):
        study.run(study.tune())


def _check_tasks(options: ComparisonOptions, tasks: TaskChain) -> None:
    """Rejects unsuitable methods before the long work: not every objective supports every chain."""
    unfit: set[str] = set()
    for method in COMPARED:
        try:
            METHODS[method].objective.heads(tasks)
        except OptionError:
            unfit.add(method)
    for method in options.chosen_methods:
        if method in unfit:
            fit = " ".join(name for name in COMPARED if name not in unfit)
            raise OptionError(
                f"`methods` {method} is not for a chain of {len(tasks)} tasks "
                f"({', '.join(tasks.names)}); choose from {fit}"
            )


def _check_fractions(options: ComparisonOptions, source: Source) -> None:
    train = source.data.train
    for fraction in options.ascending_fractions:
        rows = rows_between(train, 0.0, fraction, purpose="volume")
        last = train.schema.tasks[-1]
        if not train.scalars[last.label][rows].any():
            raise OptionError(
                f"`fractions` {fraction:g} leaves {len(rows):,} training impressions and no "
                f"{last.name}; give a larger one"
            )


def _check_expected_conversions(options: ComparisonOptions, world: World) -> None:
    """Checks the number of conversions that the rates imply, before a world is drawn."""
    for fraction in options.ascending_fractions:
        impressions = world.split_impressions["train"] * fraction
        conversions = impressions * world.ctr * world.cvr
        if conversions < MIN_CONVERSIONS:
            raise OptionError(
                f"`fractions` {fraction:g} leaves about {impressions:,.0f} training impressions "
                f"and {conversions:.2g} conversions of a world; give a larger one, or more "
                "`world.impressions`"
            )


def _environment(ranks: Ranks) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "ranks": ranks.world_size,
        "device": ranks.device.type,
        **{name: version(name) for name in ("torch", "torchrec", "esmm_torchrec", "numpy")},
    }


def _log_time(out: Path, seconds: float) -> None:
    """Appends the seconds since this start; a stopped comparison has several entries."""
    with (out / "time.jsonl").open("a") as file:
        file.write(json.dumps({"seconds": round(seconds, 1)}) + "\n")


class _Study:
    """Runs the trainings of a comparison, each once.

    Args:
        options: options of the comparison, with a numeric batch size.
        store: store of finished trainings.
        ranks: this process among the others.
        tuned_on: data for tuning.
        compared_on: data for each seed.
        settings: as in `compare`.
    """

    def __init__(
        self,
        options: ComparisonOptions,
        store: TrialStore,
        ranks: Ranks,
        *,
        tuned_on: Source,
        compared_on: Sequence[Source],
        settings: Mapping[str, Any] | None,
    ) -> None:
        self.options = options
        self.store = store
        self.ranks = ranks
        self.tuning: dict[str, dict[str, Any]] = {}
        """Title of a method → what was tried and chosen, for the report."""
        self.tuning_networks: dict[str, float] = {}
        """Name of a network that tuning needed → its seconds."""
        self._settings = settings
        self._tuned_on = tuned_on
        self._compared_on = compared_on
        self._jobs = Jobs(options, store, ranks)
        self._bar: tqdm | None = None

    @contextmanager
    def progress(self, *, shown: bool = True) -> Iterator[None]:
        """Shows a progress bar of the trainings."""
        methods = len(self.options.chosen_methods)
        rounds = self.options.rounds if self._settings is None else ()
        tuned = (methods + 1) * sum(round_.trials for round_ in rounds)
        retrained = methods * len(self.options.ascending_fractions) * self.options.seeds
        with progress_bar(
            "compare",
            tuned + retrained,
            "trainings",
            disable=not (shown and self.ranks.is_first),
        ) as self._bar:
            yield

    def _say(self, line: str) -> None:
        if not self.ranks.is_first or self._bar is None or self._bar.disable:
            return
        if sys.stderr.isatty():
            self._bar.write(line)
        else:
            print(line, flush=True)

    def _do(self, jobs: Sequence[Job], *, on_done: Callable[[Job], object] | None = None) -> None:
        bar = self._bar
        assert bar is not None

        def done(job: Job) -> None:
            bar.update(job.is_wanted)
            if on_done is not None:
                on_done(job)

        do_all(
            jobs,
            self.ranks,
            on_start=lambda job: bar.set_description_str(job.label, refresh=False),
            on_done=done,
        )

    def tune(self) -> dict[str, Chosen]:
        """Chooses a trial and a number of passes for the click network and for each method.

        The click network is chosen by its AUC, a method by the mean of the two figures in the
        paper's table: AUC of pCVR on clicks, and of the common pCTR times pCVR on all impressions.
        """
        if self._settings is not None:
            return self._chosen_elsewhere(self._settings)
        chosen: dict[str, Chosen] = {}
        for methods in ((CLICK_NETWORK,), self.options.chosen_methods):
            self._tune_side_by_side(methods, chosen)
        self._tuned_on.close()
        return chosen

    def _chosen_elsewhere(self, settings: Mapping[str, Any]) -> dict[str, Chosen]:
        found = chosen_in(settings)
        for method in (CLICK_NETWORK, *self.options.chosen_methods):
            title = METHODS[method].title
            if method not in found:
                raise OptionError(f"the settings have none for {title}; compare it there first")
            self.tuning[title] = dict(settings["tuning"][title])
        return found

    def _tune_side_by_side(self, methods: Sequence[str], chosen: dict[str, Chosen]) -> None:
        left = {method: self.options.trials_of(method) for method in methods}
        tried: dict[str, list[Tried]] = {method: [] for method in methods}
        best_of: dict[str, list[Tried]] = {}
        seconds = dict.fromkeys(methods, 0.0)
        for number, round_ in enumerate(self.options.rounds):
            jobs, paths = self._jobs.tuning(self._tuned_on, round_, left, chosen)
            self._do(jobs)
            for method, trials in left.items():
                of_round: list[Tried] = []
                for trial in trials:
                    record = self.store.record(paths[method, trial])
                    seconds[method] += record["seconds"]
                    self.tuning_networks |= record["networks"]
                    of_round += [
                        Tried(number, trial, of["epochs"], selection_score(method, of))
                        for of in record["lengths"]
                    ]
                tried[method] += of_round
                best_of[method] = best(of_round, FINALISTS)
                if not best_of[method]:
                    raise OptionError(
                        f"`validation_share` {self.options.validation_share:g} leaves no clicks "
                        "and conversions to choose a setting of "
                        f"{METHODS[method].title} by; give more"
                    )
            left = {method: [one.trial for one in best_of[method]] for method in methods}
        for method in methods:
            first = best_of[method][0]
            assert first.score is not None
            chosen[method] = Chosen(first.trial, first.epochs, first.score)
            title = METHODS[method].title
            self.tuning[title] = described(chosen[method], tried[method]) | {
                "seconds": seconds[method]
            }
            self._say(tuned_line(title, chosen[method]))

    def run(self, chosen: Mapping[str, Chosen]) -> list[dict[str, Any]]:
        """Retrains and scores every method for every seed and fraction."""
        jobs: list[Job] = []
        runs: dict[Path, Run] = {}
        left: dict[int, set[Path]] = {}
        for seed, source in enumerate(self._compared_on):
            of_seed, found = self._jobs.runs(
                source, chosen, seed=seed, resample=source.drawn is None
            )
            jobs += of_seed
            runs |= {run.record: run for run in found}
            left[seed] = {job.result for job in of_seed}

        def done(job: Job) -> None:
            if job.result in runs:
                self._say(_run_line(job.label, self.store.record(job.result)))
            for seed, results in left.items():
                if job.result in results:
                    results.remove(job.result)
                    if not results:
                        self._compared_on[seed].close()

        self._do(jobs, on_done=done)
        return [
            self.store.record(path)
            | {"method": METHODS[run.method].title, "seed": run.seed, "fraction": run.fraction}
            for path, run in runs.items()
        ]


def _run_line(label: str, record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    figures = [
        f"{title} {metrics[name]:.4f}"
        for title, name in (
            ("CVR AUC", "cvr_auc"),
            ("CTCVR AUC", "ctcvr_auc_common_ctr"),
            ("entire-space CVR AUC", "cvr_auc_entire_space"),
        )
        if metrics.get(name) is not None
    ]
    return f"{label}: {', '.join(figures)} ({record['seconds']:.0f} s)"
