"""Reading of a run's data: at random from the mapped copy, or streamed in windows."""

from __future__ import annotations

from typing import Any, Literal

from esmm_torchrec.data.batch_reader import BatchReader
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, SplitName
from esmm_torchrec.data.reader import ImpressionReader, Selection
from esmm_torchrec.data.stream import Split, StreamedSplit, StreamReader
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.models.rows.everything import AllRows
from esmm_torchrec.sharding.process_group import RankExchange, Ranks
from esmm_torchrec.training.options import TrainOptions

MAX_MAPPED_BYTES = 40 << 30
"""Maximum size of the Parquet files of a data set that `--read auto` maps. A mapped copy is about
five times as large."""


def read_mode(dataset: PreparedDataSet, options: TrainOptions) -> Literal["mapped", "stream"]:
    """Returns the read mode, with "auto" resolved.

    Raises:
        OptionError: the data set has to be streamed, but another option needs the mapped copy.
    """
    mode = options.read
    if mode == "auto":
        parts = [
            part
            for split in dataset.splits.values()
            for part in (*split.impression_parts, *split.shared_parts)
        ]
        small = sum(part.bytes for part in parts) <= MAX_MAPPED_BYTES
        mode = "mapped" if small and dataset.root.local is not None else "stream"
    if mode == "stream" and not isinstance(options.parts.rows, AllRows):
        raise OptionError(
            f"`method` {options.method} chooses the impressions that it trains on, which needs the "
            "mapped copy; use `read` mapped and a data set on a disk"
        )
    if mode == "stream" and options.validation_share:
        raise OptionError(
            "`validation_share` holds out rows by their numbers, which needs the mapped copy; use "
            "`read` mapped and a data set on a disk"
        )
    return mode


def open_splits(
    dataset: PreparedDataSet, options: TrainOptions, ranks: Ranks
) -> dict[SplitName, Split]:
    """Opens the splits of a data set in the run's read mode. The test split is measured in stored
    order, so it has one lane, a contiguous part of it, per rank.

    Raises:
        DataError: a file is missing, broken or different from the data set's description.
        OptionError: as `read_mode`.
    """
    if read_mode(dataset, options) == "mapped":
        return {
            name: MappedSplit.open(dataset, name, history_weights=options.history_weights)
            for name in SPLITS
        }
    if any(not part.row_groups for part in dataset.splits["train"].impression_parts):
        raise DataError(f"{dataset.root} does not say what its files hold; prepare it again")
    lanes = {"train": options.lanes, "test": ranks.world_size}
    return {
        name: StreamedSplit(
            dataset,
            name,
            lanes=lanes[name],
            window=options.window,
            history_weights=options.history_weights,
            cache=options.window_cache,
        )
        for name in SPLITS
    }


def training_reader(
    split: Split,
    options: TrainOptions,
    ranks: Ranks,
    *,
    rows_per_step: int,
    selection: Selection | None = None,
) -> BatchReader:
    """Builds the reader of the training split.

    Args:
        rows_per_step: number of rows per step over all ranks.
        selection: rows of a mapped split; None: all.

    Raises:
        OptionError: the number of lanes does not fit the ranks or the step.
    """
    of_any_reader: dict[str, Any] = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "rows_per_step": rows_per_step,
        "seed": options.seed,
        "shuffle_chunk": options.shuffle_chunk,
        "shared_features": options.shared_features,
        "pin_memory": ranks.device.type == "cuda",
        "exchange": RankExchange() if ranks.world_size > 1 else None,
    }
    if isinstance(split, StreamedSplit):
        assert selection is None
        return StreamReader(split, **of_any_reader)
    batch_size = -(-rows_per_step // ranks.world_size)
    return ImpressionReader(split, batch_size=batch_size, selection=selection, **of_any_reader)
