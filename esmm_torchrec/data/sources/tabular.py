"""Any table of impressions → a prepared data set: CSV, Parquet, DataFrames.

Two passes over the training rows, a block at a time: the first counts ids and takes the moments of
dense columns, the second encodes. The test rows are encoded in one pass with what training gave.
Memory holds the distinct ids and a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from esmm_torchrec.data.encoding import FeatureColumns, Features, RowEncoder
from esmm_torchrec.data.moments import Moments
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, DenseStatistics, SplitName, impression_columns
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.raw_tables import (
    EXAMPLES,
    BadRows,
    Frame,
    RawTable,
    open_raw_tables,
)
from esmm_torchrec.data.sources.raw_values import (
    Fault,
    IdKind,
    holds_integers,
    read_groups,
    read_integers,
    read_labels,
    read_probabilities,
)
from esmm_torchrec.data.sources.table_columns import IdForm, TableColumns, agreed
from esmm_torchrec.data.vocabulary import IdCounter
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    GROUP_ID,
    SAMPLE_ID,
    TIMESTAMP,
    IdFeature,
    Schema,
    Table,
)

UnclickedConversions = Literal["error", "drop", "keep"]

UNCLICKED_CONVERSIONS = "conversions without a click"
BAD_ROWS = "bad rows"
"""What rows are called among the dropped ones."""


def prepare_table(
    out: Path | str,
    *,
    train: Frame | Sequence[Frame],
    test: Frame | Sequence[Frame],
    click: str,
    conversion: str,
    ids: Sequence[str],
    dense: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
    shared_tables: Mapping[str, Sequence[str]] | None = None,
    sample_id: str | None = None,
    group_id: str | None = None,
    timestamp: str | None = None,
    true_ctr: str | None = None,
    true_cvr: str | None = None,
    min_count: int = 1,
    unclicked_conversions: UnclickedConversions = "error",
    max_bad_rows: int = 0,
    progress: bool = False,
) -> PreparedDataSet:
    """Prepares impressions in CSV or Parquet files, pandas DataFrames or Arrow tables.

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

    Args:
        out: the folder to make; it must not exist.
        train: paths or rows, one or several; all vocabularies and statistics are theirs.
        test: in the same form; ids that training does not have become row 0.
        click, conversion, ids, dense, weights, shared_tables, sample_id, group_id, timestamp,
            true_ctr, true_cvr: the raw columns, see `TableColumns`. A missing id (null, NaN, an
            empty field of a CSV) is an empty bag; a missing dense value or label is a bad row.
        min_count: how often an id must occur in training to have an embedding row of its own.
        unclicked_conversions: what becomes of rows with conversion 1 and click 0: "error" refuses
            them, "drop" leaves them out, "keep" keeps them as neither clicked nor converted. How
            many there were is in `source["unclicked_conversion_rows"]`.
        max_bad_rows: how many rows, over all files, may be skipped because a value is broken.
        progress: show a bar.

    Returns:
        The data set, opened. What was dropped is in its `dropped` and `dropped_rows`.

    Raises:
        DataError: a file, a column or a row cannot be used; names it. Lines of a CSV count from 1,
            the header included, rows of anything else from 0.
        OptionError: columns or options contradict each other.
    """
    columns = TableColumns(
        click=click,
        conversion=conversion,
        ids=tuple(ids),
        dense=tuple(dense),
        weights=dict(weights or {}),
        shared_tables={table: tuple(names) for table, names in (shared_tables or {}).items()},
        sample_id=sample_id,
        group_id=group_id,
        timestamp=timestamp,
        true_ctr=true_ctr,
        true_cvr=true_cvr,
    )
    if min_count < 1:
        raise OptionError(f"--min-count must be 1 or more, not {min_count}")
    if max_bad_rows < 0:
        raise OptionError(f"--max-bad-rows must be 0 or more, not {max_bad_rows}")
    tables: dict[SplitName, list[RawTable]] = {
        "train": open_raw_tables(train, what="train"),
        "test": open_raw_tables(test, what="test"),
    }
    source: dict[str, Any] = {
        "kind": "table",
        "files": {split: [table.file_name for table in tables[split]] for split in SPLITS},
        "columns": asdict(columns),
        "max_bad_rows": max_bad_rows,
        "unclicked_conversions": unclicked_conversions,
    }
    preparation = _Preparation(
        tables=tables,
        columns=columns,
        min_count=min_count,
        unclicked_conversions=unclicked_conversions,
        max_bad_rows=max_bad_rows,
        progress=progress,
    )
    with PreparedWriter(
        out,
        id_features=preparation.id_features,
        dense_features=columns.dense,
        columns=columns.optional,
        source=source,
        min_count=min_count,
    ) as writer:
        preparation.run(writer)
    return PreparedDataSet.open(out)


class _Block(NamedTuple):
    table: RawTable
    rows: pa.Table
    first_row: int
    """Number of the first row in its file."""
    number: int
    """Number of the first row in its split."""


class _Rows(NamedTuple):
    """The usable rows of a block."""

    scalars: dict[str, np.ndarray]
    """Labels, sample_id and optional columns, by their prepared names."""
    features: Features


class _Counted(NamedTuple):
    """What the training rows gave."""

    counters: dict[str, IdCounter]
    """By table."""
    dense: dict[str, DenseStatistics]
    rows: int


@dataclass
class _Skipped:
    """What one reading of a split left out."""

    bad_rows: BadRows
    unclicked_conversions: int = 0


class _Preparation:
    """One run of `prepare_table`."""

    def __init__(
        self,
        *,
        tables: Mapping[SplitName, Sequence[RawTable]],
        columns: TableColumns,
        min_count: int,
        unclicked_conversions: UnclickedConversions,
        max_bad_rows: int,
        progress: bool,
    ) -> None:
        self._tables = tables
        self._columns = columns
        self._min_count = min_count
        self._unclicked_conversions: UnclickedConversions = unclicked_conversions
        self._max_bad_rows = max_bad_rows
        self._progress = progress
        for split in SPLITS:
            for table in tables[split]:
                table.check_columns(columns.roles + columns.features)
        self._kinds: dict[str, IdKind] = {}
        self._guessed: list[tuple[str, ...]] = []
        """Families whose files do not say what the ids are: taken for integers until a text is
        met that is none."""
        for family in self._families():
            kind = agreed(self._forms(family, SPLITS[:1]), "kind")
            agreed(self._forms(family, SPLITS), "kind")
            self._kinds |= dict.fromkeys(family, kind or "integer")
            if kind is None:
                self._guessed.append(family)
        self.id_features = tuple(
            IdFeature(
                name,
                table=columns.table_of(name),
                multi_valued=bool(agreed(self._forms([name], SPLITS), "multi_valued")),
                weighted=name in columns.weights,
            )
            for name in columns.ids
        )
        # Its checks, before the long work.
        Schema(
            tuple(Table(name, 1) for name in {feature.table for feature in self.id_features}),
            self.id_features,
            columns.dense,
        )

    def _families(self) -> list[tuple[str, ...]]:
        """Columns whose ids are of one kind: those that share a table; the group ids."""
        families: dict[str, tuple[str, ...]] = {}
        for name in self._columns.ids:
            table = self._columns.table_of(name)
            families[table] = (*families.get(table, ()), name)
        group = self._columns.group_id
        alone = [(group,)] if group is not None and group not in self._columns.ids else []
        return [*families.values(), *alone]

    def _forms(self, columns: Iterable[str], splits: Sequence[SplitName]) -> list[IdForm]:
        return [
            IdForm.of(table, column)
            for column in columns
            for split in splits
            for table in self._tables[split]
        ]

    @property
    def _features(self) -> FeatureColumns:
        return FeatureColumns(
            id_features=self.id_features,
            kinds=self._kinds,
            weights=self._columns.weights,
            dense=self._columns.dense,
        )

    def run(self, writer: PreparedWriter) -> None:
        """Reads everything and writes the data set."""
        counted = self._count()
        dense = counted.dense
        vocabularies = {
            table: counter.vocabulary(self._min_count)
            for table, counter in counted.counters.items()
        }
        for table, vocabulary in vocabularies.items():
            writer.write_vocabulary(table, vocabulary)
        for name, statistics in dense.items():
            writer.record_dense(name, mean=statistics.mean, std=statistics.std)
        encoder = RowEncoder(self._features, vocabularies, dense)
        bad_rows, unclicked = BadRows(self._max_bad_rows), {}
        for split in SPLITS:
            skipped, noted = _Skipped(bad_rows), len(bad_rows.examples)
            bad_before = bad_rows.count
            self._write(writer, encoder, split, skipped, counted.rows if split == "train" else None)
            unclicked[split] = skipped.unclicked_conversions
            if bad_rows.count > bad_before:
                examples = bad_rows.examples[noted:]
                writer.record_dropped(split, BAD_ROWS, bad_rows.count - bad_before, examples)
            if self._unclicked_conversions == "drop" and unclicked[split]:
                writer.record_dropped(split, UNCLICKED_CONVERSIONS, unclicked[split])
        writer.source["unclicked_conversion_rows"] = unclicked

    def _write(
        self,
        writer: PreparedWriter,
        encoder: RowEncoder,
        split: SplitName,
        skipped: _Skipped,
        total: int | None,
    ) -> None:
        types = impression_columns(writer.schema, writer.columns)
        with self._bar(f"encode {split}", total) as bar:
            for block in self._blocks(split, skipped.bad_rows):
                rows = self._usable(block, skipped)
                with block.table.named_in_errors():
                    columns = rows.scalars | encoder.encode_features(rows.features)
                arrays = [pa.array(columns[column.name], column.type) for column in types]
                writer.write_impressions(split, pa.table(arrays, schema=types))
                bar.update(len(block.rows))

    def _bar(self, description: str, total: int | None) -> tqdm:
        return progress_bar(description, total, "rows", disable=not self._progress)

    def _count(self) -> _Counted:
        with self._bar("count train", None) as bar:
            while (counted := self._try_to_count(bar)) is None:
                bar.reset()
        for family in self._guessed:
            for form in self._forms(family, ["test"]):
                kind = self._kinds[family[0]]
                if form.kind not in (None, kind):
                    raise DataError(
                        f"{form.where} where the training files hold {kind} ids; give both one type"
                    )
        return counted

    def _try_to_count(self, bar: tqdm) -> _Counted | None:
        """None where a text turned up among guessed integers; `_kinds` knows it then."""
        counters = {feature.table: IdCounter() for feature in self.id_features}
        moments = Moments(len(self._columns.dense))
        count, skipped = 0, _Skipped(BadRows(self._max_bad_rows))
        for block in self._blocks("train", skipped.bad_rows):
            if self._meets_text(block):
                return None
            features = self._usable(block, skipped).features
            for feature in self.id_features:
                ids = features.ids[feature.name]
                counters[feature.table].add(ids.flatten() if feature.multi_valued else ids)
            if self._columns.dense:
                moments.add(np.stack(list(features.dense.values()), axis=1))
            count += len(block.rows)
            bar.update(len(block.rows))
        dense = dict(zip(self._columns.dense, moments.statistics(), strict=True))
        for name, of in dense.items():
            if not (math.isfinite(of.mean) and math.isfinite(of.std)):
                raise DataError(
                    f"the dense column {name!r} holds values too far apart to be standardised; "
                    "take their logarithm or mend them"
                )
        return _Counted(counters, dense, count)

    def _meets_text(self, block: _Block) -> bool:
        if not block.table.is_text:
            return False
        met = False
        for family in self._guessed:
            if self._kinds[family[0]] == "integer" and not all(
                holds_integers(block.rows.column(name)) for name in family
            ):
                self._kinds |= dict.fromkeys(family, "text")
                met = True
        return met

    def _blocks(self, split: SplitName, bad_rows: BadRows) -> Iterator[_Block]:
        names = list(
            dict.fromkeys(name for _, name in self._columns.roles + self._columns.features)
        )
        before = 0
        for table in self._tables[split]:
            first_row = 0
            for rows in table.blocks(names, bad_rows):
                yield _Block(table, rows, first_row, before + first_row)
                first_row += len(rows)
            before += first_row

    def _usable(self, block: _Block, skipped: _Skipped) -> _Rows:
        """The rows of a block that become impressions."""
        with block.table.named_in_errors():
            scalars, features, faults = self._values(block)
        keep = self._without_faults(block, faults, skipped.bad_rows)
        click, conversion = scalars[CLICK], scalars[CONVERSION]
        unclicked = (conversion > click) & keep
        if unclicked.any():
            skipped.unclicked_conversions += int(unclicked.sum())
            if self._unclicked_conversions == "error":
                (place,) = block.table.places([block.first_row + int(unclicked.argmax())])
                raise DataError(
                    f"{place}: a conversion ({self._columns.conversion!r} is 1) without a click "
                    f"({self._columns.click!r} is 0); mend it, or leave such rows out or keep them "
                    "as unclicked with --unclicked-conversions drop|keep"
                )
            if self._unclicked_conversions == "drop":
                keep &= ~unclicked
            else:
                scalars[CONVERSION] = np.minimum(conversion, click)
        if keep.all():
            return _Rows(scalars, features)
        return _Rows(
            {name: values[keep] for name, values in scalars.items()}, features.filter(keep)
        )

    def _values(self, block: _Block) -> tuple[dict[str, np.ndarray], Features, list[Fault]]:
        columns, rows = self._columns, block.rows
        scalars: dict[str, np.ndarray] = {}
        faults: list[Fault] = []

        def keep(role: str, read: tuple[np.ndarray, Fault]) -> None:
            scalars[role] = read[0]
            faults.append(read[1])

        keep(CLICK, read_labels(rows.column(columns.click), columns.click))
        keep(CONVERSION, read_labels(rows.column(columns.conversion), columns.conversion))
        if columns.sample_id is None:
            scalars[SAMPLE_ID] = np.arange(block.number, block.number + len(rows))
        else:
            keep(SAMPLE_ID, read_integers(rows.column(columns.sample_id), columns.sample_id))
        for role, name in columns.optional.items():
            values = rows.column(name)
            if role == GROUP_ID:
                keep(role, read_groups(values, name, self._kinds[name]))
            elif role == TIMESTAMP:
                keep(role, read_integers(values, name))
            else:
                keep(role, read_probabilities(values, name))
        features, found = self._features.read(rows)
        return scalars, features, faults + found

    def _without_faults(
        self, block: _Block, faults: Sequence[Fault], bad_rows: BadRows
    ) -> np.ndarray:
        keep = np.ones(len(block.rows), np.bool_)
        for fault in faults:
            keep &= ~fault.rows
        bad = np.flatnonzero(~keep).tolist()
        allowed = bad_rows.skip(len(bad))
        too_many = bad[allowed : allowed + 1]
        named = too_many or bad[: EXAMPLES - len(bad_rows.examples)]
        places = block.table.places([block.first_row + row for row in named])
        for row, place in zip(named, places, strict=True):
            fault = next(fault for fault in faults if fault.rows[row])
            sentence = f"{place}, column {fault.column!r}: {fault.describe(row)}"
            if too_many:
                raise bad_rows.error(sentence)
            bad_rows.note(sentence)
        return keep
