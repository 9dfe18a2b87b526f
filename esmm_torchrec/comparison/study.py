"""The comparison of conversion methods: tune each by one rule, retrain, score once.

    tuning       a part of the training users is held out; every method gets the same number of
                 trials; the best trial and number of epochs are chosen once, at full volume
    comparison   every method is retrained with what was chosen, on all training users or a part
                 of them, for every seed; the test half is scored by chosen models alone

One click network, tuned and trained by itself, supplies pCTR to every method, as in the paper.
Every finished training is remembered (`store`): a stopped comparison goes on where it
was and ends with the same numbers.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from esmm_torchrec.comparison.data import (
    Source,
    prepared_source,
    tuning_world,
    world_of_seed,
    world_source,
)
from esmm_torchrec.comparison.handover import best_method, chosen_options
from esmm_torchrec.comparison.options import (
    CLICK_NETWORK,
    ComparisonOptions,
    Trial,
)
from esmm_torchrec.comparison.results import assemble
from esmm_torchrec.comparison.selection import (
    Chosen,
    at_edge,
    described,
    selection_score,
    tuned_line,
)
from esmm_torchrec.comparison.statistics import UserBootstrap
from esmm_torchrec.comparison.store import Network, TrialStore
from esmm_torchrec.comparison.trial import (
    Stage,
    Training,
    test_record,
    tuning_record,
)
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.data.subsets import rows_between
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.methods import METHODS
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.run import train

COMMON_CTR_SEED = 500_009
"""Added to the seed of the common click network, so that no method's own click network is it."""

MIN_CONVERSIONS = 10
"""Expected conversions of a fraction of a generated world, below which some world may have none."""


def compare(
    options: ComparisonOptions,
    out: Path,
    ranks: Ranks,
    *,
    data: Path | None,
    world: World,
    command: str,
    tune_on: World | None = None,
    trials: Path | None = None,
    keep_best: Path | None = None,
) -> dict[str, Any]:
    """Compares methods; every rank calls it, rank 0 writes below `out`.

    Args:
        options: what is compared, and how.
        out: folder of results and of what is remembered.
        ranks: this process among the others.
        data: a prepared data set for all seeds; None: a generated world for each.
        world: settings of the worlds; its seed is that of the first.
        command: how the comparison was asked for, for the report.
        tune_on: settings of the world to tune on, where several comparisons are to have methods
            tuned alike; None: those of `world`.
        trials: folder of what is remembered; None: below `out`.
        keep_best: run folder to leave the best method in, trained with what was chosen for it; it
            needs `data`. The best is chosen on the held-out users, not on the test half.

    Returns:
        the content of results.json.

    Raises:
        DataError: the data set cannot be read or has nothing to measure.
        OptionError: a fraction is to hold no conversion, or next to none.
        PlanError: the tables do not fit.
    """
    started = time.time()

    def source(of_world: World) -> Source:
        if data is None:
            return world_source(
                of_world, out / "worlds", ranks, test_impressions=options.test_impressions
            )
        return prepared_source(
            data, held_out_by=options.held_out_by, test_impressions=options.test_impressions
        )

    if data is None:
        _check_expected_conversions(options, world)
    else:
        _check_fractions(options, source(world))
    store = TrialStore(trials or out / "trials", ranks)
    study = _Study(options, store, ranks)
    if ranks.is_first and store.left_aside:
        print(
            f"{store.left_aside} trainings of other code or libraries are left aside; "
            "they are not compared with"
        )
    with _one_thread(), study.progress():
        with _closing(source(tuning_world(tune_on or world))) as tuned_on:
            chosen = study.tune(tuned_on)
        records: list[dict[str, Any]] = []
        for seed in range(options.seeds):
            with _closing(source(world_of_seed(world, seed))) as compared_on:
                for fraction in options.ascending_fractions:
                    records += study.run(
                        compared_on, chosen, seed=seed, fraction=fraction, resample=data is not None
                    )
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
        best = best_method({method: chosen[method] for method in options.chosen_methods})
        batch_size = next(r["batch_size"] for r in records if r["method"] == METHODS[best].title)
        train(
            data,
            keep_best,
            chosen_options(options, best, chosen[best], batch_size=batch_size),
            ranks,
        )
        if ranks.is_first:
            print(f"{METHODS[best].title}, the best on the held-out users, is kept in {keep_best}")
    return json.loads(text)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The small towers of a comparison gain nothing from more threads, and results that depend on
    the number of cores are not the same elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _closing(source: Source) -> Iterator[Source]:
    try:
        yield source
    finally:
        source.close()


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
    """Before a world is drawn, by the rates it is to have."""
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
    """Seconds of each start, since a stopped comparison has several."""
    with (out / "time.jsonl").open("a") as file:
        file.write(json.dumps({"seconds": round(seconds, 1)}) + "\n")


class _Study:
    """Runs the trainings of a comparison, each once."""

    def __init__(self, options: ComparisonOptions, store: TrialStore, ranks: Ranks) -> None:
        self.options = options
        self.store = store
        self.ranks = ranks
        self.tuning: dict[str, dict[str, Any]] = {}
        """Method → what was tried, for the report."""
        self.tuning_networks: dict[str, float] = {}
        """Network that tuning needed → its seconds."""
        self._last_stage: tuple[Source, float | None, Stage] | None = None
        self._bar: tqdm | None = None

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Shows how many of the trainings are done."""
        methods = len(self.options.chosen_methods)
        tuned = self.options.trials * (methods + 1)
        retrained = methods * len(self.options.ascending_fractions) * self.options.seeds
        with progress_bar(
            "compare", tuned + retrained, "trainings", disable=not self.ranks.is_first
        ) as self._bar:
            yield

    @contextmanager
    def _training(self, label: str) -> Iterator[None]:
        """One training within the progress bar."""
        assert self._bar is not None
        self._bar.set_description_str(label, refresh=False)
        yield
        self._bar.update()

    def _stage(self, source: Source, fraction: float | None) -> Stage:
        """The stage of a fraction, or of tuning; the last one is kept for the next method."""
        if self._last_stage is not None:
            of_source, of_fraction, stage = self._last_stage
            if of_source is source and of_fraction == fraction:
                return stage
        if fraction is None:
            stage = Stage.validation(source.data, self.options.validation_share)
        else:
            stage = Stage.test(source.data, fraction)
        self._last_stage = source, fraction, stage
        return stage

    def _say(self, line: str) -> None:
        if not self.ranks.is_first or self._bar is None:
            return
        if sys.stderr.isatty():
            self._bar.write(line)
        else:
            print(line, flush=True)

    def tune(self, source: Source) -> dict[str, Chosen]:
        """Chooses a trial and a number of epochs for the click network and for each method.

        The click network is chosen by its AUC, a method by the mean of the two figures of the
        paper's table: AUC of pCVR on clicks, and of the common pCTR times pCVR on everything.
        """
        chosen: dict[str, Chosen] = {}
        for method in (CLICK_NETWORK, *self.options.chosen_methods):
            tried = []
            seconds = 0.0
            for trial in self.options.trials_of(method):
                record = self._tuning_record(source, method, trial, chosen)
                seconds += record["seconds"]
                self.tuning_networks |= record["networks"]
                for length in record["lengths"]:
                    score = selection_score(method, length)
                    if score is not None:
                        tried.append(Chosen(trial, length["epochs"], score))
            if not tried:
                raise OptionError(
                    f"`validation_share` {self.options.validation_share:g} leaves no clicks and "
                    f"conversions to choose a setting of {METHODS[method].title} by; give more"
                )
            # The first of equals, so that the order of trials decides and not a rounding.
            chosen[method] = max(tried, key=lambda choice: choice.score)
            self.tuning[METHODS[method].title] = described(chosen[method], tried) | {
                "at_edge": at_edge(chosen[method], tried),
                "seconds": seconds,
            }
            self._say(tuned_line(METHODS[method].title, chosen[method]))
        return chosen

    def _tuning_record(
        self,
        source: Source,
        method: str,
        trial: Trial,
        chosen: Mapping[str, Chosen],
    ) -> dict[str, Any]:
        options = self.options.train(method, trial, seed=0, epochs=self.options.epochs)
        key = dict(source.identity) | {
            "stage": "tuning",
            "validation_share": self.options.validation_share,
            "training": options.to_dict(),
            "common_ctr": _of_network(chosen, method),
        }
        with self._training(f"tune {METHODS[method].title}"):

            def work() -> dict[str, Any] | None:
                stage = self._stage(source, None)
                common = self._common_ctr(stage, chosen, key, method)
                pctr = self._pctr(stage, chosen, key, method)
                training = Training(stage, options, self.ranks)
                record = tuning_record(
                    training,
                    training.part(_of_all_rows(stage, pctr)),
                    common_ctr=None if common is None else common.scores,
                )
                return _with_networks(record, common, pctr)

            return self.store.record(f"tune-{method}", key, work)

    def run(
        self,
        source: Source,
        chosen: Mapping[str, Chosen],
        *,
        seed: int,
        fraction: float,
        resample: bool,
    ) -> list[dict[str, Any]]:
        """Retrains and scores every method for one seed and fraction."""
        records = []
        for method in self.options.chosen_methods:
            options = self.options.train(
                method, chosen[method].trial, seed=seed, epochs=chosen[method].epochs
            )
            key = dict(source.identity) | {
                "stage": "test",
                "fraction": fraction,
                "test_impressions": self.options.test_impressions,
                "training": options.to_dict(),
                "common_ctr": _of_network(chosen, method),
                "seed": seed,
                "resample": resample,
            }
            name = METHODS[method].title
            label = f"seed {seed} of {self.options.seeds}, {fraction:.0%} {name}"
            with self._training(label):

                def work(
                    method: str = method,
                    options: Any = options,
                    key: Mapping[str, Any] = key,
                ) -> dict[str, Any] | None:
                    stage = self._stage(source, fraction)
                    common = self._common_ctr(stage, chosen, key, method)
                    assert common is not None
                    pctr = self._pctr(stage, chosen, key, method)
                    training = Training(stage, options, self.ranks)
                    record = test_record(
                        training,
                        training.part(_of_all_rows(stage, pctr)),
                        common_ctr=common.scores,
                        resampling=_resampling(source) if resample else None,
                    )
                    return _with_networks(record, common, pctr)

                record = self.store.record(f"seed-{seed}-{method}", key, work)
            records.append(record | {"method": name, "seed": seed, "fraction": fraction})
            self._say(_run_line(label, record))
        return records

    def _common_ctr(
        self,
        stage: Stage,
        chosen: Mapping[str, Chosen],
        key: Mapping[str, Any],
        method: str,
    ) -> Network | None:
        """Logits of the common click network for what is scored; None while it is itself tuned."""
        if method == CLICK_NETWORK:
            return None
        training = self._click_network(stage, chosen, key.get("seed", 0) + COMMON_CTR_SEED)
        return self.store.network(
            "common-ctr",
            _stage_key(key) | {"training": training.options.to_dict()},
            training.click_logits,
        )

    def _pctr(
        self,
        stage: Stage,
        chosen: Mapping[str, Chosen],
        key: Mapping[str, Any],
        method: str,
    ) -> Network | None:
        """pCTR of the clicked training rows, out of fold, for methods that choose rows by it."""
        if not METHODS[method].rows.needs_pctr:
            return None
        training = self._click_network(stage, chosen, key.get("seed", 0))
        return self.store.network(
            "out-of-fold-pctr",
            _stage_key(key) | {"training": training.options.to_dict()},
            training.clicked_pctr,
        )

    def _click_network(self, stage: Stage, chosen: Mapping[str, Chosen], seed: int) -> Training:
        """A click network with the settings chosen for it, untrained."""
        network = chosen[CLICK_NETWORK]
        options = self.options.train(CLICK_NETWORK, network.trial, seed=seed, epochs=network.epochs)
        return Training(stage, options, self.ranks)


def _of_all_rows(stage: Stage, pctr: Network | None) -> np.ndarray | None:
    """pCTR by the rows of the training split; NaN where there is none."""
    if pctr is None:
        return None
    values = np.full(stage.train.impressions, np.nan)
    values[stage.clicked_train_rows()] = pctr.scores
    return values


def _with_networks(
    record: dict[str, Any] | None, *networks: Network | None
) -> dict[str, Any] | None:
    """The record with the seconds of the networks that it needed; several records may share one."""
    if record is None:
        return None
    return record | {"networks": {of.name: of.seconds for of in networks if of is not None}}


def _of_network(chosen: Mapping[str, Chosen], method: str) -> Any:
    """What the common click network adds to the identity of a training that uses it."""
    if method == CLICK_NETWORK:
        return None
    network = chosen[CLICK_NETWORK]
    return {"trial": [asdict(network.trial.setting), network.trial.rate], "epochs": network.epochs}


def _stage_key(key: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training's identity its stage has, whatever the method."""
    own = ("training", "common_ctr", "resample")
    return {name: value for name, value in key.items() if name not in own}


def _resampling(source: Source) -> UserBootstrap:
    return UserBootstrap(source.data.test_users)


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
