"""Training of a method without a run folder, shared by `train` and `compare`.

A method may train on a weighted subset of the impressions, and may need a pCTR to choose it. This
module selects the subset and computes its base rates, at which the towers start.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import Selection
from esmm_torchrec.data.stream import Split, StreamedSplit
from esmm_torchrec.data.subsets import only_ids_of, user_hash
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.models.methods import CLICK_METHOD, METHODS, build_train_task
from esmm_torchrec.models.parts import BaseRates, LoggedImpressions, TrainingRows
from esmm_torchrec.schema import CONVERSION_TIME, SAMPLE_ID, TIMESTAMP, WEIGHT
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.sharding.search import distinct_shared_rows
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.reading import training_reader
from esmm_torchrec.training.trainer import Trainer

MIN_UPDATES_PER_PASS = 256
"""Minimum number of steps in a pass over many impressions."""

MIN_BATCH_SIZE = 64
"""Minimum number of rows in an automatic step; smaller steps take as much time."""

MAX_BATCH_SIZE = {"cpu": 4096, "cuda": 32768}
"""Device type → maximum number of rows in an automatic step; larger steps are hardly faster per
impression."""

FOLDS = 2
"""Number of folds into which users are divided for an out-of-fold pCTR."""

FOLD_SEED = 1_000_003
"""Offset of the seed of a fold's network, which must differ from the seeds of compared networks."""


@dataclass(frozen=True)
class TrainingPart:
    """Impressions that a method trains on."""

    selection: Selection | None
    """Rows and their weights; None: all impressions, once."""
    num_rows: int
    """Number of rows in a pass over the selection."""
    base_rates: BaseRates
    """Weighted frequency of each label in the selection."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures of the selection that a report should show."""


def training_part(
    split: Split,
    options: TrainOptions,
    *,
    within: np.ndarray | None = None,
    pctr: np.ndarray | None = None,
) -> TrainingPart:
    """Returns the impressions that the method of the options trains on.

    Args:
        within: int (M,), the rows to choose from, ascending; None: all.
        pctr: float64 (N,), with a value for each clicked row of `within`, for methods that need
            it.

    Raises:
        DataError: the chosen rows have none of the labels that the method learns.
    """
    missing = options.parts.objective.needs_labels - options.parts.rows.gives_labels
    if missing:
        raise OptionError(
            f"the objective needs rows with {', '.join(sorted(missing))}, which "
            f"{type(options.parts.rows).__name__} does not give; choose another `rows`"
        )
    if isinstance(split, StreamedSplit):
        return _streamed_part(split)
    whole = slice(None) if within is None else within
    tasks = split.schema.tasks
    impressions = LoggedImpressions(
        {label: split.scalars[label][whole] for label in tasks.labels},
        tasks,
        None if pctr is None else pctr[whole],
        options.seed,
        *(
            split.scalars[name][whole] if name in split.scalars else None
            for name in (TIMESTAMP, CONVERSION_TIME)
        ),
    )
    chosen = options.parts.rows.select(impressions)
    learned = {head.label for head in options.parts.objective.heads(tasks)}
    return part_of(
        split, chosen, name=METHODS[options.method].title, within=within, learned=learned
    )


def _streamed_part(split: StreamedSplit) -> TrainingPart:
    """Returns all impressions, with the unweighted base rates of the data set's description."""
    counts, tasks = split.dataset.splits[split.name], split.schema.tasks
    positives = {task.label: float(counts.happened[task.name]) for task in tasks}
    return TrainingPart(
        None, counts.impressions, base_rates=BaseRates(float(counts.impressions), positives)
    )


def part_of(
    split: MappedSplit,
    chosen: TrainingRows | None,
    *,
    name: str,
    within: np.ndarray | None = None,
    learned: Container[str] | None = None,
) -> TrainingPart:
    """Returns the impressions that a method chose, with their base rates. The data set's weights
    are multiplied with those of the method.

    Args:
        chosen: result of `Rows.select` for the rows of `within`.
        name: name of the method in error messages.
        within: as in `training_part`.
        learned: labels that the method learns, one of which must occur in the rows; None: all.

    Raises:
        DataError: as `training_part`.
    """
    rows, weights = within, None
    if chosen is not None:
        rows = chosen.rows if within is None else within[chosen.rows]
        weights = chosen.weights
    if WEIGHT in split.scalars:
        rows = np.arange(split.impressions) if rows is None else rows
        own = split.scalars[WEIGHT][rows].astype(np.float32)
        weights = own if weights is None else weights * own
    kept = slice(None) if rows is None else rows
    num_rows = len(split.scalars[SAMPLE_ID][kept])
    each = np.ones(num_rows) if weights is None else weights
    tasks = split.schema.tasks
    given = {} if chosen is None else chosen.labels
    labels = {label: given.get(label, split.scalars[label][kept]) for label in tasks.labels}
    happened = tasks.happened({label: values == 1 for label, values in labels.items()})
    positives = {name: float((values == 1) @ each) for name, values in given.items()}
    positives |= {task.label: float(happened[task.name] @ each) for task in tasks}
    needed = [task for task in tasks if learned is None or task.label in learned]
    if needed and not any(positives[task.label] for task in needed):
        raise DataError(
            f"{name} is left with {num_rows:,} impressions and no "
            f"{' or '.join(task.name for task in needed)} to train on; give it more data, a "
            "larger fraction or other options of `rows`"
        )
    return TrainingPart(
        None
        if rows is None
        else Selection(rows, weights, given, None if chosen is None else chosen.periods),
        num_rows,
        base_rates=BaseRates(float(each.sum()), positives),
        notes={} if chosen is None else chosen.notes,
    )


def batch_of_equal_updates(rows: int, *, updates: int) -> int:
    """Returns the number of rows per step, over all ranks, with which a pass over `rows` takes
    `updates` steps. A method that trains on few rows is then updated as often as one that trains
    on all.

    Steps have whole rows, so a pass may take fewer steps than `updates`; if there are fewer rows
    than updates, it takes one step per row.
    """
    return max(1, -(-rows // updates))


def automatic_batch_size(rows: int, device: torch.device) -> int:
    """Returns the number of rows per step, over all ranks, for `--batch-size auto`: the largest
    power of two with which a pass over `rows` takes at least MIN_UPDATES_PER_PASS steps, within
    bounds. It does not depend on the number of ranks, so neither does the model."""
    size = 1 << max(0, (rows // MIN_UPDATES_PER_PASS).bit_length() - 1)
    return max(MIN_BATCH_SIZE, min(size, MAX_BATCH_SIZE[device.type]))


def build_trainer(
    split: Split,
    options: TrainOptions,
    ranks: Ranks,
    *,
    part: TrainingPart,
    workload: Workload,
) -> Trainer:
    """Builds a trainer of the options' method, with untrained weights."""
    return Trainer(
        build_train_task(
            split.schema,
            options.model,
            seed=options.seed,
            base_rates=part.base_rates,
        ),
        options=options,
        ranks=ranks,
        workload=workload,
    )


def build_loop(
    split: Split,
    options: TrainOptions,
    ranks: Ranks,
    *,
    part: TrainingPart,
    epochs: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingLoop:
    """Builds the training loop of the options' method.

    Args:
        epochs: number of passes; None: that of the options, or one if they say "auto".
    """
    rows_per_step = options.batch_size
    if rows_per_step == "auto":
        rows_per_step = automatic_batch_size(part.num_rows, ranks.device)
    rows_per_rank = -(-rows_per_step // ranks.world_size)
    trainer = build_trainer(
        split,
        options,
        ranks,
        part=part,
        workload=Workload(
            rows_per_rank,
            split.mean_values_per_bag,
            shared_bags(split, options, rows_per_rank, part.num_rows),
        ),
    )
    reader = training_reader(
        split, options, ranks, rows_per_step=rows_per_step, selection=part.selection
    )
    if epochs is None:
        epochs = 1 if options.epochs == "auto" else options.epochs
    return TrainingLoop(
        trainer,
        reader,
        ranks,
        epochs=epochs,
        max_steps=options.max_steps,
        callbacks=callbacks,
    )


def shared_bags(
    split: Split, options: TrainOptions, rows_per_rank: int, num_rows: int
) -> dict[str, int]:
    """Returns shared feature → expected number of its bags in a rank's batch, for a training on
    `num_rows` rows. Features that are expanded for every impression are left out, as they have one
    bag per impression."""
    if options.shared_features == "expanded":
        return {}
    if isinstance(split, StreamedSplit):
        shared_rows = split.dataset.splits[split.name].shared_rows
        bags = {feature.name: shared_rows for feature in split.schema.id_features if feature.shared}
    else:
        bags = {
            feature: len(mapped.lengths)
            for stores in split.bags.values()
            for mapped in stores
            if mapped.shared
            for feature in mapped.features
        }
    return {
        feature: distinct_shared_rows(
            rows_per_rank,
            impressions=num_rows,
            shared_rows=shared_rows,
            shuffle_chunk=options.shuffle_chunk,
        )
        for feature, shared_rows in bags.items()
    }


def fit(
    split: MappedSplit,
    options: TrainOptions,
    ranks: Ranks,
    *,
    part: TrainingPart,
    updates_per_pass: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> DistributedModelParallel:
    """Trains without a run folder; to be called on every rank.

    Args:
        updates_per_pass: number of steps in a pass, which determines the batch size
            (`batch_of_equal_updates`); None: the batch size of the options.

    Returns:
        the trained task.
    """
    if updates_per_pass is not None:
        options = replace(
            options,
            batch_size=batch_of_equal_updates(part.num_rows, updates=updates_per_pass),
        )
    loop = build_loop(split, options, ranks, part=part, callbacks=callbacks)
    loop.run()
    return loop.trainer.model


def out_of_fold_pctr(
    split: MappedSplit,
    options: TrainOptions,
    ranks: Ranks,
    *,
    within: np.ndarray | None = None,
    updates_per_pass: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> np.ndarray:
    """Returns the out-of-fold pCTR of the clicked impressions: each is scored by a click network
    that was not trained on impressions of the same user.

    Ids that do not occur in a network's training rows are replaced by the unknown id.

    Args:
        options: options of the training; their method is replaced by that of a click network.
        within: int (M,), the rows to train on and to score; None: all.
        updates_per_pass: as in `fit`.
        callbacks: callbacks of each network's training loop.

    Returns:
        float64 (N,), on every rank; NaN for rows without a click and rows outside `within`.
    """
    rows = np.arange(split.impressions) if within is None else within
    first = split.schema.tasks[0]
    fold = (user_hash(split, "fold")[rows] * FOLDS).astype(int)
    clicked = split.scalars[first.label][rows] == 1
    pctr = np.full(split.impressions, np.nan)
    network = replace(
        options,
        method=CLICK_METHOD,
        rows=None,
        architecture=None,
        objective=None,
        interaction=None,
        seed=options.seed + FOLD_SEED,
    )
    for held_out in range(FOLDS):
        trained_on = rows[fold != held_out]
        part = training_part(split, network, within=trained_on)
        model = fit(
            split,
            network,
            ranks,
            part=part,
            updates_per_pass=updates_per_pass,
            callbacks=callbacks,
        )
        wanted = rows[(fold == held_out) & clicked]
        if not len(wanted):
            continue
        scored = score_split(
            model,
            only_ids_of(split, split, trained_on),
            ranks,
            shared_features=options.shared_features,
            rows=wanted,
            progress=False,
        )
        logit = ranks.from_first(
            lambda scored=scored: None if scored is None else scored.scores[first.rate].values
        )
        assert logit is not None
        pctr[wanted] = 1 / (1 + np.exp(-logit.astype(np.float64)))
    return pctr
