"""`esmm-torchrec prepare append`: adds impressions to a prepared data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from esmm_torchrec.cli.prepared_report import report
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.spark_tasks import session


@dataclass(frozen=True)
class Options:
    """Add impressions, such as those of a new day, to a data set written by prepare table.

    They are read with the options that prepare table was given. Ids that have a row keep it; ids
    that have now occurred --min-count times get the next rows. The added impressions also form a
    separate data set, DATA/days/DAY, on which yesterday's model can be trained further with train
    --from.
    """

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Prepared data set: a folder or its URI."""

    train: tuple[str, ...]
    """Files of the impressions to add, as for prepare table."""

    test: tuple[str, ...] = ()
    """Files of a new test split; without them, the test split is unchanged."""

    day: str | None = None
    """Name of the added impressions, such as 2026-11-02. An existing name is refused, so that no
    day is added twice. By default, days are numbered."""

    engine: Literal["local", "spark"] = "local"
    """Where the files are processed; see prepare table."""


def run(options: Options) -> None:
    """Appends the impressions and prints a summary of them."""
    added = append_table(
        options.data,
        train=options.train,
        test=options.test or None,
        day=options.day,
        engine=session() if options.engine == "spark" else None,
        progress=True,
    )
    policy = added.source["unclicked_conversions"]
    print(report(added, unclicked_conversions=policy, continues=True))
    together = PreparedDataSet.open(options.data).splits["train"].impressions
    print(f"{options.data} has {together:,} training impressions over all days")
