"""Trains ESMM on Ali-CCP, on generated impressions in its form, or on any prepared data set.

    torchrun --nproc-per-node 2 examples/train_ali_ccp.py                      generates its data
    torchrun --nproc-per-node 2 examples/train_ali_ccp.py --raw RAW            the raw files
    torchrun --nproc-per-node 2 examples/train_ali_ccp.py --data PREPARED      a prepared data set

One rank generates and prepares the data while the others wait; existing data are reused.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from esmm_torchrec.cli.main import configure_threads, parse_options, run_command

configure_threads()  # before torch is imported

from esmm_torchrec.cli.method_options import MethodOptions  # noqa: E402
from esmm_torchrec.cli.train import train_and_print  # noqa: E402
from esmm_torchrec.comparison.worlds import World, generate  # noqa: E402
from esmm_torchrec.data.sources.ali_ccp.prepare import prepare_ali_ccp  # noqa: E402
from esmm_torchrec.errors import OptionError  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions, TrainOptions):
    """Train ESMM on Ali-CCP, on generated impressions in its form, or on prepared data."""

    raw: Path | None = None
    """Folder with the raw Ali-CCP files or archives; prepared next to it, as RAW-prepared."""
    data: Path | None = None
    """Prepared data set to use instead."""
    out: Path | None = None
    """Run folder; runs/<time> if not given."""
    impressions: int = 1_000_000
    """Number of impressions to generate into generated/ without --raw and --data, half to train on
    and half to test on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raw is not None and self.data is not None:
            raise OptionError("give --raw or --data, not both")


def prepared_data(options: Options) -> Path:
    """Returns the prepared data set of the options, created first if it does not exist."""
    if options.data is not None:
        return options.data
    if options.raw is not None:
        raw = options.raw.resolve()  # "." has no name to append "-prepared" to
    else:
        raw = Path(f"generated/ali-ccp-{options.impressions}")
        if not raw.exists():
            generate(World(impressions=options.impressions), raw)
    prepared = raw.with_name(f"{raw.name}-prepared")
    if not prepared.exists():
        prepare_ali_ccp(raw, prepared, progress=True)
    return prepared


def main(options: Options, ranks: Ranks) -> None:
    """Does the work of every rank."""
    started = time.strftime("%Y-%m-%d-%H%M%S")
    data, out = ranks.from_first(
        lambda: (prepared_data(options), options.out or Path("runs") / started)
    )
    train_and_print(data, out, options, ranks)


def run(options: Options) -> None:
    """Runs the whole example on the ranks that torchrun started."""
    with process_group(options.device) as ranks:
        main(options, ranks)


if __name__ == "__main__":
    run_command(run, parse_options(Options, "examples/train_ali_ccp.py", sys.argv[1:]))
