"""New rows are encoded as the rows of the data set were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data.encoding import RowEncoder, copy_preprocessing
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import impression_columns
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources import delimited_text, raw_tables
from esmm_torchrec.data.sources.raw_tables import open_raw_tables
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import IdFeature
from tests.prepared_data import encode


def impressions(rows: int = 200, seed: int = 0) -> pd.DataFrame:
    """Rows with ids, lists, weights, missing values and dense columns."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 4, rows)
    frame = pd.DataFrame(
        {
            "clicked": 1,
            "bought": random.integers(0, 2, rows),
            "key": random.permutation(rows) + 5000,
            "user": random.integers(-20, 40, rows).astype(float),
            "city": random.choice(["Oslo", "Rome", "Lima"], rows),
            "items": [random.integers(0, 30, length).tolist() for length in lengths],
            "strength": [random.random(length).tolist() for length in lengths],
            "price": random.lognormal(3, 2, rows),
            "age": random.integers(18, 80, rows),
        }
    )
    frame.loc[3, "user"], frame.loc[4, "city"] = np.nan, None
    frame.loc[9, "bought"] = 1
    return frame


@pytest.fixture
def data_set(tmp_path: Path) -> PreparedDataSet:
    return prepare_table(
        tmp_path / "prepared",
        train=impressions(),
        test=impressions(150, seed=1),
        click="clicked",
        conversion="bought",
        ids=["user", "city", "items"],
        dense={"price": "auto", "age": "standard"},
        weights={"items": "strength"},
        sample_id="key",
        group_id="city",
        min_count=2,
        max_bad_rows=2,
    )


def features(table: pa.Table) -> dict[str, Any]:
    """The columns that new rows have."""
    return table.drop_columns(
        [name for name in ("click", "conversion", "group_id") if name in table.column_names]
    ).to_pydict()


def test_encoding_the_rows_of_the_data_set_gives_what_was_written(
    data_set: PreparedDataSet,
) -> None:
    encoder = RowEncoder.load(data_set.path)
    for split, frame in (("train", impressions()), ("test", impressions(150, seed=1))):
        new = frame.drop(columns=["clicked", "bought"])
        encoded = encode(encoder, new)
        written = pa.concat_tables(map(pq.read_table, data_set.impression_files(split)))
        assert features(encoded) == features(written)
        assert encoded.schema == impression_columns(encoder.schema)
        for label in ("click", "conversion"):
            assert not np.any(encoded[label])


def test_files_are_encoded_in_blocks_of_bounded_size(
    data_set: PreparedDataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_tables, "ROWS_PER_BLOCK", 64)
    frame = impressions(300, seed=2).drop(columns="key")
    frame.to_parquet(tmp_path / "new.parquet")
    encoder = RowEncoder.load(data_set.path)
    blocks = [len(block.bad) for block in encoder.read_blocks(tmp_path / "new.parquet")]
    assert blocks == [64, 64, 64, 64, 44]
    encoded = encode(encoder, tmp_path / "new.parquet")
    assert encoded.equals(encode(encoder, pa.Table.from_pandas(frame)))
    # There is no column of sample ids, so rows are numbered.
    np.testing.assert_array_equal(encoded["sample_id"], np.arange(300))


def test_a_csv_is_encoded_as_the_frame_it_was_written_from(tmp_path: Path) -> None:
    train = impressions()
    prepare_table(
        tmp_path / "prepared",
        train=train,
        test=train,
        click="clicked",
        conversion="bought",
        ids=["user", "city"],
        dense=["age"],
        min_count=1,
    )
    new = impressions(80, seed=5).assign(city="7")
    new.loc[2, "city"] = "Oslo"
    new.to_csv(tmp_path / "new.csv", index=False)
    encoder = RowEncoder.load(tmp_path / "prepared")
    from_csv = encode(encoder, tmp_path / "new.csv")
    assert from_csv.equals(encode(encoder, new))
    # Text that spells an integer is one; a number is never text, it may have been written "007".
    as_text = encode(encoder, new.assign(user=new["user"].astype("Int64").astype("string")))
    assert as_text["user"].equals(from_csv["user"])
    for number in (7, 7.0, True):
        with pytest.raises(DataError, match=r"'city' holds .* but the ids are text; convert it"):
            encode(encoder, new.assign(city=number))


def test_no_rows_give_no_rows(data_set: PreparedDataSet) -> None:
    encoder = RowEncoder.load(data_set.path)
    empty = encode(encoder, impressions()[:0])
    assert len(empty) == 0
    assert empty.schema == impression_columns(encoder.schema)


def test_a_copy_without_the_data_encodes_the_same(
    data_set: PreparedDataSet, tmp_path: Path
) -> None:
    copy = tmp_path / "run/preprocessing"
    copy_preprocessing(data_set.path, copy)
    expected = encode(RowEncoder.load(data_set.path), impressions(50, seed=3))
    assert sorted(path.name for path in copy.iterdir()) == ["dataset.json", "vocabulary"]
    kept = copy.stat().st_ino
    copy_preprocessing(data_set.path, copy)
    assert copy.stat().st_ino == kept
    with pytest.raises(DataError, match="is missing"):
        PreparedDataSet.open(copy)
    shutil.rmtree(data_set.path)
    assert encode(RowEncoder.load(copy), impressions(50, seed=3)).equals(expected)


def test_a_copy_is_not_laid_over_that_of_another_data_set(
    data_set: PreparedDataSet, tmp_path: Path
) -> None:
    other = prepare_table(
        tmp_path / "other",
        train=impressions(),
        test=impressions(),
        click="clicked",
        conversion="bought",
        ids=["user"],
    )
    copy_preprocessing(data_set.path, tmp_path / "copy")
    before = (tmp_path / "copy/dataset.json").read_bytes()
    with pytest.raises(DataError, match="belongs to another data set"):
        copy_preprocessing(other.path, tmp_path / "copy")
    assert (tmp_path / "copy/dataset.json").read_bytes() == before


def test_shared_features_are_written_out_per_row(tmp_path: Path) -> None:
    """A data set in the form that prepare ali-ccp gives."""
    with PreparedWriter(
        tmp_path / "prepared",
        id_features=[
            IdFeature("101", "101", shared=True),
            IdFeature("109_14", "109_14", multi_valued=True, weighted=True, shared=True),
            IdFeature("205", "205"),
        ],
        source={"kind": "ali-ccp"},
        min_count=1,
    ) as writer:
        for name, ids in (("101", [11, 12]), ("109_14", [70, 80]), ("205", [5])):
            counts = np.arange(len(ids), 0, -1)
            writer.write_vocabulary(name, Vocabulary.from_counts(np.array(ids), counts, 1))
        for split in ("train", "test"):
            writer.write_shared(
                split,
                pa.table(
                    {
                        "101": pa.array([2, None], pa.int32()),
                        "109_14": pa.array([[1, 2], []], pa.list_(pa.int32())),
                        "109_14__weight": pa.array([[0.5, 1.5], []], pa.list_(pa.float32())),
                    }
                ),
            )
            writer.write_impressions(
                split,
                pa.table(
                    {
                        "click": pa.array([1], pa.int8()),
                        "conversion": pa.array([1], pa.int8()),
                        "sample_id": [1],
                        "shared_row": pa.array([1], pa.int32()),
                        "205": pa.array([1], pa.int32()),
                    }
                ),
            )
    encoder = RowEncoder.load(tmp_path / "prepared")
    assert not encoder.schema.has_shared_features
    encoded = encode(
        encoder,
        pa.table(
            {
                "sample_id": [41, 42, 43],
                "101": [12, None, 999],
                "109_14": [[80, 1, 70], None, []],
                "109_14__weight": [[0.25, 1.0, 2.0], [], []],
                "205": [5, 5, 6],
            }
        ),
    )
    assert encoded.to_pydict() == {
        "click": [0, 0, 0],
        "conversion": [0, 0, 0],
        "sample_id": [41, 42, 43],
        "101": [2, None, 0],
        "109_14": [[2, 0, 1], [], []],
        "109_14__weight": [[0.25, 1.0, 2.0], [], []],
        "205": [1, 1, 0],
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"city": ...}, "the input table has no column 'city' (an id feature); did you mean"),
        ({"strength": ...}, "has no column 'strength' (the weights of 'items')"),
        ({"price": ...}, "has no column 'price' (a dense feature)"),
        ({"price": np.inf}, "the input table, row 0, column 'price': inf is not a finite number"),
        ({"age": 1e300}, "row 0, column 'age': the value is too far from its training values"),
        ({"user": "x"}, "row 0, column 'user': 'x' is not an integer"),
        ({"user": pd.Timestamp("2026-01-01")}, "column 'user' holds timestamp"),
        ({"items": 5}, "column 'items' holds int64 instead of lists"),
        ({"city": [["Oslo"]] * 30}, "instead of single values"),
        ({"key": "a"}, "row 0, column 'key': 'a' is not an integer of 64 bits"),
        ({"strength": [[]] * 30}, "weights beside"),
    ],
)
def test_rows_that_cannot_be_encoded_are_named(
    change: dict[str, Any], sentence: str, data_set: PreparedDataSet
) -> None:
    rows = impressions(30, seed=4)
    rows["cities"] = "near miss"
    for name, value in change.items():
        rows = rows.drop(columns=name) if value is ... else rows.assign(**{name: value})
    table = pa.Table.from_pandas(rows, preserve_index=False)
    with pytest.raises(DataError) as raised:
        encode(RowEncoder.load(data_set.path), table)
    assert sentence in str(raised.value)


def test_a_bad_row_of_a_file_is_named_by_its_place_in_the_file(
    tmp_path: Path, data_set: PreparedDataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_tables, "ROWS_PER_BLOCK", 16)
    rows = impressions(60)
    rows["age"] = rows["age"].astype(float)
    rows.loc[41, "age"] = np.inf
    rows.to_parquet(tmp_path / "new.parquet")
    with pytest.raises(DataError, match=r"new\.parquet, row 41, column 'age'"):
        encode(RowEncoder.load(data_set.path), tmp_path / "new.parquet")


def test_another_version_or_a_changed_vocabulary_is_refused(data_set: PreparedDataSet) -> None:
    vocabulary = data_set.path / "vocabulary/city.parquet"
    Vocabulary.read(vocabulary)
    pq.write_table(pq.read_table(vocabulary)[:1], vocabulary)
    with pytest.raises(DataError, match=r"city\.parquet has 1 ids, but dataset\.json says 3"):
        RowEncoder.load(data_set.path)
    description = data_set.path / "dataset.json"
    values = json.loads(description.read_text())
    description.write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        RowEncoder.load(data_set.path)


def test_files_are_read_as_pandas_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited_text, "BYTES_PER_BLOCK", 2000)
    monkeypatch.setattr(raw_tables, "ROWS_PER_BLOCK", 50)
    frame = impressions()[["user", "city", "age"]].assign(**{"a.b": 1, "a": "x\ny"})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    (table,) = open_raw_tables(tmp_path / "a.csv", what="input")
    blocks = list(table.blocks(list(table.column_names)))
    assert len(blocks) > 1
    texts = pa.concat_tables(block.table for block in blocks).to_pandas().replace("", None)
    expected = pd.read_csv(tmp_path / "a.csv", dtype=str)
    pd.testing.assert_frame_equal(texts.fillna("-"), expected.fillna("-"), check_dtype=False)
    (table,) = open_raw_tables(tmp_path / "a.parquet", what="input")
    blocks = list(table.blocks(["a", "city"]))
    assert len(blocks) == 4
    found = pa.concat_tables(block.table for block in blocks)
    assert found.column_names == ["a", "city"]
    assert found["city"].to_pylist() == [
        None if pd.isna(city) else city for city in frame["city"].tolist()
    ]
    with pytest.raises(DataError, match=r"has no column 'town' \(asked for\)"):
        table.check_columns([("asked for", "town")])


def test_missing_dense_values_are_the_mean_with_an_indicator_and_are_counted(tmp_path: Path):
    train, test = impressions(400), impressions(100, seed=1)
    train.loc[:99, "price"] = np.nan
    test.loc[:9, ["price", "age"]] = np.nan
    data_set = prepare_table(
        tmp_path / "prepared",
        train=train,
        test=test,
        click="clicked",
        conversion="bought",
        ids=["city"],
        dense=["price", "age"],
    )
    # No training row lacks an age, so there is nothing to learn from an indicator of it.
    assert data_set.schema.dense_features == ("price", "price__missing", "age")
    assert data_set.statistics.missing["price"] == {"train": 0.25, "test": 0.1}
    assert data_set.statistics.missing["age"] == {"train": 0.0, "test": 0.1}
    (file,) = data_set.impression_files("test")
    rows = pq.read_table(file).to_pandas()
    assert rows["price__missing"].tolist() == [1.0] * 10 + [0.0] * 90
    assert not rows.loc[:9, ["price", "age"]].any(axis=None)
    new = encode(RowEncoder.load(data_set.path), test.drop(columns=["clicked", "bought"]))
    for name in data_set.schema.dense_features:
        np.testing.assert_array_equal(new[name], rows[name])
    # A CSV says the same with an empty field.
    test[["city", "price", "age"]].to_csv(tmp_path / "new.csv", index=False)
    in_csv = encode(RowEncoder.load(data_set.path), pd.read_csv(tmp_path / "new.csv"))
    np.testing.assert_array_equal(in_csv["price__missing"], rows["price__missing"])


def test_the_kind_of_ids_is_kept_if_no_id_has_a_row(tmp_path: Path) -> None:
    rows = impressions(100).assign(code=[f"{n:03}" for n in range(100)])
    data_set = prepare_table(
        tmp_path / "prepared",
        train=rows,
        test=rows,
        click="clicked",
        conversion="bought",
        ids=["code", "city"],
    )
    assert data_set.schema.table("code").num_embeddings == 1
    assert data_set.statistics.tables["code"].kind == "text"
    assert data_set.statistics.tables["code"].distinct_ids == 100
    assert data_set.statistics.unknown["code"] == {"train": 1.0, "test": 1.0}
    assert RowEncoder.load(data_set.path).features.kinds == {"code": "text", "city": "text"}


@pytest.mark.parametrize("where", ["data set", "copy"])
@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_damaged_vocabulary_encodes_and_copies_nothing(
    where: str, place: float, data_set: PreparedDataSet, tmp_path: Path
) -> None:
    copy = tmp_path / "run" / "preprocessing"
    copy_preprocessing(data_set.path, copy)
    damaged = (data_set.path if where == "data set" else copy) / "vocabulary" / "user.parquet"
    content = bytearray(damaged.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    damaged.write_bytes(content)
    folder = damaged.parent.parent
    with pytest.raises(DataError, match=r"user\.parquet"):
        RowEncoder.load(folder)
    with pytest.raises(DataError, match=r"user\.parquet"):
        copy_preprocessing(folder, tmp_path / "other")
    if where == "copy":
        with pytest.raises(DataError, match=r"user\.parquet"):
            copy_preprocessing(data_set.path, copy)
    assert not (tmp_path / "other").exists()
