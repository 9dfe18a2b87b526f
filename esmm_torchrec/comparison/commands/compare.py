"""`esmm-torchrec compare`: also under torchrun, on any number of ranks."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from esmm_torchrec.comparison.data import DEFAULT_WORLD
from esmm_torchrec.comparison.options import ComparisonOptions
from esmm_torchrec.comparison.report import format_table, write_report
from esmm_torchrec.comparison.study import compare
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.errors import OptionError
from esmm_torchrec.sharding.process_group import process_group


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Compare conversion methods: tune each by the same rule, retrain it, score the test half once.

    Without --data, each seed is a generated world with known probabilities. The folder gets
    results.json, report.html, table.csv, table.md and plots; a comparison that was stopped goes on
    when it is called again.
    """

    out: Path
    """Folder of the results."""
    data: Path | None = None
    """A prepared data set for all seeds, in place of generated worlds."""
    world: World = field(default_factory=lambda: DEFAULT_WORLD)
    """Settings of the generated worlds; seed n has the world of seed world.seed + n."""


def run(options: Options) -> None:
    """Compares on the ranks torchrun started, or on one."""
    if options.data is not None and options.world != DEFAULT_WORLD:
        raise OptionError(
            "--world has no meaning beside --data, which is compared on as it is; leave one out"
        )
    own = ComparisonOptions(
        **{item.name: getattr(options, item.name) for item in fields(ComparisonOptions)}
    )
    command = shlex.join(["esmm-torchrec", *sys.argv[1:]])
    with process_group(options.device) as ranks:
        results = compare(
            own, options.out, ranks, data=options.data, world=options.world, command=command
        )
        if ranks.is_first:
            write_report(results, options.out)
            print(f"\n{format_table(results)}")
            print(f"report: {options.out / 'report.html'}", flush=True)
