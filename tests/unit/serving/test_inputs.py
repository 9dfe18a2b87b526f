"""Requests as tensors: lists in text, and limits that apply before anything large is allocated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.errors import DataError
from esmm_torchrec.serving.inputs import InputEncoder, TooManyRows
from tests.prepared_data import prepare_log


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> InputEncoder:
    """Encoder of a log with a list in text, a list, and a list with weights."""
    rows = 60
    log = pd.DataFrame(
        {
            "user": np.arange(rows) % 7,
            "nums": ["1|2", "3", "4|1|2"] * (rows // 3),
            "tags": [[1, 2], [3], []] * (rows // 3),
            "click": np.arange(rows) % 2,
            "buy": np.arange(rows) % 4 == 1,
        }
    )
    path = tmp_path_factory.mktemp("inputs") / "prepared"
    prepare_log(path, log, ids=["user", "nums", "tags"], list_separator="|")
    return InputEncoder(RowEncoder.load(path))


@pytest.mark.parametrize(
    "nums",
    [
        np.array(["1|2", "3"]),
        np.array(["1|2", "3"], object),
        ("1|2", "3"),
        pa.array(["1|2", "3"]),
        pa.array(["1|2", "3"]).dictionary_encode(),
        pa.chunked_array([["1|2"], ["3"]]),
        pd.Series(["1|2", "3"]),
    ],
)
def test_a_column_of_lists_in_text_has_one_form(encoder: InputEncoder, nums: Any) -> None:
    expected = encoder.encode({"user": [1, 2], "nums": ["1|2", "3"]})
    for given in ({"user": [1, 2], "nums": nums}, {"nums": nums}):
        found = encoder.encode(given)
        assert found.size == 2
        for name in ("nums.values", "nums.lengths"):
            assert found.arrays[name].tolist() == expected.arrays[name].tolist()
    assert expected.arrays["nums.lengths"].tolist() == [2, 1]


def test_a_column_of_nulls_is_missing(encoder: InputEncoder) -> None:
    found = encoder.encode({"user": [1, 2], "tags": pa.nulls(2)})
    assert found.arrays["tags.lengths"].tolist() == [0, 0]


def test_limits_hold_before_lists_are_copied(encoder: InputEncoder) -> None:
    request = {"user": [1] * 40_000, "tags": [1] * 20_000}
    with pytest.raises(TooManyRows, match="has 40000 impressions and may have 4096; divide it"):
        encoder.encode(request, max_size=4096)
    with pytest.raises(DataError, match="feature 'tags': 20000 ids for each of 40000 impressions"):
        encoder.encode(request)
