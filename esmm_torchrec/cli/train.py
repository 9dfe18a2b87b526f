"""`esmm-torchrec train`; on several ranks: `torchrun … -m esmm_torchrec train`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from esmm_torchrec.cli.method_options import MethodOptions
from esmm_torchrec.cli.terminal import format_metrics
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions, TrainOptions):
    """Train a conversion model on a prepared data set and measure it on the test split."""

    data: str
    """Prepared data set: a folder, or a URI such as s3://bucket/prepared."""
    out: Path
    """Run folder to create or to resume."""
    start_from: Annotated[Path | None, tyro.conf.arg(name="from", metavar="RUN")] = None
    """Run whose weights and optimiser state a new run starts from; the vocabularies of the data
    must begin with those of this run."""


def run(options: Options) -> None:
    """Trains on the ranks that torchrun started, or on one."""
    with process_group(options.device) as ranks:
        train_and_print(options.data, options.out, options, ranks)


def train_and_print(data: Path | str, out: Path, options: TrainOptions, ranks: Ranks) -> None:
    """Trains and prints the metrics; `options` may belong to a subclass of TrainOptions."""
    names = [field.name for field in fields(TrainOptions)]
    own = TrainOptions(**{name: getattr(options, name) for name in names})
    metrics = train(data, out, own, ranks)
    if ranks.is_first:
        speed = metrics["throughput"]["train_samples_per_second"]
        print(f"\n{format_metrics(metrics, RunFolder.open(out).schema.tasks)}")
        print(f"trained at {speed:,.0f} impressions per second")
        print(f"run folder: {out} (metrics.json, plots/, tensorboard/, checkpoints/)", flush=True)
