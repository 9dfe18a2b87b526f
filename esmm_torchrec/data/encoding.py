"""Raw rows → prepared columns, in the same way for training and for scoring.

`FeatureColumns` reads the features of a block; a `RowEncoder` turns ids into rows of their tables
and transforms dense values. `data.sources.tabular` uses both to prepare a data set. To encode new
rows, a trained model needs only dataset.json and the vocabularies: `copy_preprocessing` copies them
to a folder, from which `RowEncoder.load` creates an encoder.

Shapes: n rows of a block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.dense import TOO_FAR, DenseTransform
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import (
    DESCRIPTION,
    impression_columns,
    schema_of,
)
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.delimited_text import TextFormat
from esmm_torchrec.data.sources.feature_columns import FeatureColumns, Features, RawReading
from esmm_torchrec.data.sources.raw_tables import Frame, RawRows, RawTable, open_raw_tables
from esmm_torchrec.data.sources.raw_values import Fault, read_integers
from esmm_torchrec.data.storage import Location
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.durable import publish
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import SAMPLE_ID, Schema, missing_column, weight_column
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


@dataclass(frozen=True)
class RowsToEncode:
    """A block of n raw rows after reading."""

    features: Features
    sample_ids: np.ndarray
    """Sample ids, int64 (n,), from the same raw column as in the data set; if the rows lack that
    column, row numbers from 0."""
    bad: np.ndarray
    """Rows that cannot be used, bool (n,); their values in `features` are arbitrary."""
    kept: pa.Table
    """The columns passed as `keep`, unchanged."""


class RowEncoder:
    """Encodes raw rows in the same way as the rows of a prepared data set.

    Example::

        encoder = RowEncoder.load(prepared)  # or a folder from copy_preprocessing
        for read in encoder.read_blocks("new_rows.parquet"):
            impressions = encoder.encode_rows(read)

    Args:
        features: raw columns of the features.
        vocabularies: table → vocabulary or hashed ids.
        dense: dense column → transform.
        sample_id: raw column of sample ids, if the data set was made from one.
        text_format: format of text files.
        tasks: the chain. New rows need no labels.
    """

    def __init__(
        self,
        features: FeatureColumns,
        vocabularies: Mapping[str, Vocabulary | HashedIds],
        dense: Mapping[str, DenseTransform],
        *,
        sample_id: str | None = None,
        text_format: TextFormat | None = None,
        tasks: TaskChain = DEFAULT_TASKS,
    ) -> None:
        self.features = features
        self.vocabularies = vocabularies
        self.dense = dense
        self.sample_id = sample_id
        """Raw column of sample ids; None: rows are numbered."""
        self.text_format = text_format
        self._tasks = tasks

    @classmethod
    def load(cls, folder: Path | str) -> RowEncoder:
        """Loads the encoder of a prepared data set, or of a folder from `copy_preprocessing`.

        New rows must have the raw columns that the data set was made from. For a data set made
        from the Ali-CCP files, a column has the name of its field ("101", "109_14") and contains
        int64, or lists of int64 if the feature is multi-valued; weights are in a separate column
        (`schema.weight_column`).

        Raises:
            DataError: dataset.json or a vocabulary is missing, or a vocabulary was changed.
        """
        data_set = PreparedDataSet.open(folder, data_files=False)
        schema, source = data_set.schema, data_set.source
        if source.get("kind") == "table":
            reading = RawReading.from_dict(source["reading"])
        else:
            kinds, features = data_set.statistics.tables, schema.id_features
            columns = FeatureColumns(
                id_features=tuple(replace(feature, shared=False) for feature in features),
                kinds={feature.name: kinds[feature.table].kind for feature in features},
                weights={of.name: weight_column(of.name) for of in features if of.weighted},
                dense=tuple(data_set.statistics.dense),
            )
            reading = RawReading(columns, SAMPLE_ID, TextFormat())
        return cls(
            reading.features,
            {table.name: data_set.row_of_ids(table.name) for table in schema.tables},
            data_set.statistics.dense,
            sample_id=reading.sample_id,
            text_format=reading.text_format,
            tasks=schema.tasks,
        )

    @property
    def hashed(self) -> dict[str, HashedIds]:
        """Table → hashed ids, for the tables whose ids are hashed."""
        ids = self.vocabularies.items()
        return {table: rows for table, rows in ids if isinstance(rows, HashedIds)}

    @property
    def schema(self) -> Schema:
        """Schema of the rows from `encode_rows`: shared features are repeated in every row."""
        features = self.features
        rows = {name: of.num_embeddings for name, of in self.vocabularies.items()}
        return schema_of(
            features.id_features, rows, {n: self.dense[n] for n in features.dense}, self._tasks
        )

    def read_blocks(
        self,
        rows: Frame | Sequence[Frame],
        *,
        keep: Sequence[str] = (),
        bad_rows: BadRows | None = None,
    ) -> Iterator[RowsToEncode]:
        """Reads raw rows block by block, in bounded memory.

        Args:
            rows: one or several files or tables in memory, in the forms `prepare_table` accepts.
            keep: further columns to return unchanged in `RowsToEncode.kept`.
            bad_rows: counts the rows that cannot be scored; None allows none.

        Raises:
            DataError: a column is missing or of another kind than when the data was prepared, or
                a row cannot be used and may not be skipped. The message names the file, the column
                and the line or row.
        """
        tables = open_raw_tables(rows, what="input", text_format=self.text_format)
        for table in tables:
            table.check_columns(self.features.roles)
            table.check_columns(("a column to keep", name) for name in keep)
        first_row = 0
        for table in tables:
            sample_id = self.sample_id if self.sample_id in table.column_names else None
            columns = dict.fromkeys((*(name for _, name in self.features.roles), *keep))
            if sample_id is not None:
                columns[sample_id] = None
            for block in table.blocks(list(columns), bad_rows):
                yield self._read_block(block, table, first_row, sample_id, keep, bad_rows)
                first_row += len(block.table)

    def _read_block(
        self,
        block: RawRows,
        table: RawTable,
        first_row: int,
        sample_id: str | None,
        keep: Sequence[str],
        bad_rows: BadRows | None,
    ) -> RowsToEncode:
        sample_ids = np.arange(first_row, first_row + len(block.table))
        with table.named_in_errors():
            features, faults = self.features.read(block.table)
            if sample_id is not None:
                sample_ids, fault = read_integers(block.table.column(sample_id), sample_id)
                faults.append(fault)
        for name, values in features.dense.items():
            # Infinite values are reported already, and clipping could make them finite.
            too_far = np.abs(values) > self.dense[name].reach
            faults.append(
                Fault(self.features.column_of(name), too_far, lambda _: f"the value is {TOO_FAR}")
            )
            features.dense[name] = np.where(np.isinf(values) | too_far, np.nan, values)
        is_good = (bad_rows or BadRows(0, by_option=False)).leave_out(
            faults, lambda row: table.place(int(block.numbers[row]))
        )
        return RowsToEncode(features, sample_ids, ~is_good, block.table.select(list(keep)))

    def encode_rows(self, read: RowsToEncode) -> pa.Table:
        """Encodes a block as impressions of a prepared data set, without optional columns.

        Ids never seen in training get row 0. All labels are 0, because labels of new rows are not
        read. Rows that cannot be scored have arbitrary values.
        """
        no_labels = [np.zeros(len(read.bad), np.int8)] * len(self._tasks)
        encoded = self.encode_features(read.features)
        columns = [*no_labels, read.sample_ids, *encoded.values()]
        return pa.table(columns, schema=impression_columns(self.schema))

    def encode_features(self, features: Features) -> dict[str, pa.Array]:
        """Encodes the feature columns of the impressions, in stored order: ids as int32 rows of
        their tables, weights unchanged, dense values as float32 after their transform."""
        columns: dict[str, pa.Array] = {}
        for feature in self.features.id_features:
            ids = features.ids[feature.name]
            columns[feature.name] = encode_ids(ids, self.vocabularies[feature.table])
            if feature.weighted:
                columns[weight_column(feature.name)] = features.weights[feature.name]
        for name, values in features.dense.items():
            transform = self.dense[name]
            encoded = {name: transform.encode(values, name)}
            if transform.has_indicator:
                encoded[missing_column(name)] = np.isnan(values).astype(np.float32)
            columns |= {column: pa.array(of_column) for column, of_column in encoded.items()}
        return columns


def encode_ids(raw_ids: pa.Array, vocabulary: Vocabulary | HashedIds) -> pa.Array:
    """Replaces raw ids, scalars or lists, with int32 rows of a table; nulls stay null."""
    if pa.types.is_list(raw_ids.type):
        offsets = raw_ids.offsets.to_numpy()
        rows = pa.array(vocabulary.encode(raw_ids.flatten()))
        return pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), rows)
    missing = raw_ids.is_null().to_numpy(zero_copy_only=False) if raw_ids.null_count else None
    return pa.array(vocabulary.encode(raw_ids), mask=missing)


def copy_preprocessing(data_set: Location | Path | str, destination: Path | str) -> None:
    """Copies the files that `RowEncoder.load` needs, dataset.json and the vocabularies, to a new
    folder. Does nothing if `destination` contains the same copy already.

    Raises:
        DataError: `data_set` is not a prepared data set, `destination` has other content, or a
            vocabulary of either was changed after it was written.
    """
    source, destination = Location.of(data_set), Path(destination)
    opened = PreparedDataSet.open(data_set, data_files=False)
    vocabularies = [opened.vocabulary_file(table) for table in opened.vocabulary_tables]
    if destination.exists():
        copy = PreparedDataSet.open(destination, data_files=False)
        if copy.fingerprint != opened.fingerprint:
            raise DataError(
                f"{destination} belongs to another data set than {source}; choose another folder"
            )
        for name in vocabularies:
            copy.check_checksum(name)
        return
    for name in vocabularies:
        opened.check_checksum(name)
    partial = destination.with_name(f"{destination.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    for name in (*vocabularies, DESCRIPTION):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes((source / name).read_bytes())
    publish(partial, destination)
