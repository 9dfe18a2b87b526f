"""The fields of Ali-CCP and the columns of its raw files.

Each split consists of `sample_skeleton_<split>.csv` (one impression per line) and
`common_features_<split>.csv` (features shared by many impressions), or of one
`sample_<split>.tar.gz` that contains both. Lines are comma-separated; their last column is a list
of features, `field 0x02 id 0x03 value` joined by 0x01.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.prepared_form import SplitName
from esmm_torchrec.schema import CLICK, SAMPLE_ID, IdFeature

USER = "101"
"""Field of the user id."""


def _common(name: str, *, multi_valued: bool = False, weighted: bool = False) -> IdFeature:
    return IdFeature(name, name, multi_valued=multi_valued, weighted=weighted, shared=True)


def _skeleton(name: str, *, multi_valued: bool = False, weighted: bool = False) -> IdFeature:
    return IdFeature(name, name, multi_valued=multi_valued, weighted=weighted)


FIELDS: tuple[IdFeature, ...] = (
    _common(USER),
    _common("109_14", multi_valued=True, weighted=True),  # categories in the user's history
    _common("110_14", multi_valued=True, weighted=True),  # shops in the history
    _common("127_14", multi_valued=True, weighted=True),  # brands in the history
    _common("150_14", multi_valued=True, weighted=True),  # intention nodes in the history
    _common("121"),  # profile
    _common("122"),  # profile
    _common("124"),  # gender
    _common("125"),  # age
    _common("126"),  # consumption level I
    _common("127"),  # consumption level II
    _common("128"),  # works or not
    _common("129"),  # geography
    _skeleton("205"),  # item
    _skeleton("206"),  # category
    _skeleton("207"),  # shop
    _skeleton("210", multi_valued=True),  # intention nodes of the item
    _skeleton("216"),  # brand
    _skeleton("508", weighted=True),  # 109_14 x 206
    _skeleton("509", weighted=True),  # 110_14 x 207
    _skeleton("702", weighted=True),  # 127_14 x 216
    _skeleton("853", multi_valued=True, weighted=True),  # 150_14 x 210
    _skeleton("301"),  # context
)
"""Every field of the raw data, each a feature with its own table; shared fields come from the
common features. The order is the one in which a batch contains them."""

INDEX = "common_feature_index"
FEATURE_NUM = "feature_num"
FEATURE_LIST = "feature_list"

PURCHASE = "purchase"

INDEX_DIGITS = 16
HEX_DIGITS = np.full(256, 255, np.uint8)
HEX_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
HEX_DIGITS[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


@dataclass(frozen=True)
class Layout:
    """The columns of one kind of raw file, and the fields of its feature lists."""

    stem: str
    """Name of the file without split and suffix."""
    columns: Mapping[str, pa.DataType]
    features: tuple[IdFeature, ...]
    reason: str
    """Reason under which bad rows of this file are recorded as dropped."""

    def file(self, split: SplitName) -> str:
        """Returns the name of the file of a split."""
        return f"{self.stem}_{split}.csv"


COMMON = Layout(
    stem="common_features",
    columns={INDEX: pa.binary(), FEATURE_NUM: pa.int32(), FEATURE_LIST: pa.binary()},
    features=tuple(feature for feature in FIELDS if feature.shared),
    reason="bad common rows",
)
SKELETON = Layout(
    stem="sample_skeleton",
    columns={
        SAMPLE_ID: pa.int64(),
        CLICK: pa.int8(),
        PURCHASE: pa.int8(),
        INDEX: pa.binary(),
        FEATURE_NUM: pa.int32(),
        FEATURE_LIST: pa.binary(),
    },
    features=tuple(feature for feature in FIELDS if not feature.shared),
    reason="bad skeleton rows",
)
