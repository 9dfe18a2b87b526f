"""One training of a method without a run folder: what `train` and `compare` have in common.

A method may train on a part of the impressions, weighted, and may need a pCTR to choose it by;
here that part is made, with the base rates that its towers start at.
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
"""Steps of a pass over many impressions, at least."""

MIN_BATCH_SIZE = 64
"""Smaller steps cost as much time as this one."""

MAX_BATCH_SIZE = {"cpu": 4096, "cuda": 32768}
"""Larger steps are hardly faster per impression."""

FOLDS = 2
"""Parts that the users are divided into where a pCTR must come from other users' impressions."""

FOLD_SEED = 1_000_003
"""Added to the seed of a fold's network, which is to be none of those compared."""


@dataclass(frozen=True)
class TrainingPart:
    """What a method trains on."""

    selection: Selection | None
    """None: all impressions, once."""
    num_rows: int
    """Rows of a pass over it."""
    base_rates: BaseRates
    """How often each label occurs in it, weighted as it is."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures of the selection that a report should show."""


def training_part(
    split: Split,
    options: TrainOptions,
    *,
    within: np.ndarray | None = None,
    pctr: np.ndarray | None = None,
) -> TrainingPart:
    """The impressions that the method of the options trains on.

    Args:
        within: int (M,), the rows to choose from, ascending; None: all.
        pctr: float64 (N,), one of each clicked row chosen from, for methods that need it.

    Raises:
        DataError: what is left has none of the labels that the method learns.
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
    """All impressions. The base rates are those of the description, without weights."""
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
    """The impressions that a method chose, with the base rates among them. Weights of the data set
    multiply those of the method.

    Args:
        chosen: as `Rows.select` gives it for the rows of `within`.
        name: of the method, for the sentence of an error.
        within: as in `training_part`.
        learned: labels that the method learns, so that some rows must have one of them; None: all.

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
    """Rows of a step over all ranks with which a pass over `rows` takes `updates` steps, so that a
    method that trains on few rows is updated as often as one that trains on all.

    As near as whole rows allow: a pass may take fewer steps, and one step per row if there are
    fewer rows than updates.
    """
    return max(1, -(-rows // updates))


def automatic_batch_size(rows: int, device: torch.device) -> int:
    """Rows of a step over all ranks that `--batch-size auto` means: the largest power of two
    with which a pass over `rows` takes at least MIN_UPDATES_PER_PASS steps, within bounds. It does
    not depend on the number of ranks, so neither does the model."""
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
    """The method of the options, untrained, on its ranks."""
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
    """The training of a method, before its first step.

    Args:
        epochs: passes; None: as the options say, and one for "auto".
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
    """Shared feature → bags of it in a rank's batch, for a training on `num_rows` rows. A feature
    that is written out for every impression is left out: it has a bag for each."""
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
        updates_per_pass: steps of a pass, from which the batches' size follows
            (`batch_of_equal_updates`); None: batches of the options' size.

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
    """pCTR of the clicked impressions from click networks that saw nothing of their users.

    Ids that a network saw nothing of either are the unknown id for it.

    Args:
        options: of the training; the method is that of a click network whatever they say.
        within: int (M,), the rows to train on and to score; None: all.
        updates_per_pass: as in `fit`.
        callbacks: take part in the loop of each network.

    Returns:
        float64 (N,), on every rank; NaN if there is no click or no such row.
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
