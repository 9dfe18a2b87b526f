"""The second pass over rows in Spark tasks: encodes and writes them.

If the data set is stored by a key, Spark sorts the encoded rows by the hash of the key in between.
Tasks write row groups as they come, to files with random names. The driver lists the files of the
tasks that succeeded in dataset.json; files of repeated tasks are deleted.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared_form import (
    SPLITS,
    SplitName,
    impression_columns,
    vocabulary_file,
)
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.bad_rows import MAX_EXAMPLES, BadRows
from esmm_torchrec.data.sources.feature_columns import FeatureColumns
from esmm_torchrec.data.sources.spark_tasks import (
    Failure,
    Session,
    numbers_of,
    pieces_on,
    states_of,
)
from esmm_torchrec.data.sources.table_blocks import encode_block, noted
from esmm_torchrec.data.sources.table_rows import Skipped, TableRows
from esmm_torchrec.data.split_writer import SplitWriter
from esmm_torchrec.data.storage import Location
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError, EsmmTorchrecError
from esmm_torchrec.schema import Schema

pc: Any = pyarrow.compute

ROWS_PER_PART = 1 << 21
"""Approximate number of rows in a file of impressions."""
_KEY, _PLACE, _STATE = "__key", "__place", "__state"


@dataclass(frozen=True)
class _Encoding:
    """Data that a task needs to encode and write the rows of a split."""

    pieces: list[TableRows]
    split: SplitName
    features: FeatureColumns
    dense: Mapping[str, DenseTransform]
    schema: Schema
    columns: tuple[str, ...]
    hashed: Mapping[str, HashedIds]
    root: Location
    version: str
    """Version of the vocabularies, which a process keeps from one task to the next."""

    @property
    def types(self) -> pa.Schema:
        return impression_columns(self.schema, self.columns)


def write_table_on_spark(
    spark: Session,
    writer: PreparedWriter,
    rows: TableRows,
    encoder: RowEncoder,
    dense: Mapping[str, DenseTransform],
) -> None:
    """Encodes and writes all rows, as `table_blocks.write_table` does.

    Raises:
        DataError: a row cannot be used.
        OptionError: a file is not Parquet.
    """
    root = writer.root
    if root.local is not None:
        root = Location.of(root.local.absolute())  # tasks have other working directories
    version = uuid4().hex
    bad_rows = BadRows(rows.max_bad_rows)
    writer.source["unclicked_conversion_rows"] = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        encoding = _Encoding(
            rows.pieces(split),
            split,
            encoder.features,
            dense,
            writer.schema,
            tuple(writer.columns),
            encoder.hashed,
            root,
            version,
        )
        if not encoding.pieces:
            continue
        pieces = _write_split(spark, writer, encoding, total=rows.rows_read(split))
        with noted(writer, rows, split, bad_rows) as skipped:
            for piece in pieces:
                examples = piece.bad_rows.examples
                bad_rows.skip(
                    piece.bad_rows.count,
                    lambda row, examples=examples: examples[min(row, MAX_EXAMPLES - 1)],
                )
                skipped.unclicked_conversions += piece.unclicked_conversions
                skipped.missing_dense.update(piece.missing_dense)
    writer.source["train_rows"] = rows.rows_read("train")
    _remove_others(writer)


def _write_split(
    spark: Session, writer: PreparedWriter, encoding: _Encoding, *, total: int
) -> list[Skipped]:
    from pyspark.sql.pandas.types import (  # noqa: PLC0415  # pyright: ignore
        from_arrow_schema,
    )

    shared = spark.sparkContext.broadcast(encoding)

    def encode(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number in numbers_of(batches):
            yield from _encode_piece(shared.value, number)

    def write_part(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _write_part(shared.value, batches)

    frame = pieces_on(spark, len(encoding.pieces))
    frame = frame.mapInArrow(encode, from_arrow_schema(_row_columns(encoding.types)))
    if writer.key is not None:
        parts = max(spark.sparkContext.defaultParallelism, -(-total // ROWS_PER_PART))
        frame = frame.repartitionByRange(parts, _KEY).sortWithinPartitions(_KEY, _PLACE)
    replies = frame.mapInArrow(write_part, "place long, state binary").collect()
    shared.unpersist()
    states = states_of(replies)
    skipped: list[tuple[int, Skipped]] = []
    for written, of_pieces in states:
        writer.split_writer(encoding.split).add(written)
        skipped += of_pieces
    return [piece for _, piece in sorted(skipped, key=lambda numbered: numbered[0])]


def _row_columns(types: pa.Schema) -> pa.Schema:
    """Returns the columns of encoded rows within Spark. Column names in Spark ignore case, so the
    columns are numbered."""
    fields = [pa.field(f"c{place}", _nullable(field.type)) for place, field in enumerate(types)]
    fields += [(_KEY, pa.int64()), (_PLACE, pa.int64()), (_STATE, pa.binary())]
    return pa.schema(fields)


def _nullable(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


_encoders: dict[str, RowEncoder] = {}


def _encoder(encoding: _Encoding) -> RowEncoder:
    """Returns the encoder of this process, which reads the vocabularies once."""
    if encoding.version not in _encoders:
        _encoders.clear()
        vocabularies = dict(encoding.hashed) | {
            table.name: Vocabulary.read(encoding.root / vocabulary_file(table.name))
            for table in encoding.schema.tables
            if table.name not in encoding.hashed
        }
        _encoders[encoding.version] = RowEncoder(
            encoding.features, vocabularies, encoding.dense, tasks=encoding.schema.tasks
        )
    return _encoders[encoding.version]


def _encode_piece(encoding: _Encoding, number: int) -> Iterator[pa.RecordBatch]:
    piece, types = encoding.pieces[number], encoding.types
    columns = _row_columns(types)
    skipped = Skipped(BadRows(piece.max_bad_rows))
    place, lowest = number << 32, np.iinfo(np.int64).min
    state: Any = skipped
    try:
        for block in piece.blocks(encoding.split, skipped.bad_rows):
            encoded = encode_block(
                piece,
                block,
                _encoder(encoding),
                types,
                skipped=skipped,
            )
            rows = encoded.impressions
            key = np.zeros(len(rows), np.uint64) if encoded.key is None else encoded.key
            arrays = [
                *rows.columns,
                # int64 in the order of the unsigned hashes.
                pa.array((key ^ np.uint64(1 << 63)).view(np.int64)),
                pa.array(np.arange(place, place + len(rows))),
                pa.nulls(len(rows), pa.binary()),
            ]
            place += len(rows)
            yield from pa.table(arrays, names=columns.names).cast(columns).to_batches()
    except EsmmTorchrecError as error:
        state = Failure(str(error))
    row = dict.fromkeys(columns.names)
    row |= {_KEY: lowest, _PLACE: number, _STATE: pickle.dumps(state)}
    yield pa.RecordBatch.from_pylist([row], schema=columns)


def _write_part(encoding: _Encoding, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Writes the rows of a task; replies with the written files and what its pieces skipped."""
    from pyspark import TaskContext  # noqa: PLC0415  # pyright: ignore

    types = encoding.types
    writer = SplitWriter(
        encoding.root, encoding.split, encoding.schema, encoding.columns, random_names=True
    )
    of_pieces: list[tuple[int, Skipped]] = []
    state: Any
    try:
        for batch in batches:
            is_state = batch.column(_STATE).is_valid()
            for row in batch.filter(is_state).select([_PLACE, _STATE]).to_pylist():
                found = pickle.loads(row[_STATE])
                if isinstance(found, Failure):
                    raise DataError(found.sentence)
                of_pieces.append((row[_PLACE], found))
            rows = batch.filter(pc.invert(is_state))
            if len(rows):
                arrays = rows.columns[: len(types)]
                writer.write_impressions(pa.Table.from_arrays(arrays, names=types.names))
        state = (writer.finish(), of_pieces)
    except EsmmTorchrecError as error:
        writer.close()
        state = Failure(str(error))
    task = TaskContext.get()
    place = pa.array([0 if task is None else task.partitionId()], pa.int64())
    yield pa.RecordBatch.from_pydict({"place": place, "state": pa.array([pickle.dumps(state)])})


def _remove_others(writer: PreparedWriter) -> None:
    """Deletes the files of tasks that Spark repeated."""
    if writer.root.local is None:
        return  # such files do no harm, and listing a store is slow
    for split in SPLITS:
        named = {part.file for part in writer.split_writer(split).parts("impressions")}
        for file in (writer.root.local / split).glob("*.parquet"):
            if f"{split}/{file.name}" not in named:
                file.unlink()
