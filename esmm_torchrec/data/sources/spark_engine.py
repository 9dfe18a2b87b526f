"""`prepare_table` with the tasks of Spark: the same blocks, on as many machines as there are.

Spark divides, groups and sorts; everything else is the code that one machine runs, in
`DataFrame.mapInArrow`. A task reads row groups of the raw Parquet files itself.

1. Each task counts the ids of its rows and samples their dense values. Spark sums the counts and
   sorts (table, falling count, id) by ranges, so that no task sees all ids; the driver reads the
   ranges in order, 16 bytes an id, which gives every id its row.
2. Each task encodes its rows. If the data set is stored by a key, Spark sorts them by its hash.
   Tasks write row groups as they come to files with random names. The driver names the files of
   the tasks that succeeded in dataset.json; a file of a task that was repeated is deleted.

Nothing here needs torch, and pyspark is imported only where a session is made.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute

from esmm_torchrec.data.dense import DenseFitter, DenseTransform
from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared_form import (
    SPLITS,
    SplitName,
    impression_columns,
    vocabulary_file,
)
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.feature_columns import FeatureColumns
from esmm_torchrec.data.sources.raw_ids import IdKind
from esmm_torchrec.data.sources.raw_tables import BadRows
from esmm_torchrec.data.sources.table_blocks import Counted, encode_block, record_skipped
from esmm_torchrec.data.sources.table_rows import Skipped, TableRows
from esmm_torchrec.data.split_writer import SplitWriter
from esmm_torchrec.data.storage import Location
from esmm_torchrec.data.vocabulary import Vocabulary, check_number_of_ids
from esmm_torchrec.errors import DataError, EsmmTorchrecError, OptionError
from esmm_torchrec.schema import Schema

pc: Any = pyarrow.compute

if TYPE_CHECKING:
    from esmm_torchrec.data.sources.tabular import Preparation

Session = Any
"""A pyspark.sql.SparkSession; pyspark need not be installed."""

MAX_TASKS = 20_000
ROWS_PER_PART = 1 << 21
"""Rows of a file of impressions, about."""
_IDS_PER_BATCH = 1 << 16
_KEY, _PLACE, _STATE = "__key", "__place", "__state"


def session() -> Session:
    """The session of this process: that of spark-submit, or one of all cores of this machine.

    Raises:
        OptionError: pyspark is not installed.
    """
    try:
        from pyspark.sql import SparkSession  # noqa: PLC0415  # pyright: ignore
    except ModuleNotFoundError:
        raise OptionError(
            "--engine spark needs pyspark and Java 17; pip install 'esmm_torchrec[spark]'"
        ) from None
    # Of pandas, nothing is used there.
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit chooses the Python of a cluster
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    return SparkSession.builder.appName("esmm_torchrec").getOrCreate()


class _Failure(NamedTuple):
    """An error of the user's in a task: raised by the driver, which knows which came first."""

    sentence: str


@dataclass
class _PieceCount:
    """What a task says of the training rows that it counted, beside the ids."""

    fitter: DenseFitter
    rows: int


class _Met(NamedTuple):
    """Lists and texts were met where none were expected."""

    lists: Mapping[str, bool | None]
    kinds: Mapping[str, IdKind]


@dataclass
class _PieceSkipped:
    """What a task says of the rows that it encoded, beside the impressions."""

    skipped: Skipped
    missing_dense: dict[str, int]


def _pieces_on(spark: Session, number: int) -> Any:
    """A row for each piece, contiguous ones in one task."""
    return spark.range(0, number, 1, max(1, min(number, MAX_TASKS)))


def _numbers(batches: Iterable[pa.RecordBatch]) -> Iterator[int]:
    for batch in batches:
        yield from batch.column(0).to_pylist()


def _states(rows: Iterable[Any]) -> list[Any]:
    """What the tasks say, in the order of their rows.

    Raises:
        DataError: one of them failed.
    """
    states = [pickle.loads(state) for _, state in sorted((row[0], bytes(row[1])) for row in rows)]
    for state in states:
        if isinstance(state, _Failure):
            raise DataError(state.sentence)
    return states


_COUNTED = "place long, tab int, number long, text string, n long, state binary"
_COUNTED_COLUMNS = pa.schema(
    [
        ("place", pa.int64()),
        ("tab", pa.int32()),
        ("number", pa.int64()),
        ("text", pa.string()),
        ("n", pa.int64()),
        ("state", pa.binary()),
    ]
)


def count(spark: Session, preparation: Preparation) -> Counted | None:
    """What the training rows give, or None if they are not what they seemed, which `preparation`
    knows then.

    Raises:
        DataError: a row cannot be used.
        OptionError: a file is not Parquet.
    """
    from pyspark import StorageLevel  # noqa: PLC0415  # pyright: ignore
    from pyspark.sql import functions as F  # noqa: PLC0415

    _ = preparation.rows.pieces("test")  # can they be read?
    pieces = preparation.rows.pieces("train")
    features = preparation.features
    kinds: dict[str, IdKind] = {
        feature.table: features.kinds[feature.name]
        for feature in features.id_features
        if feature.table not in preparation.hashed
    }
    tables = list(kinds)
    shared = spark.sparkContext.broadcast((preparation, pieces, tables))

    def count_pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        preparation, pieces, tables = shared.value
        for number in _numbers(batches):
            yield from _count_piece(preparation, pieces[number], number, tables)

    counted = _pieces_on(spark, len(pieces)).mapInArrow(count_pieces, _COUNTED)
    counted = counted.persist(StorageLevel.DISK_ONLY)
    ordered = None
    try:
        told = counted.where("state is not null").select("place", "state").collect()
        states = _states(told)
        met = [state for state in states if isinstance(state, _Met)]
        news = [preparation.meet(*state) for state in met]
        if any(news):
            return None
        assert not met
        fitter = DenseFitter(len(features.dense))
        for state in states:
            fitter.merge(state.fitter)

        columns = ["tab", "rare", "rank", "number", "text"]
        ids = counted.where("state is null").groupBy("tab", "number", "text")
        ids = ids.agg(F.sum("n").alias("n"))
        ids = ids.withColumn("rare", F.col("n") < preparation.min_count)
        ids = ids.withColumn("rank", F.when(F.col("rare"), 0).otherwise(-F.col("n")))
        ranges = 2 * spark.sparkContext.defaultParallelism
        ordered = ids.repartitionByRange(ranges, *columns).sortWithinPartitions(*columns)
        ordered = ordered.mapInArrow(_pack, "tab int, rare boolean, ids binary")
        ordered = ordered.persist(StorageLevel.DISK_ONLY)
        ordered.count()  # all ranges at once; the iterator asks for one after the other
        vocabularies = _vocabularies(ordered.toLocalIterator(), kinds, preparation.min_count)
    finally:
        counted.unpersist()
        if ordered is not None:
            ordered.unpersist()
        shared.unpersist()
    rows = sum(state.rows for state in states)
    return Counted(vocabularies | preparation.hashed, preparation.fit(fitter), rows)


def _count_piece(
    preparation: Preparation, piece: TableRows, number: int, tables: list[str]
) -> Iterator[pa.RecordBatch]:
    try:
        counted = preparation.count_rows(piece)
    except EsmmTorchrecError as error:
        yield _state_row(number, _Failure(str(error)))
        return
    if counted is None:
        yield _state_row(number, _Met(*preparation.met))
        return
    for table, name in enumerate(tables):
        ids, counts = counted.counters[name].counts()
        column = "number" if pa.types.is_int64(ids.type) else "text"
        columns = {
            "place": pa.array(np.full(len(ids), number)),
            "tab": pa.array(np.full(len(ids), table, np.int32)),
            "number": pa.nulls(len(ids), pa.int64()),
            "text": pa.nulls(len(ids), pa.string()),
            "n": pa.array(counts, pa.int64()),
            "state": pa.nulls(len(ids), pa.binary()),
        } | {column: ids}
        arrow = pa.table(columns).cast(_COUNTED_COLUMNS)
        yield from arrow.to_batches(max_chunksize=_IDS_PER_BATCH)
    yield _state_row(number, _PieceCount(counted.fitter, counted.rows))


def _state_row(place: int, state: Any) -> pa.RecordBatch:
    row = dict.fromkeys(_COUNTED_COLUMNS.names)
    row |= {"place": place, "state": pickle.dumps(state)}
    return pa.RecordBatch.from_pylist([row], schema=_COUNTED_COLUMNS)


def _pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Ids that are sorted by table and rarity, packed by these."""
    for batch in batches:
        table, rare = batch.column("tab").to_numpy(), batch.column("rare").to_numpy(False)
        group = 2 * table.astype(np.int64) + rare
        starts = np.flatnonzero(np.diff(group, prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], len(group)], strict=True):
            part = batch.slice(start, end - start).select(["number", "text", "n"])
            sink = pa.BufferOutputStream()
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_stream(sink, part.schema, options=options) as stream:
                stream.write_batch(part)
            yield pa.RecordBatch.from_pydict(
                {
                    "tab": pa.array([table[start]], pa.int32()),
                    "rare": pa.array([bool(rare[start])]),
                    "ids": pa.array([sink.getvalue().to_pybytes()], pa.binary()),
                }
            )


def _vocabularies(
    rows: Iterable[Any], kinds: Mapping[str, IdKind], min_count: int
) -> dict[str, Vocabulary]:
    """The vocabularies out of packed ids in their order."""
    tables: list[dict[bool, list[pa.Table]]] = [{False: [], True: []} for _ in kinds]
    for table, rare, ids in rows:
        with pa.ipc.open_stream(bytes(ids)) as stream:
            tables[table][rare].append(stream.read_all())
    vocabularies: dict[str, Vocabulary] = {}
    for (name, kind), parts in zip(kinds.items(), tables, strict=True):
        is_integer = kind == "integer"
        column, of_kind = ("number", pa.int64()) if is_integer else ("text", pa.large_string())
        empty = pa.table({"raw_id": pa.array([], of_kind), "count": pa.array([], pa.int64())})
        kept, rare = (
            pa.concat_tables(
                [
                    empty,
                    *(pa.table({"raw_id": p[column].cast(of_kind), "count": p["n"]}) for p in of),
                ]
            ).combine_chunks()
            for of in (parts[False], parts[True])
        )
        check_number_of_ids(len(kept), min_count)
        vocabularies[name] = Vocabulary(
            kept["raw_id"].combine_chunks(), kept["count"].to_numpy(), rare=rare
        )
    return vocabularies


@dataclass(frozen=True)
class _Encoding:
    """What a task needs to encode and write the rows of a split."""

    pieces: list[TableRows]
    split: SplitName
    features: FeatureColumns
    dense: Mapping[str, DenseTransform]
    schema: Schema
    columns: tuple[str, ...]
    group_kinds: Mapping[str, IdKind]
    hashed: Mapping[str, HashedIds]
    root: Location
    version: str
    """Of the vocabularies, which a process keeps from one task to the next."""

    @property
    def types(self) -> pa.Schema:
        return impression_columns(self.schema, self.columns)


def write(
    spark: Session,
    writer: PreparedWriter,
    rows: TableRows,
    encoder: RowEncoder,
    dense: Mapping[str, DenseTransform],
    *,
    group_kinds: Mapping[str, IdKind],
) -> None:
    """Encodes and writes all rows, as `table_blocks.write_table` does.

    Raises:
        DataError: a row cannot be used.
        OptionError: a file is not Parquet.
    """
    root = writer.root
    if root.local is not None:
        root = Location.of(root.local.absolute())  # tasks run in folders of their own
    version = uuid4().hex
    bad_rows, unclicked = BadRows(rows.max_bad_rows), dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        encoding = _Encoding(
            rows.pieces(split),
            split,
            encoder.features,
            dense,
            writer.schema,
            tuple(writer.columns),
            group_kinds,
            encoder.hashed,
            root,
            version,
        )
        if not encoding.pieces:
            continue
        skipped = _write_split(spark, writer, encoding, total=rows.rows_read(split))
        of_split, noted = Skipped(bad_rows), len(bad_rows.examples)
        before = bad_rows.count
        for piece in skipped:
            found = piece.skipped.bad_rows
            if found.count > bad_rows.limit - bad_rows.count:
                raise bad_rows.error(found.examples[0])
            bad_rows.skip(found.count)
            for sentence in found.examples:
                bad_rows.note(sentence)
            of_split.unclicked_conversions += piece.skipped.unclicked_conversions
            for name, missing in piece.missing_dense.items():
                writer.record_missing_dense(split, name, missing)
        unclicked[split] = of_split.unclicked_conversions
        examples = bad_rows.examples[noted:]
        record_skipped(writer, rows, split, of_split, bad_rows.count - before, examples)
    writer.source["unclicked_conversion_rows"] = unclicked
    writer.source["train_rows"] = rows.rows_read("train")
    _remove_others(writer)


def _write_split(
    spark: Session, writer: PreparedWriter, encoding: _Encoding, *, total: int
) -> list[_PieceSkipped]:
    from pyspark.sql.pandas.types import (  # noqa: PLC0415  # pyright: ignore
        from_arrow_schema,
    )

    shared = spark.sparkContext.broadcast(encoding)

    def encode(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number in _numbers(batches):
            yield from _encode_piece(shared.value, number)

    def write_part(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _write_part(shared.value, batches)

    frame = _pieces_on(spark, len(encoding.pieces))
    frame = frame.mapInArrow(encode, from_arrow_schema(_row_columns(encoding.types)))
    if writer.key is not None:
        parts = max(spark.sparkContext.defaultParallelism, -(-total // ROWS_PER_PART))
        frame = frame.repartitionByRange(parts, _KEY).sortWithinPartitions(_KEY, _PLACE)
    told = frame.mapInArrow(write_part, "place long, state binary").collect()
    shared.unpersist()
    states = _states(told)
    skipped: list[tuple[int, _PieceSkipped]] = []
    for written, of_pieces in states:
        writer.split_writer(encoding.split).add(written)
        skipped += of_pieces
    return [piece for _, piece in sorted(skipped, key=lambda numbered: numbered[0])]


def _row_columns(types: pa.Schema) -> pa.Schema:
    """Columns of encoded rows on their way through Spark. Its names ignore case, so they are
    numbered."""
    fields = [pa.field(f"c{place}", _nullable(field.type)) for place, field in enumerate(types)]
    fields += [(_KEY, pa.int64()), (_PLACE, pa.int64()), (_STATE, pa.binary())]
    return pa.schema(fields)


def _nullable(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


_encoders: dict[str, RowEncoder] = {}


def _encoder(encoding: _Encoding) -> RowEncoder:
    """The encoder of this process, which reads the vocabularies once."""
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
    skipped, missing = Skipped(BadRows(piece.max_bad_rows)), dict.fromkeys(encoding.dense, 0)
    place, lowest = number << 32, np.iinfo(np.int64).min
    state: Any = _PieceSkipped(skipped, missing)
    try:
        for block in piece.blocks(encoding.split, skipped.bad_rows):
            encoded = encode_block(
                piece,
                block,
                _encoder(encoding),
                types,
                group_kinds=encoding.group_kinds,
                skipped=skipped,
            )
            rows = encoded.impressions
            for name, values in encoded.missing_dense.items():
                missing[name] += values
            key = np.zeros(len(rows), np.uint64) if encoded.key is None else encoded.key
            arrays = [
                *rows.columns,
                # In the order of the unsigned hashes.
                pa.array((key ^ np.uint64(1 << 63)).view(np.int64)),
                pa.array(np.arange(place, place + len(rows))),
                pa.nulls(len(rows), pa.binary()),
            ]
            place += len(rows)
            yield from pa.table(arrays, names=columns.names).cast(columns).to_batches()
    except EsmmTorchrecError as error:
        state = _Failure(str(error))
    row = dict.fromkeys(columns.names)
    row |= {_KEY: lowest, _PLACE: number, _STATE: pickle.dumps(state)}
    yield pa.RecordBatch.from_pylist([row], schema=columns)


def _write_part(encoding: _Encoding, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Writes the rows of a task, and tells of them and of what came with them."""
    from pyspark import TaskContext  # noqa: PLC0415  # pyright: ignore

    types = encoding.types
    writer = SplitWriter(
        encoding.root, encoding.split, encoding.schema, encoding.columns, random_names=True
    )
    of_pieces: list[tuple[int, _PieceSkipped]] = []
    state: Any
    try:
        for batch in batches:
            is_state = batch.column(_STATE).is_valid()
            for row in batch.filter(is_state).select([_PLACE, _STATE]).to_pylist():
                found = pickle.loads(row[_STATE])
                if isinstance(found, _Failure):
                    raise DataError(found.sentence)
                of_pieces.append((row[_PLACE], found))
            rows = batch.filter(pc.invert(is_state))
            if len(rows):
                arrays = rows.columns[: len(types)]
                writer.write_impressions(pa.Table.from_arrays(arrays, names=types.names))
        state = (writer.finish(), of_pieces)
    except EsmmTorchrecError as error:
        writer.close()
        state = _Failure(str(error))
    task = TaskContext.get()
    place = pa.array([0 if task is None else task.partitionId()], pa.int64())
    yield pa.RecordBatch.from_pydict({"place": place, "state": pa.array([pickle.dumps(state)])})


def _remove_others(writer: PreparedWriter) -> None:
    """Deletes files that tasks wrote which Spark then repeated."""
    if writer.root.local is None:
        return  # they are of no consequence, and a store is slow to list
    for split in SPLITS:
        named = {part.file for part in writer.split_writer(split).parts("impressions")}
        for file in (writer.root.local / split).glob("*.parquet"):
            if f"{split}/{file.name}" not in named:
                file.unlink()
