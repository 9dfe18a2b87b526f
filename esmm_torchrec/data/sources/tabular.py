"""Preparation of any table of impressions: delimited text, Parquet, Arrow, DataFrames.

Training rows are read in two passes, a block at a time: the first counts ids and samples dense
columns, the second encodes. Test rows are encoded in one pass with the vocabularies and statistics
of training. Memory holds the distinct ids and a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.data.dense import DENSE_METHODS, DenseMethod
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_writer import PreparedWriter, refuse_existing
from esmm_torchrec.data.sources.delimited_text import TextFormat
from esmm_torchrec.data.sources.feature_columns import RawReading
from esmm_torchrec.data.sources.raw_tables import Frame
from esmm_torchrec.data.sources.row_split import RowSplit
from esmm_torchrec.data.sources.spark_tasks import Session
from esmm_torchrec.data.sources.table_columns import TableColumns
from esmm_torchrec.data.sources.table_passes import count_training_rows, write_rows
from esmm_torchrec.data.sources.table_preparation import Preparation
from esmm_torchrec.data.sources.table_rows import TableRows, UnclickedConversions
from esmm_torchrec.data.storage import Location
from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import CLICK, CONVERSION
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


@checks_choices
def prepare_table(
    out: Path | str,
    *,
    train: Frame | Sequence[Frame],
    test: Frame | Sequence[Frame] | None = None,
    split: RowSplit | str | None = None,
    click: str | None = None,
    conversion: str | None = None,
    actions: Sequence[str] | Mapping[str, str] = (),
    ids: Sequence[str] = (),
    dense: Sequence[str] | Mapping[str, DenseMethod] = (),
    texts: Sequence[str] = (),
    time_features: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
    shared_tables: Mapping[str, Sequence[str]] | None = None,
    hashed: Mapping[str, int] | None = None,
    sample_id: str | None = None,
    group_id: str | None = None,
    timestamp: str | None = None,
    conversion_time: str | None = None,
    weight: str | None = None,
    true_ctr: str | None = None,
    true_cvr: str | None = None,
    key: str | None = None,
    list_separator: str | None = None,
    text_format: TextFormat | None = None,
    min_count: int = 2,
    unclicked_conversions: UnclickedConversions = "error",
    max_bad_rows: int = 0,
    engine: Session | None = None,
    progress: bool = False,
) -> PreparedDataSet:
    """Prepares impressions in text, Parquet or Arrow files, pandas DataFrames or Arrow tables.

    Example::

        data_set = prepare_table(
            "prepared",
            train=train_frame,
            test=["test-1.parquet", "test-2.parquet"],
            click="visit",
            conversion="purchase",
            ids=["user", "item", "history"],  # a column of lists is multi-valued
            dense=["price"],
            weights={"history": "history_weights"},
        )

    Arguments that are not listed here name raw columns; see `TableColumns`. A missing id (null,
    NaN, one of `raw_values.NULL_TEXTS`) becomes an empty bag, a missing dense value the training
    mean; a row with a missing label is a bad row. `dense` may map columns to the methods of
    `data.dense`.

    Args:
        out: folder to create, or its URI; it must not exist.
        click: column of the default chain's first label: 0 or 1, -1 or 1, no or yes.
        conversion: column of the second label, in the same form; None if only clicks are known.
        actions: columns of a chain of tasks, instead of `click` and `conversion`, in the order in
            which the tasks happen, such as ["click", "cart", "order"], or task → column. A task may
            name an earlier task that it is conditional on instead of the previous one:
            "order:click".
        train: training rows: paths or rows, one or several; all vocabularies and statistics come
            from them. A path is a file, a folder or a pattern such as "logs/2026-*.tsv.gz".
        test: test rows in the same form; ids that do not occur in training become row 0.
        split: rule that selects test rows from `train`, instead of `test`: a `RowSplit` or
            "time:COL:0.8", "group:COL:0.8" or "share:0.8".
        list_separator: separator of the values in lists that are written as text ("1|5|9"). An id
            column of text that contains it anywhere in training is multi-valued.
        text_format: format of text files.
        min_count: minimum number of training impressions in which an id must occur to have an
            embedding row. Other ids share row 0 with ids that do not occur in training; with 1,
            that row is never trained.
        unclicked_conversions: treatment of rows with a task but without the one before it, such as
            conversion 1 and click 0: "error" raises, "drop" leaves them out, "keep" keeps them as
            if the later task had not happened, here neither clicked nor converted. The number of
            such rows is in `source["unclicked_conversion_rows"]`.
        max_bad_rows: maximum number of rows, over all files, to skip because a value is broken.
        engine: SparkSession whose tasks read, encode and write, each one row group of Parquet at a
            time; None does so in this process. The result is the same, except for the division into
            files. All tasks must have access to the places they read from and write to.
        progress: show progress bars.

    Returns:
        The data set, opened. Its `dropped` and `dropped_rows` describe what was dropped.

    Raises:
        DataError: a file, a column or a row cannot be used; names it. Lines of text count from 1,
            the header included, rows of anything else from 0.
        OptionError: columns or options contradict each other.
    """
    tasks, labels = _chain(click, conversion, actions)
    columns = TableColumns(
        tasks=tasks,
        labels=labels,
        ids=tuple(map(str, ids)),
        dense=tuple(map(str, dense)),
        texts=tuple(map(str, texts)),
        time_features=tuple(map(str, time_features)),
        weights={str(name): str(column) for name, column in (weights or {}).items()},
        shared_tables={
            table: tuple(map(str, names)) for table, names in (shared_tables or {}).items()
        },
        hashed={str(name): rows for name, rows in (hashed or {}).items()},
        sample_id=None if sample_id is None else str(sample_id),
        group_id=None if group_id is None else str(group_id),
        timestamp=None if timestamp is None else str(timestamp),
        conversion_time=None if conversion_time is None else str(conversion_time),
        weight=None if weight is None else str(weight),
        true_ctr=None if true_ctr is None else str(true_ctr),
        true_cvr=None if true_cvr is None else str(true_cvr),
        key=None if key is None else str(key),
    )
    if min_count < 1:
        raise OptionError(f"`min_count` must be 1 or more, not {min_count}")
    if max_bad_rows < 0:
        raise OptionError(f"`max_bad_rows` must be 0 or more, not {max_bad_rows}")
    methods: dict[str, DenseMethod] = dict.fromkeys(map(str, dense), "auto")
    if isinstance(dense, Mapping):
        methods |= {str(name): method for name, method in dense.items()}
    for name, method in methods.items():
        if method not in DENSE_METHODS:
            raise OptionError(
                f"the method {method!r} of the dense column {name!r} is not one of "
                f"{', '.join(DENSE_METHODS)}"
            )
    if list_separator == "":
        raise OptionError("`list_separator` is empty; give the text between the values of a list")
    if (test is None) == (split is None):
        raise OptionError("give either `test` files or `split`, which divides the `train` files")
    refuse_existing(Location.of(out))
    rule = RowSplit.parse(split) if isinstance(split, str) else split
    text_format = text_format or TextFormat()
    rows = TableRows(
        train,
        test,
        text_format=text_format,
        split=rule,
        columns=columns,
        unclicked_conversions=unclicked_conversions,
        max_bad_rows=max_bad_rows,
    )
    source: dict[str, Any] = {
        "kind": "table",
        **rows.files,
        "split": None if rule is None else asdict(rule),
        "columns": asdict(columns),
        "dense_methods": methods,
        "max_bad_rows": max_bad_rows,
        "unclicked_conversions": unclicked_conversions,
    }
    preparation = Preparation(rows, columns, list_separator=list_separator, min_count=min_count)
    counted = count_training_rows(preparation, engine, progress=progress)
    features = preparation.features
    transforms = counted.fitter.fit(
        {name: methods[features.column_of(name)] for name in features.dense}
    )
    source["group_kinds"] = preparation.group_kinds
    source["reading"] = RawReading(
        features=features, sample_id=columns.sample_id, text_format=text_format
    ).to_dict()
    with PreparedWriter(
        out,
        id_features=features.id_features,
        dense_features=features.dense,
        columns=columns.optional,
        source=source,
        min_count=min_count,
        tasks=tasks,
        key=columns.key,
    ) as writer:
        write_rows(
            writer,
            preparation,
            counted.vocabularies,
            transforms,
            engine,
            progress=progress,
        )
    return PreparedDataSet.open(out)


def _chain(
    click: str | None, conversion: str | None, actions: Sequence[str] | Mapping[str, str]
) -> tuple[TaskChain, dict[str, str]]:
    """Returns the chain, and the raw column of each label that has one."""
    if bool(actions) == (click is not None) or (actions and conversion is not None):
        raise OptionError(
            "give either `actions`, the columns of a chain in order, or `click` and `conversion`"
        )
    if click is not None:
        labels = {CLICK: str(click)}
        return DEFAULT_TASKS, labels if conversion is None else labels | {
            CONVERSION: str(conversion)
        }
    named = (
        {str(name): str(column) for name, column in actions.items()}
        if isinstance(actions, Mapping)
        else {str(name): str(name).partition(":")[0] for name in actions}
    )
    if len(named) < 2 or len(named) < len(actions):
        raise OptionError(
            f"`actions` {' '.join(map(str, actions))} is not a chain of two actions or more, each "
            "named once; for clicks alone give `click`"
        )
    tasks = TaskChain.of(*named)
    return tasks, dict(zip(tasks.labels, named.values(), strict=True))
