"""Impressions of a synthetic world as the bytes of the raw Ali-CCP files.

Arrow puts the rows together column by column, from texts that are made once: one for each item,
one for each id of a history or a cross, one for each weight. Fields, their ranges of ids and the
way values are written are those of the real files.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from esmm_torchrec.comparison.worlds.catalogue import PROFILE_VALUES, Catalogue, Ints
from esmm_torchrec.comparison.worlds.exposure import MAX_TIMES, Counts
from esmm_torchrec.comparison.worlds.raw_ids import WEIGHTED_FIELDS, RawIds
from esmm_torchrec.comparison.worlds.world import Block

LABELS = pa.array([",0,0,", ",1,0,", ",1,1,"])
"""Click and conversion by their sum: there is no conversion without a click."""


def weight_text(times: int) -> str:
    """A weight as the real files have it: ln(1 + times), at most five decimals."""
    return repr(round(math.log1p(times), 5))


class AliCcpText:
    """Writes blocks of one world; the seed decides which raw id a number of the world gets."""

    def __init__(self, catalogue: Catalogue, *, num_users: int, seed: int) -> None:
        self._catalogue = catalogue
        self._weights = pa.array(["", *map(weight_text, range(1, MAX_TIMES + 1))])
        self._ids = RawIds(catalogue, num_users=num_users, seed=seed)
        self._weighted = {field: self._starts(field) for field in WEIGHTED_FIELDS}
        self._one_hot = {field: self._features(field) for field in (*PROFILE_VALUES, "101", "301")}
        self._items = self._item_texts()
        self._item_features = 3 + (catalogue.brand >= 0) + catalogue.nodes.lengths

    def skeleton(self, block: Block, index: pa.Array) -> pa.Array:
        """(impressions,) rows of sample_skeleton_*.csv, newline included.

        `index` holds the (visits,) common_feature_index.
        """
        exposure, catalogue = block.exposure, self._catalogue
        first, item = exposure.first_impression, exposure.item
        crosses = {
            "508": (catalogue.category[item], exposure.category_times),
            "509": (catalogue.shop[item], exposure.shop_times),
            "702": (catalogue.brand[item], exposure.brand_times),
        }
        counts = 1 + self._item_features[item] + np.diff(exposure.node_hits.offsets)
        cross_texts: list[pa.Array] = []
        for field, (value, times) in crosses.items():
            there = times > 0
            counts += there
            cross_texts += [
                _take(self._weighted[field], np.where(there, value, -1)),
                self._weights.take(pa.array(times)),
            ]
        return _joined(
            pa.array(np.arange(first + 1, first + 1 + len(item))).cast(pa.string()),
            LABELS.take(pa.array(block.click + block.conversion)),
            index.take(pa.array(exposure.visit)),
            ",",
            pa.array(counts).cast(pa.string()),
            ",",
            self._items.take(pa.array(item)),
            *cross_texts,
            self._lists("853", exposure.node_hits),
            self._one_hot["301"].take(pa.array(exposure.position)),
            "\n",
        )

    def common(self, block: Block, index: pa.Array) -> pa.Array:
        """(visits,) rows of common_features_*.csv, newline included; `index` as above."""
        exposure = block.exposure
        user = np.where(exposure.user_logged, exposure.user, -1)
        one_hot = {"101": user, **exposure.profile}
        histories = {
            "109_14": exposure.categories,
            "110_14": exposure.shops,
            "127_14": exposure.brands,
            "150_14": exposure.nodes,
        }
        counts = sum(values >= 0 for values in one_hot.values())
        counts = counts + sum(np.diff(history.offsets) for history in histories.values())
        features = _joined(
            *(_take(self._one_hot[field], values) for field, values in one_hot.items()),
            *(self._lists(field, history) for field, history in histories.items()),
        )
        return _joined(
            index,
            ",",
            pa.array(counts).cast(pa.string()),
            ",",
            _without_first_separator(features),
            "\n",
        )

    def _starts(self, field: str) -> pa.Array:
        """(values + 1,) features up to their weight, a separator first; nothing for -1."""
        raw = pa.array(self._ids.of(field)).cast(pa.string())
        texts = _joined(f"\x01{field}\x02", raw, "\x03")
        return pa.concat_arrays([texts, pa.array([""])])

    def _features(self, field: str) -> pa.Array:
        """(values + 1,) one-hot features, a separator first; nothing for -1."""
        texts = _joined(self._starts(field)[:-1], "1.0")
        return pa.concat_arrays([texts, pa.array([""])])

    def _lists(self, field: str, counts: Counts) -> pa.Array:
        """(lists,) weighted features of each list in a row, a separator before each."""
        texts = _joined(
            self._weighted[field].take(pa.array(counts.values)),
            self._weights.take(pa.array(counts.times)),
        )
        return _joined_lists(counts.offsets, texts)

    def _item_texts(self) -> pa.Array:
        """(items,) what every impression of an item has, without a separator first."""
        catalogue = self._catalogue
        nodes = _take(self._features("210"), catalogue.nodes.values)
        parts = [
            self._features("205")[:-1],
            _take(self._features("206"), catalogue.category),
            _take(self._features("207"), catalogue.shop),
            _joined_lists(catalogue.nodes.offsets, nodes),
            _take(self._features("216"), catalogue.brand),
        ]
        # The real rows follow no order of fields, so no reader may count on one.
        items = [np.arange(turn, catalogue.num_items, len(parts)) for turn in range(len(parts))]
        texts = [
            _joined(*(part.take(pa.array(turned)) for part in parts[turn:] + parts[:turn]))
            for turn, turned in enumerate(items)
        ]
        back = np.argsort(np.concatenate(items))
        return _without_first_separator(pa.concat_arrays(texts)).take(pa.array(back))


def index_texts(index: npt.NDArray[np.uint64]) -> pa.Array:
    """(visits,) 16 hexadecimal characters for each number."""
    characters = index.astype(">u8").tobytes().hex().encode()
    offsets = np.arange(0, len(characters) + 16, 16, dtype=np.int32)
    return pa.StringArray.from_buffers(len(index), pa.py_buffer(offsets), pa.py_buffer(characters))


def text_bytes(texts: pa.Array) -> memoryview:
    """The texts of a freshly made array end to end, without copying them."""
    _, offsets, characters = texts.buffers()
    end = int(np.frombuffer(offsets, dtype=np.int32)[len(texts)])
    return memoryview(characters)[:end]


def _take(texts: pa.Array, numbers: Ints) -> pa.Array:
    """The texts of the numbers; of -1 the last one."""
    return texts.take(pa.array(np.where(numbers < 0, len(texts) - 1, numbers)))


def _joined(*parts: pa.Array | str) -> pa.Array:
    """The parts end to end, element by element; a string is repeated in each element."""
    ends = [pa.scalar(part) if isinstance(part, str) else part for part in (*parts, "")]
    return pc.call_function("binary_join_element_wise", ends)


def _joined_lists(offsets: Ints, texts: pa.Array) -> pa.Array:
    """The texts of each list end to end."""
    lists = pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), texts)
    return pc.call_function("binary_join", [lists, pa.scalar("")])


def _without_first_separator(texts: pa.Array) -> pa.Array:
    return pc.call_function("utf8_slice_codeunits", [texts], pc.SliceOptions(1))
