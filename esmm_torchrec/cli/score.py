"""`esmm-torchrec score`: also under torchrun, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import OptionError
from esmm_torchrec.runs.restore import restore
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.chosen_checkpoint import chosen_step, described
from esmm_torchrec.serving.scoring import encode_rows, refuse_existing, remove, score
from esmm_torchrec.sharding.planner import ShardingOption
from esmm_torchrec.sharding.process_group import DeviceOption, Ranks, process_group


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the sample_id, pctr, pcvr and pctcvr of every impression to Parquet, in order."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """The run folder."""
    out: Path
    """The Parquet file to make."""
    data: Path | None = None
    """A prepared data set whose vocabularies are those of the training."""
    input: Path | None = None
    """Instead: a Parquet or CSV file with raw ids, columns named as in the data that was prepared;
    no labels needed."""
    split: Literal["train", "test"] = "test"
    """What of --data to score."""
    batch_size: int = 8192
    """Impressions per rank and step."""
    sharding: ShardingOption = "auto"
    """How tables are placed on the ranks at hand."""
    step: int | None = None
    """Of the checkpoint; if not given, the best one that validation chose, else the last."""
    device: DeviceOption = "auto"
    """auto: CUDA where there is a GPU for each rank."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.input is None):
            raise OptionError("give either --data or --input, what is to be scored")


def run(options: Options) -> None:
    """Scores on the ranks torchrun started, or on one."""
    with process_group(options.device) as ranks:
        _score(options, ranks)


def _score(options: Options, ranks: Ranks) -> None:
    folder = RunFolder.open(options.run)
    ranks.from_first(lambda: refuse_existing(options.out))
    step = ranks.from_first(lambda: chosen_step(folder, options.step))
    with _split(options, folder, ranks) as split:
        model = restore(
            folder, ranks, batch_size=options.batch_size, sharding=options.sharding, step=step
        )
        score(model, split, options.out, ranks, batch_size=options.batch_size)
    if ranks.is_first:
        print(described(folder, step))
        print(f"{split.impressions:,} impressions scored: {options.out}")


@contextmanager
def _split(options: Options, run: RunFolder, ranks: Ranks) -> Iterator[MappedSplit]:
    """What is to be scored; raw rows are laid out beside --out for as long as the block lasts."""
    if options.data is not None:
        dataset = PreparedDataSet.open(options.data)
        run.check_data(options.data)
        weights = run.config["options"]["history_weights"]
        yield MappedSplit.open(dataset, options.split, history_weights=weights)
        return
    rows = options.input
    assert rows is not None
    laid_out = options.out.with_name(f"{options.out.name}.rows")
    ranks.from_first(lambda: refuse_existing(laid_out))
    try:
        ranks.from_first(lambda: encode_rows(run, rows, laid_out).impressions)
        yield MappedSplit.map(laid_out, run.schema)
    finally:
        if ranks.is_first:
            remove(laid_out)
