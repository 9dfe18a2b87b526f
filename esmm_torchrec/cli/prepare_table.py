"""`esmm-torchrec prepare table`: converts files of impressions to a prepared data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

import tyro

from esmm_torchrec.cli.prepared_report import report
from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.sources.delimited_text import TextFormat
from esmm_torchrec.data.sources.spark_tasks import session
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import OptionError

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Turn any text, Parquet or Arrow files of impressions into a prepared data set.

    Separate several values of an option by spaces: --id user item. Text files (CSV, TSV and the
    like) have a header. Empty text, NaN and NULL are missing values. An id column contains integers
    or text: in a text file, integers if all its training values are integers.
    """

    out: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """Folder to create, or its URI (s3://bucket/folder)."""

    train: tuple[str, ...]
    """Files of the training impressions, folders of them, or quoted patterns ("logs/*.tsv.gz"):
    .csv, .tsv, .tab, .txt, also compressed (.gz, .bz2, .zst, .lz4); .parquet, .pq; .arrow,
    .feather."""

    click: str | None = None
    """Column that says whether the impression was clicked: 0/1, -1/1, no/yes or false/true."""

    conversion: str | None = None
    """Column, in the same form, that says whether it was clicked and converted; it may be empty
    without a click. Without this option the data set has only clicks, for --method ctr."""

    actions: tuple[str, ...] = ()
    """Instead of --click and --conversion, a longer chain: COL or NAME=COL for each action in the
    order in which they happen, such as click cart order. Columns have the form of --click; an
    action may be empty without the one before it. order:click instead of order means that an order
    needs only a click. Names consist of lower-case letters, digits and underscores."""

    test: tuple[str, ...] = ()
    """Files of the test impressions, in the same form as --train."""

    split: str | None = None
    """Instead of --test: the part of the rows of --train to train on. time:COL:0.8 takes the
    earliest rows, group:COL:0.8 whole groups (users), share:0.8 random rows. The rest becomes the
    test split."""

    id: tuple[str, ...] = ()
    """Columns of integers, text or booleans, or of lists of them; each is a feature with an
    embedding table. A missing value is an empty bag; a value that does not occur in training maps
    to row 0."""

    dense: tuple[str, ...] = ()
    """Columns of numbers, COL or COL:METHOD; each is a feature. METHOD auto, the default, clips
    outliers, takes the signed logarithm if the training values are skewed, and standardises;
    standard only standardises; the others are log, quantile (ranks) and as-is. A missing value
    becomes the training mean, and a feature COL__missing marks it. A column may also be given to
    --id."""

    text: tuple[str, ...] = ()
    """Columns of text; each is a multi-valued feature of its words in lower case."""

    time_features: tuple[str, ...] = ()
    """Columns of times; the hour and the weekday (UTC) of each are features, COL__hour and
    COL__weekday."""

    weights: tuple[str, ...] = ()
    """COL:WCOL: the id column COL is weighted by WCOL, a column of the same form."""

    share_table: tuple[str, ...] = ()
    """NAME=COL,COL: id columns that look up one embedding table, NAME."""

    hash: Mapping[str, int] = field(default_factory=dict)
    """COL=N: an id of column COL maps to row 1 + hash mod N of its table, without a vocabulary: for
    ids that are unbounded in number, or too many to count. No id is unknown, and some share a
    row."""

    list_separator: str | None = None
    """Separator of the values of lists in text, such as | in 1|5|9. An id column that contains it
    anywhere in training is a list."""

    sample_id: str | None = None
    """Column of int64 that identifies impressions; by default, rows are numbered from 0 in each
    split, or in --train if --split divides it."""

    group_id: str | None = None
    """Column of integers or text (hashed) by which gauc groups impressions, such as a user or a
    session. A row without a value forms its own group."""

    timestamp: str | None = None
    """Column of times: ISO 8601 text and typed times are stored as seconds since 1970 (UTC),
    integers as they are."""

    conversion_time: str | None = None
    """Column of times, in the form of --timestamp: when the impression converted, empty if it did
    not. The choices of train --rows for delayed feedback need it."""

    weight: str | None = None
    """Column of the weight of each impression in training and in metrics, 0 or more."""

    true_ctr: str | None = None
    """Column of the true probability of a click, if it is known."""

    true_cvr: str | None = None
    """Column of the true probability of a conversion after a click, if it is known."""

    key: str | None = None
    """Column of the user: impressions are stored in the order of its 64-bit hash, as train --read
    stream requires. By default, they keep the order of the files."""

    separator: str | None = None
    """Separator between the fields of a text file, \\t for a tab; by default, comma, tab, semicolon
    or |, as detected in the header."""

    encoding: str | None = None
    """Encoding of text files, such as cp1252; by default, UTF-8, or UTF-16 if they have a byte
    order mark."""

    quote: str = '"'
    """Character around fields of text files that contain separators or line ends; none: fields are
    not quoted."""

    min_count: int = 2
    """Number of training impressions in which an id must occur to get its own embedding row. Rarer
    ids share row 0 with ids that do not occur in training. With 1, row 0 is not trained."""

    unclicked_conversions: Literal["error", "drop", "keep"] = "error"
    """Impressions with an action but not the one before it, such as a conversion without a click:
    stop, drop them, or keep them without that action. Their number is reported."""

    max_bad_rows: int = 0
    """Maximum number of broken rows, over all files, to skip. Skipped rows are reported by line
    number in text files and by row number, from 0, in others."""

    engine: Literal["local", "spark"] = "local"
    """Where the files are processed; spark: in Spark tasks, on all cores of this machine or, under
    spark-submit, on a cluster, for Parquet files."""


def _pairs(option: str, given: Iterable[str], separator: str, form: str) -> dict[str, str]:
    def read(text: str) -> tuple[str, str]:
        left, found, right = text.partition(separator)
        if not (left and found and right):
            raise OptionError(f"{option} {text!r} is not of the form {form}")
        return left, right

    return _once(option, map(read, given))


def _once(option: str, given: Iterable[tuple[str, T]]) -> dict[str, T]:
    named: dict[str, T] = {}
    for name, value in given:
        if name in named:
            raise OptionError(f"{option} names {name!r} twice; name it once")
        named[name] = value
    return named


def _named(action: str) -> tuple[str, str]:
    """Splits NAME=COL into name and column; COL alone is both."""
    name, equals, column = action.partition("=")
    return name, column if equals else name.partition(":")[0]


def run(options: Options) -> None:
    """Prepares the data set and prints a summary of it."""
    weights = _pairs("--weights", options.weights, ":", "COL:WCOL")
    shared = _pairs("--share-table", options.share_table, "=", "NAME=COL,COL")
    separator = options.separator
    text_format = TextFormat(
        separator="\t" if separator in ("\\t", "tab") else separator,
        encoding=options.encoding,
        quote=None if options.quote == "none" else options.quote,
    )
    data_set = prepare_table(
        options.out,
        train=options.train,
        test=options.test or None,
        split=options.split,
        click=options.click,
        conversion=options.conversion,
        actions=_once("--actions", map(_named, options.actions)),
        ids=options.id,
        dense=_once("--dense", map(DenseTransform.parse, options.dense)),
        texts=options.text,
        time_features=options.time_features,
        weights=weights,
        shared_tables={name: columns.split(",") for name, columns in shared.items()},
        hashed=options.hash,
        sample_id=options.sample_id,
        group_id=options.group_id,
        timestamp=options.timestamp,
        conversion_time=options.conversion_time,
        weight=options.weight,
        true_ctr=options.true_ctr,
        true_cvr=options.true_cvr,
        key=options.key,
        list_separator=options.list_separator,
        text_format=text_format,
        min_count=options.min_count,
        unclicked_conversions=options.unclicked_conversions,
        max_bad_rows=options.max_bad_rows,
        engine=session() if options.engine == "spark" else None,
        progress=True,
    )
    print(report(data_set, unclicked_conversions=options.unclicked_conversions))
