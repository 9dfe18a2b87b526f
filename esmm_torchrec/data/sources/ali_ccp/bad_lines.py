"""Explanations of what is wrong with a raw Ali-CCP line, so that a reader can find the problem."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from esmm_torchrec.data.sources.ali_ccp.fields import (
    FEATURE_LIST,
    FEATURE_NUM,
    FIELDS,
    HEX_DIGITS,
    INDEX,
    INDEX_DIGITS,
    PURCHASE,
    Layout,
)
from esmm_torchrec.schema import CLICK, SAMPLE_ID

_HIGHEST_FLOAT32 = float(np.finfo(np.float32).max)


def _shown(text: bytes) -> str:
    shown = text.decode("utf-8", errors="backslashreplace")
    return repr(shown if len(shown) <= 40 else f"{shown[:37]}...")


def _as_integer(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.removeprefix(b"-").isdigit() else None


def explain(line: bytes, layout: Layout) -> str:
    """Returns the problem of a line, in words that continue 'line 3: '."""
    cells = line.rstrip(b"\r\n").split(b",")
    if cells == [b""]:
        return "the line is empty"
    if len(cells) != len(layout.columns):
        return f"{len(cells)} columns instead of {len(layout.columns)}"
    of = dict(zip(layout.columns, cells, strict=True))
    if SAMPLE_ID in of:
        number = _as_integer(of[SAMPLE_ID])
        if number is None or not 0 <= number < 2**63:
            return f"sample_id {_shown(of[SAMPLE_ID])} is not a whole number below 2^63"
        for label in (CLICK, PURCHASE):
            if of[label].strip() not in (b"0", b"1"):
                return f"{label} {_shown(of[label])} is neither 0 nor 1"
    digits = np.frombuffer(of[INDEX], np.uint8)
    if len(digits) != INDEX_DIGITS or (HEX_DIGITS[digits] > 15).any():
        return f"{INDEX} {_shown(of[INDEX])} is not {INDEX_DIGITS} hex digits"
    count = _as_integer(of[FEATURE_NUM])
    if count is None or count < 0:
        return f"feature_num {_shown(of[FEATURE_NUM])} is not a whole number"
    features = of[FEATURE_LIST].split(b"\x01") if of[FEATURE_LIST] else []
    if len(features) != count:
        return f"feature_num is {count} and feature_list holds {len(features)} features"
    return _explain_features(features, layout) or "not in the form of this file"


def _explain_features(features: Sequence[bytes], layout: Layout) -> str | None:
    known = {feature.name: feature for feature in layout.features}
    seen: set[str] = set()
    for feature in features:
        parts = feature.replace(b"\x03", b"\x02").split(b"\x02")
        if len(parts) != 3:
            return f"the feature {_shown(feature)} is not a field, an id and a value"
        name, number = parts[0].decode(errors="backslashreplace"), _as_integer(parts[1])
        if name not in known:
            if any(name == other.name for other in FIELDS):
                return f"field {_shown(parts[0])} belongs in the other file"
            return f"field {_shown(parts[0])} is unknown"
        if name in seen and not known[name].multi_valued:
            return f"field {_shown(parts[0])} has two values and takes one"
        seen.add(name)
        if number is None:
            return f"id {_shown(parts[1])} of field {name} is not a whole number"
        if not 0 <= number < 2**63:
            return f"id {number} of field {name} is not between 0 and 2^63 - 1"
        try:
            value = float(parts[2])
        except ValueError:
            return f"value {_shown(parts[2])} of field {name} is not a number"
        if not math.isfinite(value) or abs(value) > _HIGHEST_FLOAT32:
            return f"value {_shown(parts[2])} of field {name} is not a finite float32"
    return None
