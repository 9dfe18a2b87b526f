"""Formats impressions of a synthetic world as the bytes of the raw Ali-CCP files.

Arrow concatenates the rows column by column from texts that are created once: one per item, per id
of a history or a cross, and per weight. Fields, their id ranges and the format of values match the
real files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esmm_torchrec.comparison.worlds.catalogue import Ints
from esmm_torchrec.comparison.worlds.exposure import MAX_TIMES
from esmm_torchrec.comparison.worlds.fields import (
    Values,
    impression_values,
    item_values,
    raw_ids,
    visit_values,
)
from esmm_torchrec.comparison.worlds.world import Block, Simulation
from esmm_torchrec.data.sources.ali_ccp.fields import FIELDS
from esmm_torchrec.schema import IdFeature

LABELS = pa.array([",0,0,", ",1,0,", ",1,1,"])
"""Text of click and conversion, indexed by their sum: a conversion requires a click."""


def weight_text(times: int) -> str:
    """Formats a weight as in the real files: ln(1 + times), with at most five decimals."""
    return repr(round(math.log1p(times), 5))


class AliCcpText:
    """Formats blocks of one world. Its seed determines the raw id of each number of the world."""

    def __init__(self, simulation: Simulation) -> None:
        self._catalogue = catalogue = simulation.catalogue
        self._weights = pa.array(["", *map(weight_text, range(1, MAX_TIMES + 1))])
        ids = raw_ids(simulation)
        self._features = {of.name: _feature_texts(of, ids[of.name]) for of in FIELDS}
        items = item_values(catalogue, np.arange(catalogue.num_items))
        self._items = _in_turns(self._texts(items))
        self._item_lengths = _total_lengths(items)

    def skeleton(self, block: Block, index: pa.Array) -> pa.Array:
        """Returns (impressions,) rows of sample_skeleton_*.csv, newline included.

        `index` is the common_feature_index of each visit, (visits,).
        """
        exposure = block.exposure
        first, item = exposure.first_impression + 1, exposure.item
        values = impression_values(self._catalogue, exposure)
        lengths = self._item_lengths[item] + _total_lengths(values)
        return _joined(
            pa.array(np.arange(first, first + len(item))).cast(pa.string()),
            LABELS.take(pa.array(block.click + block.conversion)),
            index.take(pa.array(exposure.visit)),
            ",",
            pa.array(lengths).cast(pa.string()),
            ",",
            self._items.take(pa.array(item)),
            *self._texts(values),
            "\n",
        )

    def common(self, block: Block, index: pa.Array) -> pa.Array:
        """Returns (visits,) rows of common_features_*.csv; `index` as for `skeleton`."""
        values = visit_values(block.exposure)
        lengths = _total_lengths(values)
        return _joined(
            index,
            ",",
            pa.array(lengths).cast(pa.string()),
            ",",
            _without_first_separator(_joined(*self._texts(values))),
            "\n",
        )

    def _texts(self, values: Mapping[str, Values]) -> list[pa.Array]:
        """Returns (n,) texts per field; each feature is preceded by a separator."""
        texts = []
        for field, of in values.items():
            features = self._features[field]
            missing = len(features) - 1
            text = features.take(pa.array(np.where(of.numbers < 0, missing, of.numbers)))
            if of.times is not None:
                text = _joined(text, self._weights.take(pa.array(of.times)))
            texts.append(text if of.offsets is None else _joined_lists(of.offsets, text))
        return texts


def _total_lengths(values: Mapping[str, Values]) -> Ints:
    return np.sum([of.lengths for of in values.values()], axis=0)


def _feature_texts(feature: IdFeature, ids: Ints) -> pa.Array:
    """Returns (values + 1,) texts with a leading separator, without the weight if the feature is
    weighted. The last text is empty."""
    end = "\x03" if feature.weighted else "\x031.0"
    texts = _joined(f"\x01{feature.name}\x02", pa.array(ids).cast(pa.string()), end)
    return pa.concat_arrays([texts, pa.array([""])])


def _in_turns(parts: Sequence[pa.Array]) -> pa.Array:
    """Concatenates the parts of each item, without a leading separator. Items start with different
    parts, as readers must not rely on an order of fields: real rows have none."""
    turns = range(len(parts))
    items = [pa.array(np.arange(turn, len(parts[0]), len(parts))) for turn in turns]
    texts = [
        _joined(*(part.take(items[turn]) for part in (*parts[turn:], *parts[:turn])))
        for turn in turns
    ]
    back = np.argsort(np.concatenate(items))
    return _without_first_separator(pa.concat_arrays(texts)).take(pa.array(back))


def index_texts(index: npt.NDArray[np.uint64]) -> pa.Array:
    """Returns (visits,) texts of 16 hexadecimal digits, one per number."""
    characters = index.astype(">u8").tobytes().hex().encode()
    offsets = np.arange(0, len(characters) + 16, 16, dtype=np.int32)
    return pa.StringArray.from_buffers(len(index), pa.py_buffer(offsets), pa.py_buffer(characters))


def text_bytes(texts: pa.Array) -> memoryview:
    """Returns the concatenated texts of a newly created array, without copying them."""
    _, offsets, characters = texts.buffers()
    end = int(np.frombuffer(offsets, dtype=np.int32)[len(texts)])
    return memoryview(characters)[:end]


def _joined(*parts: pa.Array | str) -> pa.Array:
    """Concatenates the parts element by element; a string is repeated in each element."""
    ends = [pa.scalar(part) if isinstance(part, str) else part for part in (*parts, "")]
    return pc.call_function("binary_join_element_wise", ends)


def _joined_lists(offsets: Ints, texts: pa.Array) -> pa.Array:
    """Concatenates the texts of each list."""
    lists = pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), texts)
    return pc.call_function("binary_join", [lists, pa.scalar("")])


def _without_first_separator(texts: pa.Array) -> pa.Array:
    return pc.call_function("utf8_slice_codeunits", [texts], pc.SliceOptions(1))
