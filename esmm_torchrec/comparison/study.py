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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from esmm_torchrec.comparison.options import (
    CLICK_NETWORK,
    ComparisonOptions,
    Trial,
)
from esmm_torchrec.comparison.results import assemble
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
from esmm_torchrec.models.methods import METHODS, MethodOption
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import CLICK, CONVERSION
from esmm_torchrec.sharding.process_group import Ranks

COMMON_CTR_SEED = 500_009
"""Added to the seed of the common click network, so that no method's own click network is it."""

NETWORKS: Mapping[MethodOption, int] = {"division": 2, "esmm-ns": 2}
"""Networks of methods that have more than one, for the estimate of time."""

SCORING_SHARE = 0.9
"""Time to score and measure a row over the time to train on it, for the same estimate."""

ROWS_PER_UPDATE = 1400
"""Rows that could be trained on in the time that an update takes whatever its rows, for the same
estimate."""

VISITED: Mapping[MethodOption, float] = {
    "base": 0.1,
    "aman": 0.5,
    "oversampling": 0.1,
    "unbias": 0.1,
    "unbias-weighted": 0.1,
}
"""Part of the training rows that methods train on which do not take all, for the same estimate."""

FEWEST_CONVERSIONS = 10
"""That a fraction of a generated world must be expected to hold, or some world has none."""


@dataclass(frozen=True)
class Chosen:
    """What tuning chose for a method."""

    trial: Trial
    epochs: int
    score: float
    """Of the held-out users, by which it was chosen."""


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

    Returns:
        the content of results.json.

    Raises:
        DataError: the data set cannot be read or has nothing to measure.
        OptionError: a fraction is to hold no conversion, or next to none.
        PlanError: the tables do not fit.
    """
    # The small towers of a comparison gain nothing from more, and results that depend on the
    # number of cores are not the same elsewhere.
    torch.set_num_threads(1)
    started = time.time()

    def source(of_world: World) -> Source:
        if data is None:
            return world_source(
                of_world, out / "worlds", ranks, test_impressions=options.test_impressions
            )
        return prepared_source(data, test_impressions=options.test_impressions)

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
    with study.progress(_train_impressions(data, world)):
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
    return json.loads(text)


@contextmanager
def _closing(source: Source) -> Iterator[Source]:
    # Left in place after an error: what was generated serves the next start.
    yield source
    source.close()


def _check_fractions(options: ComparisonOptions, source: Source) -> None:
    train = source.data.train
    for fraction in options.ascending_fractions:
        rows = rows_between(train, 0.0, fraction, purpose="volume")
        conversions = int((train.scalars[CLICK][rows] * train.scalars[CONVERSION][rows]).sum())
        if conversions == 0:
            raise OptionError(
                f"--fractions {fraction:g} leaves {len(rows):,} training impressions and no "
                "conversion; give a larger one"
            )


def _check_expected_conversions(options: ComparisonOptions, world: World) -> None:
    """Before a world is generated, by the rates it is to have."""
    for fraction in options.ascending_fractions:
        impressions = world.split_impressions["train"] * fraction
        conversions = impressions * world.ctr * world.cvr
        if conversions < FEWEST_CONVERSIONS:
            raise OptionError(
                f"--fractions {fraction:g} leaves about {impressions:,.0f} training impressions "
                f"and {conversions:.2g} conversions of a world; give a larger one, or more "
                "--world.impressions"
            )


def _train_impressions(data: Path | None, world: World) -> int:
    """Training impressions of one data set."""
    if data is None:
        return world.split_impressions["train"]
    return prepared_source(data, test_impressions=1).data.train.impressions


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
        self._rows = 0

    @contextmanager
    def progress(self, rows: int) -> Iterator[None]:
        """Shows how far the comparison is; `rows` are the training impressions of a data set."""
        self._rows = rows
        methods = (CLICK_NETWORK, *self.options.chosen_methods)
        longest = self.options.epochs
        tuned = sum(
            self._cost(method, 1 - self.options.validation_share, longest) * self.options.trials
            for method in methods
        )
        typical = (1 + longest) / 2
        compared = sum(
            self._cost(method, fraction, typical)
            for method in methods
            for fraction in self.options.ascending_fractions
        )
        total = tuned + compared * self.options.seeds
        with progress_bar(
            "compare", total, "rows", disable=not self.ranks.is_first, smoothing=0.05
        ) as self._bar:
            yield

    def _cost(self, method: MethodOption, share: float, epochs: float) -> float:
        """Rows that a training visits, times its networks."""
        updates = self._rows / self.options.batch_size
        visited = self._rows * share * VISITED.get(method, 1.0) + updates * ROWS_PER_UPDATE
        scored = self.options.test_impressions * SCORING_SHARE
        return (visited * epochs + scored) * NETWORKS.get(method, 1)

    @contextmanager
    def _training(self, label: str, cost: float) -> Iterator[Callable[[int], object]]:
        """One training within the progress bar, which moves by its cost however it ends."""
        assert self._bar is not None
        bar, before = self._bar, self._bar.n
        bar.set_description_str(label, refresh=False)

        def on_rows(rows: int) -> None:
            bar.update(min(rows + ROWS_PER_UPDATE, max(0.0, before + cost - bar.n)))

        yield on_rows
        bar.update(before + cost - bar.n)

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

    def tune(self, source: Source) -> dict[MethodOption, Chosen]:
        """Chooses a trial and a number of epochs for the click network and for each method.

        The click network is chosen by its AUC, a method by the mean of the two figures of the
        paper's table: AUC of pCVR on clicks, and of the common pCTR times pCVR on everything.
        """
        chosen: dict[MethodOption, Chosen] = {}
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
                    f"--validation-share {self.options.validation_share:g} leaves no clicks and "
                    f"conversions to choose a setting of {METHODS[method].name} by; give more"
                )
            # The first of equals, so that the order of trials decides and not a rounding.
            chosen[method] = max(tried, key=lambda choice: choice.score)
            self.tuning[METHODS[method].name] = _described(chosen[method], tried) | {
                "at_edge": at_edge(chosen[method], tried),
                "seconds": seconds,
            }
            self._say(_tuned_line(METHODS[method].name, chosen[method]))
        return chosen

    def _tuning_record(
        self,
        source: Source,
        method: MethodOption,
        trial: Trial,
        chosen: Mapping[MethodOption, Chosen],
    ) -> dict[str, Any]:
        options = self.options.train(method, trial, seed=0, epochs=self.options.epochs)
        key = dict(source.identity) | {
            "stage": "tuning",
            "validation_share": self.options.validation_share,
            "training": asdict(options),
            "common_ctr": _of_network(chosen, method),
        }
        share = 1 - self.options.validation_share
        name = METHODS[method].name
        with self._training(f"tune {name}", self._cost(method, share, self.options.epochs)) as rows:

            def work() -> dict[str, Any] | None:
                stage = self._stage(source, None)
                common = self._common_ctr(stage, chosen, key, method, rows)
                pctr = self._pctr(stage, chosen, key, method, rows)
                training = Training(stage, options, self.ranks)
                record = tuning_record(
                    training,
                    training.part(_of_all_rows(stage, pctr)),
                    common_ctr=None if common is None else common.scores,
                    on_rows=rows,
                )
                return _with_networks(record, common, pctr)

            return self.store.record(f"tune-{method}", key, work)

    def run(
        self,
        source: Source,
        chosen: Mapping[MethodOption, Chosen],
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
                "training": asdict(options),
                "common_ctr": _of_network(chosen, method),
                "seed": seed,
                "resample": resample,
            }
            name = METHODS[method].name
            label = f"seed {seed} of {self.options.seeds}, {fraction:.0%} {name}"
            cost = self._cost(method, fraction, (1 + self.options.epochs) / 2)
            with self._training(label, cost) as rows:

                def work(
                    method: MethodOption = method,
                    options: Any = options,
                    key: Mapping[str, Any] = key,
                    rows: Callable[[int], object] = rows,
                ) -> dict[str, Any] | None:
                    stage = self._stage(source, fraction)
                    common = self._common_ctr(stage, chosen, key, method, rows)
                    assert common is not None
                    pctr = self._pctr(stage, chosen, key, method, rows)
                    training = Training(stage, options, self.ranks)
                    record = test_record(
                        training,
                        training.part(_of_all_rows(stage, pctr)),
                        common_ctr=common.scores,
                        resampling=_resampling(source, stage) if resample else None,
                        on_rows=rows,
                    )
                    return _with_networks(record, common, pctr)

                record = self.store.record(f"seed-{seed}-{method}", key, work)
            records.append(record | {"method": name, "seed": seed, "fraction": fraction})
            self._say(_run_line(label, record))
        return records

    def _common_ctr(
        self,
        stage: Stage,
        chosen: Mapping[MethodOption, Chosen],
        key: Mapping[str, Any],
        method: MethodOption,
        on_rows: Callable[[int], object],
    ) -> Network | None:
        """Logits of the common click network for what is scored; None while it is itself tuned."""
        if method == CLICK_NETWORK:
            return None
        training = self._click_network(stage, chosen, key.get("seed", 0) + COMMON_CTR_SEED)
        return self.store.network(
            "common-ctr",
            _stage_key(key) | {"training": asdict(training.options)},
            lambda: training.click_logits(on_rows=on_rows),
        )

    def _pctr(
        self,
        stage: Stage,
        chosen: Mapping[MethodOption, Chosen],
        key: Mapping[str, Any],
        method: MethodOption,
        on_rows: Callable[[int], object],
    ) -> Network | None:
        """pCTR of the clicked training rows, out of fold, for methods that choose rows by it."""
        if not METHODS[method].needs_pctr:
            return None
        training = self._click_network(stage, chosen, key.get("seed", 0))
        return self.store.network(
            "out-of-fold-pctr",
            _stage_key(key) | {"training": asdict(training.options)},
            lambda: training.clicked_pctr(on_rows=on_rows),
        )

    def _click_network(
        self, stage: Stage, chosen: Mapping[MethodOption, Chosen], seed: int
    ) -> Training:
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


def selection_score(method: MethodOption, figures: Mapping[str, float | None]) -> float | None:
    """What tuning chooses by, higher being better; None where the held-out users allow none."""
    names = ("ctr_auc",) if method == CLICK_NETWORK else ("cvr_auc", "ctcvr_auc_common_ctr")
    values = [figures[name] for name in names]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _of_network(chosen: Mapping[MethodOption, Chosen], method: MethodOption) -> Any:
    """What the common click network adds to the identity of a training that uses it."""
    if method == CLICK_NETWORK:
        return None
    network = chosen[CLICK_NETWORK]
    return {"trial": [asdict(network.trial.setting), network.trial.rate], "epochs": network.epochs}


def _stage_key(key: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training's identity its stage has, whatever the method."""
    own = ("training", "common_ctr", "resample")
    return {name: value for name, value in key.items() if name not in own}


def _resampling(source: Source, stage: Stage) -> UserBootstrap:
    users = source.data.test.scalars[source.data.user_column]
    return UserBootstrap(users if stage.scored_rows is None else users[stage.scored_rows])


def _described(chosen: Chosen, tried: list[Chosen]) -> dict[str, Any]:
    def values(choice: Chosen) -> dict[str, Any]:
        return asdict(choice.trial.setting) | {
            "rate": choice.trial.rate,
            "epochs": choice.epochs,
            "score": choice.score,
        }

    return {"chosen": values(chosen), "tried": [values(choice) for choice in tried]}


def at_edge(chosen: Chosen, tried: Sequence[Chosen]) -> list[str]:
    """What was chosen at the end of what was tried of it, beyond which better may lie: "epochs" at
    the most passes; a learning rate, weight decay or rate at its lowest or highest."""
    edges = []
    if chosen.epochs == max(other.epochs for other in tried):
        edges.append("epochs")
    for name in ("sparse_lr", "dense_lr", "weight_decay"):
        values = {getattr(other.trial.setting, name) for other in tried}
        # Below no weight decay there is none.
        lowest = min(values) if name != "weight_decay" or min(values) else None
        if getattr(chosen.trial.setting, name) in (lowest, max(values)):
            edges.append(name)
    rates = {other.trial.rate for other in tried if other.trial.rate is not None}
    if rates and chosen.trial.rate in (min(rates), max(rates)):
        edges.append("rate")
    return edges


def _tuned_line(name: str, chosen: Chosen) -> str:
    rate = "" if chosen.trial.rate is None else f", rate {chosen.trial.rate:g}"
    setting = chosen.trial.setting
    return (
        f"tuned {name}: tables {setting.sparse_lr:g}, towers {setting.dense_lr:g}, weight decay "
        f"{setting.weight_decay:g}{rate}, {chosen.epochs} epochs (score {chosen.score:.4f})"
    )


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
