"""Encodes raw feature values as the input tensors of a program.

Shapes: B impressions, L ids of a multi-valued feature in all of them, D raw dense columns.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from esmm_torchrec.data.dense import TOO_FAR
from esmm_torchrec.data.encoding import RowEncoder, RowsToEncode, encode_ids
from esmm_torchrec.data.prepared_form import MAX_BAG_LENGTH
from esmm_torchrec.data.sources.feature_columns import CONSTANT, TOO_LONG, FeatureColumns, Features
from esmm_torchrec.data.sources.raw_values import Fault
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import IdFeature
from esmm_torchrec.serving.lookup import Bags, Lookup
from esmm_torchrec.serving.scored_rows import Counts
from esmm_torchrec.serving.signature import DENSE, IMPRESSIONS, MISSING_ROW, Signature

_NUMBERS = frozenset({float, int, bool, type(None)})
_SINGLE = _NUMBERS | {str}

MAX_COPIED_IDS = 1 << 24
"""Maximum number of ids after the list of one impression is copied to all others of a request."""

Request = Mapping[str, Any]
"""Values by raw column; see `InputEncoder`."""


class TooManyRows(DataError):
    """A request has more impressions than it may have."""


class Inputs(NamedTuple):
    """The tensors of B impressions."""

    arrays: dict[str, np.ndarray]
    """Arrays by input name of a `Signature`."""
    size: int
    """Number of impressions, B."""

    def tensors(self, signature: Signature, device: torch.device) -> list[torch.Tensor]:
        """Returns the tensors in the order of the signature."""
        tensors = [torch.from_numpy(self.arrays[name]) for name in signature.names]
        return tensors if device.type == "cpu" else [one.to(device) for one in tensors]

    def batches(self, signature: Signature, size: int) -> Iterator[Inputs]:
        """Yields the impressions in order, at most `size` at a time."""
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
        """Concatenates the impressions of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        arrays = {
            name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays
        }
        return Inputs(arrays, sum(part.size for part in parts))


class Form(NamedTuple):
    """Form of the values of a raw column."""

    kind: Literal["integer", "text", "number"]
    is_list: bool


@dataclass(frozen=True)
class _Column:
    """Reader of one id feature from a request."""

    feature: IdFeature
    raw: str
    weights: str | None
    lookup: Lookup
    carefully: FeatureColumns
    """Reader of files, restricted to this feature."""
    is_plain: bool
    """Whether the raw values are ids rather than texts or times."""

    @cached_property
    def is_quick(self) -> bool:
        """Whether each impression has a single, unweighted id."""
        plain = self.is_plain and self.feature.name != CONSTANT
        return plain and not (self.feature.multi_valued or self.weights)

    @cached_property
    def number_input(self) -> str:
        """Name of the input with one integer per impression: its row or its number of ids."""
        name = self.feature.name
        return f"{name}.lengths" if self.feature.multi_valued else name


class InputEncoder:
    """Encodes raw values for a program. It is thread-safe.

    A request maps raw column names to raw values: {"user": 7, "tags": [3, 4]} is one impression,
    {"user": [7, 8], "tags": [[3], []]} are two, {"user": 7, "item": [1, 2, 3]} are three of one
    user. Several values are a list, a NumPy array or an Arrow array.

    A feature that a request omits is missing: an id feature becomes the zero vector, a dense value
    the one that training used (`DenseTransform.missing`, and the indicator if there is one).

    Args:
        encoder: encoder of the training data.
    """

    def __init__(self, encoder: RowEncoder) -> None:
        features = encoder.features
        self._features = features
        lookups = {
            feature.table: Lookup(encoder.vocabularies[feature.table])
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
        self._dense_columns = [(name, features.column_of(name)) for name in features.dense]
        reach = [encoder.dense[name].reach for name in features.dense]
        self._reach = np.minimum(reach, np.finfo(np.float64).max)
        self.raw_columns = tuple(dict.fromkeys(name for _, name in features.roles))
        self._known = {*self.raw_columns, encoder.sample_id}
        self._lists = {
            name
            for column in self._columns
            if column.feature.multi_valued and column.feature.name not in features.texts
            for name in (column.raw, column.weights)
        }
        several = {str} if features.list_separator is not None else set()
        self._nested = frozenset({list, tuple, np.ndarray} | several)
        self.signature = Signature.of(encoder.schema, dense=features.dense)

    def form_of(self, raw: str) -> Form:
        """Returns the form of the values of a raw column."""
        if raw in dict(self._dense_columns).values():
            return Form("number", False)
        column = next(one for one in self._columns if raw in (one.raw, one.weights))
        is_list = raw in self._lists
        if raw == column.weights:
            return Form("number", is_list)
        return Form(
            self._features.kinds[column.feature.name] if column.is_plain else "text", is_list
        )

    def encode(
        self, request: Request | Sequence[Request], *, max_size: int | None = None
    ) -> Inputs:
        """Encodes a request.

        Args:
            request: raw values by raw column, or a list of such requests, one per impression.
            max_size: maximum number of impressions; None: no limit.

        Raises:
            TooManyRows: there are more than `max_size` impressions.
            DataError: a name is not a raw column, columns differ in length, or a value is invalid;
                the message names the column, and the row if there are several.
        """
        if isinstance(request, Mapping):
            size, columns = self._aligned(request)
        else:
            size, columns = len(request), self._columns_of(request)
        if max_size is not None and size > max_size:
            raise TooManyRows(
                f"the request has {size} impressions and may have {max_size}; divide it"
            )
        arrays: dict[str, np.ndarray] = {}
        for column, numbers in zip(
            self._columns, np.empty((len(self._columns), size), np.int64), strict=True
        ):
            arrays[column.number_input] = numbers
            if column.is_quick:
                values = columns.get(column.raw)
                if values is None:
                    rows = MISSING_ROW
                elif type(values) is list and len(values) == 1:
                    rows = column.lookup.one(values[0])
                else:
                    rows = column.lookup.many(values)
                if rows is not None:
                    numbers[:] = rows
                    continue
            _put(arrays, column.feature, self._bags(column, columns, size), numbers)
        if self._dense_columns:
            arrays[DENSE] = self._dense(columns, size)
        return Inputs(arrays, size)

    def _columns_of(self, rows: Sequence[Request]) -> dict[str, Any]:
        """Converts rows to columns, without columns whose values are all missing."""
        columns: dict[str, Any] = {}
        for name in self._checked(dict.fromkeys(name for row in rows for name in row)):
            values = [row.get(name) for row in rows]
            if all(value is None for value in values):
                continue
            if name in self._lists and not self._nested.issuperset(map(type, values)):
                values = [self._as_list(value) for value in values]
            columns[name] = values
        return columns

    def _checked(self, names: Collection[str]) -> Collection[str]:
        if not self._known.issuperset(names):
            name = next(name for name in names if name not in self._known)
            raise DataError(f"there is no feature {name!r}; {self._closest(str(name))}")
        return names

    def _as_list(self, value: Any) -> Any:
        """Wraps a scalar value of a list column in a list."""
        return [value] if np.isscalar(value) and type(value) not in self._nested else value

    def encode_rows(self, read: RowsToEncode) -> tuple[Inputs, dict[str, Counts]]:
        """Encodes raw rows that were read, and counts the ids of the good ones by id feature. The
        inputs of bad rows are arbitrary, but can be scored."""
        size, good = len(read.bad), pa.array(~read.bad)
        arrays: dict[str, np.ndarray] = {}
        counts = {}
        for column in self._columns:
            feature = column.feature
            encoded = encode_ids(read.features.ids[feature.name], column.lookup.vocabulary)
            counts[feature.name] = Counts.of(encoded.filter(good))
            arrays[column.number_input] = numbers = np.empty(size, np.int64)
            _put(arrays, feature, _bags_of(feature, encoded, read.features), numbers)
        if self._features.dense:
            dense = [read.features.dense[name] for name in self._features.dense]
            arrays[DENSE] = np.stack(dense, axis=1)
        return Inputs(arrays, size), counts

    def _aligned(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Returns B and the columns that are not missing, each with B values or with a list of one
        value for all impressions."""
        columns: dict[str, Any] = {}
        size, of_size = None, ""
        for name in self._checked(request):
            given = request[name]
            if given is None:
                continue
            if type(given) in _SINGLE and name not in self._lists:
                columns[name] = [given]
                continue
            values = self._as_list(given) if name in self._lists else given
            if isinstance(given, pd.Series):
                values = pa.Array.from_pandas(given)
            elif isinstance(given, pa.ChunkedArray):
                values = given.combine_chunks()
            if self._is_single(name, values):
                columns[name] = [values]
                continue
            if size is None:
                size, of_size = len(values), name
            elif len(values) != size:
                raise DataError(
                    f"{of_size!r} has {size} values and {name!r} has {len(values)}; give each "
                    "feature one value per impression"
                )
            columns[name] = values
        return 1 if size is None else size, columns

    def _is_single(self, name: str, values: Any) -> bool:
        if isinstance(values, pa.Array):
            return False
        if not isinstance(values, (list, tuple, np.ndarray)):
            return True
        # A bag, unless it contains bags or texts with several ids.
        if name not in self._lists or (len(values) and type(values[0]) in self._nested):
            return False
        kinds = {str if issubclass(kind, str) else kind for kind in map(type, values)}
        return self._nested.isdisjoint(kinds)

    def _closest(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.raw_columns, n=1, cutoff=0.5)
        if close:
            return f"did you mean {close[0]!r}?"
        shown = ", ".join(map(repr, self.raw_columns[:8]))
        return f"there are {shown}" + (", …" if len(self.raw_columns) > 8 else "")

    def _bags(self, column: _Column, columns: dict[str, Any], size: int) -> Bags:
        """Returns the bags of `size` impressions, or a single bag that all of them share."""
        if column.feature.name == CONSTANT:
            return Bags(column.lookup.vocabulary.encode(np.zeros(1, np.int64)))
        given = {raw: columns.get(raw) for raw in (column.raw, column.weights) if raw is not None}
        if all(values is None for values in given.values()):
            return _nothing(column.feature)
        if column.weights is not None and given[column.weights] is None:
            raise DataError(
                f"{column.raw!r} comes without its weights {column.weights!r}; give both"
            )
        given = {raw: [None] if values is None else values for raw, values in given.items()}
        if size != 1 and any(len(values) == size for values in given.values()):
            given = {raw: v * size if len(v) == 1 else v for raw, v in given.items()}
        bags = None
        if column.is_plain and not column.is_quick:
            are_lists = column.feature.multi_valued
            bags = column.lookup.bags(*given.values(), are_lists=are_lists)
        if bags is None:
            block = pa.table({raw: _arrow(values, raw) for raw, values in given.items()})
            features, faults = column.carefully.read(block)
            _raise_first(faults)
            encoded = encode_ids(features.ids[column.feature.name], column.lookup.vocabulary)
            bags = _bags_of(column.feature, encoded, features)
        if bags.lengths is not None and bags.lengths.max(initial=0) > MAX_BAG_LENGTH:
            _raise_first([Fault(column.raw, bags.lengths > MAX_BAG_LENGTH, lambda _: TOO_LONG)])
        return bags

    def _dense(self, columns: dict[str, Any], size: int) -> np.ndarray:
        """Returns the raw dense values, float64 (B, D)."""
        dense = np.empty((size, len(self._dense_columns)))
        for place, (name, raw) in enumerate(self._dense_columns):
            values = columns.get(raw)
            if values is None:
                dense[:, place] = np.nan
            elif len(values) == 1 and isinstance(values[0], float):
                dense[:, place] = values[0]
            else:
                dense[:, place] = self._numbers(values, name, raw)
        too_far = np.abs(dense) > self._reach
        if too_far.any():
            place = int(too_far.any(axis=0).argmax())
            name, raw = self._dense_columns[place]
            # An infinite value has its own error message.
            self._read_numbers(columns[raw], name, raw)
            _raise_first([Fault(raw, too_far[:, place], lambda _: f"the value is {TOO_FAR}")])
        return dense

    def _numbers(self, values: Any, name: str, raw: str) -> np.ndarray:
        """Converts values to float64 (B,), with NaN for missing ones."""
        if isinstance(values, (list, tuple)):
            if _NUMBERS.issuperset(map(type, values)):
                try:
                    return np.array(values, np.float64)
                except OverflowError:
                    values = [str(value) for value in values]
        elif isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
            return values.astype(np.float64, copy=False)
        return self._read_numbers(values, name, raw)

    def _read_numbers(self, values: Any, name: str, raw: str) -> np.ndarray:
        """Converts values like `_numbers`, with the reader of files."""
        only = replace(self._features, id_features=(), dense=(name,))
        features, faults = only.read(pa.table({raw: _arrow(values, raw)}))
        _raise_first(faults)
        return features.dense[name]


def _put(
    arrays: dict[str, np.ndarray], feature: IdFeature, bags: Bags, numbers: np.ndarray
) -> None:
    """Adds the inputs of a feature; a single bag is copied to all B impressions.

    Args:
        arrays: receives all inputs of the feature except `numbers`.
        bags: bags of one impression or of B.
        numbers: int64 (B,), overwritten with the rows of a single-valued feature, or the lengths.

    Raises:
        DataError: the copies have too many ids.
    """
    size, name = len(numbers), feature.name
    rows, weights = bags.rows, bags.weights
    numbers[:] = rows if bags.lengths is None else bags.lengths
    # Arrow's memory is read-only, which torch does not support, so it is copied.
    copies = 1 if len(rows if bags.lengths is None else bags.lengths) == size else size
    if copies > 1 and len(rows) * copies > MAX_COPIED_IDS:
        raise DataError(
            f"feature {name!r}: {len(rows)} ids for each of {size} impressions are more than "
            f"{MAX_COPIED_IDS}; divide the request"
        )
    if bags.lengths is not None:
        rows = rows.astype(np.int64)
        arrays[f"{name}.values"] = rows if copies == 1 else np.tile(rows, copies)
    if weights is not None:
        arrays[f"{name}.weights"] = np.tile(weights, copies)


def _nothing(feature: IdFeature) -> Bags:
    """Returns the bag of an impression without the feature."""
    rows, lengths = (
        (np.zeros(0, np.int64), np.zeros(1, np.int64))
        if feature.multi_valued
        else (np.array([MISSING_ROW]), None)
    )
    return Bags(rows, lengths, np.ones(len(rows), np.float32) if feature.weighted else None)


def _bags_of(feature: IdFeature, encoded: pa.Array, features: Features) -> Bags:
    """Converts the result of `encode_ids` for values from the reader of files."""
    weights = features.weights[feature.name] if feature.weighted else None
    if feature.multi_valued:
        lengths = np.diff(encoded.offsets.to_numpy())
        of_ids = None if weights is None else weights.flatten().to_numpy()
        return Bags(encoded.flatten().to_numpy(), lengths, of_ids)
    rows = encoded.fill_null(MISSING_ROW).to_numpy()
    return Bags(rows, None, None if weights is None else weights.fill_null(1.0).to_numpy())


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
