"""Tables as found in practice: one file, lists in text, times, words, labels in words, no group."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.delimited_text import TextFormat
from esmm_torchrec.data.sources.raw_ids import read_tokens
from esmm_torchrec.data.sources.raw_times import read_time_part, read_times
from esmm_torchrec.data.sources.row_split import RowSplit
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import DataError, OptionError
from tests.prepared_data import encode


def log(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    clicked = random.random(rows) < 0.4
    bought = clicked & (random.random(rows) < 0.5)
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return pd.DataFrame(
        {
            "clicked": clicked.astype(int),
            "bought": bought.astype(int),
            "user": random.integers(0, 30, rows),
            "items": [random.integers(0, 9, random.integers(0, 4)).tolist() for _ in range(rows)],
            "price": random.lognormal(size=rows),
            "when": [start + dt.timedelta(minutes=int(m)) for m in random.integers(0, 9000, rows)],
        }
    )


ROLES: dict[str, Any] = {"click": "clicked", "conversion": "bought", "ids": ["user"]}


def prepare(out: Path, train: Any, test: Any = None, **options: Any) -> PreparedDataSet:
    return prepare_table(out, train=train, test=test, **(ROLES | {"min_count": 1} | options))


def stored(data_set: PreparedDataSet, split: str) -> pd.DataFrame:
    files = data_set.impression_files(split)  # type: ignore[arg-type]
    return pd.concat([pq.read_table(file).to_pandas() for file in files], ignore_index=True)


# One table, divided


def test_a_split_by_time_puts_the_latest_rows_into_the_test(tmp_path: Path) -> None:
    frame = log()
    data_set = prepare(tmp_path / "out", frame, split="time:when:0.8", timestamp="when")
    train, test = (stored(data_set, split) for split in ("train", "test"))
    assert train["timestamp"].max() < test["timestamp"].min()
    assert len(train) + len(test) == len(frame)
    assert 0.8 <= len(train) / len(frame) < 0.82
    assert sorted([*train["sample_id"], *test["sample_id"]]) == list(range(len(frame)))
    seconds = frame["when"].map(lambda when: int(when.timestamp()))
    np.testing.assert_array_equal(test["timestamp"], seconds[test["sample_id"]])


def test_a_split_by_group_keeps_groups_together(tmp_path: Path) -> None:
    frame = log(2000).assign(user=lambda rows: rows["user"] * 7)
    data_set = prepare(tmp_path / "out", frame, split="group:user:0.5", group_id="user")
    train, test = (stored(data_set, split) for split in ("train", "test"))
    assert not set(train["group_id"]) & set(test["group_id"])
    assert len(train) + len(test) == 2000
    assert set(train["group_id"]) | set(test["group_id"]) == set(frame["user"])


def test_a_split_by_share_is_the_same_in_every_run_and_block(tmp_path: Path) -> None:
    frame = log(5000)
    data_set = prepare(tmp_path / "out", frame, split="share:0.7")
    rows = [data_set.splits[split].impressions for split in ("train", "test")]  # type: ignore[index]
    assert sum(rows) == 5000
    assert rows[0] / 5000 == pytest.approx(0.7, abs=0.03)
    frame.drop(columns="items").to_csv(tmp_path / "log.csv", index=False)
    again = prepare(tmp_path / "again", tmp_path / "log.csv", split=RowSplit("share", None, 0.7))
    assert again.checksums == data_set.checksums


def test_bad_rows_of_a_divided_table_are_counted_once(tmp_path: Path) -> None:
    frame = log().drop(columns="items").astype(str)
    frame.loc[[7, 200], "clicked"] = "?"
    frame.loc[9, "when"] = ""
    frame.loc[11, "when"] = "soon"
    path = tmp_path / "log.csv"
    frame.to_csv(path, index=False)
    options: dict[str, Any] = {"split": "time:when:0.5"}
    with pytest.raises(DataError, match=r"line 9, column 'clicked': '\?' is not a label"):
        prepare(tmp_path / "out", path, **options)
    path.write_text(path.read_text() + "1,2\n")
    data_set = prepare(tmp_path / "out", path, max_bad_rows=5, **options)
    dropped = sum(data_set.dropped[split].get("bad rows", 0) for split in ("train", "test"))  # type: ignore[index]
    assert dropped == 5
    assert sum(len(stored(data_set, split)) for split in ("train", "test")) == 396
    assert sum(len(rows) for rows in data_set.dropped_rows.values()) == 5


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("share:1", "between 0 and 1, not 1.0"),
        ("share:user:0.5", "must be time:COL:0.8"),
        ("time:0.5", "must be time:COL:0.8"),
        ("day:when:0.5", "is not of the form time:COL:0.8"),
        ("time", "is not of the form time:COL:0.8"),
        (None, "give either `test` files or `split`"),
    ],
)
def test_a_split_that_is_none_is_refused(split: str | None, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as raised:
        prepare(tmp_path / "out", log(), split=split)
    assert sentence in str(raised.value)


def test_rows_of_one_time_cannot_be_divided_by_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'when' holds 1 different times, but `split` needs"):
        prepare(tmp_path / "out", log().assign(when=5), split="time:when:0.5")


# Lists, words and times


@pytest.mark.parametrize("separator", ["|", ", ", ";"])
def test_lists_in_text_are_lists(separator: str, tmp_path: Path) -> None:
    frame = log().assign(power=lambda rows: [[0.5 * i for i in items] for items in rows["items"]])
    written = frame.assign(
        **{
            name: [separator.join(map(str, values)) for values in frame[name]]
            for name in ("items", "power")
        }
    )
    written[:200].to_csv(tmp_path / "a.csv", index=False)
    written[200:].to_csv(tmp_path / "b.csv", index=False)
    options: dict[str, Any] = {"ids": ["user", "items"], "weights": {"items": "power"}}
    expected = prepare(tmp_path / "frame", frame[:200], frame[200:], **options)
    data_set = prepare(
        tmp_path / "text",
        tmp_path / "a.csv",
        tmp_path / "b.csv",
        list_separator=separator,
        **options,
    )
    assert data_set.checksums == expected.checksums
    assert data_set.schema == expected.schema
    encoder = RowEncoder.load(data_set.path)
    encoded = encode(encoder, tmp_path / "b.csv")
    assert encoded["items"].to_pylist() == stored(data_set, "test")["items"].map(list).tolist()
    assert encode(encoder, frame[200:])["items"].equals(encoded["items"])


def test_words_are_ids_of_a_bag(tmp_path: Path) -> None:
    titles = ["Red shoes, SIZE 9", "", "Grüne Schuhe!", "size", "NULL", "红色 鞋子"]
    words = [["red", "shoes", "size", "9"], [], ["grüne", "schuhe"], ["size"], [], ["红色", "鞋子"]]
    assert read_tokens(pa.array([*titles, None]), "title").to_pylist() == [*words, []]
    frame = log(6).assign(clicked=1, bought=1, title=titles)
    data_set = prepare(tmp_path / "out", frame, frame, texts=["title"])
    raw_ids = [None, *data_set.vocabulary("title").raw_ids.to_pylist()]
    rows = stored(data_set, "train")["title"]
    assert [[raw_ids[row] for row in bag] for bag in rows] == words
    encoder = RowEncoder.load(data_set.path)
    new = encode(encoder, frame[:1].assign(title="blue SHOES"))
    assert new["title"].to_pylist() == [[0, raw_ids.index("shoes")]]


TIMES = [
    dt.datetime(2026, 1, 1, 0, 0, 0),  # A Thursday.
    dt.datetime(1969, 12, 31, 23, 59, 59, 500_000),
    dt.datetime(2024, 2, 29, 13, 30, 5),
]
SECONDS = [1767225600, -1, 1709213405]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([*TIMES, None], pa.timestamp("ms")),
        pa.array([*TIMES, None], pa.timestamp("us")),
        pa.array([*TIMES, None], pa.timestamp("ns")),
        pa.array([SECONDS[0], -1, SECONDS[2], None]).cast(pa.timestamp("s")),
        pa.array([*TIMES, None], pa.timestamp("us", "Europe/Berlin")),
        pa.array(["2026-01-01", "1969-12-31 23:59:59.5", "2024-02-29T13:30:05.123456789", ""]),
        pa.array(
            ["2026-01-01T00:00Z", "1970-01-01T01:59:59.5+0200", "2024-02-29 12:00:05-01:30", None]
        ),
        pa.array(["1767225600", "-1", " 1709213405.0", "NULL"]),
        pa.array([*SECONDS, None]),
        pa.array([*map(float, SECONDS), np.nan]),
    ],
    ids=lambda column: str(column.type),
)  # fmt: skip
def test_times_of_every_form(column: pa.Array) -> None:
    times, there, fault = read_times(column, "x")
    assert times[:3].tolist() == SECONDS
    assert there.tolist() == [True, True, True, False]
    assert not fault.rows.any()


def test_hours_and_weekdays() -> None:
    texts = pa.array([time.isoformat() for time in TIMES] + [None])
    milliseconds = pa.array([1767225600_000, 1709213405_000])
    for part, expected in (("hour", [0, 23, 13, None]), ("weekday", [4, 3, 4, None])):
        values, fault = read_time_part(texts, "x", part)  # type: ignore[arg-type]
        assert values.to_pylist() == expected
        assert not fault.rows.any()
        values, _ = read_time_part(milliseconds, "x", part)  # type: ignore[arg-type]
        assert values.to_pylist() == [expected[0], expected[2]]
    for wrong in (pa.array(["yesterday", "20240131"]), pa.array([7, 20240131])):
        assert read_time_part(wrong, "x", "hour")[1].rows.tolist() == [True, True]


def test_parts_of_times_are_features(tmp_path: Path) -> None:
    frame = log()
    data_set = prepare(tmp_path / "out", frame, frame, time_features=["when"])
    for part, of in (
        ("hour", frame["when"].dt.hour),
        ("weekday", frame["when"].dt.day_of_week + 1),
    ):
        raw_ids = [None, *data_set.vocabulary(f"when__{part}").raw_ids.to_pylist()]
        rows = stored(data_set, "train")[f"when__{part}"]
        assert [raw_ids[int(row)] for row in rows] == of.tolist()


# Labels, groups, weights


@pytest.mark.parametrize("words", [("No", "Yes"), ("False", "True"), (-1, 1), ("f", "t")])
def test_labels_in_other_words(words: tuple[Any, Any], tmp_path: Path) -> None:
    frame = log().drop(columns="items")
    expected = prepare(tmp_path / "expected", frame, frame)
    said = frame.assign(
        clicked=frame["clicked"].map(lambda label: words[label]),
        bought=frame["bought"].map(lambda label: words[label]).where(frame["clicked"] == 1, None),
    )
    said.to_csv(tmp_path / "log.csv", index=False)
    assert prepare(tmp_path / "a", said, tmp_path / "log.csv").checksums == expected.checksums
    said.loc[frame["clicked"].idxmax(), "bought"] = None
    with pytest.raises(
        DataError, match="column 'bought': the value is missing and must be a label"
    ):
        prepare(tmp_path / "b", said, said)


def test_a_row_without_a_group_is_a_group_of_its_own(tmp_path: Path) -> None:
    frame = log().assign(user=lambda rows: rows["user"].mask(rows.index % 3 == 0))
    for name, given in (("numbers", frame), ("texts", frame.assign(
        user=frame["user"].map(lambda user: f"u{user:.0f}", na_action="ignore")
    ))):  # fmt: skip
        data_set = prepare(tmp_path / name, given, given, group_id="user")
        train, test = (stored(data_set, split)["group_id"] for split in ("train", "test"))
        alone = frame["user"].isna()
        assert train[~alone].nunique() == frame["user"].nunique()
        assert train[alone].nunique() == alone.sum()
        assert not set(train[alone]) & (set(test[alone]) | set(train[~alone]))


def test_weights_of_impressions_are_stored(tmp_path: Path) -> None:
    frame = log().assign(sure=np.linspace(0, 3, 400))
    data_set = prepare(tmp_path / "out", frame, frame, weight="sure")
    np.testing.assert_allclose(stored(data_set, "test")["sample_weight"], frame["sure"], rtol=1e-6)
    for bad in (-0.5, np.inf, None):
        wrong = frame.assign(sure=frame["sure"].mask(frame.index == 17, bad))
        with pytest.raises(DataError, match=r"row 17, column 'sure': .* a weight, 0 or more"):
            prepare(tmp_path / "no", wrong, frame, weight="sure")


def test_a_column_may_be_an_id_and_dense_and_have_a_reserved_name(tmp_path: Path) -> None:
    frame = log().assign(timestamp=lambda rows: rows["user"] % 5).rename(columns={"user": 5})
    data_set = prepare(
        tmp_path / "out",
        frame,
        frame,
        ids=[5, "timestamp"],
        dense=[5, "price", "timestamp"],
        timestamp="timestamp",
    )
    assert [feature.name for feature in data_set.schema.id_features] == ["5", "timestamp__id"]
    assert data_set.schema.dense_features[:3] == ("5__dense", "price", "timestamp__dense")
    encoded = encode(RowEncoder.load(data_set.path), frame)
    rows = stored(data_set, "train")
    for name in ("5", "timestamp__id", "5__dense", "timestamp__dense"):
        np.testing.assert_array_equal(encoded[name], rows[name])


def test_tables_without_ids_and_without_conversions(tmp_path: Path) -> None:
    frame = log().drop(columns="items")
    dense = prepare(tmp_path / "dense", frame, frame, ids=[], dense=["price"])
    assert dense.schema.dense_features == ("price",)
    (table,) = dense.schema.tables
    assert table.num_embeddings == 2
    assert (
        encode(RowEncoder.load(dense.path), frame[["price"]])[table.name].to_pylist() == [1] * 400
    )
    clicks = prepare(tmp_path / "clicks", frame, frame, conversion=None)
    assert clicks.source["columns"]["labels"] == {"click": "clicked"}
    assert clicks.splits["train"].happened["click"] == frame["clicked"].sum()
    assert clicks.splits["train"].happened["conversion"] == 0


def test_long_names_in_any_script_are_names(tmp_path: Path) -> None:
    name = "这是一个非常长的中文列名用来测试文件名的长度是否会超出限制吗"
    other = name + "二"
    frame = log().rename(columns={"user": name}).assign(**{other: 3})
    data_set = prepare(tmp_path / "out", frame, frame, ids=[name, other])
    assert data_set.vocabulary(other).raw_ids.to_pylist() == [3]
    assert len(data_set.vocabulary(name).raw_ids) == frame[name].nunique()


# One value, one row


@pytest.mark.parametrize(
    "values",
    [
        ["7", "07", "x", "", "NaN", "007", "7.0"],
        ["7", "-3", "12", "", "0", "9223372036854775807", "5"],
        ["9223372036854775808", "7", "18446744073709551615", "", "1", "2", "3"],
        [" a", "a", "a ", "", "null", "A", "ä"],
    ],
)
def test_every_road_gives_a_value_the_same_row(values: list[str], tmp_path: Path) -> None:
    frame = pd.DataFrame({"clicked": 1, "bought": 1, "user": values})
    frame.to_csv(tmp_path / "log.csv", index=False)
    pq.write_table(pa.table(dict(frame)), tmp_path / "log.parquet")
    pyarrow.feather.write_feather(pa.table(dict(frame)), str(tmp_path / "log.arrow"))
    roads = [tmp_path / "log.csv", tmp_path / "log.parquet", tmp_path / "log.arrow", frame,
             pa.table(dict(frame)), frame.astype("category")]  # fmt: skip
    for number, road in enumerate(roads):
        data_set = prepare(tmp_path / str(number), road, road)
        encoder = RowEncoder.load(data_set.path)
        encoded = [encode(encoder, way)["user"].to_pylist() for way in roads]
        assert all(rows == encoded[0] for rows in encoded), road
        missing = [value in ("", "NaN", "null") for value in values]
        assert [row is None for row in encoded[0]] == missing
        assert 0 not in encoded[0]


def test_numbers_never_stand_for_text_ids(tmp_path: Path) -> None:
    frame = pd.DataFrame({"clicked": 1, "bought": 1, "user": ["007", "8", "x"]})
    encoder = RowEncoder.load(prepare(tmp_path / "out", frame, frame).path)
    for numbers in ([7, 8, 9], [7.0, 8.0, np.nan], np.array([7, 8, 2**63], np.uint64)):
        with pytest.raises(DataError, match=r"holds .* but the ids are text; convert it to text"):
            encode(encoder, frame.assign(user=numbers))
    nothing = encode(encoder, frame.assign(user=np.nan))
    assert nothing["user"].to_pylist() == [None] * 3


def test_an_empty_column_of_text_stays_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"clicked": 1, "bought": 1, "user": ["a", "b"]})
    encoder = RowEncoder.load(prepare(tmp_path / "out", frame, frame, min_count=2).path)
    assert encode(encoder, frame)["user"].to_pylist() == [0, 0]
    with pytest.raises(DataError, match="but the ids are text"):
        encode(encoder, frame.assign(user=[1, 2]))


def test_several_tables_are_encoded_one_after_the_other(tmp_path: Path) -> None:
    frame = log().drop(columns="items")
    encoder = RowEncoder.load(prepare(tmp_path / "out", frame, frame).path)
    frame[300:].to_csv(tmp_path / "b.csv", index=False)
    encoded = encode(encoder, [frame[:300], tmp_path / "b.csv"])
    assert encoded.equals(encode(encoder, frame))
    with pytest.raises(DataError, match="a list is not a table; give paths, DataFrames or Arrow"):
        encode(encoder, [[frame]])


def test_text_is_read_for_scoring_as_it_was_for_training(tmp_path: Path) -> None:
    frame = log().drop(columns="items").assign(city="Malmö")
    path = tmp_path / "log.tsv"
    frame.to_csv(path, index=False, sep="~", encoding="cp1252")
    data_set = prepare(
        tmp_path / "out",
        path,
        split="share:0.5",
        ids=["user", "city"],
        text_format=TextFormat(separator="~", encoding="cp1252"),
    )
    encoded = encode(RowEncoder.load(data_set.path), path)
    assert encoded["city"].to_pylist() == [1] * 400


def test_parts_of_a_time_do_not_look_up_the_table_of_its_column(tmp_path: Path) -> None:
    frame = log().assign(start=lambda rows: rows["when"].map(lambda when: int(when.timestamp())))
    data_set = prepare(
        tmp_path / "out",
        frame,
        frame,
        ids=["user", "start"],
        time_features=["start"],
        shared_tables={"numbers": ["user", "start"]},
    )
    tables = {feature.name: feature.table for feature in data_set.schema.id_features}
    assert tables == {
        "user": "numbers",
        "start": "numbers",
        "start__hour": "start__hour",
        "start__weekday": "start__weekday",
    }


def test_columns_of_text_are_stored_in_their_order(tmp_path: Path) -> None:
    names = [f"title{number}" for number in range(8)]
    frame = log(20).assign(**dict.fromkeys(names, "red shoes"))
    data_set = prepare(tmp_path / "out", frame, frame, texts=names)
    assert data_set.source["reading"]["features"]["texts"] == names
