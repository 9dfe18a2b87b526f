"""Ids that are hashed to rows, from raw rows to scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data.encoding import RowEncoder, copy_preprocessing
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import DataError, OptionError
from tests.prepared_data import encode

ROWS = 97


def _splitmix64(value: int) -> int:
    """Vigna's splitmix64.c, in whole numbers."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _row_of_integer(value: int) -> int:
    return 1 + _splitmix64(value % 2**64) % ROWS


def _row_of_text(value: str) -> int:
    (hashed,) = pd.util.hash_array(np.array([value], dtype=object), categorize=False)
    return 1 + _splitmix64(int(hashed)) % ROWS


def _day(seed: int, rows: int = 300) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    click = random.random(rows) < 0.4
    return pd.DataFrame(
        {
            "click": click.astype(int),
            "buy": (click & (random.random(rows) < 0.5)).astype(int),
            "cookie": [f"c{n}" for n in random.integers(0, 10**9, rows)],
            "item": random.integers(0, 40, rows),
            "seen": [random.integers(-5, 40, n).tolist() for n in random.integers(0, 4, rows)],
        }
    )


def _prepare(path: Path, **options: object) -> PreparedDataSet:
    given = {
        "train": _day(0),
        "test": _day(1),
        "click": "click",
        "conversion": "buy",
        "ids": ["cookie", "item", "seen"],
        "hashed": {"cookie": ROWS, "seen": ROWS},
    }
    return prepare_table(path, **(given | options))  # pyright: ignore[reportArgumentType]


def test_rows_are_those_of_the_definition() -> None:
    integers = np.array([0, 1, -1, 2**63 - 1, -(2**63), 12345])
    rows = HashedIds("integer", ROWS).encode(integers)
    assert rows.tolist() == [_row_of_integer(int(value)) for value in integers]
    texts = pa.array(["", "a", None, "Öl", "a"])
    rows = HashedIds("text", ROWS).encode(texts)
    assert rows.tolist() == [
        0 if text is None else _row_of_text(text) for text in texts.to_pylist()
    ]
    assert set(HashedIds("integer", 3).encode(np.arange(100))) == {1, 2, 3}
    with pytest.raises(DataError, match="integer ids cannot be looked up among text ids"):
        HashedIds("text", ROWS).encode(integers)


def test_a_hashed_column_needs_no_vocabulary(tmp_path: Path) -> None:
    data_set = _prepare(tmp_path / "data")
    assert data_set.vocabulary_tables == ["item"]
    assert [path.name for path in (data_set.path / "vocabulary").iterdir()] == ["item.parquet"]
    sizes = {table.name: table.num_embeddings for table in data_set.schema.tables}
    assert sizes["cookie"] == sizes["seen"] == ROWS + 1
    for split, frame in (("train", _day(0)), ("test", _day(1))):
        (file,) = data_set.impression_files(split)  # pyright: ignore[reportArgumentType]
        rows = pq.read_table(file)
        assert rows["cookie"].to_pylist() == [_row_of_text(text) for text in frame["cookie"]]
        assert rows["seen"].to_pylist() == [
            [_row_of_integer(value) for value in values] for values in frame["seen"]
        ]
    assert data_set.statistics.unknown["cookie"] == {"train": 0.0, "test": 0.0}
    data_set.verify()


def test_rows_to_score_and_further_days_follow_the_same_rule(tmp_path: Path) -> None:
    data_set = _prepare(tmp_path / "data")
    copy_preprocessing(data_set.path, tmp_path / "copy")
    encoded = encode(RowEncoder.load(tmp_path / "copy"), _day(2))
    assert encoded["cookie"].to_pylist() == [_row_of_text(text) for text in _day(2)["cookie"]]
    added = append_table(data_set.path, train=_day(2))
    (file,) = added.impression_files("train")
    assert pq.read_table(file)["cookie"].equals(encoded["cookie"])
    PreparedDataSet.open(data_set.path).verify()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hashed": {"shop": 5}}, "`hashed` names 'shop', which is not a column of `ids`"),
        ({"hashed": {"item": 0}}, "`hashed` item=0 is not a number from 1"),
        (
            {"hashed": {"item": 5}, "shared_tables": {"items": ["item", "seen"]}},
            "`shared_tables` items has columns that `hashed` treats differently",
        ),
    ],
)
def test_what_cannot_be_hashed_is_said(
    options: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=said):
        _prepare(tmp_path / "data", **options)
