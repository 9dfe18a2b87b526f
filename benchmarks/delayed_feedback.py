"""DFM, FNW and ES-DFM against the usual alternatives, on data with known delays.

    python benchmarks/delayed_feedback.py --seeds 5 --out delayed_feedback.json

For each seed, a world with delayed conversions is drawn (`comparison.worlds.delays`). Every method
is trained once through the training split in time order, and measured on the test split with all
conversions, however late. Intervals are 95 % t-intervals over the worlds.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from esmm_torchrec.comparison.statistics import paired_difference
from esmm_torchrec.comparison.worlds import World, draw_mapped
from esmm_torchrec.comparison.worlds.delays import Delays
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader, Selection
from esmm_torchrec.data.subsets import only_ids_of
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.models.esmm import TrainTask
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.models.objectives.delayed import (
    DelayedFeedbackObjective,
    ElapsedTimeObjective,
    FakeNegativeObjective,
)
from esmm_torchrec.models.objectives.single import ConversionObjective
from esmm_torchrec.models.parts import Objective, Rows
from esmm_torchrec.models.rows.delayed import (
    ElapsedTimeRows,
    FakeNegativeRows,
    ObservedRows,
    WaitedRows,
)
from esmm_torchrec.schema import CLICK, TRUE_CTR, TRUE_CVR
from esmm_torchrec.serving.scorer import scores_of
from esmm_torchrec.training.fit import training_part
from esmm_torchrec.training.options import TrainOptions

MIN_COUNT = 5
BATCH_SIZE = 128
FIGURES = {"cvr_auc": "CVR AUC", "cvr_log_loss": "log loss", "cvr_pcoc": "PCOC"}
"""Figures on the clicks of the test split, by their names in metrics.json."""
REFERENCE = "wait a day"


@dataclass(frozen=True)
class Method:
    """A method to compare."""

    rows: Rows
    objective: Objective


METHODS = {
    "naive": Method(ObservedRows(), ConversionObjective()),
    "wait a day": Method(WaitedRows(wait=1.0), ConversionObjective()),
    "DFM": Method(ObservedRows(), DelayedFeedbackObjective()),
    "FNW": Method(FakeNegativeRows(), FakeNegativeObjective()),
    "ES-DFM": Method(ElapsedTimeRows(), ElapsedTimeObjective()),
    "naive, labels of the last day": Method(ObservedRows(at_end=True), ConversionObjective()),
    "DFM, labels of the last day": Method(ObservedRows(at_end=True), DelayedFeedbackObjective()),
    "oracle labels": Method(ObservedRows(hindsight=True), ConversionObjective()),
}


@dataclass(frozen=True)
class Options:
    """Compare methods for delayed feedback on worlds with known delays."""

    out: Path
    """Output file for the figures of every world."""
    impressions: int = 200_000
    """Impressions per world, both splits together."""
    ctr: float = 0.09
    """Clicks per impression."""
    cvr: float = 0.18
    """Conversions per click."""
    mean_delay: float = 2.0
    """Days from a click to its conversion in the median category."""
    seeds: int = 5
    """Number of worlds."""


def main(options: Options) -> None:
    """Compares, writes the figures of every world and prints the table."""
    delays = Delays(mean=options.mean_delay)
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in range(options.seeds):
        world = World(impressions=options.impressions, ctr=options.ctr, cvr=options.cvr, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            drawn = draw_mapped(world, Path(folder) / "world", min_count=MIN_COUNT)
            train = delays.add_to(drawn.open("train"), seed=seed)
            for name, of in _of_world(train, drawn.open("test"), seed=seed).items():
                for figure, value in of.items():
                    figures.setdefault(name, {}).setdefault(figure, []).append(value)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


def _of_world(train: MappedSplit, test: MappedSplit, *, seed: int) -> dict[str, dict[str, float]]:
    """Returns method → its figures; "true pCVR" is the best that any score can reach."""
    found: dict[str, dict[str, float]] = {}
    best = 0.0
    test = only_ids_of(test, train, np.flatnonzero(train.scalars[CLICK]))
    clicks = np.flatnonzero(test.scalars[CLICK])
    for name, method in METHODS.items():
        options = TrainOptions(
            method="base",
            rows=method.rows,
            objective=method.objective,
            batch_size=BATCH_SIZE,
            embedding_dim=8,
            tower=(32, 16),
            dense_lr=0.002,
            seed=seed,
            device="cpu",
        )
        task = _trained(train, options)
        measured = measure(_scored(task, test, clicks))
        found[name] = {figure: measured["test"][figure] for figure in FIGURES}
        best = measured["truth"]["oracle"]["cvr_auc"]
        print(f"seed {seed} {name}: {found[name]}", flush=True)
    return found | {"true pCVR": {"cvr_auc": best}}


def _trained(train: MappedSplit, options: TrainOptions) -> TrainTask:
    """Trains for one pass through the rows in time order, unsharded, since the models are small."""
    part = training_part(train, options)
    task = build_train_task(
        train.schema,
        options.model,
        seed=options.seed,
        base_rates=part.base_rates,
        embedding_device="cpu",
    )
    tables = [weight for name, weight in task.named_parameters() if "embedding_bags" in name]
    towers = [weight for name, weight in task.named_parameters() if "embedding_bags" not in name]
    optimizers = (
        torch.optim.Adagrad(tables, lr=options.sparse_lr),
        torch.optim.Adam(towers, lr=options.dense_lr),
    )
    reader = ImpressionReader(
        train, batch_size=BATCH_SIZE, seed=options.seed, selection=part.selection
    )
    for batch in reader:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = task(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return task


@torch.no_grad()
def _scored(task: TrainTask, test: MappedSplit, clicks: np.ndarray) -> ScoredImpressions:
    reader = ImpressionReader(
        test, batch_size=len(clicks), shuffle=False, selection=Selection(clicks)
    )
    (batch,) = reader
    tasks = test.schema.tasks
    return ScoredImpressions(
        {label: test.scalars[label][clicks] for label in tasks.labels},
        scores_of(task.model(batch.features), tasks, len(clicks)),
        true_ctr=test.scalars[TRUE_CTR][clicks],
        true_cvr=test.scalars[TRUE_CVR][clicks],
    )


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Formats means, and paired differences from waiting a day, as Markdown."""
    heading = ["method", *FIGURES.values()]
    heading += [f"{FIGURES[name]} − {REFERENCE}" for name in ("cvr_auc", "cvr_log_loss")]
    rows = [heading, ["---"] * len(heading)]
    for name, of in figures.items():
        row = [name, *(f"{np.mean(of[key]):.4f}" if key in of else "–" for key in FIGURES)]
        for key in ("cvr_auc", "cvr_log_loss"):
            known = key in of and name != REFERENCE
            row.append(_difference(of[key], figures[REFERENCE][key]) if known else "–")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _difference(ours: list[float], others: list[float]) -> str:
    """Formats the mean difference and its 95 % interval over the worlds."""
    of = paired_difference(ours, others)
    if of.low is None or of.high is None:
        return f"{of.mean:+.4f}"
    return f"{of.mean:+.4f} ({of.low:+.4f} to {of.high:+.4f})"


if __name__ == "__main__":
    main(tyro.cli(Options))
