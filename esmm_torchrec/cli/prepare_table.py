"""esmm-torchrec prepare table: any CSV or Parquet files of impressions → a prepared data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from esmm_torchrec.cli.prepared_report import report
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import OptionError


@dataclass(frozen=True)
class Options:
    """Turn any CSV or Parquet files of impressions into a prepared data set.

    An option that takes several values takes them one after the other: --id user item. A CSV has a
    header and is in UTF-8; an empty field is a missing value. A column of a CSV holds integer ids
    if all its training values are integers, else strings. A column of lists is a multi-valued
    feature; a CSV has none, take Parquet.
    """

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Folder to make."""

    train: tuple[Path, ...]
    """Files of the training impressions: .csv, .csv.gz, .parquet, .pq."""

    click: str
    """Column of 0 or 1: whether the impression was clicked."""

    conversion: str
    """Column of 0 or 1: whether it was clicked and converted."""

    test: tuple[Path, ...] = ()
    """Files of the test impressions; needed. No rows are split off the training files."""

    id: tuple[str, ...] = ()
    """Columns of integers, strings or booleans, or of lists of them; each is a feature with an
    embedding table. A missing value is an empty bag, one that training does not have is row 0."""

    dense: tuple[str, ...] = ()
    """Columns of numbers; each is a feature, standardised with its mean and standard deviation in
    training. A missing value is a bad row."""

    weights: tuple[str, ...] = ()
    """COL:WCOL: the id column COL is weighted by WCOL, a column of the same form."""

    share_table: tuple[str, ...] = ()
    """NAME=COL,COL: id columns that look up one embedding table, NAME."""

    sample_id: str | None = None
    """Column of int64; without it rows are numbered from 0 in each split."""

    group_id: str | None = None
    """Column of int64 or strings (hashed) by which gauc groups, a user or a session."""

    timestamp: str | None = None
    """Column of int64."""

    true_ctr: str | None = None
    """Column of the true probability of a click, where it is known."""

    true_cvr: str | None = None
    """Column of the true probability of a conversion behind a click, where it is known."""

    min_count: int = 1
    """How often an id must occur in training to have an embedding row of its own; rarer ids share
    one."""

    unclicked_conversions: Literal["error", "drop", "keep"] = "error"
    """Impressions with a conversion and no click: stop, drop them, or keep them as neither clicked
    nor converted. Their number is reported."""

    max_bad_rows: int = 0
    """Broken rows to skip, over all files, before giving up. What is skipped is reported: by its
    line in a CSV, by its number from 0 in a Parquet file."""


def _pairs(option: str, given: Iterable[str], separator: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given:
        left, found, right = text.partition(separator)
        if not (left and found and right):
            raise OptionError(f"{option} {text!r} is not of the form {form}")
        if left in pairs:
            raise OptionError(f"{option} names {left!r} twice; name it once")
        pairs[left] = right
    return pairs


def run(options: Options) -> None:
    """Prepares, then prints what is in the data set."""
    weights = _pairs("--weights", options.weights, ":", "COL:WCOL")
    shared = _pairs("--share-table", options.share_table, "=", "NAME=COL,COL")
    data_set = prepare_table(
        options.out,
        train=options.train,
        test=options.test,
        click=options.click,
        conversion=options.conversion,
        ids=options.id,
        dense=options.dense,
        weights=weights,
        shared_tables={name: columns.split(",") for name, columns in shared.items()},
        sample_id=options.sample_id,
        group_id=options.group_id,
        timestamp=options.timestamp,
        true_ctr=options.true_ctr,
        true_cvr=options.true_cvr,
        min_count=options.min_count,
        unclicked_conversions=options.unclicked_conversions,
        max_bad_rows=options.max_bad_rows,
        progress=True,
    )
    print(report(data_set, unclicked_conversions=options.unclicked_conversions))
