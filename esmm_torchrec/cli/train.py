"""`esmm-torchrec train`: also under torchrun, `torchrun … -m esmm_torchrec train`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """Train a conversion model on a prepared data set and measure it on the test half."""

    data: Path
    """The prepared data set."""
    out: Path
    """The run folder to make or to go on with."""


def run(options: Options) -> None:
    """Trains on the ranks torchrun started, or on one."""
    names = (field.name for field in fields(TrainOptions))
    train_options = TrainOptions(**{name: getattr(options, name) for name in names})
    with process_group(options.device) as ranks:
        metrics = train(options.data, options.out, train_options, ranks)
        if ranks.is_first:
            print(metrics)
