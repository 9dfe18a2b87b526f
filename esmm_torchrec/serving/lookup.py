"""Looks up the rows of the raw ids of a request.

A request has a few impressions, and every microsecond counts: single ids are looked up in a dict,
many integers at once in the array of the vocabulary. Values that these cannot handle (text in a
column of integer ids, a missing weight) are left to `data.sources.feature_columns`, which reads the
columns of files, so that a value has the same row however it is scored.

Shapes: B impressions, L ids of a multi-valued feature in all of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.sources.raw_values import NULL_TEXTS
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.schema import UNKNOWN_ROW
from esmm_torchrec.serving.signature import MISSING_ROW

MAX_DICT_IDS = 1 << 22
"""Maximum number of ids of a table for which the first request builds a dict (about 100 bytes per
id). The ids of a larger table are found by search, and hashed texts are hashed by Arrow, which
costs a request about 100 µs."""

MAX_TEXTS = 4096
"""Maximum length of an Arrow column of texts to look up one by one rather than together."""

_NOT_THERE = -2

_IDS = frozenset({int, str, type(None)})


class Bags(NamedTuple):
    """Values of one id feature of B impressions, in the form of a `Signature`."""

    rows: np.ndarray
    """Integers (B,) with MISSING_ROW for a missing id; (L,) if there are lengths."""
    lengths: np.ndarray | None = None
    """Number of ids per impression, integers (B,); None for a single-valued feature."""
    weights: np.ndarray | None = None
    """float32, same shape as the rows."""


class Lookup:
    """Looks up rows of a table; results of None mean that the values need the reader of files."""

    def __init__(self, vocabulary: Vocabulary | HashedIds) -> None:
        self.vocabulary = vocabulary
        self._are_integers = vocabulary.kind == "integer"
        is_list = isinstance(vocabulary, Vocabulary)
        self._has_dict = is_list and vocabulary.num_embeddings <= MAX_DICT_IDS

    @cached_property
    def _rows(self) -> dict[Any, int]:
        assert isinstance(self.vocabulary, Vocabulary)
        ids = self.vocabulary.raw_ids.to_pylist()
        rows: dict[Any, int] = dict(zip(ids, range(1, len(ids) + 1), strict=True))
        if not self._are_integers:
            rows |= dict.fromkeys(NULL_TEXTS, MISSING_ROW)
        rows[None] = MISSING_ROW
        return rows

    def one(self, value: Any) -> int | None:
        """Returns the row of an id; MISSING_ROW for None."""
        if not self._has_dict:
            rows = self.many([value])
            return None if rows is None else int(rows[0])
        if type(value) not in _IDS:  # a float may equal an id
            return None
        row = self._rows.get(value, _NOT_THERE)
        if row == _NOT_THERE:
            return UNKNOWN_ROW if self._is_id(value) else None
        return row

    def many(self, values: Any) -> np.ndarray | None:
        """Returns the rows of ids in a list, an array or an Arrow array; MISSING_ROW for None."""
        if isinstance(values, pa.Array):
            kind = values.type
            if self._are_integers and pa.types.is_signed_integer(kind) and not values.null_count:
                values = values.to_numpy()
            elif not self._are_integers and pa.types.is_string(kind) and len(values) <= MAX_TEXTS:
                values = values.to_pylist()
        if isinstance(values, np.ndarray):
            if self._are_integers and values.dtype.kind == "i" and values.ndim == 1:
                return self.vocabulary.rows_of(values.astype(np.int64, copy=False))
            if values.dtype.kind in "OU":
                values = values.tolist()
        if not isinstance(values, (list, tuple)):
            return None
        if self._are_integers:
            try:
                ids = np.frombuffer(array("q", values), np.int64)
            except (TypeError, OverflowError):  # None, or not integers
                pass
            else:
                return self.vocabulary.rows_of(ids)
        return self._one_by_one(values) if self._has_dict else None

    def _one_by_one(self, values: Sequence[Any]) -> np.ndarray | None:
        if not _IDS.issuperset(map(type, values)):
            return None
        found = map(self._rows.get, values, repeat(_NOT_THERE))
        rows = np.fromiter(found, np.int64, len(values))
        unknown = np.flatnonzero(rows == _NOT_THERE).tolist()
        if not all(self._is_id(values[place]) for place in unknown):
            return None
        rows[unknown] = UNKNOWN_ROW
        return rows

    def _is_id(self, value: Any) -> bool:
        if not self._are_integers:
            return type(value) is str
        return type(value) is int and -(2**63) <= value < 2**63

    def bags(self, values: Any, weights: Any = None, *, are_lists: bool) -> Bags | None:
        """Returns the bags of single ids or of lists of ids; None also if an id is missing or if
        the weights are not finite numbers of the same form."""
        lengths = None
        if are_lists:
            if not _are_lists(values):
                return None
            lengths = np.fromiter(map(len, values), np.int64, len(values))
            values = list(chain.from_iterable(values))
            if weights is not None:
                if not _are_lists(weights) or list(map(len, weights)) != lengths.tolist():
                    return None
                weights = list(chain.from_iterable(weights))
        rows = self.many(values)
        if rows is None or rows.min(initial=UNKNOWN_ROW) < UNKNOWN_ROW:
            return None
        if weights is None:
            return Bags(rows, lengths)
        of_ids = _weights(weights)
        return None if of_ids is None else Bags(rows, lengths, of_ids)


def _weights(values: Any) -> np.ndarray | None:
    """Converts a list of weights to float32 (L,); None if they are not finite numbers."""
    if not isinstance(values, (list, tuple)) or not {float, int}.issuperset(map(type, values)):
        return None
    try:
        with np.errstate(over="ignore"):
            found = np.array(values, np.float64).astype(np.float32)
    except OverflowError:
        return None
    return found if np.isfinite(found).all() else None


def _are_lists(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and {list, tuple}.issuperset(map(type, values))
