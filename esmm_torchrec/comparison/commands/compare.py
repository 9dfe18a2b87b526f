"""`esmm-torchrec compare`, which also runs under torchrun, on any number of ranks."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from esmm_torchrec.comparison.data import DEFAULT_WORLD, REGIMES, Regime
from esmm_torchrec.comparison.options import ComparisonOptions
from esmm_torchrec.comparison.report import format_table, write_report
from esmm_torchrec.comparison.study import compare
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.errors import OptionError
from esmm_torchrec.sharding.process_group import process_group


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Compare conversion methods: tune each in the same way, retrain it, score the test split once.

    Without --data, each seed has its own generated world with known probabilities. Writes
    results.json, report.html, table.csv, table.md and plots to the output folder. Rerun the command
    to resume a stopped comparison.
    """

    out: Path
    """Output folder."""
    data: Path | None = None
    """A prepared data set for all seeds, instead of generated worlds."""
    settings_of: Path | None = None
    """Folder of another comparison whose choices are used instead of tuning again."""
    keep_best: Path | None = None
    """Run folder to write the best method to (needs --data): the best on the held-out users,
    trained with the settings chosen for it."""
    regime: Regime | None = None
    """Rates and size of the generated worlds by name, instead of --world. paper: CTR .039, CVR .02;
    public: CVR .0055, as in the paper's Public data set; dense: CTR .09, CVR .18."""
    world: World = field(default_factory=lambda: DEFAULT_WORLD)
    """Settings of the generated worlds, the paper regime by default; seed n uses the world with
    seed world.seed + n."""


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise OptionError(
            f"--settings-of {folder}: {path} cannot be read ({error}); give the folder of a "
            "comparison that has ended"
        ) from error


def run(options: Options) -> None:
    """Compares methods on the ranks that torchrun started, or on a single one."""
    if options.data is not None and (options.world != DEFAULT_WORLD or options.regime is not None):
        raise OptionError(
            "--world and --regime describe generated worlds, but --data is not one; leave one out"
        )
    if options.regime is not None and options.world != DEFAULT_WORLD:
        raise OptionError("--regime sets what --world sets; give one of the two")
    if options.keep_best is not None and options.data is None:
        raise OptionError(
            "--keep-best needs --data, the prepared data set that the run folder is of"
        )
    settings = None if options.settings_of is None else _settings(options.settings_of)
    world = options.world if options.regime is None else REGIMES[options.regime]
    own = ComparisonOptions(
        **{item.name: getattr(options, item.name) for item in fields(ComparisonOptions)}
    )
    command = shlex.join(["esmm-torchrec", *sys.argv[1:]])
    with process_group(options.device) as ranks:
        results = compare(
            own,
            options.out,
            ranks,
            data=options.data,
            world=world,
            command=command,
            settings=settings,
            keep_best=options.keep_best,
        )
        if ranks.is_first:
            write_report(results, options.out)
            print(f"\n{format_table(results)}")
            print(f"report: {options.out / 'report.html'}", flush=True)
