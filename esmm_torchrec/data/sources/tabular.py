"""Any table of impressions → a prepared data set: delimited text, Parquet, Arrow, DataFrames.

Two passes over the training rows, a block at a time: the first counts ids and samples dense
columns, the second encodes. The test rows are encoded in one pass with what training gave.
Memory holds the distinct ids and a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.data.dense import DENSE_METHODS, DenseFitter, DenseMethod, DenseTransform
from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, SplitName
from esmm_torchrec.data.prepared_writer import PreparedWriter, refuse_existing
from esmm_torchrec.data.sources import spark_engine
from esmm_torchrec.data.sources.delimited_text import TextFormat
from esmm_torchrec.data.sources.feature_columns import CONSTANT, FeatureColumns, RawReading
from esmm_torchrec.data.sources.raw_ids import IdKind, split_lists
from esmm_torchrec.data.sources.raw_tables import (
    BadRows,
    Frame,
    RawTable,
    open_raw_tables,
)
from esmm_torchrec.data.sources.raw_values import (
    holds_integers,
    holds_text,
    one_array,
)
from esmm_torchrec.data.sources.row_split import RowSplit
from esmm_torchrec.data.sources.table_blocks import (
    Counted,
    TrainingCount,
    count_ids,
    write_table,
)
from esmm_torchrec.data.sources.table_columns import IdForm, TableColumns, agreed
from esmm_torchrec.data.sources.table_rows import RawBlock, Skipped, TableRows, UnclickedConversions
from esmm_torchrec.data.storage import Location
from esmm_torchrec.data.vocabulary import IdCounter
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import CLICK, CONVERSION, IdFeature, Schema, Table
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
    engine: spark_engine.Session | None = None,
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

    The arguments that are not listed here name raw columns, see `TableColumns`. A missing id (null,
    NaN, one of `raw_values.NULL_TEXTS`) is an empty bag, a missing dense value the training mean; a
    missing label is a bad row. `dense` may map columns to the methods of `data.dense`.

    Args:
        out: the folder to make, or its URI; it must not exist.
        click: column of the default chain's first label, 0 or 1, -1 or 1, no or yes.
        conversion: as click; None: only clicks are known.
        actions: instead of click and conversion, the columns of a chain of tasks in the order in
            which they happen, such as ["click", "cart", "order"], or task → column. A task may
            name an earlier one that it is given instead of the one before: "order:click".
        train: paths or rows, one or several; all vocabularies and statistics are theirs. A path
            is that of a file, a folder or a pattern such as "logs/2026-*.tsv.gz".
        test: in the same form; ids that training does not have become row 0.
        split: instead of `test`: which of the rows in `train` become test rows, a `RowSplit` or
            "time:COL:0.8", "group:COL:0.8" or "share:0.8".
        list_separator: what stands between the values of lists that are written as text ("1|5|9").
            An id column of text that holds it anywhere in training is multi-valued.
        text_format: how text files are written.
        min_count: in how many training impressions an id must occur to have an embedding row. The
            others share row 0, also with ids that training does not have; with 1 that row is never
            trained.
        unclicked_conversions: what becomes of rows with a task and not the one before it, such as
            conversion 1 and click 0: "error" refuses them, "drop" leaves them out, "keep" keeps
            them up to what is missing, as neither clicked nor converted. How many there were is in
            `source["unclicked_conversion_rows"]`.
        max_bad_rows: how many rows, over all files, may be skipped because a value is broken.
        engine: a SparkSession whose tasks read, encode and write, each a row group of Parquet at a
            time; None: this process does. The result is the same, except that files are divided
            otherwise. What tasks read and write must be in a place that all of them see.
        progress: show a bar.

    Returns:
        The data set, opened. What was dropped is in its `dropped` and `dropped_rows`.

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
    train_tables = open_raw_tables(train, what="train", text_format=text_format)
    tables: dict[SplitName, list[RawTable]] = {
        "train": train_tables,
        "test": train_tables
        if test is None
        else open_raw_tables(test, what="test", text_format=text_format),
    }
    source: dict[str, Any] = {
        "kind": "table",
        "files": {
            name: [table.file_name for table in tables[name]]
            for name in (SPLITS if rule is None else ("train",))
        },
        "split": None if rule is None else asdict(rule),
        "columns": asdict(columns),
        "dense_methods": methods,
        "max_bad_rows": max_bad_rows,
        "unclicked_conversions": unclicked_conversions,
    }
    preparation = Preparation(
        rows=TableRows(
            tables,
            split=rule,
            columns=columns,
            unclicked_conversions=unclicked_conversions,
            max_bad_rows=max_bad_rows,
        ),
        columns=columns,
        list_separator=list_separator,
        dense_methods=methods,
        min_count=min_count,
        progress=progress,
    )
    counted = preparation.count(engine)
    source["group_kinds"] = preparation.group_kinds
    source["reading"] = RawReading(
        features=preparation.features, sample_id=columns.sample_id, text_format=text_format
    ).to_dict()
    with PreparedWriter(
        out,
        id_features=preparation.features.id_features,
        dense_features=preparation.features.dense,
        columns=columns.optional,
        source=source,
        min_count=min_count,
        tasks=tasks,
        has_conversions=columns.covers_the_chain,
        key=columns.key,
    ) as writer:
        preparation.write(writer, counted, engine)
    return PreparedDataSet.open(out)


def _chain(
    click: str | None, conversion: str | None, actions: Sequence[str] | Mapping[str, str]
) -> tuple[TaskChain, dict[str, str]]:
    """The chain, and the raw column of each label that has one."""
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


class Preparation:
    """One run of `prepare_table`."""

    def __init__(
        self,
        *,
        rows: TableRows,
        columns: TableColumns,
        list_separator: str | None,
        dense_methods: Mapping[str, DenseMethod],
        min_count: int,
        progress: bool,
    ) -> None:
        self.rows = rows
        self._columns = columns
        self._list_separator = list_separator
        self._dense_methods = dense_methods
        self.min_count = min_count
        self._progress = progress
        raw_ids = dict.fromkeys(columns.ids)
        self._lists = {
            name: agreed(self._forms([name], SPLITS), "multi_valued") for name in raw_ids
        }
        """By raw id column; None while no list has been met."""
        self._kinds: dict[str, IdKind] = {}
        self._guessed: list[tuple[str, ...]] = []
        """Groups of raw columns whose ids are integers until a text is met."""
        for family in self._families():
            kind = agreed(self._forms(family, SPLITS[:1]), "kind")
            agreed(self._forms(family, SPLITS), "kind")
            self._kinds |= dict.fromkeys(family, kind or "integer")
            if kind is None:
                self._guessed.append(family)
        # Its checks, before the long work.
        features = self.features
        Schema(
            tuple(Table(name, 1) for name in {of.table for of in features.id_features}),
            features.id_features,
            features.dense,
            columns.tasks,
        )

    def _families(self) -> list[tuple[str, ...]]:
        """Raw columns whose ids are of one kind: those that share a table; the group ids."""
        families: dict[str, tuple[str, ...]] = {}
        for feature, column in self._columns.id_features.items():
            table = self._columns.table_of(feature)
            if column in self._columns.ids and feature not in self._columns.time_parts:
                families[table] = (*families.get(table, ()), column)
            elif column in self._columns.texts:
                self._kinds[column] = "text"
        for table, names in self._columns.shared_tables.items():
            if any(name in self._columns.texts for name in names):
                self._kinds |= dict.fromkeys(families.pop(table, ()), "text")
        alone = [
            (name,)
            for name in dict.fromkeys((self._columns.group_id, self._columns.key))
            if name is not None and name not in self._kinds and name not in self._columns.ids
        ]
        return [*families.values(), *alone]

    def _forms(self, columns: Iterable[str], splits: Sequence[SplitName]) -> list[IdForm]:
        return [
            IdForm.of(table, column, self._list_separator)
            for column in columns
            for split in splits
            for table in self.rows.tables[split]
        ]

    @property
    def group_kinds(self) -> dict[str, IdKind]:
        """What group ids are, as far as is known: by raw column, of --group-id and --key."""
        columns = (self._columns.group_id, self._columns.key)
        return {name: self._kinds[name] for name in columns if name is not None}

    @property
    def features(self) -> FeatureColumns:
        """How features are read, as far as is known; `count` finds out the rest."""
        columns, parts = self._columns, self._columns.time_parts
        id_features = {
            name: IdFeature(
                name,
                table=columns.table_of(name),
                multi_valued=column in columns.texts or bool(self._lists.get(column))
                if name not in parts
                else False,
                weighted=column in columns.weights and name not in parts,
            )
            for name, column in columns.id_features.items()
        }
        if not id_features:
            id_features = {CONSTANT: IdFeature(CONSTANT, table=CONSTANT)}
        renamed = columns.id_features | columns.dense_features
        return FeatureColumns(
            id_features=tuple(id_features.values()),
            kinds={
                name: "integer"
                if name in parts or name == CONSTANT
                else self._kinds[columns.id_features[name]]
                for name in id_features
            },
            weights={
                name: columns.weights[columns.id_features[name]]
                for name, feature in id_features.items()
                if feature.weighted
            },
            dense=tuple(columns.dense_features),
            columns={name: column for name, column in renamed.items() if name != column},
            texts=frozenset(
                name
                for name, column in columns.id_features.items()
                if column in columns.texts and name not in parts
            ),
            time_parts=parts,
            list_separator=self._list_separator,
        )

    def count(self, engine: spark_engine.Session | None = None) -> Counted:
        """Reads the training rows once, or again if they are not what they seemed."""
        self.rows.find_last_train_time()
        with progress_bar("count train", None, "rows", disable=not self._progress) as bar:
            while (counted := self._try_to_count(bar, engine)) is None:
                bar.reset()
        for family in self._guessed:
            for form in self._forms(family, ["test"]):
                kind = self._kinds[family[0]]
                if form.kind not in (None, kind):
                    raise DataError(
                        f"{form.where} where the training files hold {kind} ids; give both one type"
                    )
        return counted

    def _try_to_count(self, bar: tqdm, engine: spark_engine.Session | None) -> Counted | None:
        if engine is not None:
            return spark_engine.count(engine, self)
        count = self.count_rows(self.rows, bar.update)
        if count is None:
            return None
        vocabularies = {
            table: counter.vocabulary(self.min_count) for table, counter in count.counters.items()
        }
        return Counted(vocabularies | self.hashed, self.fit(count.fitter), count.rows)

    @property
    def hashed(self) -> dict[str, HashedIds]:
        """By table whose ids are hashed."""
        hashed, kinds = self._columns.hashed, self.features.kinds
        return {
            feature.table: HashedIds(kinds[feature.name], hashed[column])
            for feature in self.features.id_features
            if (column := self.features.column_of(feature.name)) in hashed
            and feature.name not in self.features.time_parts
        }

    def fit(self, fitter: DenseFitter) -> dict[str, DenseTransform]:
        """The transforms of the dense columns, by the methods asked for."""
        columns = self.features
        return fitter.fit(
            {name: self._dense_methods[columns.column_of(name)] for name in columns.dense}
        )

    def count_rows(
        self, rows: TableRows, on_rows: Callable[[int], object] = lambda _: None
    ) -> TrainingCount | None:
        """Counts training rows; None if a list or a text turned up where none was expected, which
        `met` has then.

        Args:
            rows: all of them, or a piece.
            on_rows: is told how many more have been read.
        """
        columns, hashed = self.features, self.hashed
        counters = {
            feature.table: IdCounter(columns.kinds[feature.name])
            for feature in columns.id_features
            if feature.table not in hashed
        }
        fitter = DenseFitter(len(columns.dense))
        count, skipped = 0, Skipped(BadRows(rows.max_bad_rows))
        for block in rows.blocks("train", skipped.bad_rows):
            if self._meets_lists(block) or self._meets_text(block):
                return None
            usable = rows.usable(block, columns, self.group_kinds, skipped)
            count_ids(counters, columns, usable.features)
            if columns.dense:
                values = np.stack(list(usable.features.dense.values()), axis=1)
                fitter.add(values, usable.numbers)
            count += len(block.rows)
            on_rows(len(block.rows))
        return TrainingCount(counters, fitter, count)

    @property
    def met(self) -> tuple[dict[str, bool | None], dict[str, IdKind]]:
        """What is known of raw id columns: whether each holds lists, and what its ids are."""
        return self._lists, self._kinds

    def meet(self, lists: Mapping[str, bool | None], kinds: Mapping[str, IdKind]) -> bool:
        """Learns of lists and texts that were met in a piece; whether any of them is new."""
        before = dict(self._lists), dict(self._kinds)
        self._lists |= {name: True for name, is_list in lists.items() if is_list}
        self._kinds |= {name: kind for name, kind in kinds.items() if kind == "text"}
        return before != (self._lists, self._kinds)

    def _meets_lists(self, block: RawBlock) -> bool:
        if self._list_separator is None:
            return False
        met = [
            name
            for name, multi_valued in self._lists.items()
            if multi_valued is None and holds_text(block.rows.column(name), self._list_separator)
        ]
        self._lists |= dict.fromkeys(met, True)
        return bool(met)

    def _meets_text(self, block: RawBlock) -> bool:
        if not block.table.is_text:
            return False
        met = False
        for family in self._guessed:
            if self._kinds[family[0]] == "integer" and not all(
                self._is_integer(block.rows.column(name), name) for name in family
            ):
                self._kinds |= dict.fromkeys(family, "text")
                met = True
        return met

    def _is_integer(self, column: pa.ChunkedArray, name: str) -> bool:
        if self._lists.get(name) and self._list_separator is not None:
            return holds_integers(split_lists(one_array(column), self._list_separator).flatten())
        return holds_integers(column)

    def write(
        self, writer: PreparedWriter, counted: Counted, engine: spark_engine.Session | None = None
    ) -> None:
        """Encodes everything and writes the data set."""
        for table, vocabulary in counted.vocabularies.items():
            writer.write_vocabulary(table, vocabulary)
        for name, transform in counted.dense.items():
            writer.record_dense(name, transform)
        encoder = RowEncoder(
            self.features, counted.vocabularies, counted.dense, tasks=self._columns.tasks
        )
        if engine is not None:
            spark_engine.write(
                engine, writer, self.rows, encoder, counted.dense, group_kinds=self.group_kinds
            )
            return
        write_table(
            writer,
            self.rows,
            encoder,
            group_kinds=self.group_kinds,
            train_rows=counted.rows,
            progress=self._progress,
        )
