"""Rows of raw tables that become impressions: divided into splits, read and checked."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.hashing import splitmix64
from esmm_torchrec.data.prepared_form import SPLITS, SplitName
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.column_forms import agreed, time_form
from esmm_torchrec.data.sources.delimited_text import TextFormat
from esmm_torchrec.data.sources.feature_columns import FeatureColumns, Features
from esmm_torchrec.data.sources.raw_ids import IdKind, read_groups
from esmm_torchrec.data.sources.raw_tables import Frame, RawTable, open_raw_tables
from esmm_torchrec.data.sources.raw_times import read_times
from esmm_torchrec.data.sources.raw_values import (
    Fault,
    LabelReader,
    read_integers,
    read_probabilities,
    read_weights,
    row_hashes,
)
from esmm_torchrec.data.sources.row_split import RowSplit
from esmm_torchrec.data.sources.table_columns import TableColumns
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import (
    CONVERSION_TIME,
    GROUP_ID,
    NEVER,
    SAMPLE_ID,
    TIMESTAMP,
    WEIGHT,
)

UnclickedConversions = Literal["error", "drop", "keep"]

KEY = "key"
"""Name of the hash by which impressions are stored."""


class RawBlock(NamedTuple):
    """Raw rows of one file and one split."""

    table: RawTable
    rows: pa.Table
    places: np.ndarray
    """int64, numbers of the rows in their file, as `RawTable.place` takes them."""
    numbers: np.ndarray
    """int64, numbers of the rows over all files of the split."""
    split: SplitName


class Impressions(NamedTuple):
    """Impressions without a fault."""

    numbers: np.ndarray
    """int64, numbers of their rows, as in `RawBlock`."""

    scalars: dict[str, np.ndarray]
    """Labels, sample_id and optional columns, by their prepared names; also KEY, uint64 (n,), if
    there is a key."""
    features: Features


@dataclass
class Skipped:
    """Rows that one reading of a split left out, and values that it found missing."""

    bad_rows: BadRows
    unclicked_conversions: int = 0
    missing_dense: Counter[str] = field(default_factory=Counter)
    """Number of impressions without a value, by dense feature."""


class TableRows:
    """The rows of raw tables.

    Args:
        train: training rows: files or rows in memory, one or several.
        test: test rows in the same form; None if there are none or `split` selects them.
        text_format: format of text files.
        split: rule that divides the training rows into both splits.
        columns: roles of the columns.
        unclicked_conversions: treatment of rows with a task but without the one before it.
        max_bad_rows: maximum number of rows to skip.
        first_train_row: number of the first training row.

    Raises:
        DataError: a file cannot be opened, a column is missing, or a column has times in two forms.
    """

    def __init__(
        self,
        train: Frame | Sequence[Frame],
        test: Frame | Sequence[Frame] | None,
        *,
        text_format: TextFormat,
        split: RowSplit | None = None,
        columns: TableColumns,
        unclicked_conversions: UnclickedConversions,
        max_bad_rows: int,
        first_train_row: int = 0,
    ) -> None:
        tables = open_raw_tables(train, what="train", text_format=text_format)
        tests = [] if split is None else tables
        if test is not None:
            tests = open_raw_tables(test, what="test", text_format=text_format)
        self.tables: dict[SplitName, list[RawTable]] = {"train": tables, "test": tests}
        self.kinds: dict[str, IdKind] = {}
        """Kind of ids, by raw column, as far as `Preparation` knows it."""
        self._split = split
        self._columns = columns
        self.unclicked_conversions: UnclickedConversions = unclicked_conversions
        self.max_bad_rows = max_bad_rows
        self._first_row: dict[SplitName, int] = {"train": first_train_row, "test": 0}
        self._rows_read: dict[SplitName, int] = {}
        self.rows_given: dict[SplitName, int] = {}
        """Number of rows that `blocks` yielded in its last complete iteration, by split."""
        self._labels = {label: LabelReader(column) for label, column in columns.labels.items()}
        self._last_train_time: int | None = None
        wanted = columns.roles + columns.features
        if split is not None and split.column is not None:
            wanted = [*wanted, ("`split`", split.column)]
        self._raw_columns = list(dict.fromkeys(name for _, name in wanted))
        every = list(dict.fromkeys([*tables, *tests]))
        for table in every:
            table.check_columns(wanted)
        times = [columns.timestamp, columns.conversion_time]
        if split is not None and split.kind == "time":
            times.append(split.column)
        # Integers stay unchanged but other times become seconds, so a column must not have both.
        for name in dict.fromkeys(name for name in times if name is not None):
            agreed((time_form(table, name) for table in every), "form")

    @property
    def files(self) -> dict[str, Any]:
        """Entries about the files in the `source` of a data set."""
        splits = SPLITS if self._split is None else ("train",)
        opened = [table for name in splits for table in self.tables[name]]
        trained_on = {table.absolute for table in self.tables["train"]} - {None}
        return {
            "files": {name: [table.file_name for table in self.tables[name]] for name in splits},
            "text_forms": sorted({table.form for table in opened if table.form}),
            "files_of_both_splits": []
            if self._split is not None
            else [t.file_name for t in self.tables["test"] if t.absolute in trained_on],
        }

    def find_last_train_time(self) -> None:
        """Reads the times by which rows are split, if they are split by time."""
        if self._split is None or self._split.kind != "time":
            return
        assert self._split.column is not None
        columns = [self._split.column]
        self._last_train_time = self._split.last_train_time(
            (table, rows)
            for table in self.tables["train"]
            for rows in table.blocks(columns, BadRows(self.max_bad_rows))
        )

    def blocks(self, split: SplitName, bad_rows: BadRows) -> Iterator[RawBlock]:
        """Yields the rows of a split in order, block by block.

        Raises:
            DataError: a file cannot be read, or the limit of bad rows is exceeded.
        """
        before, given = self._first_row[split], 0
        for table in self.tables[split]:
            # Records with a wrong number of fields are in neither split but count as training rows.
            ignored = BadRows(self.max_bad_rows)
            counts_all = self._split is None or split == "train"
            for rows in table.blocks(self._raw_columns, bad_rows if counts_all else ignored):
                numbers = np.arange(before, before + len(rows.table))
                before += len(rows.table)
                block = RawBlock(table, rows.table, rows.numbers, numbers, split)
                if self._split is not None:
                    block = self._half(block, self._split)
                given += len(block.rows)
                yield block
        self._rows_read[split], self.rows_given[split] = before, given

    def pieces(self, split: SplitName) -> list[TableRows]:
        """Returns the rows of a split in parts that processes can read independently, in order.

        Raises:
            OptionError: a table cannot be divided.
        """
        pieces: list[TableRows] = []
        first = self._first_row[split]
        for table in self.tables[split]:
            for part, rows in table.pieces():
                piece = copy.copy(self)
                piece.tables = {split: [part]}
                piece._first_row = {split: first}
                piece._rows_read = {}
                pieces.append(piece)
                first += rows
        self._rows_read[split] = first
        return pieces

    def rows_read(self, split: SplitName) -> int:
        """Returns the number after that of the last row, once `blocks` or `pieces` has finished."""
        return self._rows_read[split]

    def _half(self, block: RawBlock, rule: RowSplit) -> RawBlock:
        with block.table.named_in_errors():
            is_train = rule.is_train(block.rows, block.numbers, self._last_train_time)
        mask = is_train if block.split == "train" else ~is_train
        return block._replace(
            rows=block.rows.filter(pa.array(mask)),
            places=block.places[mask],
            numbers=block.numbers[mask],
        )

    def usable(self, block: RawBlock, features: FeatureColumns, skipped: Skipped) -> Impressions:
        """Returns the rows of a block that become impressions; `skipped` counts the others."""
        with block.table.named_in_errors():
            scalars, values, faults = self._values(block, features)
        keep = skipped.bad_rows.leave_out(
            faults, lambda row: block.table.place(int(block.places[row]))
        )
        out_of_order = self._out_of_order(block, scalars, keep)
        if out_of_order.any():
            skipped.unclicked_conversions += int(out_of_order.sum())
            if self.unclicked_conversions == "drop":
                keep &= ~out_of_order
            else:
                for task, before in self._columns.tasks.links:
                    scalars[task.label] = np.minimum(scalars[task.label], scalars[before.label])
                if CONVERSION_TIME in scalars:
                    converted = scalars[self._columns.tasks[-1].label] == 1
                    scalars[CONVERSION_TIME] = np.where(converted, scalars[CONVERSION_TIME], NEVER)
        if keep.all():
            return Impressions(block.numbers, scalars, values)
        return Impressions(
            block.numbers[keep],
            {name: values[keep] for name, values in scalars.items()},
            values.filter(keep),
        )

    def _out_of_order(
        self, block: RawBlock, scalars: Mapping[str, np.ndarray], keep: np.ndarray
    ) -> np.ndarray:
        """Returns rows of `keep` in which a task happened without the one before it, bool (n,).

        Raises:
            DataError: there is such a row, and `unclicked_conversions` is "error".
        """
        found = np.zeros_like(keep)
        for task, before in self._columns.tasks.links:
            wrong = (scalars[task.label] > scalars[before.label]) & keep
            if wrong.any() and self.unclicked_conversions == "error":
                place = block.table.place(int(block.places[wrong.argmax()]))
                columns = self._columns.labels
                raise DataError(
                    f"{place}: {task.name} without {before.name} ({columns[task.label]!r} is 1, "
                    f"{columns[before.label]!r} is 0); fix it, or leave such rows out or keep them "
                    f"without the {task.name} with `unclicked_conversions` drop or keep"
                )
            found |= wrong
        return found

    def _read_labels(self, block: RawBlock) -> tuple[dict[str, np.ndarray], list[Fault]]:
        labels: dict[str, np.ndarray] = {}
        faults: list[Fault] = []
        faulty: dict[str, np.ndarray] = {}
        for task in self._columns.tasks:
            label, before = task.label, self._columns.tasks.given(task)
            if label not in self._labels:
                labels[label] = np.zeros(len(block.rows), np.int8)
                continue
            column = block.rows.column(self._columns.labels[label])
            labels[label], fault, missing = self._labels[label].read(column)
            if before is not None:  # the label may be missing if the task before did not happen
                missing &= (labels[before.label] == 0) & ~faulty[before.label]
                fault = replace(fault, rows=fault.rows & ~missing)
            faults.append(fault)
            faulty[label] = fault.rows
        return labels, faults

    def _values(
        self, block: RawBlock, features: FeatureColumns
    ) -> tuple[dict[str, np.ndarray], Features, list[Fault]]:
        columns, rows = self._columns, block.rows
        scalars, faults = self._read_labels(block)
        if self._split is not None:
            faults += self._split.faults(rows)
        if columns.sample_id is None:
            scalars[SAMPLE_ID] = block.numbers
        else:
            scalars[SAMPLE_ID], fault = read_integers(
                rows.column(columns.sample_id), columns.sample_id
            )
            faults.append(fault)
        for role, name in columns.optional.items():
            values = rows.column(name)
            if role == GROUP_ID:
                scalars[role], fault = _groups(block, name, self.kinds[name])
            elif role == TIMESTAMP:
                scalars[role], _, fault = read_times(values, name, may_be_missing=False)
            elif role == CONVERSION_TIME:
                scalars[role], fault = self._conversion_times(scalars, values, name)
            elif role == WEIGHT:
                scalars[role], fault = read_weights(values, name)
            else:
                scalars[role], fault = read_probabilities(values, name)
            faults.append(fault)
        if columns.key is not None:
            groups, fault = _groups(block, columns.key, self.kinds[columns.key])
            scalars[KEY] = splitmix64(groups.view(np.uint64))
            if columns.key != columns.group_id:
                faults.append(fault)
        values, found = features.read(rows)
        return scalars, values, faults + found

    def _conversion_times(
        self, scalars: Mapping[str, np.ndarray], column: pa.ChunkedArray, name: str
    ) -> tuple[np.ndarray, Fault]:
        """Reads times, int64 (n,), NEVER without a conversion; a time before the impression is a
        fault."""
        times, there, fault = read_times(column, name)
        converted = scalars[self._columns.tasks[-1].label] == 1
        wrong = (there != converted) | (there & (times < scalars[TIMESTAMP]))

        def describe(row: int) -> str:
            if fault.rows[row]:
                return fault.describe(row)
            if there[row] and converted[row]:
                return "the conversion is before the impression"
            return "there is a time and no conversion" if there[row] else "the time is missing"

        times = np.where(converted, times, NEVER)
        return times, Fault(name, fault.rows | wrong, describe)


def _groups(block: RawBlock, name: str, kind: IdKind) -> tuple[np.ndarray, Fault]:
    """Returns the groups of rows by a column, int64 (n,), and the fault of unusable values. A row
    without a value is a group of its own, with different groups in training and in test."""
    groups, fault, missing = read_groups(block.rows.column(name), name, kind)
    # Large numbers, because the hash of a small one may be small, like an id.
    alone = row_hashes((1 << 62) + 2 * block.numbers + (block.split == "test"))
    return np.where(missing, alone.view(np.int64), groups), fault
