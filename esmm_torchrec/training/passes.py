"""Number of passes over the training split when `epochs` is "auto".

Few rows need several passes. Many rows need one: in a second pass, the embeddings of a large model
overfit. In between, the number is searched: the model is trained on a part of the rows until it
stops improving on the rest, and then trained anew on all rows for the best number of passes, so
that validation costs no training rows. Both trainings average their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from esmm_torchrec.data.stream import Split, StreamedSplit
from esmm_torchrec.errors import DataError
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.averaging import AverageWeights
from esmm_torchrec.training.fit import (
    automatic_batch_size,
    build_loop,
    training_part,
)
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.validation import Validate, hold_out

MAX_SEARCHED_ROWS = 500_000
"""Number of rows from which a run takes one pass unless it has a validation share. From half as
many on, a second pass was never better (benchmarks/passes_by_rows.py)."""

SEARCH_SHARE = 0.2
"""Share of the rows that a search holds out."""

MAX_PASSES = 30
PATIENCE = 2
"""Number of passes without an improvement after which training stops."""


@dataclass(frozen=True)
class Passes:
    """Number of passes, and the reason for it."""

    epochs: int
    """Maximum number of passes."""
    reason: str
    """Human-readable reason; empty if the options set the number."""
    search: Mapping[str, Any] | None = None
    """Result of `Validate.report` in the search; None: no search."""


def choose_passes(
    split: Split,
    options: TrainOptions,
    ranks: Ranks,
    *,
    num_rows: int,
    pctr: np.ndarray | None,
    continues: bool,
    found: Passes | None,
) -> Passes:
    """Returns the number of passes of a run; to be called on every rank.

    Args:
        num_rows: number of rows that the method trains on.
        pctr: as in `fit.training_part`.
        continues: whether the run continues an earlier training on other rows.
        found: result of this run's search before it was interrupted.
    """
    if options.epochs != "auto":
        return Passes(options.epochs, "")
    if options.validation_share:
        return Passes(
            MAX_PASSES, f"until {PATIENCE} passes in a row do not improve the held-out part"
        )
    if found is not None and not continues:
        return found
    if continues or options.max_steps is not None:
        return Passes(1, "one pass, as always after other data and with a number of steps")
    if isinstance(split, StreamedSplit):
        return Passes(1, "one pass, as the data are streamed")
    if num_rows >= MAX_SEARCHED_ROWS:
        return Passes(1, f"one pass, as there are {MAX_SEARCHED_ROWS:,} rows or more")
    try:
        held_out = hold_out(split, share=SEARCH_SHARE, by=options.validation)
        part = training_part(split, options, within=held_out.kept, pctr=pctr)
    except DataError as error:
        return Passes(1, f"one pass, as the number cannot be searched ({error})")
    if ranks.is_first:
        print(
            f"searching for the number of passes on {part.num_rows:,} rows, "
            f"with {len(held_out.rows):,} held out",
            flush=True,
        )
    batch_size = options.batch_size
    if batch_size == "auto":
        batch_size = automatic_batch_size(num_rows, ranks.device)
    average = None if options.average_weights == "off" else AverageWeights()
    validate = Validate(
        split,
        held_out,
        patience=PATIENCE,
        average=average,
        shared_features=options.shared_features,
        log=lambda _, figures: print(_line(figures), flush=True),
    )
    loop = build_loop(
        split,
        replace(options, batch_size=batch_size),
        ranks,
        part=part,
        epochs=MAX_PASSES,
        callbacks=(validate,) if average is None else (average, validate),
    )
    loop.run()
    best = validate.best
    if best is None:
        return Passes(
            1, "one pass, as nothing can be measured on the held-out part", validate.report()
        )
    epochs = round(best["epoch"])
    return Passes(
        epochs,
        f"{epochs} {'pass' if epochs == 1 else 'passes'} over all rows, the best number for "
        f"{len(held_out.rows):,} held-out rows",
        validate.report(),
    )


def _line(figures: Mapping[str, float]) -> str:
    """Formats the figures of a pass."""
    aucs = [
        f"{key.removeprefix('validation_').removesuffix('_auc').upper()} AUC {value:.4f}"
        for key, value in figures.items()
        if key.endswith("_auc")
    ]
    mean = figures.get("validation_mean_ne")
    known = "not measurable" if mean is None else f"mean normalised entropy {mean:.4f}"
    return f"  held out, pass {figures['epoch']:g}: {known}, {', '.join(aucs)}"
