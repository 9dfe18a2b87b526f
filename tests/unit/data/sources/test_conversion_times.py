"""Conversion times, from a raw table to the mapped split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import CONVERSION_TIME, NEVER, TIMESTAMP


def _log() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    shown = pd.Timestamp("2026-03-01") + pd.to_timedelta(np.arange(60), "h")
    click = rng.random(60) < 0.7
    bought = click & (rng.random(60) < 0.5)
    bought_at = shown + pd.to_timedelta(rng.integers(0, 90_000, 60), "s")
    return pd.DataFrame(
        {
            "item": rng.integers(0, 5, 60),
            "click": click.astype(int),
            "bought": bought.astype(int),
            "shown": shown,
            "bought_at": bought_at.where(bought),
        }
    )


def _prepare(out: Path, log: pd.DataFrame, **options: Any) -> PreparedDataSet:
    roles = {"timestamp": "shown", "conversion_time": "bought_at"} | options
    return prepare_table(
        out, train=log, test=log, click="click", conversion="bought", ids=["item"], **roles
    )


def test_times_reach_the_mapped_split(tmp_path: Path) -> None:
    log = _log()
    split = MappedSplit.open(_prepare(tmp_path / "ds", log), "train")
    seconds = log["bought_at"].astype("datetime64[s]").astype(np.int64).to_numpy()
    expected = np.where(log["bought"] == 1, seconds, NEVER)
    np.testing.assert_array_equal(split.scalars[CONVERSION_TIME], expected)
    shown = log["shown"].astype("datetime64[s]").astype(np.int64)
    np.testing.assert_array_equal(split.scalars[TIMESTAMP], shown)


def test_a_conversion_that_is_not_kept_has_no_time(tmp_path: Path) -> None:
    log = _log()
    row = int(np.flatnonzero(log["bought"])[0])
    log.loc[row, "click"] = 0
    data_set = _prepare(tmp_path / "ds", log, unclicked_conversions="keep")
    assert MappedSplit.open(data_set, "train").scalars[CONVERSION_TIME][row] == NEVER


@pytest.mark.parametrize(
    ("converted", "value", "sentence"),
    [
        (1, None, "the time is missing"),
        (1, pd.Timestamp("2026-01-01"), "the conversion is before the impression"),
        (0, pd.Timestamp("2026-06-01"), "there is a time and no conversion"),
    ],
)
def test_times_that_contradict_the_labels_are_bad_rows(
    converted: int, value: Any, sentence: str, tmp_path: Path
) -> None:
    log = _log()
    row = int(np.flatnonzero(log["bought"] == converted)[3])
    log.loc[row, "bought_at"] = value
    with pytest.raises(DataError, match=rf"row {row}, column 'bought_at': {sentence}"):
        _prepare(tmp_path / "ds", log)
    assert _prepare(tmp_path / "ds", log, max_bad_rows=2).splits["train"].impressions == 59


def test_the_time_of_the_impression_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`conversion_time` needs `timestamp`"):
        _prepare(tmp_path / "ds", _log(), timestamp=None)
