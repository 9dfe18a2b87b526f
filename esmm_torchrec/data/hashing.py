"""Hashes that are the same on all machines and in all runs, and ids that are hashed to rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas.util
import pyarrow as pa

from esmm_torchrec.choices import check_choices
from esmm_torchrec.data.vocabulary import IdKind, check_kind, id_array
from esmm_torchrec.schema import UNKNOWN_ROW

_hash_array: Any = pandas.util.hash_array


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Applies the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), uint64 → uint64."""
    z = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def text_hashes(texts: pa.Array) -> np.ndarray:
    """Hashes n non-null strings to uint64 (n,): pandas.util.hash_array, SipHash, fixed key."""
    encoded = texts.dictionary_encode()
    distinct = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    hashes = np.asarray(_hash_array(distinct, categorize=False))
    return hashes[encoded.indices.to_numpy()]


@dataclass(frozen=True)
class HashedIds:
    """The rows of a table whose ids are open-ended: 1 + hash mod `rows`, without a vocabulary.

    The hash is `splitmix64` of an integer id, or of the `text_hashes` of a string. Row 0 stays
    unused, because no id is unknown. Ids that collide share a row.
    """

    kind: IdKind
    """Kind of the raw ids."""
    rows: int
    """Number of rows that ids are hashed to."""

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the table, including row 0."""
        return self.rows + 1

    @property
    def distinct_ids(self) -> int:
        """Always 0, because hashed ids are not counted."""
        return 0

    def encode(self, raw_ids: pa.Array | pa.ChunkedArray | np.ndarray) -> np.ndarray:
        """Returns the row of each id, int32 of the same length; 0 for nulls, as in `Vocabulary`.

        Raises:
            DataError: the ids are not of the kind they were prepared with.
        """
        ids = id_array(raw_ids)
        if len(ids) == 0 or ids.null_count == len(ids):
            return np.full(len(ids), UNKNOWN_ROW, np.int32)
        check_kind(ids, self.kind)
        is_text = self.kind == "text"
        integers = text_hashes(ids.fill_null("")) if is_text else ids.fill_null(0).to_numpy()
        is_there = ids.is_valid().to_numpy(zero_copy_only=False)
        return np.where(is_there, self.rows_of(integers), np.int32(UNKNOWN_ROW))

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Maps integer ids, or hashes of strings, to rows, 64-bit integers (n,) → int32 (n,)."""
        hashes = splitmix64(ids.view(np.uint64)) % np.uint64(self.rows)
        return (hashes + np.uint64(1)).astype(np.int32)
