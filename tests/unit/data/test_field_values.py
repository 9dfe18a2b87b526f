"""The ranges of dense fields, and the names of ids, in figures by value."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from esmm_torchrec.data.field_values import FieldValues, field_values
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import OptionError
from tests.prepared_data import prepare_log

ROWS = 1000


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rare = rng.random(ROWS) < 0.08
    return pd.DataFrame(
        {
            "flag": rng.random(ROWS) < 0.3,
            "mostly": np.where(rare, rng.lognormal(1, 1, ROWS), 0.0),
            "price": 1e6 + rng.normal(size=ROWS).round(2),
            "days": rng.integers(0, 40, ROWS),
            "gaps": np.where(rng.random(ROWS) < 0.2, np.nan, rng.lognormal(3, 2, ROWS)),
            "never": np.full(ROWS, np.nan),
            "tiny": rng.integers(0, 5, ROWS) * 1e-9,
            "id": rng.choice(["missing", "Rome", ""], ROWS),
            "hashed": rng.integers(0, 99, ROWS),
            "click": rng.integers(0, 2, ROWS),
            "buy": 0,
        }
    ).astype({"flag": float})


@pytest.fixture(scope="module")
def data(log: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataSet:
    path = tmp_path_factory.mktemp("values") / "prepared"
    dense = dict.fromkeys(["flag", "mostly", "price", "days", "gaps", "never"], "auto")
    dense["tiny"] = "as-is"
    prepare_log(path, log, ids=["id", "hashed"], dense=dense, hashed={"hashed": 16})
    return PreparedDataSet.open(path)


def _values(data: PreparedDataSet, field: str) -> FieldValues:
    return field_values(data, MappedSplit.open(data, "test"), field)


@pytest.mark.parametrize("field", ["flag", "mostly", "price", "days", "gaps", "tiny"])
def test_ranges_hold_the_values_that_they_say(
    data: PreparedDataSet, log: pd.DataFrame, field: str
) -> None:
    transform = data.statistics.dense[field]
    found, raw = _values(data, field), np.clip(log[field], transform.low, transform.high)
    assert len(set(found.names)) == len(found.names)
    for code, name in enumerate(found.names):
        own = raw[found.codes == code]
        if name == "missing":
            assert np.isnan(own).all()
            continue
        low, _, high = name.partition(" to ")
        assert own.min() == pytest.approx(float(low), rel=6e-3, abs=1e-12)
        assert own.max() == pytest.approx(float(high or low), rel=6e-3, abs=1e-12)
        assert field in ("flag", "mostly", "tiny") or len(own) < ROWS / 5
    lows = [float(name.split()[0]) for name in found.names if name != "missing"]
    assert lows == sorted(lows)
    assert len(lows) > 1


def test_a_value_that_many_have_is_a_range_by_itself(data: PreparedDataSet) -> None:
    assert _values(data, "flag").names == ["0", "1"]
    assert _values(data, "mostly").names[0] == "0"
    assert _values(data, "gaps__missing").names == ["0", "1"]
    assert _values(data, "never").names == ["missing"]


def test_ids_have_names_if_there_are_any(data: PreparedDataSet) -> None:
    assert set(_values(data, "id").names) == {"'missing'", "Rome", "missing"}
    with pytest.raises(OptionError, match="`by` hashed has hashed ids, which have no names"):
        _values(data, "hashed")
