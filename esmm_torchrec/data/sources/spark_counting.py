"""The first pass over training rows in Spark tasks: counts ids and samples dense values.

Each task counts the ids of its rows. Spark sums the counts and sorts (table, falling count, id) by
ranges, so that no task sees all ids. The driver reads the ranges in order, 16 bytes per id, and so
assigns each id its row.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.dense import DenseFitter
from esmm_torchrec.data.sources.raw_ids import IdKind
from esmm_torchrec.data.sources.spark_tasks import (
    Failure,
    Session,
    numbers_of,
    pieces_on,
    states_of,
)
from esmm_torchrec.data.sources.table_blocks import Counted
from esmm_torchrec.data.sources.table_preparation import Preparation
from esmm_torchrec.data.sources.table_rows import TableRows
from esmm_torchrec.data.vocabulary import Vocabulary, check_number_of_ids
from esmm_torchrec.errors import EsmmTorchrecError

_IDS_PER_BATCH = 1 << 16


class _Met(NamedTuple):
    """Reply of a task that found lists or texts where none were expected."""

    lists: Mapping[str, bool | None]
    kinds: Mapping[str, IdKind]


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


def count_table(spark: Session, preparation: Preparation) -> Counted | None:
    """Counts the training rows; returns None if lists or texts appeared unexpectedly.

    In that case, `preparation` has been updated and the rows must be counted again.

    Raises:
        DataError: a row cannot be used.
        OptionError: a file is not Parquet.
    """
    from pyspark import StorageLevel  # noqa: PLC0415  # pyright: ignore
    from pyspark.sql import functions as F  # noqa: PLC0415  # pyright: ignore

    _ = preparation.rows.pieces("test")  # raises if Spark cannot read them
    pieces = preparation.rows.pieces("train")
    features = preparation.features
    kinds: dict[str, IdKind] = {
        feature.table: features.kinds[feature.name]
        for feature in features.id_features
        if feature.table not in preparation.hashed
    }
    tables = list(kinds)
    of_rows = preparation.rows.rows_read("train")
    shared = spark.sparkContext.broadcast((preparation, pieces, tables, of_rows))

    def count_pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        preparation, pieces, tables, of_rows = shared.value
        for number in numbers_of(batches):
            yield from _count_piece(preparation, pieces[number], number, tables, of_rows)

    counted = pieces_on(spark, len(pieces)).mapInArrow(count_pieces, _COUNTED)
    counted = counted.persist(StorageLevel.DISK_ONLY)
    ordered = None
    try:
        replies = counted.where("state is not null").select("place", "state").collect()
        states = states_of(replies)
        met = [state for state in states if isinstance(state, _Met)]
        news = [preparation.meet(*state) for state in met]
        if any(news):
            return None
        assert not met
        fitter = DenseFitter(len(features.dense))
        for state in states:
            fitter.merge(state)

        columns = ["tab", "rare", "rank", "number", "text"]
        ids = counted.where("state is null").groupBy("tab", "number", "text")
        ids = ids.agg(F.sum("n").alias("n"))
        ids = ids.withColumn("rare", F.col("n") < preparation.min_count)
        ids = ids.withColumn("rank", F.when(F.col("rare"), 0).otherwise(-F.col("n")))
        ranges = 2 * spark.sparkContext.defaultParallelism
        ordered = ids.repartitionByRange(ranges, *columns).sortWithinPartitions(*columns)
        ordered = ordered.mapInArrow(_pack, "tab int, rare boolean, ids binary")
        ordered = ordered.persist(StorageLevel.DISK_ONLY)
        ordered.count()  # computes all ranges at once; the iterator requests one at a time
        vocabularies = _vocabularies(ordered.toLocalIterator(), kinds, preparation.min_count)
    finally:
        counted.unpersist()
        if ordered is not None:
            ordered.unpersist()
        shared.unpersist()
    return Counted(vocabularies | preparation.hashed, fitter)


def _count_piece(
    preparation: Preparation, piece: TableRows, number: int, tables: list[str], of_rows: int
) -> Iterator[pa.RecordBatch]:
    try:
        counted = preparation.count_rows(piece, of_rows=of_rows)
    except EsmmTorchrecError as error:
        yield _state_row(number, Failure(str(error)))
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
    yield _state_row(number, counted.fitter)


def _state_row(place: int, state: Any) -> pa.RecordBatch:
    row = dict.fromkeys(_COUNTED_COLUMNS.names)
    row |= {"place": place, "state": pickle.dumps(state)}
    return pa.RecordBatch.from_pylist([row], schema=_COUNTED_COLUMNS)


def _pack(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Packs sorted ids of the same table and rarity into compressed rows."""
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
    """Builds the vocabularies from packed ids in their order."""
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
