"""The forms of the columns of a table, which become known while its training rows are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.counting import count_raw_ids
from esmm_torchrec.data.dense import DenseFitter
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared_form import SPLITS, SplitName
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.column_forms import IdForm, agreed
from esmm_torchrec.data.sources.feature_columns import CONSTANT, FeatureColumns
from esmm_torchrec.data.sources.raw_ids import IdKind, split_lists
from esmm_torchrec.data.sources.raw_values import holds_integers, holds_text, one_array
from esmm_torchrec.data.sources.table_blocks import TrainingCount
from esmm_torchrec.data.sources.table_columns import TableColumns
from esmm_torchrec.data.sources.table_rows import RawBlock, Skipped, TableRows
from esmm_torchrec.data.vocabulary import IdCounter
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import IdFeature, Schema, Table


class Preparation:
    """Settings for reading the rows of a table, as far as is known; `count_rows` finds the rest.

    Args:
        rows: rows of both splits.
        columns: roles of their columns.
        list_separator: separator of the values in lists that are written as text.
        min_count: minimum count of an id in the vocabularies.
        features: how features are read, if already known; requires `group_kinds`.
        group_kinds: kind of group ids, by raw column.
    """

    def __init__(
        self,
        rows: TableRows,
        columns: TableColumns,
        *,
        list_separator: str | None,
        min_count: int,
        features: FeatureColumns | None = None,
        group_kinds: Mapping[str, IdKind] | None = None,
    ) -> None:
        self.rows = rows
        self._columns = columns
        self._list_separator = list_separator
        self.min_count = min_count
        self._settled = features
        self._lists: dict[str, bool | None] = {}
        """Whether each raw id column has lists; None while no list has been found."""
        self._kinds = rows.kinds
        self._kinds |= group_kinds or {}
        self._guessed: list[tuple[str, ...]] = []
        """Groups of raw columns whose ids count as integers until a text is found."""
        if features is None:
            self._guess()

    def _guess(self) -> None:
        """Takes the forms of columns from their types, as far as these define them."""
        columns = self._columns
        self._lists |= {
            name: agreed(
                ((form.multi_valued, form.where) for form in self._forms([name], SPLITS)), "type"
            )
            for name in dict.fromkeys(columns.ids)
        }
        for family in self._families():
            kind = self._agreed_kind(family, SPLITS[:1])
            self._agreed_kind(family, SPLITS)
            self._kinds |= dict.fromkeys(family, kind or "integer")
            if kind is None:
                self._guessed.append(family)
        # Run the checks of Schema before the long work.
        features = self.features
        Schema(
            tuple(Table(name, 1) for name in {of.table for of in features.id_features}),
            features.id_features,
            features.dense,
            columns.tasks,
        )

    def _agreed_kind(self, family: Sequence[str], splits: Sequence[SplitName]) -> IdKind | None:
        forms = self._forms(family, splits)
        kinds: list[tuple[IdKind | None, str]] = [(form.kind, form.where) for form in forms]
        return agreed(kinds, "type")

    def _families(self) -> list[tuple[str, ...]]:
        """Returns groups of raw columns with ids of the same kind: those of a table, and each group
        id."""
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
        """Kind of group ids, as far as is known, by raw column of `group_id` and `key`."""
        columns = (self._columns.group_id, self._columns.key)
        return {name: self._kinds[name] for name in columns if name is not None}

    @property
    def features(self) -> FeatureColumns:
        """Raw columns of the features and how to read them, as far as is known."""
        if self._settled is not None:
            return self._settled
        columns = self._columns
        id_features: list[IdFeature] = []
        kinds: dict[str, IdKind] = {}
        weights: dict[str, str] = {}
        texts: list[str] = []
        for name, column in columns.id_features.items():
            table, is_list = columns.table_of(name), False
            if name in columns.time_parts:
                kinds[name] = "integer"
            else:
                kinds[name] = self._kinds[column]
                is_list = column in columns.texts or bool(self._lists.get(column))
                if column in columns.texts:
                    texts.append(name)
                if column in columns.weights:
                    weights[name] = columns.weights[column]
            id_features.append(
                IdFeature(name, table, multi_valued=is_list, weighted=name in weights)
            )
        if not id_features:
            id_features, kinds = [IdFeature(CONSTANT, CONSTANT)], {CONSTANT: "integer"}
        renamed = columns.id_features | columns.dense_features
        return FeatureColumns(
            id_features=tuple(id_features),
            kinds=kinds,
            weights=weights,
            dense=tuple(columns.dense_features),
            columns={name: column for name, column in renamed.items() if name != column},
            texts=tuple(texts),
            time_parts=columns.time_parts,
            list_separator=self._list_separator,
        )

    def check_test_kinds(self) -> None:
        """Raises DataError if the test files have ids of another kind than the training rows."""
        for family in self._guessed:
            for form in self._forms(family, ["test"]):
                kind = self._kinds[family[0]]
                if form.kind not in (None, kind):
                    raise DataError(
                        f"{form.where}, but the training files have {kind} ids; "
                        "use the same type for both"
                    )

    @property
    def hashed(self) -> dict[str, HashedIds]:
        """Hash by table, for the tables with hashed ids."""
        hashed, kinds = self._columns.hashed, self.features.kinds
        return {
            feature.table: HashedIds(kinds[feature.name], hashed[column])
            for feature in self.features.id_features
            if (column := self.features.column_of(feature.name)) in hashed
            and feature.name not in self.features.time_parts
        }

    def count_rows(
        self,
        rows: TableRows,
        on_rows: Callable[[int], object] = lambda _: None,
        *,
        of_rows: int | None = None,
    ) -> TrainingCount | None:
        """Counts training rows; returns None if a list or text appears unexpectedly, and updates
        `met`.

        Args:
            rows: all training rows, or a piece of them.
            on_rows: called with the number of rows in each block read.
            of_rows: approximate number of rows in all pieces.
        """
        columns, hashed = self.features, self.hashed
        counters = {
            feature.table: IdCounter(columns.kinds[feature.name])
            for feature in columns.id_features
            if feature.table not in hashed
        }
        fitter = DenseFitter(len(columns.dense), of_rows)
        skipped = Skipped(BadRows(rows.max_bad_rows))
        for block in rows.blocks("train", skipped.bad_rows):
            if self._meets_lists(block) or self._meets_text(block):
                return None
            usable = rows.usable(block, columns, skipped)
            with block.table.named_in_errors():
                count_raw_ids(counters, columns.id_features, usable.features.ids)
            if columns.dense:
                values = np.stack(list(usable.features.dense.values()), axis=1)
                fitter.add(values, usable.numbers)
            on_rows(len(block.rows))
        return TrainingCount(counters, fitter)

    @property
    def met(self) -> tuple[dict[str, bool | None], dict[str, IdKind]]:
        """Whether raw id columns have lists, and the kind of their ids, as far as is known."""
        return self._lists, self._kinds

    def meet(self, lists: Mapping[str, bool | None], kinds: Mapping[str, IdKind]) -> bool:
        """Adds lists and texts that were found in a piece; returns whether any of them is new."""
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
