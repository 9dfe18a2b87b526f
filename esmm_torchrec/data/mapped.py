"""A split laid out for random access: uncompressed, memory-mapped, one copy for all ranks.

Training reads rows in random order, which compressed Parquet does not support. The first reader of
a split writes this copy inside the data set's folder, under a lock; other processes on the machine
map the same pages. The copy can be deleted at any time.

Ids are stored row by row, not feature by feature, so that an impression is one short stretch of
memory:

    offsets  int64  (N + 1,)    start of each row's ids in `values`
    lengths  uint16 (N, F)      number of ids of each feature in the row
    values   int32  (total,)    ids, feature after feature
    weights  float32 (total,)   weight of each id, for weighted features

Shapes: N rows stored, B rows requested, F features, D dense features.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.data.array_files import ArrayWriter, Layout, is_intact
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import MAX_BAG_LENGTH, OPTIONAL_COLUMNS, RowKind, SplitName
from esmm_torchrec.errors import DataError
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import (
    COLLECTIONS,
    SAMPLE_ID,
    SHARED_ROW,
    CollectionName,
    IdFeature,
    Schema,
    weight_column,
)

LAYOUT_VERSION = 4
CACHE_FOLDER = ".mapped"

HistoryWeights = Literal["normalised", "raw"]
"""normalised: the weights of a multi-valued feature are divided by the sum of their absolute values
in each bag, so that pooling is a mean whatever the length of the history. raw: as stored.
Single-valued features keep their weight in both cases."""


class Bags(NamedTuple):
    """The ids of F features for B rows, feature by feature as in a KeyedJaggedTensor."""

    lengths: np.ndarray
    """Number of ids of each bag, int32 (F, B)."""
    values: np.ndarray
    """Ids, int32 (sum of lengths,)."""
    weights: np.ndarray | None
    """Weights of the ids, float32 (sum of lengths,); None if the features are unweighted."""

    def slices(self) -> Iterator[slice]:
        """Yields the slice of `values` that contains the ids of each feature."""
        end = 0
        for size in self.lengths.sum(axis=1, dtype=np.int64).tolist():
            start, end = end, end + size
            yield slice(start, end)


@dataclass(frozen=True)
class MappedBags:
    """The ids of some features in all stored rows of a split."""

    features: tuple[str, ...]
    shared: bool
    """Whether rows are shared rows rather than impressions."""
    offsets: np.ndarray
    lengths: np.ndarray
    values: np.ndarray
    weights: np.ndarray | None
    row_of: tuple[np.ndarray, ...] | None = None
    """Per feature: replacement of each id, int32 (rows of the table,); None: ids are unchanged."""

    def gather(self, rows: np.ndarray) -> Bags:
        """Returns the bags of the given rows, int (B,), in that order."""
        lengths = self.lengths[rows].astype(np.int64)
        starts = np.cumsum(lengths, axis=1)
        starts -= lengths
        starts += self.offsets[rows][:, None]
        lengths = lengths.T.ravel()
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        index = np.repeat(starts.T.ravel() - ends + lengths, lengths)
        index += np.arange(total)
        bags = Bags(
            lengths=lengths.astype(np.int32).reshape(len(self.features), len(rows)),
            values=self.values.take(index),
            weights=None if self.weights is None else self.weights.take(index),
        )
        if self.row_of is not None:
            for row_of, part in zip(self.row_of, bags.slices(), strict=True):
                bags.values[part] = row_of[bags.values[part]]
        return bags

    def ids_of(self, feature: str) -> np.ndarray:
        """Returns the stored id of a single-valued feature in each row, int (N,); −1 if missing."""
        place = self.features.index(feature)
        before = self.lengths[:, :place].sum(axis=1, dtype=np.int64)
        starts = self.offsets[: len(self.lengths)] + before
        ids = np.full(len(self.lengths), -1, np.int64)
        there = self.lengths[:, place] > 0
        ids[there] = self.values[starts[there]]
        return ids


@dataclass(frozen=True)
class MappedSplit:
    """All rows of one split, memory-mapped."""

    schema: Schema
    scalars: dict[str, np.ndarray]
    """Column → (N,): labels, sample_id, and the shared row and optional columns if present."""
    dense: np.ndarray
    """Dense features, float32 (N, D)."""
    bags: dict[CollectionName, tuple[MappedBags, ...]]
    """Collection → stores of its features; two if only some of the features are shared."""
    mean_values_per_bag: Mapping[str, float] = field(default_factory=dict)
    """Id feature → mean number of ids per stored row of the training split; empty if unknown."""

    @property
    def impressions(self) -> int:
        """Number of impressions."""
        return len(self.scalars[SAMPLE_ID])

    @property
    def stores(self) -> list[MappedBags]:
        """The stores of all collections."""
        return [store for stores in self.bags.values() for store in stores]

    @classmethod
    @checks_choices
    def open(
        cls,
        dataset: PreparedDataSet,
        split: SplitName,
        *,
        history_weights: HistoryWeights = "normalised",
    ) -> MappedSplit:
        """Maps a split. If its mapped copy is missing, stale or damaged, writes the copy first,
        which reads and checks every file of the split. The checksums of a copy are verified once,
        when it is first opened. A current copy can be mapped from a read-only location.

        Args:
            dataset: data set of the split.
            split: name of the split.
            history_weights: how to treat the weights of multi-valued features.

        Raises:
            DataError: a file was changed, a value is not valid, or the folder of the data set
                cannot be written.
        """
        cache = dataset.path / CACHE_FOLDER
        folder = cache / f"{split}-{history_weights}"
        if _is_current(folder, dataset.fingerprint, read=False):
            return cls.map(folder, dataset.schema, dataset.statistics.mean_values_per_bag)
        with _locked(folder):
            if not _is_current(folder, dataset.fingerprint, read=True):
                counts = dataset.splits[split]
                with progress_bar(
                    f"Laying out {split}", counts.impressions + counts.shared_rows, "rows"
                ) as bar:
                    cls.write(
                        folder,
                        schema=dataset.schema,
                        impressions=_shown(dataset.checked_rows(split, "impressions"), bar),
                        shared=_shown(dataset.checked_rows(split, "shared"), bar),
                        history_weights=history_weights,
                        fingerprint=dataset.fingerprint,
                    )
                if not _is_current(folder, dataset.fingerprint, read=True):
                    raise DataError(
                        f"{folder} does not hold what was just written to it; check its disk"
                    )
        return cls.map(folder, dataset.schema, dataset.statistics.mean_values_per_bag)

    @classmethod
    @checks_choices
    def write(
        cls,
        folder: Path,
        *,
        schema: Schema,
        impressions: Iterable[pa.RecordBatch],
        shared: Iterable[pa.RecordBatch] = (),
        written_out: bool = False,
        history_weights: HistoryWeights = "normalised",
        fingerprint: str = "",
    ) -> MappedSplit:
        """Lays out blocks of impressions in bounded memory, and maps them.

        Args:
            folder: folder to create; an existing one is replaced.
            schema: schema of the columns.
            impressions: columns as in the impression files of a prepared data set.
            shared: columns as in its shared files.
            written_out: impressions contain the shared features, too; there are no shared rows.
            history_weights: how to treat the weights of multi-valued features.
            fingerprint: fingerprint of the data that the impressions come from.

        Raises:
            DataError: an id is out of range, a bag is too long, or the folder cannot be written.
                Nothing is left of the folder in that case.
        """
        partial = folder.with_name(folder.name + ".partial")
        for stale in (partial, folder):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            with _writing(folder):
                partial.mkdir()
            layout = _Layout(
                partial,
                schema,
                _stores(schema, written_out=written_out),
                normalised=history_weights == "normalised",
            )
            layout.append("impressions", impressions)
            layout.append("shared", shared)
            written = Layout(LAYOUT_VERSION, fingerprint, layout.writer.arrays)
            with _writing(folder):
                written.write(partial)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls.map(folder, schema)

    @classmethod
    def map(
        cls, folder: Path, schema: Schema, mean_values_per_bag: Mapping[str, float] | None = None
    ) -> MappedSplit:
        """Maps a folder that `write` created."""
        layout = Layout.read(folder)

        def array(name: str) -> np.ndarray:
            return layout.map(folder, name)

        bags: dict[CollectionName, tuple[MappedBags, ...]] = {}
        for store in _stores(schema, written_out=SHARED_ROW not in layout.arrays):
            mapped = MappedBags(
                features=tuple(feature.name for feature in store.features),
                shared=store.shared,
                offsets=array(f"{store.name}.offsets"),
                lengths=array(f"{store.name}.lengths"),
                values=array(f"{store.name}.values"),
                weights=array(f"{store.name}.weights") if store.weighted else None,
            )
            bags[store.collection] = (*bags.get(store.collection, ()), mapped)
        return cls(
            schema=schema,
            scalars={name: array(name) for name in _scalars(schema) if name in layout.arrays},
            dense=array("dense"),
            bags=bags,
            mean_values_per_bag=mean_values_per_bag or {},
        )


class _Store(NamedTuple):
    """Features stored together in one set of arrays."""

    collection: CollectionName
    shared: bool
    features: tuple[IdFeature, ...]

    @property
    def name(self) -> str:
        return f"{self.collection}-of-{'shared-rows' if self.shared else 'impressions'}"

    @property
    def weighted(self) -> bool:
        return COLLECTIONS[self.collection].weighted


def _scalars(schema: Schema) -> dict[str, type]:
    """Returns column → NumPy type for the columns that are not features."""
    columns = dict.fromkeys(schema.tasks.labels, np.int8)
    columns |= {SAMPLE_ID: np.int64, SHARED_ROW: np.int32}
    return columns | {name: kind.to_pandas_dtype() for name, kind in OPTIONAL_COLUMNS.items()}


def _stores(schema: Schema, *, written_out: bool) -> list[_Store]:
    """Returns the non-empty stores of a schema."""
    return [
        _Store(collection, shared, of_kind)
        for collection, features in schema.collections.items()
        for shared in (False, True)
        if (
            of_kind := tuple(
                feature for feature in features if (feature.shared and not written_out) == shared
            )
        )
    ]


def _is_current(folder: Path, fingerprint: str, *, read: bool) -> bool:
    """Returns whether an intact mapped copy of these data exists; otherwise it is written again."""
    try:
        layout = Layout.read(folder)
    except (OSError, ValueError):
        return False
    same = (layout.version, layout.fingerprint) == (LAYOUT_VERSION, fingerprint)
    return same and is_intact(folder, layout, read=read)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing or checking a mapped copy. An existing copy may be on a
    read-only file system, where no lock can be created; it is then used without one."""
    path = folder.with_name(f"{folder.name}.lock")
    try:
        with _writing(folder.parent):
            folder.parent.mkdir(exist_ok=True)
            lock = path.open("w")
    except DataError:
        if not folder.exists():
            raise
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises DataError with the folder of a mapped copy if it cannot be written."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        remedy = "make it writable or copy the data set to a writable location"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room or copy the data set to a larger disk"
        raise DataError(
            f"cannot write {folder} ({reason}), an uncompressed copy for random access; {remedy}"
        ) from error


def _shown(blocks: Iterable[pa.RecordBatch], bar: tqdm) -> Iterator[pa.RecordBatch]:
    for block in blocks:
        yield block
        bar.update(block.num_rows)


class _Layout:
    """Appends blocks of rows to the arrays of one folder."""

    def __init__(
        self, folder: Path, schema: Schema, stores: Sequence[_Store], *, normalised: bool
    ) -> None:
        self.folder = folder
        self.schema = schema
        self.stores = stores
        self.normalised = normalised
        self.writer = ArrayWriter(folder)

    def _extend(self, name: str, values: np.ndarray) -> None:
        with _writing(self.folder.with_suffix("")):
            self.writer.extend(name, values)

    def append(self, kind: RowKind, blocks: Iterable[pa.RecordBatch]) -> None:
        """Appends all rows of one kind."""
        stores = [store for store in self.stores if store.shared == (kind == "shared")]
        written = dict.fromkeys((store.name for store in stores), 0)
        for name in written:
            self._extend(f"{name}.offsets", np.zeros(1, np.int64))
        for block in blocks:
            columns = dict(zip(block.schema.names, block.columns, strict=True))
            if kind == "impressions":
                self._append_scalars(columns, block.num_rows)
            for store in stores:
                bags = self._bags(columns, store.features, weighted=store.weighted)
                ends = np.cumsum(bags.lengths.sum(axis=0, dtype=np.int64)) + written[store.name]
                self._extend(f"{store.name}.offsets", ends)
                self._extend(f"{store.name}.lengths", bags.lengths.T.astype(np.uint16))
                self._extend(f"{store.name}.values", bags.values)
                if bags.weights is not None:
                    self._extend(f"{store.name}.weights", bags.weights)
                written[store.name] += len(bags.values)

    def _append_scalars(self, columns: dict[str, pa.Array], num_rows: int) -> None:
        for name, dtype in _scalars(self.schema).items():
            if name in columns:
                self._extend(name, columns[name].to_numpy().astype(dtype, copy=False))
        dense = np.empty((num_rows, len(self.schema.dense_features)), np.float32)
        for place, name in enumerate(self.schema.dense_features):
            dense[:, place] = columns[name].to_numpy()
        self._extend("dense", dense)

    def _bags(
        self, columns: dict[str, pa.Array], features: Sequence[IdFeature], *, weighted: bool
    ) -> Bags:
        """Returns the features of a block with ids row by row; `lengths` has shape (F, rows)."""
        parts = [self._feature(columns, feature) for feature in features]
        lengths = np.stack([part.lengths[0] for part in parts])
        by_row = lengths.T.ravel().astype(np.int64)
        starts = (np.cumsum(by_row) - by_row).reshape(lengths.shape[::-1]).T
        values = np.empty(int(by_row.sum()), np.int32)
        weights = np.empty(len(values), np.float32) if weighted else None
        for part, start in zip(parts, starts, strict=True):
            own = part.lengths[0].astype(np.int64)
            into = np.repeat(start - np.cumsum(own) + own, own) + np.arange(len(part.values))
            values[into] = part.values
            if weights is not None:
                weights[into] = 1.0 if part.weights is None else part.weights
        return Bags(lengths=lengths, values=values, weights=weights)

    def _feature(self, columns: dict[str, pa.Array], feature: IdFeature) -> Bags:
        ids, weights = columns[feature.name], None
        if feature.weighted:
            weights = columns[weight_column(feature.name)]
        if feature.multi_valued:
            lengths = ids.value_lengths().to_numpy().astype(np.int32)
            values = ids.flatten().to_numpy()
            weights = None if weights is None else weights.flatten().to_numpy()
            if weights is not None and self.normalised:
                weights = _normalised(weights, lengths)
        else:
            lengths = ids.is_valid().to_numpy(zero_copy_only=False).astype(np.int32)
            values = ids.drop_null().to_numpy()
            weights = None if weights is None else weights.drop_null().to_numpy()
        rows = self.schema.table(feature.table).num_embeddings
        if len(values) and (values.min() < 0 or values.max() >= rows):
            raise DataError(
                f"column {feature.name!r} holds an id outside 0..{rows - 1}, the rows of its "
                "table; prepare the data set again"
            )
        if len(lengths) and lengths.max() > MAX_BAG_LENGTH:
            raise DataError(
                f"column {feature.name!r} holds a bag of {lengths.max()} ids; cut it to at most "
                f"{MAX_BAG_LENGTH}"
            )
        return Bags(lengths=lengths[None], values=values, weights=weights)


def _normalised(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Divides weights by the sum of their absolute values in the bag; bags of zeros stay zero."""
    bag = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.bincount(bag, weights=np.abs(weights), minlength=len(lengths))
    return (weights / np.where(sums > 0, sums, 1.0)[bag]).astype(np.float32)
