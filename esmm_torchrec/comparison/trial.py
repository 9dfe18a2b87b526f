"""One training of a comparison: its training rows, its scored rows and its record."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.comparison.data import ComparisonData
from esmm_torchrec.comparison.statistics import UserBootstrap
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import Selection
from esmm_torchrec.data.subsets import count_ids, rows_between, user_hash, without_ids
from esmm_torchrec.metrics.probability import Prediction, product, reliability_curve
from esmm_torchrec.metrics.ranking import auc, auc_within_strata, soft_auc
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.schema import UNKNOWN_ROW
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.tasks import DEFAULT_TASKS
from esmm_torchrec.training.fit import (
    TrainingPart,
    batch_of_equal_updates,
    fit,
    out_of_fold_pctr,
    training_part,
)
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import TrainOptions

SCORING_BATCH = 8192
CURVE_BINS = 12
POINTS = 1500
"""Number of test impressions in the record of a run, to plot its scores against the truth."""

UNCLICKED_IN_TUNING = 200_000
"""Approximate maximum number of held-out impressions without a click that tuning scores; if they
are sampled, each has a larger weight. All clicked ones are scored."""


@dataclass(frozen=True)
class Stage:
    """Rows to train on and rows to score.

    If only a part of the training users is used, ids too rare in its rows for a vocabulary become
    the unknown id for every method, as if that part had been prepared separately.
    """

    train: MappedSplit
    train_rows: np.ndarray | None
    scored: MappedSplit
    scored_rows: np.ndarray | None
    scored_weight: np.ndarray | None = None
    """float32, weight of each scored row; None: all 1."""
    updates: float = 1.0
    """Updates of a pass, as a share of those of a pass over all training rows."""

    @classmethod
    def validation(
        cls, data: ComparisonData, held_out: float, *, share: float = 1.0, updates: float = 1.0
    ) -> Stage:
        """Returns a tuning stage: some training users held out, a share of the rest to train on.

        A sample of the held-out impressions without a click is scored, weighted by the number of
        impressions that each represents, so that AUCs over all of them keep their expectation.
        """
        hashed = user_hash(data.train, "validation")
        clicked = data.train.scalars[data.train.schema.tasks[0].label] == 1
        within = hashed < held_out
        rate = min(1.0, UNCLICKED_IN_TUNING / max(1, np.count_nonzero(within & ~clicked)))
        rows = np.flatnonzero(within & (clicked | (user_hash(data.train, "sample") < rate)))
        return cls(
            data.train,
            np.flatnonzero((hashed >= held_out) & (hashed < held_out + share * (1 - held_out))),
            data.train,
            rows,
            None if rate == 1 else np.where(clicked[rows], 1.0, 1 / rate).astype(np.float32),
            updates,
        )

    @classmethod
    def test(cls, data: ComparisonData, fraction: float) -> Stage:
        """Returns a test stage: all or a part of the training users, and the test split."""
        train, test, rows = data.train, data.test, None
        if fraction < 1:
            rows = rows_between(train, 0.0, fraction, purpose="volume")
            known = {
                table: count >= max(1, data.min_count)
                for table, count in count_ids(train, rows).items()
            }
            train, test = without_ids(train, known), without_ids(test, known)
        return cls(train, rows, test, data.test_rows)

    @cached_property
    def scored_ids(self) -> dict[str, np.ndarray]:
        """Table → number of occurrences of each id in the scored rows."""
        return count_ids(self.scored, self.scored_rows)

    @cached_property
    def trained_ids(self) -> dict[str, np.ndarray]:
        """Table → number of occurrences of each id in the training rows."""
        return count_ids(self.train, self.train_rows)

    def clicked_train_rows(self) -> np.ndarray:
        """Returns the clicked training rows, ascending."""
        rows = np.flatnonzero(self.train.scalars[self.train.schema.tasks[0].label])
        return rows if self.train_rows is None else np.intersect1d(rows, self.train_rows)


@dataclass(frozen=True)
class Known:
    """Splits with the ids that a method's training rows have; all others are the unknown id."""

    train: MappedSplit
    """Training split with only these ids."""
    scored: MappedSplit
    """Split to score with only these ids."""
    unknown_share: float
    """Share of the ids in the scored rows that become unknown this way."""


def ids_known_to(stage: Stage, selection: Selection | None, *, min_count: int) -> Known:
    """Keeps the ids that occur at least `min_count` times in a method's training rows."""
    rows = stage.train_rows if selection is None else selection.rows
    counts = stage.trained_ids if rows is stage.train_rows else count_ids(stage.train, rows)
    known = {table: count >= max(1, min_count) for table, count in counts.items()}
    total = lost = 0
    for table, count in stage.scored_ids.items():
        known[table][UNKNOWN_ROW] = True
        total += int(count.sum())
        lost += int(count[~known[table]].sum())
    return Known(
        without_ids(stage.train, known) if min_count > 1 else stage.train,
        without_ids(stage.scored, known) if lost else stage.scored,
        lost / total,
    )


class Training:
    """A method with its options on a stage.

    The batch size of the options is that of a pass over all training rows of the data set. Every
    pass takes as many updates as that one (times the stage's `updates`), whatever rows a method
    trains on.
    """

    def __init__(
        self, stage: Stage, options: TrainOptions, ranks: Ranks, *, min_count: int = 1
    ) -> None:
        self.stage = stage
        self.options = options
        self.ranks = ranks
        self.min_count = min_count
        batch_size = options.batch_size
        assert batch_size != "auto"
        self.updates = math.ceil(stage.train.impressions / batch_size * stage.updates)

    def part(self, pctr: np.ndarray | None) -> TrainingPart:
        """Returns the rows to train on."""
        return training_part(
            self.stage.train, self.options, within=self.stage.train_rows, pctr=pctr
        )

    def known(self, part: TrainingPart) -> Known:
        """Returns the splits with the ids that the method knows."""
        return ids_known_to(self.stage, part.selection, min_count=self.min_count)

    def fit(
        self,
        part: TrainingPart,
        known: Known,
        *,
        callbacks: Sequence[Callback] = (),
    ) -> DistributedModelParallel:
        """Trains the model."""
        return fit(
            known.train,
            self.options,
            self.ranks,
            part=part,
            updates_per_pass=self.updates,
            callbacks=callbacks,
        )

    def batches(self, part: TrainingPart) -> dict[str, int]:
        """Returns the rows per step over all ranks, and the steps per pass."""
        size = batch_of_equal_updates(part.num_rows, updates=self.updates)
        return {"batch_size": size, "updates_per_pass": -(-part.num_rows // size)}

    def score(
        self, model: DistributedModelParallel, split: MappedSplit
    ) -> ScoredImpressions | None:
        """Scores the rows of the stage, read from `split`; returns None except on rank 0."""
        scored = score_split(
            model,
            split,
            self.ranks,
            batch_size=SCORING_BATCH,
            shared_features=self.options.shared_features,
            rows=self.stage.scored_rows,
            progress=False,
        )
        return None if scored is None else as_click_and_conversion(scored)

    def click_logits(self) -> np.ndarray | None:
        """Returns pCTR logits of the scored rows, from the options' click network; on rank 0."""
        part = self.part(None)
        known = self.known(part)
        scored = self.score(self.fit(part, known), known.scored)
        return None if scored is None else scored.scores["ctr"].values

    def clicked_pctr(self) -> np.ndarray:
        """Returns out-of-fold pCTR of the clicked training rows, in their order."""
        pctr = out_of_fold_pctr(
            self.stage.train,
            self.options,
            self.ranks,
            within=self.stage.train_rows,
            updates_per_pass=self.updates,
        )
        return pctr[self.stage.clicked_train_rows()].astype(np.float32)


def as_click_and_conversion(scored: ScoredImpressions) -> ScoredImpressions:
    """Maps the first task of any chain to the click and the last to the conversion: "cvr" is the
    probability of the last given the first, "ctcvr" that of the last and all before it."""
    tasks = scored.tasks
    if tasks == DEFAULT_TASKS:
        return scored
    first, last = tasks[0], tasks[-1]
    steps = [scored.scores.get(task.rate) for task in tasks.prefix(last)[1:]]
    found = {
        "ctr": scored.scores.get(first.rate),
        "cvr": None if None in steps else reduce(product, filter(None, steps)),
        "ctcvr": scored.scores.get(last.joint),
    }
    click, conversion = DEFAULT_TASKS
    return replace(
        scored,
        tasks=DEFAULT_TASKS,
        labels={
            click.label: scored.happened(first.name).astype(np.int8),
            conversion.label: scored.happened(last.name).astype(np.int8),
        },
        scores={name: score for name, score in found.items() if score is not None},
    )


class _ScorePasses(Callback):
    """Measures the model on the scored rows after each pass."""

    def __init__(
        self, training: Training, split: MappedSplit, *, common_ctr: np.ndarray | None
    ) -> None:
        self.lengths: list[dict[str, Any]] = []
        self._training = training
        self._split = split
        self._common_ctr = common_ctr

    def on_pause(self, loop: TrainingLoop) -> None:
        scored = self._training.score(loop.trainer.model, self._split)
        if scored is None:
            return
        figures = measure(
            replace(
                scored,
                common_ctr_logit=self._common_ctr,
                true_ctr=None,
                true_cvr=None,
                group_id=None,
                weight=_product(scored.weight, self._training.stage.scored_weight),
            )
        )["test"]
        names = ("ctr_auc", "cvr_auc", "ctcvr_auc_common_ctr", "ctcvr_auc")
        self.lengths.append(
            {"epochs": loop.reader.epoch} | {name: figures.get(name) for name in names}
        )


def _product(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second


def tuning_record(
    training: Training,
    part: TrainingPart,
    *,
    common_ctr: np.ndarray | None,
) -> dict[str, Any] | None:
    """Trains, and measures on the held-out users after each pass."""
    started = time.perf_counter()
    known = training.known(part)
    passes = _ScorePasses(training, known.scored, common_ctr=common_ctr)
    training.fit(part, known, callbacks=(passes,))
    return {"lengths": passes.lengths, "seconds": time.perf_counter() - started}


def test_record(
    training: Training,
    part: TrainingPart,
    *,
    common_ctr: np.ndarray,
    resampling: UserBootstrap | None,
) -> dict[str, Any] | None:
    """Trains, scores the test rows once, and measures; returns None except on rank 0."""
    started = time.perf_counter()
    known = training.known(part)
    begun = time.perf_counter()
    model = training.fit(part, known)
    trained = time.perf_counter()
    scored = training.score(model, known.scored)
    if scored is None:
        return None
    scored = replace(scored, common_ctr_logit=common_ctr)
    figures = measure(scored)
    record: dict[str, Any] = {
        "metrics": _flat(figures),
        "references": _references(scored, figures),
        "training_rows": part.num_rows,
        **training.batches(part),
        "passes": training.options.epochs,
        "notes": dict(part.notes),
        "unknown_share": known.unknown_share,
        "curves": _curves(scored),
        "points": _points(scored),
        "train_seconds": trained - begun,
    }
    if resampling is not None:
        record["bootstrap"] = resampled_figures(resampling, scored)
    return record | {"seconds": time.perf_counter() - started}


def resampled_figures(
    resampling: UserBootstrap, scored: ScoredImpressions
) -> dict[str, list[float | None]]:
    """Returns the figures that methods are compared by, in each resampling of the test users."""
    cvr = scored.scores["cvr"]
    scores = cvr.values
    clicked, converted = scored.happened("click"), scored.happened("conversion").astype(np.int8)
    figures = {"cvr_auc": resampling.auc(scores, converted, clicked)}
    for name, joint in (
        ("ctcvr_auc_common_ctr", scored.ctcvr_common_ctr),
        ("ctcvr_auc", scored.scores.get("ctcvr")),
    ):
        if joint is not None:
            figures[name] = resampling.auc(joint.values, converted)
    if scored.true_cvr is not None and scored.true_ctr is not None:
        figures |= {
            "cvr_auc_entire_space": resampling.auc(scores, scored.true_cvr),
            "cvr_auc_entire_space_within_ctr_strata": resampling.auc_within_strata(
                scores, scored.true_cvr, scored.true_ctr
            ),
            "cvr_excess_log_loss_entire_space": resampling.mean(
                _excess_log_losses(cvr, scored.true_cvr)
            ),
        }
    return figures


def _excess_log_losses(prediction: Prediction, target: np.ndarray) -> np.ndarray:
    """Returns each impression's cross entropy minus that of its true probability, float64 (n,)."""
    block = prediction.block(slice(None))
    true = target.astype(np.float64)
    possible = np.where((true > 0) & (true < 1), true, 0.5)
    entropy = -true * np.log(possible) - (1 - true) * np.log1p(-possible)
    entropy[(true == 0) | (true == 1)] = 0.0
    return -true * block.log_probability - (1 - true) * block.log_complement - entropy


def _flat(figures: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Returns the numbers of "test" and "truth" by their names in metrics.json."""
    return {
        name: value
        for part in figures.values()
        for name, value in part.items()
        if value is None or isinstance(value, int | float)
    }


def _references(
    scored: ScoredImpressions, figures: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """Returns the figures of other probabilities when they are used as the conversion score."""
    rows: dict[str, dict[str, float | None]] = {}
    clicked, converted = scored.happened("click"), scored.happened("conversion")
    ctcvr = scored.scores.get("ctcvr")
    for name, logit in (
        ("pCTR", scored.common_ctr_logit),
        ("pCTCVR", None if ctcvr is None else ctcvr.values),
    ):
        if logit is None:
            continue
        weight = scored.weight
        of_clicked = None if weight is None else weight[clicked]
        rows[name] = {"cvr_auc": auc(logit[clicked], converted[clicked], of_clicked)}
        if scored.true_cvr is not None and scored.true_ctr is not None:
            rows[name]["cvr_auc_entire_space"] = soft_auc(logit, scored.true_cvr, weight)
            rows[name]["cvr_auc_entire_space_within_ctr_strata"] = auc_within_strata(
                logit, scored.true_cvr, scored.true_ctr, weight
            )
    for name, key in (
        ("true pCVR", "oracle"),
        ("true pCTR", "pctr as conversion score"),
        ("true pCTCVR", "pctcvr as conversion score"),
    ):
        if "truth" in figures:
            rows[name] = dict(figures["truth"][key])
    return rows


def _curves(scored: ScoredImpressions) -> dict[str, Any]:
    """Returns predicted and observed conversion rates in bins of equal size."""
    cvr, clicked = scored.scores["cvr"], scored.happened("click")
    weight = scored.weight
    of_clicked = None if weight is None else weight[clicked]
    curves = {"clicked": _curve(cvr[clicked], scored.happened("conversion")[clicked], of_clicked)}
    if scored.true_cvr is not None:
        curves["entire space"] = _curve(cvr, scored.true_cvr, weight)
    return curves


def _curve(
    prediction: Prediction, target: np.ndarray, weight: np.ndarray | None
) -> dict[str, list[float]]:
    curve = reliability_curve(prediction, target, weight, num_bins=CURVE_BINS)
    return {
        "predicted": curve.mean_prediction.tolist(),
        "observed": curve.mean_target.tolist(),
    }


def _points(scored: ScoredImpressions) -> dict[str, list[float]] | None:
    """Returns predicted and true CVR of evenly spaced test impressions; None without the truth."""
    cvr = scored.scores.get("cvr")
    if scored.true_cvr is None or cvr is None:
        return None
    rows = np.linspace(0, scored.size - 1, min(POINTS, scored.size)).astype(int)
    probability = cvr.block(slice(None)).probability[rows]
    return {
        "true": [round(value, 5) for value in scored.true_cvr[rows].tolist()],
        "predicted": [round(value, 5) for value in probability.tolist()],
    }
