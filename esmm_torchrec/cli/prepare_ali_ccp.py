"""`esmm-torchrec prepare ali-ccp`: converts the raw Ali-CCP files to a prepared data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from esmm_torchrec.cli.prepared_report import report
from esmm_torchrec.data.sources.ali_ccp.prepare import prepare_ali_ccp


@dataclass(frozen=True)
class Options:
    """Turn the raw Ali-CCP files into a prepared data set."""

    raw: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RAW")]]
    """Folder with sample_skeleton_{train,test}.csv and common_features_{train,test}.csv, or
    sample_{train,test}.tar.gz. A truth.parquet in it is joined."""

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Folder to create."""

    min_count: int = 10
    """Number of training impressions in which an id must occur to get its own embedding row; rarer
    ids share one. An id of a shared row counts once for each impression that shares the row."""

    max_bad_rows: int = 0
    """Maximum number of broken rows, over all files, to skip. Skipped rows are counted, and the
    first ones are named."""

    unclicked_purchases: Literal["drop", "keep", "error"] = "drop"
    """Impressions with purchase 1 and click 0, an error in the log: drop them, keep them as neither
    clicked nor converted, or stop. Their number is reported."""


def run(options: Options) -> None:
    """Prepares the data set and prints a summary of it."""
    data_set = prepare_ali_ccp(
        options.raw,
        options.out,
        min_count=options.min_count,
        max_bad_rows=options.max_bad_rows,
        unclicked_purchases=options.unclicked_purchases,
        progress=True,
    )
    print(report(data_set, unclicked_conversions=options.unclicked_purchases))
