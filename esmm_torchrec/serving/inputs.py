"""Raw feature values → the tensors that a program takes.

A request is a few impressions in Python values, and every microsecond counts: ids are looked up in
a dict per table. What such a look-up cannot decide (a text where the ids are integers, a weight
that is missing) is left to `data.sources.feature_columns`, which reads the columns of files, so
that one value has one row on every road.

Shapes: B impressions, L ids of a multi-valued feature in all of them, D raw dense columns.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from esmm_torchrec.data.dense import TOO_FAR
from esmm_torchrec.data.encoding import TOO_LONG, RowEncoder, RowsToEncode
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared_form import MAX_BAG_LENGTH
from esmm_torchrec.data.sources.feature_columns import CONSTANT, FeatureColumns, Features
from esmm_torchrec.data.sources.raw_ids import is_list
from esmm_torchrec.data.sources.raw_values import NULL_TEXTS, Fault
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import UNKNOWN_ROW, IdFeature
from esmm_torchrec.serving.scored_rows import Counts
from esmm_torchrec.serving.signature import DENSE, IMPRESSIONS, MISSING_ROW, Signature

MAX_DICT_IDS = 1 << 22
"""Ids of a table that are kept in a dict, too (about 100 bytes each), once there is a request.
Those of a larger table are searched, and hashed ids are hashed by Arrow, which costs a request some
100 µs."""

MAX_TEXTS = 4096
"""Texts of an Arrow column that are looked up one by one; more of them are looked up together."""

_NOT_THERE = -2
_NUMBERS = frozenset({float, int, bool, type(None)})

Request = Mapping[str, Any]
"""Values by raw column; see `InputEncoder`."""


class Inputs(NamedTuple):
    """The tensors of B impressions."""

    arrays: dict[str, np.ndarray]
    """By the names of a `Signature`."""
    size: int
    """B."""

    def tensors(self, signature: Signature, device: torch.device) -> list[torch.Tensor]:
        """In the order of the signature."""
        arrays = [self.arrays[one.name] for one in signature.inputs]
        # Arrow's memory is read-only, which torch does not know.
        tensors = [torch.from_numpy(one if one.flags.writeable else one.copy()) for one in arrays]
        return tensors if device.type == "cpu" else [one.to(device) for one in tensors]

    def batches(self, signature: Signature, size: int) -> Iterator[Inputs]:
        """The impressions in order, at most `size` at a time."""
        if self.size <= size:
            yield self
            return
        ends = {
            f"ids of {name.removesuffix('.lengths')}": np.r_[0, np.cumsum(values)]
            for name, values in self.arrays.items()
            if name.endswith(".lengths")
        }
        for start in range(0, self.size, size):
            stop = min(start + size, self.size)
            arrays = {}
            for one in signature.inputs:
                first, last = start, stop
                if one.dims[0] != IMPRESSIONS:
                    first, last = ends[str(one.dims[0])][[start, stop]]
                arrays[one.name] = self.arrays[one.name][first:last]
            yield Inputs(arrays, stop - start)

    @staticmethod
    def concatenate(parts: Sequence[Inputs]) -> Inputs:
        """The impressions of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        arrays = {
            name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays
        }
        return Inputs(arrays, sum(part.size for part in parts))


class Form(NamedTuple):
    """What a raw column holds."""

    kind: Literal["integer", "text", "number"]
    is_list: bool


class _Bags(NamedTuple):
    """One id feature of B impressions, as a signature has it."""

    rows: np.ndarray
    """int64 (B,) with MISSING_ROW for none; (L,) if there are lengths."""
    lengths: np.ndarray | None = None
    weights: np.ndarray | None = None


class _Lookup:
    """The rows of a table's ids, one by one."""

    def __init__(self, vocabulary: Vocabulary | HashedIds) -> None:
        self.vocabulary = vocabulary
        is_list = isinstance(vocabulary, Vocabulary)
        self.is_small = is_list and vocabulary.num_embeddings <= MAX_DICT_IDS
        self._type = int if vocabulary.kind == "integer" else str
        self._plain = frozenset({self._type, type(None)})

    @cached_property
    def _rows(self) -> dict[Any, int]:
        assert isinstance(self.vocabulary, Vocabulary)
        ids = self.vocabulary.raw_ids.to_pylist()
        rows: dict[Any, int] = dict(zip(ids, range(1, len(ids) + 1), strict=True))
        if self._type is str:
            rows |= dict.fromkeys(NULL_TEXTS, MISSING_ROW)
        rows[None] = MISSING_ROW
        return rows

    def of(self, values: Sequence[Any]) -> np.ndarray | None:
        """int64 rows, MISSING_ROW for a missing id; None if the values must be read with care."""
        if not self._plain.issuperset(map(type, values)):
            return None
        get = self._rows.get
        rows = np.array([get(value, _NOT_THERE) for value in values], np.int64)
        unknown = rows == _NOT_THERE
        if unknown.any():
            if self._type is int and any(
                not -(2**63) <= value < 2**63 for value in values if value
            ):
                return None
            rows[unknown] = UNKNOWN_ROW
        return rows


@dataclass(frozen=True)
class _Column:
    """How an id feature is read from a request."""

    feature: IdFeature
    raw: str
    weights: str | None
    lookup: _Lookup
    carefully: FeatureColumns
    """Reads this feature alone."""
    is_plain: bool
    """Whether the raw values are ids, and not texts or times."""


class InputEncoder:
    """Encodes raw values for a program. Several threads can use it at a time.

    A request holds raw values by the names of the raw columns: {"user": 7, "tags": [3, 4]} is one
    impression, {"user": [7, 8], "tags": [[3], []]} are two, {"user": 7, "item": [1, 2, 3]} are
    three of one user. Several values are a list, a NumPy array or an Arrow array.

    A feature that a request leaves out is missing: for ids this is the zero vector, for a dense
    value what the training data say (`DenseTransform.missing`, and the indicator if there is one).

    Args:
        encoder: of the training data.
    """

    def __init__(self, encoder: RowEncoder) -> None:
        features = encoder.features
        self._features = features
        lookups = {
            feature.table: _Lookup(encoder.vocabulary_of(feature))
            for feature in features.id_features
        }
        self._columns = [
            _Column(
                feature=feature,
                raw=features.column_of(feature.name),
                weights=features.weights.get(feature.name),
                lookup=lookups[feature.table],
                carefully=replace(features, id_features=(feature,), dense=()),
                is_plain=feature.name not in features.texts | features.time_parts.keys(),
            )
            for feature in features.id_features
        ]
        self._reach = np.array([encoder.transform_of(name).reach for name in features.dense])
        self._can_be_too_far = bool(np.isfinite(self._reach).any())
        self.raw_columns = tuple(dict.fromkeys(name for _, name in features.roles))
        self._known = {*self.raw_columns, encoder.sample_id}
        bags = [column for column in self._columns if column.feature.multi_valued]
        self._texts = {column.raw for column in bags if column.feature.name in features.texts}
        self._lists = {name for column in bags for name in (column.raw, column.weights)}
        self._lists -= self._texts
        self.signature = Signature.of(encoder.schema, dense=features.dense)

    @classmethod
    def load(cls, folder: Path | str) -> InputEncoder:
        """The encoder of a folder that `data.encoding.copy_preprocessing` made.

        Raises:
            DataError: a file of it is missing or another one.
        """
        return cls(RowEncoder.load(folder))

    def form_of(self, raw: str) -> Form:
        """What a raw column holds, of those that have one form."""
        if raw in {self._features.column_of(name) for name in self._features.dense}:
            return Form("number", False)
        column = next(one for one in self._columns if raw in (one.raw, one.weights))
        is_list = raw in self._lists
        if raw == column.weights:
            return Form("number", is_list)
        return Form(
            self._features.kinds[column.feature.name] if column.is_plain else "text", is_list
        )

    def encode(self, request: Request) -> Inputs:
        """The tensors of a request.

        Raises:
            DataError: a name is not a raw column, columns differ in length, or a value cannot be
                used; names the column, and the row if there are several.
        """
        size, columns = self._aligned(request)
        arrays: dict[str, np.ndarray] = {}
        for column in self._columns:
            _put(arrays, column.feature, self._of_request(column, columns, size))
        if self._features.dense:
            arrays[DENSE] = self._dense(columns, size)
        return Inputs(arrays, size)

    def encode_rows(self, read: RowsToEncode) -> tuple[Inputs, dict[str, Counts]]:
        """The tensors of raw rows that were read, and what the good ones among them hold, by id
        feature. The inputs of bad rows are arbitrary, but can be scored."""
        size, good = len(read.bad), ~read.bad
        arrays: dict[str, np.ndarray] = {}
        counts = {}
        for column in self._columns:
            bags = _bags_of(column, read.features)
            if bags.lengths is None:
                is_there = good & (bags.rows != MISSING_ROW)
                rows, missing = bags.rows[is_there], good & ~is_there
            else:
                rows, missing = bags.rows[np.repeat(good, bags.lengths)], good & (bags.lengths == 0)
            unknown = int((rows == UNKNOWN_ROW).sum())
            name = column.feature.name
            counts[name] = Counts(int(good.sum()), int(missing.sum()), len(rows), unknown)
            _put(arrays, column.feature, bags)
        if self._features.dense:
            dense = [read.features.dense[name] for name in self._features.dense]
            arrays[DENSE] = np.stack(dense, axis=1)
        return Inputs(arrays, size), counts

    def _aligned(self, request: Request) -> tuple[int, dict[str, Any]]:
        """B, and columns of B values each; a single value is for all impressions."""
        if not self._known.issuperset(request):
            name = next(name for name in request if name not in self._known)
            raise DataError(f"there is no feature {name!r}; {self._closest(str(name))}")
        columns, single, size = {}, [], None
        for name, given in request.items():
            values = given
            if isinstance(given, pd.Series):
                values = pa.Array.from_pandas(given)
            elif isinstance(given, pa.ChunkedArray):
                values = given.combine_chunks()
            if self._is_single(name, values):
                single.append(name)
            elif size is None:
                size = len(values)
            elif len(values) != size:
                other = next(name for name in columns if name not in single)
                raise DataError(
                    f"{other!r} has {size} values and {name!r} has {len(values)}; give each "
                    "feature one value per impression"
                )
            columns[name] = values
        size = 1 if size is None else size
        for name in single:
            columns[name] = [columns[name]] * size
        return size, columns

    def _is_single(self, name: str, values: Any) -> bool:
        if isinstance(values, pa.Array):
            return name in self._lists and not is_list(values.type)
        if not isinstance(values, (list, tuple, np.ndarray)):
            return True
        # A bag, unless it holds bags or texts with several ids.
        return name in self._lists and not any(
            isinstance(one, (list, tuple, np.ndarray))
            or (isinstance(one, str) and self._features.list_separator is not None)
            for one in values
        )

    def _closest(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.raw_columns, n=1, cutoff=0.5)
        if close:
            return f"did you mean {close[0]!r}?"
        shown = ", ".join(map(repr, self.raw_columns[:8]))
        return f"there are {shown}" + (", …" if len(self.raw_columns) > 8 else "")

    def _of_request(self, column: _Column, columns: Request, size: int) -> _Bags:
        feature = column.feature
        if feature.name == CONSTANT:
            row = column.lookup.vocabulary.encode(np.zeros(1, np.int64))[0]
            return _Bags(np.full(size, row, np.int64))
        values = columns.get(column.raw)
        if values is None:
            return _nothing(feature, size)
        weights = None
        if column.weights is not None:
            weights = columns.get(column.weights)
            if weights is None:
                raise DataError(
                    f"{column.raw!r} comes without its weights {column.weights!r}; give both"
                )
        bags = None
        if column.is_plain:
            bags = (_quick_bags if feature.multi_valued else _quick_rows)(column, values, weights)
        if bags is None:
            block = {column.raw: _arrow(values, column.raw)}
            if column.weights is not None:
                block[column.weights] = _arrow(weights, column.weights)
            features, faults = column.carefully.read(pa.table(block))
            _raise_first(faults)
            bags = _bags_of(column, features)
        if bags.lengths is not None and (bags.lengths > MAX_BAG_LENGTH).any():
            _raise_first([Fault(column.raw, bags.lengths > MAX_BAG_LENGTH, lambda _: TOO_LONG)])
        return bags

    def _dense(self, columns: Request, size: int) -> np.ndarray:
        """float64 (B, D)."""
        dense = np.empty((size, len(self._features.dense)))
        for place, name in enumerate(self._features.dense):
            raw = self._features.column_of(name)
            values = columns.get(raw)
            dense[:, place] = np.nan if values is None else self._numbers(values, name, raw)
        if self._can_be_too_far:
            too_far = np.abs(dense) > self._reach
            if too_far.any():
                place = int(too_far.any(axis=0).argmax())
                raw = self._features.column_of(self._features.dense[place])
                _raise_first([Fault(raw, too_far[:, place], lambda _: f"the value is {TOO_FAR}")])
        return dense

    def _numbers(self, values: Any, name: str, raw: str) -> np.ndarray:
        """float64 (B,), NaN for missing."""
        found = None
        if isinstance(values, (list, tuple)):
            if _NUMBERS.issuperset(map(type, values)):
                try:
                    found = np.array(values, np.float64)
                except OverflowError:
                    values = [str(value) for value in values]
        elif isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
            found = values.astype(np.float64)
        if found is None or np.isinf(found).any():
            only = replace(self._features, id_features=(), dense=(name,))
            features, faults = only.read(pa.table({raw: _arrow(values, raw)}))
            _raise_first(faults)
            found = features.dense[name]
        return found


def _put(arrays: dict[str, np.ndarray], feature: IdFeature, bags: _Bags) -> None:
    name = feature.name
    if bags.lengths is None:
        arrays[name] = bags.rows
    else:
        arrays[f"{name}.values"], arrays[f"{name}.lengths"] = bags.rows, bags.lengths
    if bags.weights is not None:
        arrays[f"{name}.weights"] = bags.weights


def _nothing(feature: IdFeature, size: int) -> _Bags:
    """A feature that is missing in all impressions."""
    if feature.multi_valued:
        weights = np.zeros(0, np.float32) if feature.weighted else None
        return _Bags(np.zeros(0, np.int64), np.zeros(size, np.int64), weights)
    weights = np.ones(size, np.float32) if feature.weighted else None
    return _Bags(np.full(size, MISSING_ROW), None, weights)


def _bags_of(column: _Column, features: Features) -> _Bags:
    """From values that were read with care."""
    feature, raw = column.feature, features.ids[column.feature.name]
    weights = features.weights[feature.name] if feature.weighted else None
    vocabulary = column.lookup.vocabulary
    if feature.multi_valued:
        rows = vocabulary.encode(raw.flatten()).astype(np.int64)
        lengths = np.diff(raw.offsets.to_numpy()).astype(np.int64)
        return _Bags(rows, lengths, None if weights is None else weights.flatten().to_numpy())
    rows = vocabulary.encode(raw).astype(np.int64)
    if raw.null_count:
        rows[raw.is_null().to_numpy(zero_copy_only=False)] = MISSING_ROW
    return _Bags(rows, None, None if weights is None else weights.fill_null(1.0).to_numpy())


def _quick_rows(column: _Column, values: Any, weights: Any) -> _Bags | None:
    """The rows of a single-valued feature; None if its values need to be read with care."""
    vocabulary = column.lookup.vocabulary
    are_integers = vocabulary.kind == "integer"
    if isinstance(values, pa.Array):
        if are_integers and pa.types.is_signed_integer(values.type) and not values.null_count:
            values = values.to_numpy()
        elif not are_integers and pa.types.is_string(values.type) and len(values) <= MAX_TEXTS:
            values = values.to_pylist()
    rows = None
    if isinstance(values, (list, tuple)):
        rows = column.lookup.of(values) if column.lookup.is_small else None
    elif isinstance(values, np.ndarray) and values.dtype.kind == "i" and are_integers:
        rows = vocabulary.encode(values).astype(np.int64)
    if rows is None:
        return None
    if column.weights is None:
        return _Bags(rows)
    of_ids = _quick_weights(weights)
    return None if of_ids is None or (rows == MISSING_ROW).any() else _Bags(rows, None, of_ids)


def _quick_bags(column: _Column, values: Any, weights: Any) -> _Bags | None:
    """The same of a multi-valued feature."""
    flat = _flattened(values)
    if flat is None or not column.lookup.is_small:
        return None
    rows = column.lookup.of(flat)
    if rows is None or (rows == MISSING_ROW).any():
        return None
    lengths = [len(bag) for bag in values]
    of_ids = None
    if column.weights is not None:
        flat_weights = _flattened(weights)
        if flat_weights is None or [len(bag) for bag in weights] != lengths:
            return None
        of_ids = _quick_weights(flat_weights)
        if of_ids is None:
            return None
    return _Bags(rows, np.array(lengths, np.int64), of_ids)


def _flattened(bags: Any) -> list[Any] | None:
    """The values of lists, or None if there is anything but lists."""
    if not isinstance(bags, (list, tuple)) or not {list, tuple}.issuperset(map(type, bags)):
        return None
    return [value for bag in bags for value in bag]


def _quick_weights(weights: Any) -> np.ndarray | None:
    """float32, or None if they are not finite numbers in a list."""
    if not isinstance(weights, (list, tuple)) or not {float, int}.issuperset(map(type, weights)):
        return None
    try:
        with np.errstate(over="ignore"):
            found = np.array(weights, np.float64).astype(np.float32)
    except OverflowError:
        return None
    return found if np.isfinite(found).all() else None


def _arrow(values: Any, column: str) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if isinstance(values, np.ndarray) and values.ndim > 1:
        values = list(values)
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"column {column!r}: its values are not of one type ({reason})") from None


def _raise_first(faults: Sequence[Fault]) -> None:
    for fault in faults:
        if fault.rows.any():
            row = int(fault.rows.argmax())
            place = f"row {row}, " if len(fault.rows) > 1 else ""
            raise DataError(f"{place}column {fault.column!r}: {fault.describe(row)}")
