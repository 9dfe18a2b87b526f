"""Tables of impressions → prepared data sets, checked against pandas and NumPy."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources import delimited_text, raw_tables
from esmm_torchrec.data.sources.table_columns import TableColumns
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import DataError, OptionError

HILLSTROM = Path(
    os.environ.get(
        "HILLSTROM_CSV", Path(__file__).parents[4] / "../shared/data/hillstrom/hillstrom.csv"
    )
)
"""Hillstrom data, which this project may not distribute; see datasets/hillstrom.md for the
source."""

ROLES: dict[str, Any] = {
    "click": "clicked",
    "conversion": "bought",
    "ids": ["user", "city", "mobile"],
    "dense": ["price", "age"],
    "min_count": 1,
}


def impressions(rows: int = 300, seed: int = 0, users: int = 40) -> pd.DataFrame:
    """Returns rows without missing values."""
    random = np.random.default_rng(seed)
    clicked = random.random(rows) < 0.3
    clicked[:2] = True
    bought = clicked & (random.random(rows) < 0.4)
    bought[0] = True
    return pd.DataFrame(
        {
            "clicked": clicked.astype(int),
            "bought": bought.astype(int),
            "user": random.zipf(1.5, rows) % users - 3,
            "city": random.choice(["Oslo", "Rome", "Lima", "NA", "Bonn, DE", 'a "b"'], rows),
            "mobile": random.random(rows) < 0.5,
            "price": random.lognormal(3, 2, rows),
            "age": random.integers(18, 80, rows),
        }
    )


def stored(data_set: PreparedDataSet, split: str) -> pd.DataFrame:
    """Returns the impressions of a split; missing ids are -1."""
    files = sorted((data_set.path / split).glob("impressions-*.parquet"))
    return pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)


def expected_rows(train: pd.Series, values: pd.Series, min_count: int = 1) -> np.ndarray:
    """Assigns rows by descending count, ties by ascending id; unknown ids get 0, missing ids
    NaN."""
    counts = train.dropna().value_counts()
    kept = sorted(counts[counts >= min_count].index, key=lambda raw: (-counts[raw], raw))
    row_of = {raw: row for row, raw in enumerate(kept, start=1)}
    return np.array([np.nan if pd.isna(raw) else row_of.get(raw, 0) for raw in values])


def prepare(path: Path, train: Any, test: Any, **options: Any) -> PreparedDataSet:
    return prepare_table(path, train=train, test=test, **(ROLES | options))


def test_ids_are_ranked_by_their_training_counts(tmp_path: Path) -> None:
    train, test = impressions(), impressions(seed=1, users=60)
    data_set = prepare(tmp_path / "out", train, test, min_count=3)
    for split, frame in (("train", train), ("test", test)):
        rows = stored(data_set, split)
        for name in ("user", "city"):
            np.testing.assert_array_equal(
                rows[name], expected_rows(train[name], frame[name], min_count=3)
            )
    assert (stored(data_set, "train")["user"] == 0).any(), "no rare id in this test"
    assert set(test["user"]) - set(train["user"]), "no new id in this test"
    counts = train["user"].value_counts()
    table = pq.read_table(data_set.path / "vocabulary/user.parquet").to_pydict()
    assert dict(zip(table["raw_id"], table["count"], strict=True)) == {
        raw: count for raw, count in counts.items() if count >= 3
    }
    data_set.verify()


def test_dense_values_are_standardised_with_the_training_rows(tmp_path: Path) -> None:
    train, test = impressions(), impressions(seed=1)
    train["one"] = test["one"] = 0.1
    methods = {"price": "standard", "age": "standard", "one": "auto"}
    data_set = prepare(tmp_path / "out", train, test, dense=methods)
    for split, frame in (("train", train), ("test", test)):
        rows = stored(data_set, split)
        for name in ("price", "age"):
            standard = (frame[name] - train[name].mean()) / train[name].std(ddof=0)
            np.testing.assert_allclose(rows[name], standard, rtol=1e-5, atol=1e-6)
        assert (rows["one"] == 0).all()
    of_price = data_set.statistics.dense["price"]
    assert of_price.mean == pytest.approx(train["price"].mean(), rel=1e-12)
    assert of_price.std == pytest.approx(train["price"].std(ddof=0), rel=1e-12)
    assert data_set.statistics.dense["one"].std == 1.0


def test_labels_and_sample_ids_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    train, test = impressions(), impressions(100, seed=1)
    data_set = prepare(tmp_path / "out", [train[:120], train[120:]], test)
    for split, frame in (("train", train), ("test", test)):
        rows = stored(data_set, split)
        np.testing.assert_array_equal(rows["click"], frame["clicked"])
        np.testing.assert_array_equal(rows["conversion"], frame["bought"])
        np.testing.assert_array_equal(rows["sample_id"], np.arange(len(frame)))
        assert data_set.splits[split].happened["click"] == frame["clicked"].sum()
        assert data_set.splits[split].happened["conversion"] == frame["bought"].sum()


def _as_csv(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_csv(path.with_suffix(".csv"), index=False)
    return path.with_suffix(".csv")


def _as_gzip(frame: pd.DataFrame, path: Path) -> Path:
    with gzip.open(path.with_suffix(".csv.gz"), "wt", encoding="utf-8-sig", newline="") as file:
        frame.to_csv(file, index=False)
    return path.with_suffix(".csv.gz")


def _as_parquet(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def _as_categories(frame: pd.DataFrame, path: Path) -> pd.DataFrame:  # noqa: ARG001
    return frame.assign(city=frame["city"].astype("category"))


def _as_arrow(frame: pd.DataFrame, path: Path) -> pa.Table:  # noqa: ARG001
    return pa.Table.from_pandas(frame)


@pytest.mark.parametrize("form", [_as_csv, _as_gzip, _as_parquet, _as_categories, _as_arrow])
def test_every_form_of_the_same_rows_gives_the_same_bytes(
    form: Callable[[pd.DataFrame, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = impressions(), impressions(seed=1)
    train.loc[5:30, "user"] = np.nan  # The column becomes floats; a CSV contains "7.0".
    train["stamp"], test["stamp"] = 2**60 + train.index, 2**60 + test.index
    options = {"group_id": "city", "timestamp": "stamp", "sample_id": "age"}
    from_frame = prepare(tmp_path / "frame", train, test, **options)
    # Several blocks, of another size.
    monkeypatch.setattr(delimited_text, "BYTES_PER_BLOCK", 3000)
    monkeypatch.setattr(raw_tables, "ROWS_PER_BLOCK", 77)
    other = prepare(
        tmp_path / "other", form(train, tmp_path / "a"), form(test, tmp_path / "b"), **options
    )
    assert other.checksums == from_frame.checksums
    assert other.statistics == from_frame.statistics


@pytest.mark.parametrize("key", ["user", "city"])
def test_impressions_are_stored_by_a_hash_of_the_key(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_tables, "ROWS_PER_BLOCK", 77)
    train, test = impressions(), impressions(seed=1)
    ordered = prepare(tmp_path / "by-key", train, test, key=key)
    plain = prepare(tmp_path / "plain", train, test)
    assert (ordered.key, plain.key) == (key, None)
    assert ordered.statistics == plain.statistics
    for split, raw in (("train", train), ("test", test)):
        by_key, as_given = (
            pa.concat_tables(map(pq.read_table, of.impression_files(split)))  # type: ignore[arg-type]
            for of in (ordered, plain)
        )
        rows = by_key.column("sample_id").to_numpy()
        assert by_key == as_given.take(rows)
        assert sorted(rows) == list(range(len(raw)))
        # One run of rows for each user, in the order of the source; not the order of the users.
        users = raw[key].to_numpy()[rows]
        starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
        assert len(starts) == len(set(users)) > 1
        assert list(users[starts]) != sorted(users[starts])
        for run in np.split(rows, starts[1:]):
            assert list(run) == sorted(run)


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (
        prepare(tmp_path / name, impressions(), impressions(seed=1)) for name in ("a", "b")
    )
    assert first.fingerprint == second.fingerprint


def test_the_test_rows_change_no_vocabulary_and_no_statistics(tmp_path: Path) -> None:
    train = impressions()
    one = prepare(tmp_path / "one", train, impressions(seed=1))
    other = prepare(tmp_path / "other", train, impressions(seed=2).assign(price=1e6, city="Oslo"))
    same = [name for name in one.checksums if not name.startswith("test/")]
    assert {name: one.checksums[name] for name in same} == {
        name: other.checksums[name] for name in same
    }
    for name in ("dense", "tables", "mean_values_per_bag"):
        assert getattr(one.statistics, name) == getattr(other.statistics, name)
    assert one.checksums != other.checksums


def test_missing_ids_are_null_and_not_unknown(tmp_path: Path) -> None:
    train, test = impressions(), impressions(seed=1)
    for frame in (train, test):
        frame["user"] = frame["user"].astype("Int64").mask(frame["user"] == 1)
        frame["city"] = frame["city"].mask(frame["city"] == "Rome", None)
    data_set = prepare(tmp_path / "out", train, test)
    for split, frame in (("train", train), ("test", test)):
        rows = stored(data_set, split)
        for name in ("user", "city"):
            assert frame[name].isna().any()
            np.testing.assert_array_equal(rows[name], expected_rows(train[name], frame[name]))
    assert data_set.statistics.mean_values_per_bag["city"] == train["city"].notna().mean()


def test_na_is_a_place_and_an_empty_field_is_missing(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("c,b,city\n1,1,NA\n\n1,0,\n0,0,NULL\n0,0,Oslo\n")
    data_set = prepare_table(
        tmp_path / "out",
        train=tmp_path / "train.csv",
        test=str(tmp_path / "test.csv"),
        click="c",
        conversion="b",
        ids=["city"],
        min_count=1,
    )
    assert data_set.vocabulary("city").raw_ids.to_pylist() == ["NA", "Oslo"]
    np.testing.assert_array_equal(stored(data_set, "test")["city"], [1, np.nan, np.nan, 2])


@pytest.mark.parametrize(
    ("texts", "raw_ids"),
    [
        (["7", "-3", "7.0", " 12"], [7, -3, 12]),
        (["7", "-3", "007", "x"], ["-3", "007", "7", "x"]),
        (["true", "False", "", "TRUE"], [1, 0]),
        (["1.5", "2", "3", "4"], ["1.5", "2", "3", "4"]),
        (["", "", "", ""], []),
    ],
)
def test_a_column_of_a_csv_holds_integers_if_all_its_values_are(
    texts: list[str], raw_ids: list[int | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The deciding value is in a late block.
    monkeypatch.setattr(delimited_text, "BYTES_PER_BLOCK", 16)
    text = "click,buy,id\n" + "".join(f"1,1,{text}\n" for text in texts)
    (tmp_path / "a.csv").write_text(text)
    data_set = prepare_table(
        tmp_path / "out",
        train=[tmp_path / "a.csv"],
        test=[tmp_path / "a.csv"],
        click="click",
        conversion="buy",
        ids=["id"],
        min_count=1,
    )
    assert sorted(data_set.vocabulary("id").raw_ids.to_pylist(), key=str) == sorted(
        raw_ids, key=str
    )
    np.testing.assert_array_equal(stored(data_set, "train"), stored(data_set, "test"))


def with_histories(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Adds lists of weighted items to the rows: some empty, some missing, some with a null."""
    random = np.random.default_rng(seed)
    items, weights = [], []
    for row in range(len(frame)):
        length = int(random.integers(0, 5))
        items.append([int(item) for item in random.integers(0, 30, length)])
        weights.append([float(weight) for weight in random.random(length)])
        if row % 7 == 3:
            items[-1].append(None)
            weights[-1].append(None)
        if row % 11 == 5:
            items[-1], weights[-1] = None, None
    return frame.assign(items=items, weights=weights)


@pytest.mark.parametrize("kind", ["list", "large_list", "strings", "categories"])
def test_lists_are_multi_valued_features_with_weights(kind: str, tmp_path: Path) -> None:
    value_type = {
        "list": pa.list_(pa.int32()),
        "large_list": pa.large_list(pa.int64()),
        "strings": pa.list_(pa.string()),
        "categories": pa.list_(pa.dictionary(pa.int32(), pa.string())),
    }[kind]
    frames = {
        "train": with_histories(impressions()),
        "test": with_histories(impressions(seed=1), seed=1),
    }
    tables = {}
    for split, frame in frames.items():
        table = pa.Table.from_pandas(frame, preserve_index=False)
        items = table.column("items")
        if kind == "categories":
            items = items.cast(pa.list_(pa.string()))
        place = table.schema.get_field_index("items")
        tables[split] = table.set_column(place, "items", items.cast(value_type))
    data_set = prepare(
        tmp_path / "out",
        tables["train"],
        tables["test"],
        ids=["items"],
        weights={"items": "weights"},
    )
    (feature,) = data_set.schema.id_features
    assert feature.multi_valued
    assert feature.weighted

    def raw(item: int) -> int | str:
        return item if "list" in kind else str(item)

    def bags(frame: pd.DataFrame, column: str) -> list[list[Any]]:
        return [
            [value for value in values if value is not None] if values is not None else []
            for values in frame[column]
        ]

    flat = pd.Series([raw(item) for bag in bags(frames["train"], "items") for item in bag])
    for split, frame in frames.items():
        rows = stored(data_set, split)
        expected = [
            expected_rows(flat, pd.Series([raw(item) for item in bag])).tolist()
            for bag in bags(frame, "items")
        ]
        assert [list(bag) for bag in rows["items"]] == expected
        for found, weights in zip(rows["items__weight"], bags(frame, "weights"), strict=True):
            np.testing.assert_allclose(found, weights, rtol=1e-6)
    assert data_set.statistics.mean_values_per_bag["items"] == len(flat) / len(frames["train"])
    data_set.verify()


def test_single_ids_have_single_weights(tmp_path: Path) -> None:
    train = impressions().assign(weight=lambda frame: frame["price"] / 7)
    train.loc[4, ["user", "weight"]] = np.nan
    data_set = prepare(tmp_path / "out", train, train, weights={"user": "weight"})
    rows = stored(data_set, "train")
    assert list(rows.columns[3:5]) == ["user", "user__weight"]
    np.testing.assert_allclose(rows["user__weight"], train["weight"], rtol=1e-6)
    np.testing.assert_array_equal(rows["user"], expected_rows(train["user"], train["user"]))


def test_columns_that_share_a_table_share_its_vocabulary(tmp_path: Path) -> None:
    train = impressions().assign(friend=lambda frame: np.roll(frame["user"], 7) + 2)
    data_set = prepare(
        tmp_path / "out",
        train,
        train,
        ids=["user", "city", "friend"],
        shared_tables={"people": ["user", "friend"]},
    )
    people = pd.concat([train["user"], train["friend"]])
    rows = stored(data_set, "train")
    for name in ("user", "friend"):
        np.testing.assert_array_equal(rows[name], expected_rows(people, train[name]))
    assert data_set.schema.table("people").num_embeddings == people.nunique() + 1
    assert [table.name for table in data_set.schema.tables] == ["people", "city"]


def test_a_text_in_one_column_makes_texts_of_all_that_share_its_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("c,b,seller,buyer\n1,1,7,8\n1,0,8,x\n0,0,7,7\n")
    data_set = prepare_table(
        tmp_path / "out",
        train=tmp_path / "a.csv",
        test=tmp_path / "a.csv",
        click="c",
        conversion="b",
        ids=["seller", "buyer"],
        shared_tables={"people": ["seller", "buyer"]},
        min_count=1,
    )
    assert data_set.vocabulary("people").raw_ids.to_pylist() == ["7", "8", "x"]


def test_optional_columns_are_stored(tmp_path: Path) -> None:
    train = impressions().assign(
        key=lambda frame: 2**62 + frame.index[::-1],
        stamp=lambda frame: frame.index * 1000.0,
        ctr=0.25,
        cvr=np.linspace(0, 1, 300),
    )
    data_set = prepare(
        tmp_path / "out",
        train,
        train,
        sample_id="key",
        group_id="user",
        timestamp="stamp",
        true_ctr="ctr",
        true_cvr="cvr",
    )
    assert data_set.columns == {"group_id", "timestamp", "true_ctr", "true_cvr"}
    rows = stored(data_set, "test")
    for stored_name, raw in (
        ("sample_id", "key"),
        ("group_id", "user"),
        ("timestamp", "stamp"),
        ("true_ctr", "ctr"),
    ):
        np.testing.assert_array_equal(rows[stored_name], train[raw])
    np.testing.assert_allclose(rows["true_cvr"], train["cvr"], rtol=1e-6)


def test_texts_are_groups_by_a_hash_that_never_changes(tmp_path: Path) -> None:
    train = impressions()
    data_set = prepare(tmp_path / "out", train, train, group_id="city")
    groups = stored(data_set, "train")["group_id"]
    assert groups.groupby(train["city"]).nunique().eq(1).all()
    assert groups.nunique() == train["city"].nunique()
    assert groups[train["city"] == "Oslo"].iloc[0] == -8338374106956743200


def test_the_source_says_how_it_was_made_without_paths(tmp_path: Path) -> None:
    train = _as_csv(impressions(), tmp_path / "train")
    data_set = prepare(tmp_path / "out", train, impressions(seed=1), min_count=2)
    text = (data_set.path / "dataset.json").read_text()
    assert str(tmp_path) not in text
    assert data_set.source["kind"] == "table"
    assert data_set.source["files"] == {"train": ["train.csv"], "test": ["DataFrame"]}
    columns = json.loads(text)["source"]["columns"]
    assert msgspec.convert(columns, TableColumns).labels["click"] == "clicked"
    assert columns["ids"] == ROLES["ids"]


@pytest.mark.parametrize("policy", ["error", "drop", "keep"])
def test_conversions_without_a_click(policy: str, tmp_path: Path) -> None:
    train, test = impressions(), impressions(seed=1)
    train.loc[[40, 41], ["clicked", "bought", "city"]] = [0, 1, "only here"]
    path = _as_csv(train, tmp_path / "train")
    if policy == "error":
        with pytest.raises(DataError, match=r"train\.csv, line 42: .*`unclicked_conversions`"):
            prepare(tmp_path / "out", path, test)
        assert not (tmp_path / "out").exists()
        return
    data_set = prepare(tmp_path / "out", path, test, unclicked_conversions=policy)
    rows = stored(data_set, "train")
    assert data_set.source["unclicked_conversion_rows"] == {"train": 2, "test": 0}
    texts = data_set.vocabulary("city").raw_ids.to_pylist()
    if policy == "drop":
        assert data_set.dropped == {"train": {"conversions without a click": 2}, "test": {}}
        np.testing.assert_array_equal(rows["sample_id"], train.index.drop([40, 41]))
        assert "only here" not in texts
    else:
        assert data_set.dropped == {"train": {}, "test": {}}
        assert len(rows) == len(train)
        assert not rows.loc[[40, 41], ["click", "conversion"]].any(axis=None)
        assert "only here" in texts


BAD_VALUES = [
    ("clicked", "2", "'2' is not a label, 0 or 1"),
    ("bought", "maybe", "'maybe' is not a label"),
    ("clicked", "", "the value is missing and must be a label"),
    ("price", "n/a", "'n/a' is not a finite number"),
    ("price", "inf", "'inf' is not a finite number"),
    ("price", "1,5", "'1,5' is not a finite number"),
    ("key", "x7", "'x7' is not an integer of 64 bits"),
    ("key", "", "the value is missing and must be an integer"),
    ("key", str(2**64), "is not an integer of 64 bits"),
    ("chance", "1.01", "'1.01' is not a probability"),
]


@pytest.mark.parametrize(("column", "value", "sentence"), BAD_VALUES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_value_is_named_by_file_line_and_column(
    column: str, value: str, sentence: str, split: str, tmp_path: Path
) -> None:
    roles = {"sample_id": "key", "true_ctr": "chance"}
    paths = {}
    for name in ("train", "test"):
        frame = impressions(60).assign(key=np.arange(60), chance=0.5).astype(str)
        if name == split:
            frame.loc[17, column] = value
        paths[name] = _as_csv(frame, tmp_path / name)
    with pytest.raises(DataError) as raised:
        prepare(tmp_path / "out", paths["train"], paths["test"], **roles)
    message = str(raised.value)
    assert message.startswith(f"{paths[split]}, line 19, column {column!r}: ")
    assert sentence in message
    assert message.endswith("fix it, or skip up to N bad rows with `max_bad_rows` N")
    assert not list(tmp_path.glob("out*"))

    data_set = prepare(tmp_path / "out", paths["train"], paths["test"], max_bad_rows=1, **roles)
    kept = np.delete(np.arange(60), 17)
    np.testing.assert_array_equal(stored(data_set, split)["sample_id"], kept)
    assert data_set.dropped[split] == {"bad rows": 1}
    assert data_set.dropped_rows[split] == (message.partition("; fix it")[0],)
    assert data_set.splits["train"].impressions + data_set.splits["test"].impressions == 119


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("clicked", 0.5, "0.5 is not a label, 0 or 1"),
        ("price", np.inf, "inf is not a finite number"),
        ("user", 1.5, "1.5 is not an integer, as the ids of this column are"),
        ("user", 2.0**60, "is a float too large to be exact"),
    ],
)
def test_a_bad_value_of_a_frame_is_named_by_its_row(
    column: str, value: Any, sentence: str, tmp_path: Path
) -> None:
    train = impressions().astype({"clicked": float, "user": float})
    train.loc[123, column] = value
    with pytest.raises(DataError, match="the train DataFrame, row 123, ") as raised:
        prepare(tmp_path / "out", train, impressions())
    assert sentence in str(raised.value)
    parquet = _as_parquet(train, tmp_path / "a")
    with pytest.raises(DataError, match=r"a\.parquet, row 123, ") as raised:
        prepare(tmp_path / "out", parquet, impressions())
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("items", "weights", "sentence"),
    [
        ([1, 2], [0.5], "column 'weights': 1 weights beside 2 ids in 'items'"),
        ([1, 2], None, "column 'weights': 0 weights beside 2 ids"),
        ([1, 2], [0.5, None], "column 'weights': the list holds a weight that is missing"),
        ([1, 2], [np.inf, 1.0], "column 'weights': the list holds a weight that is missing"),
        ([1, 2.5], [1.0, 1.0], "column 'items': the list holds a value that is not an id"),
    ],
)
def test_a_bad_list_is_named_by_its_row(
    items: Any, weights: Any, sentence: str, tmp_path: Path
) -> None:
    train = with_histories(impressions())
    train.at[37, "items"], train.at[37, "weights"] = items, weights
    options: dict[str, Any] = {"ids": ["items"], "weights": {"items": "weights"}}
    with pytest.raises(DataError, match="row 37, ") as raised:
        prepare(tmp_path / "out", train, train, **options)
    assert sentence in str(raised.value)
    data_set = prepare(tmp_path / "out", train, train, max_bad_rows=2, **options)
    without = prepare(tmp_path / "without", train.drop(37), train.drop(37), **options)
    rows, others = stored(data_set, "train"), stored(without, "train")
    assert rows["items"].map(list).tolist() == others["items"].map(list).tolist()
    assert rows["items__weight"].map(list).tolist() == others["items__weight"].map(list).tolist()


def test_a_line_with_other_than_the_headers_fields_is_named(tmp_path: Path) -> None:
    path = _as_csv(impressions(50), tmp_path / "train")
    lines = path.read_text().splitlines(keepends=True)
    lines[10] = "1,1,7\n"
    lines[20] = lines[20].rstrip("\n") + ",8\n"
    lines[30] = lines[30].replace("1", "2", 1) if lines[30][0] == "1" else "9" + lines[30][1:]
    path.write_text("\n".join(["".join(lines[:5]), "".join(lines[5:])]))  # And an empty line.
    test = impressions()
    with pytest.raises(DataError, match=r"line 12: 3 fields, but the header has 7; fix it"):
        prepare(tmp_path / "out", path, test)
    with pytest.raises(DataError, match=r"more than 1 bad rows .*line 22: 8 fields"):
        prepare(tmp_path / "out", path, test, max_bad_rows=1)
    data_set = prepare(tmp_path / "out", path, test, max_bad_rows=3)
    assert data_set.splits["train"].impressions == 47
    assert data_set.dropped["train"] == {"bad rows": 3}
    assert {sentence.partition(":")[0] for sentence in data_set.dropped_rows["train"]} == {
        f"{path}, line 12",
        f"{path}, line 22",
        f"{path}, line 32, column 'clicked'",
    }


def test_integers_beyond_64_bits_are_text(tmp_path: Path) -> None:
    small = impressions(60)
    large = small.assign(user=small["user"].astype(str)).replace({"user": {"-2": str(2**63)}})
    assert (large["user"] == str(2**63)).any()
    data_set = prepare(
        tmp_path / "out", _as_csv(large, tmp_path / "large"), small.astype({"user": str})
    )
    assert str(2**63) in data_set.vocabulary("user").raw_ids.to_pylist()
    with pytest.raises(DataError, match=r"the id \d+ is over 9223372036854775807; store such ids"):
        prepare(tmp_path / "no", _as_csv(small, tmp_path / "small"), tmp_path / "large.csv")
    typed = small.assign(user=np.uint64(2**63))
    with pytest.raises(DataError, match=r"row 0, column 'user': the id \d+ is over"):
        prepare(tmp_path / "no", typed, typed)


def _frame_with(**columns: Any) -> pd.DataFrame:
    return impressions().assign(**columns)


@pytest.mark.parametrize(
    ("train", "options", "sentence"),
    [
        (
            _frame_with(),
            {"click": "Click"},
            "has no column 'Click' (`click`); did you mean 'clicked'",
        ),
        (_frame_with(), {"dense": ["zzzz"]}, "has no column 'zzzz' (`dense`); it has 'clicked', "),
        (
            pd.concat([_frame_with(), _frame_with()[["user"]]], axis=1),
            {},
            "has the column 'user' 2 times; rename one",
        ),
        (
            _frame_with(price=pd.Timestamp("2026-01-01")),
            {},
            "the train DataFrame: column 'price' holds timestamp",
        ),
        (
            _frame_with(user=pd.Timestamp("2026-01-01")),
            {},
            "in column 'user', but ids must be integers or text; convert it",
        ),
        (
            _frame_with(user=[1, "a"] * 150),
            {},
            "column 'user': its values are not of one type",
        ),
        (
            _frame_with(user=[[1]] * 300),
            {},
            "the test DataFrame has int64 in column 'user' and the train DataFrame has list<",
        ),
        (
            _frame_with(user="a"),
            {},
            "the test DataFrame has int64 in column 'user' and the train DataFrame has ",
        ),
        (
            _frame_with(clicked=0, bought=0),
            {},
            "the train split has 300 impressions but no click",
        ),
        (_frame_with()[:0], {}, "the train split has no impression"),
        (
            _frame_with(price=np.tile([1.7e308, -1.7e308], 150)),
            {"dense": {"price": "as-is"}},
            "column 'price' holds 1.7e+308, too far from its training values for a 32-bit float",
        ),
        ([], {}, "there is no train file; give at least one"),
    ],
)
def test_a_table_that_cannot_be_prepared_is_refused_in_a_sentence(
    train: Any, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    test = impressions(seed=1)
    test["timestamp"] = 1
    with pytest.raises(DataError) as raised:
        prepare(tmp_path / "out", train, test, **options)
    assert sentence in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", None, "does not exist; check the path"),
        ("a.parquet", None, "does not exist; check the path"),
        ("a.xlsx", b"x", "has an unknown file type; its name must end in one of .csv, "),
        ("a.csv", b"", "is empty; give a file with a header and rows"),
        ("a.csv", b"\n\n", "has no header"),
        ("a.csv", b"clicked,bought\n1,\xff\n", ", line 2: the text is not UTF-8"),
        ("a.csv.gz", b"clicked", "cannot be read ("),
        ("a.parquet", b"PAR1PAR1", "is not a Parquet file, or is damaged or cut short"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(
    name: str, content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        prepare(tmp_path / "out", tmp_path / name, tmp_path / name)
    assert sentence in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


def test_folders_and_patterns_stand_for_their_files_in_order(tmp_path: Path) -> None:
    frame = impressions(90)
    logs = tmp_path / "logs"
    logs.mkdir()
    for number, name in enumerate(("b", "a", "c")):
        frame[30 * number : 30 * number + 30].to_csv(logs / f"{name}.csv", index=False)
    (logs / "_SUCCESS").write_text("")
    in_order = pd.concat([frame[30:60], frame[:30], frame[60:]], ignore_index=True)
    expected = prepare(tmp_path / "expected", in_order, in_order)
    for name, given in (("folder", logs), ("pattern", str(logs / "*.csv")), ("both", [logs])):
        assert prepare(tmp_path / name, given, given).checksums == expected.checksums
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(DataError, match=r"a\.parquet is a folder without any \.csv"):
        prepare(tmp_path / "out", tmp_path / "a.parquet", impressions())
    with pytest.raises(DataError, match=r"no file matches .*\*\.tsv; check the pattern"):
        prepare(tmp_path / "out", logs / "*.tsv", impressions())


def test_a_parquet_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = _as_parquet(impressions(), tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is damaged or cut short"):
        prepare(tmp_path / "out", path, impressions())


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("keep")
    with pytest.raises(DataError, match="already exists; remove it or choose another folder"):
        prepare(tmp_path / "out", impressions(), impressions())
    assert (tmp_path / "out/mine").read_text() == "keep"


def test_files_of_one_split_must_agree_on_the_type_of_ids(tmp_path: Path) -> None:
    numbers = _as_csv(impressions(), tmp_path / "numbers")
    texts = _as_parquet(impressions().astype({"user": str}), tmp_path / "texts")
    more = _as_parquet(impressions(), tmp_path / "more")
    # An untyped file adopts the types of typed files, be they first, last or in the test split.
    data_set = prepare(tmp_path / "out", [numbers, texts], texts)
    assert data_set.vocabulary("user").kind == "text"
    with pytest.raises(DataError, match=r"more\.parquet has int64 .*texts\.parquet has .*string"):
        prepare(tmp_path / "no", [texts, more], texts)
    with pytest.raises(DataError, match=r"texts\.parquet has .*string.* but the training files"):
        prepare(tmp_path / "no", numbers, texts)
    words = _as_csv(impressions().assign(user="x"), tmp_path / "words")
    with pytest.raises(
        DataError, match=r"words\.csv, line 2, column 'user': 'x' is not an integer"
    ):
        prepare(tmp_path / "no", numbers, words)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"ids": [], "dense": []},
            "there is no feature; name at least one column with `ids` or `dense`",
        ),
        ({"conversion": "clicked"}, "'clicked' is both `click` and `conversion`"),
        ({"dense": ["bought"]}, "'bought' is both `conversion` and a feature"),
        ({"true_ctr": "price"}, "'price' is both `true_ctr` and a feature"),
        ({"ids": ["user", "user"]}, "`ids` or `texts` names the column 'user' twice"),
        ({"weights": {"age": "price"}}, "`weights` names 'age', which is not an `ids` column"),
        (
            {"shared_tables": {"t": ["age"]}},
            "`shared_tables` t names 'age', which is not an `ids` column",
        ),
        (
            {"shared_tables": {"t": ["user"], "u": ["user"]}},
            "`shared_tables` puts 'user' into 't' and into 'u'",
        ),
        (
            {"shared_tables": {"city": ["user"]}},
            "`shared_tables` has 'city', which is the name of an `ids` column",
        ),
        ({"min_count": 0}, "`min_count` must be 1 or more, not 0"),
        ({"dense": {"price": "logg"}}, "the method 'logg' of the dense column 'price' is not one"),
        ({"max_bad_rows": -1}, "`max_bad_rows` must be 0 or more, not -1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as raised:
        prepare(tmp_path / "out", impressions(), impressions(), **options)
    assert sentence in str(raised.value)


def test_rows_that_many_strings_are_looked_up_in_are_right(tmp_path: Path) -> None:
    # Above some tens of thousands of strings, another look-up algorithm is used.
    random = np.random.default_rng(0)
    train = impressions(120_000).assign(user=random.integers(0, 10**6, 120_000).astype(str))
    test = impressions(20_000).assign(user=random.integers(0, 10**6, 20_000).astype(str))
    test.loc[::97, "user"] = None
    data_set = prepare(tmp_path / "out", train, test, ids=["user"])
    raw = pq.read_table(data_set.path / "vocabulary/user.parquet").to_pandas()
    assert len(raw) > 100_000
    rows = test[["user"]].merge(raw, how="left", left_on="user", right_on="raw_id")["row"]
    rows = rows.fillna(0).mask(test["user"].isna())
    np.testing.assert_array_equal(stored(data_set, "test")["user"], rows)


@pytest.mark.skipif(
    not HILLSTROM.exists(),
    reason="the Hillstrom e-mail log is not here; HILLSTROM_CSV says where it is",
)
def test_hillstrom(tmp_path: Path) -> None:
    frame = pd.read_csv(HILLSTROM)
    is_train = np.random.default_rng(0).random(len(frame)) < 0.8
    frame[is_train].to_csv(tmp_path / "train.csv", index=False)
    frame[~is_train].to_csv(tmp_path / "test.csv", index=False)
    names = ["history_segment", "mens", "womens", "zip_code", "newbie", "channel", "segment"]
    data_set = prepare_table(
        tmp_path / "out",
        train=tmp_path / "train.csv",
        test=tmp_path / "test.csv",
        click="visit",
        conversion="conversion",
        ids=names,
        dense={"recency": "auto", "history": "standard"},
        min_count=1,
    )
    both = [data_set.splits[split] for split in ("train", "test")]
    assert sum(split.impressions for split in both) == 64_000
    assert sum(split.happened["click"] for split in both) == 9_394
    assert sum(split.happened["conversion"] for split in both) == 578
    for name in names:
        assert data_set.schema.table(name).num_embeddings == frame[name].nunique() + 1
    rows = stored(data_set, "test")
    assert (rows[names] > 0).all(axis=None)
    history = frame["history"][is_train]
    np.testing.assert_allclose(
        rows["history"],
        (frame["history"][~is_train] - history.mean()) / history.std(ddof=0),
        rtol=1e-4,
        atol=1e-5,
    )
