"""Jobs of a comparison: tuning trials, networks that methods need, and test runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esmm_torchrec.comparison.data import Source
from esmm_torchrec.comparison.options import CLICK_NETWORK, ComparisonOptions, Round, Trial
from esmm_torchrec.comparison.selection import Chosen
from esmm_torchrec.comparison.statistics import UserBootstrap
from esmm_torchrec.comparison.store import Network, TrialStore
from esmm_torchrec.comparison.trial import Stage, Training, test_record, tuning_record
from esmm_torchrec.comparison.work import Job
from esmm_torchrec.models.methods import METHODS
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.fit import TrainingPart
from esmm_torchrec.training.options import TrainOptions

COMMON_CTR_SEED = 500_009
"""Offset of the common click network's seed, which makes it differ from any method's own."""

MAX_OPEN_STAGES = 3
"""Maximum number of stages that a process keeps; counting their ids takes a pass over the data."""


class Run(NamedTuple):
    """A test run of a method."""

    method: str
    seed: int
    fraction: float
    record: Path


class Jobs:
    """Creates the jobs of a comparison.

    Args:
        options: options of the comparison, with a numeric batch size.
        store: store of finished trainings.
        ranks: this process among the others.
    """

    def __init__(self, options: ComparisonOptions, store: TrialStore, ranks: Ranks) -> None:
        self.options = options
        self.store = store
        self.ranks = ranks
        self._stages: dict[Any, Stage] = {}

    def tuning(
        self,
        source: Source,
        round_: Round,
        trials: Mapping[str, Sequence[Trial]],
        chosen: Mapping[str, Chosen],
    ) -> tuple[list[Job], dict[tuple[str, Trial], Path]]:
        """Creates the jobs of a round of tuning.

        Args:
            source: data to tune on.
            round_: the round.
            trials: method → its trials.
            chosen: results of tuning; contains the click network unless that is being tuned.

        Returns:
            the jobs, and the path of the record of each method and trial.
        """
        jobs: list[Job] = []
        records: dict[tuple[str, Trial], Path] = {}
        for method, tried in trials.items():
            for trial in tried:
                options = self.options.train(method, trial, seed=0, epochs=round_.epochs)
                key = {
                    "stage": "tuning",
                    "validation_share": self.options.validation_share,
                    "share": round_.share,
                    "updates": round_.updates,
                }
                records[method, trial] = self._training(
                    jobs,
                    source,
                    ("tuning", round_.share, round_.updates),
                    options,
                    trial,
                    chosen,
                    key=key,
                    name=f"tune-{method}",
                    label=f"tune {METHODS[method].title}",
                    record=_tuning_record,
                )
        return _with_drawing(source, jobs), records

    def runs(
        self,
        source: Source,
        chosen: Mapping[str, Chosen],
        *,
        seed: int,
        resample: bool,
    ) -> tuple[list[Job], list[Run]]:
        """Creates the jobs that retrain and score every method for one seed, at every fraction."""
        jobs: list[Job] = []
        runs: list[Run] = []

        def record(
            training: Training, part: TrainingPart, common_ctr: np.ndarray | None
        ) -> dict[str, Any] | None:
            assert common_ctr is not None
            data = source.data
            resampling = UserBootstrap(data.test_users, data.test_weights) if resample else None
            return test_record(training, part, common_ctr=common_ctr, resampling=resampling)

        for fraction in self.options.ascending_fractions:
            for method in self.options.chosen_methods:
                choice = chosen[method]
                options = self.options.train(method, choice.trial, seed=seed, epochs=choice.epochs)
                key = {
                    "stage": "test",
                    "fraction": fraction,
                    "test_impressions": self.options.test_impressions,
                    "seed": seed,
                }
                path = self._training(
                    jobs,
                    source,
                    ("test", fraction, 1.0),
                    options,
                    choice.trial,
                    chosen,
                    key=key | {"resample": resample},
                    name=f"seed-{seed}-{method}",
                    label=f"seed {seed}, {fraction:.0%} {METHODS[method].title}",
                    record=record,
                )
                runs.append(Run(method, seed, fraction, path))
        return _with_drawing(source, jobs), runs

    def _training(
        self,
        jobs: list[Job],
        source: Source,
        stage: tuple[str, float, float],
        options: TrainOptions,
        trial: Trial,
        chosen: Mapping[str, Chosen],
        *,
        key: Mapping[str, Any],
        name: str,
        label: str,
        record: Callable[[Training, TrainingPart, np.ndarray | None], dict[str, Any] | None],
    ) -> Path:
        """Appends the job of a training, and those of the networks that it needs.

        Returns:
            the path of its record.
        """
        method, min_count = options.method, trial.setting.min_count
        of_stage = dict(source.identity) | {k: v for k, v in key.items() if k != "resample"}
        common = pctr = None
        if method != CLICK_NETWORK:
            # In tuning, the click network is chosen by its own AUC.
            common = self._network(
                jobs, source, stage, chosen, of_stage, COMMON_CTR_SEED, Training.click_logits
            )
        if METHODS[method].rows.needs_pctr:
            pctr = self._network(jobs, source, stage, chosen, of_stage, 0, Training.clicked_pctr)
        identity = (
            dict(source.identity)
            | dict(key)
            | {
                "training": options.to_dict(),
                "min_count": min_count,
                "common_ctr": None if common is None else _values(chosen[CLICK_NETWORK]),
            }
        )
        path = self.store.of_record(name, identity)

        def work() -> dict[str, Any] | None:
            on = self._stage(source, stage)
            networks = [None if of is None else self.store.network(of) for of in (common, pctr)]
            training = Training(on, options, self.ranks, min_count=min_count)
            part = training.part(_of_all_rows(on, networks[1]))
            made = record(training, part, None if networks[0] is None else networks[0].scores)
            seconds = {of.name: of.seconds for of in networks if of is not None}
            # Keyed by name, since several records may share a network.
            return None if made is None else made | {"networks": seconds}

        jobs.append(
            Job(
                label,
                path,
                lambda: self.store.keep_record(path, identity, work),
                needs=_needs(source, common, pctr),
            )
        )
        return path

    def _stage(self, source: Source, what: tuple[str, float, float]) -> Stage:
        key = (id(source), *what)
        if key not in self._stages:
            if len(self._stages) >= MAX_OPEN_STAGES:
                del self._stages[next(iter(self._stages))]
            kind, share, updates = what
            held_out = self.options.validation_share
            self._stages[key] = (
                Stage.test(source.data, share)
                if kind == "test"
                else Stage.validation(source.data, held_out, share=share, updates=updates)
            )
        return self._stages[key]

    def _network(
        self,
        jobs: list[Job],
        source: Source,
        stage: tuple[str, float, float],
        chosen: Mapping[str, Chosen],
        key: Mapping[str, Any],
        seed: int,
        scores: Callable[[Training], np.ndarray | None],
    ) -> Path:
        """Appends the job of a click network whose scores trainings need, unless it exists.

        Args:
            jobs: jobs of the trainings; appended to.
            source: data to train on.
            stage: stage of the source.
            chosen: results of tuning, including that of the click network.
            key: identity of the stage.
            seed: offset from the seed of the training.
            scores: function that returns the scores to keep.

        Returns:
            the path of its scores.
        """
        network = chosen[CLICK_NETWORK]
        min_count = network.trial.setting.min_count
        options = self.options.train(
            CLICK_NETWORK, network.trial, seed=key.get("seed", 0) + seed, epochs=network.epochs
        )
        name = scores.__name__.replace("_", "-")
        path = self.store.of_network(
            name, dict(key) | {"training": options.to_dict(), "min_count": min_count}
        )

        def work() -> None:
            self.store.keep_network(
                path,
                lambda: scores(
                    Training(self._stage(source, stage), options, self.ranks, min_count=min_count)
                ),
            )

        if all(job.result != path for job in jobs):
            label = name.replace("-", " ")
            jobs.append(Job(label, path, work, needs=_needs(source), is_wanted=False))
        return path


def _needs(source: Source, *paths: Path | None) -> tuple[Path, ...]:
    return tuple(path for path in (source.drawn, *paths) if path is not None)


def _with_drawing(source: Source, jobs: list[Job]) -> list[Job]:
    """Returns the jobs, preceded by one that draws their world."""
    if source.drawn is None:
        return jobs
    return [Job("draw a world", source.drawn, source.draw, is_wanted=False), *jobs]


def _of_all_rows(stage: Stage, pctr: Network | None) -> np.ndarray | None:
    """Returns pCTR by the rows of the training split; NaN if a row has none."""
    if pctr is None:
        return None
    values = np.full(stage.train.impressions, np.nan)
    values[stage.clicked_train_rows()] = pctr.scores
    return values


def _values(chosen: Chosen) -> dict[str, Any]:
    """Returns what the common click network adds to the identity of trainings that use it."""
    trial = chosen.trial
    return {"trial": [asdict(trial.setting), dict(trial.own)], "epochs": chosen.epochs}


def _tuning_record(
    training: Training, part: TrainingPart, common_ctr: np.ndarray | None
) -> dict[str, Any] | None:
    return tuning_record(training, part, common_ctr=common_ctr)
