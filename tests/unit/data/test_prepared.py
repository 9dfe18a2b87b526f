import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data import split_writer
from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import Part, Split
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.storage import Location
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import IdFeature
from tests.prepared_data import description_of, record_changed_file

ITEMS = Vocabulary.from_counts(np.array([70, 80, 90]), np.array([5, 4, 3]), 1)
SHOPS = Vocabulary.from_counts(pa.array(["x", "y"]), np.array([2, 2]), 1)
FEATURES = (
    IdFeature("history", "item", multi_valued=True, weighted=True, shared=True),
    IdFeature("item", "item"),
    IdFeature("a.b", "shop/1", weighted=True),
    IdFeature("tags", "shop/1", multi_valued=True),
)
PRICE = DenseTransform("standard", 3.0, 1.5, -4.5, 10.5)


def ints(values: list) -> pa.Array:
    return pa.array(values, pa.int32())


def shared(**changes: Any) -> pa.Table:
    columns = {
        "history": pa.array([[1, 3], [], [2]], pa.list_(pa.int32())),
        "history__weight": pa.array([[0.5, 2.0], [], [1.0]], pa.list_(pa.float32())),
    }
    return pa.table(columns | changes)


def impressions(**changes: Any) -> pa.Table:
    columns = {
        "click": pa.array([1, 0, 1, 0], pa.int8()),
        "conversion": pa.array([1, 0, 0, 0], pa.int8()),
        "sample_id": pa.array([10, 11, 12, 13], pa.int64()),
        "shared_row": ints([0, 0, 2, 0]),
        "group_id": pa.array([7, 7, -8, 7], pa.int64()),
        "true_cvr": pa.array([0.5, 0.0, 1.0, 0.25], pa.float32()),
        "item": ints([1, None, 3, 0]),
        "a.b": ints([None, 2, 1, 1]),
        "a.b__weight": pa.array([None, 0.5, -1.0, 1.0], pa.float32()),
        "tags": pa.array([[1, 1, 2], [], [0], [2]], pa.list_(pa.int32())),
        "price": pa.array([0.5, -1.5, 0.0, 1.0], pa.float32()),
    }
    return pa.table(columns | changes)


def writer(path: Path) -> PreparedWriter:
    return PreparedWriter(
        path,
        id_features=FEATURES,
        dense_features=["price"],
        columns=["true_cvr", "group_id"],
        source={"kind": "test"},
        min_count=1,
    )


def write_vocabularies(to: PreparedWriter) -> None:
    to.write_vocabulary("item", ITEMS)
    to.write_vocabulary("shop/1", SHOPS)
    to.record_dense("price", PRICE)


def write(path: Path, pieces: int = 1) -> PreparedDataSet:
    with writer(path) as to:
        write_vocabularies(to)
        (to.scratch / "something").write_text("x")
        to.record_dropped("train", "bad rows", 2, ["line 3: bad"])
        for split in ("train", "test"):
            to.write_shared(split, shared())
            table = impressions()
            size = -(-len(table) // pieces)
            for start in range(0, len(table), size):
                to.write_impressions(split, table.slice(start, size))
    return PreparedDataSet.open(path)


def test_what_is_opened_is_what_was_written(tmp_path: Path):
    data_set = write(tmp_path / "deep" / "ds")
    data_set.verify()
    assert data_set.splits["train"] == Split(
        impressions=4,
        happened={"click": 2, "conversion": 1},
        shared_rows=3,
        impression_parts=(
            Part(
                "train/impressions-00000.parquet",
                row_groups=(4,),
                bytes=(tmp_path / "deep/ds/train/impressions-00000.parquet").stat().st_size,
                happened={"click": 2, "conversion": 1},
            ),
        ),
        shared_parts=(
            Part(
                "train/shared-00000.parquet",
                row_groups=(3,),
                bytes=(tmp_path / "deep/ds/train/shared-00000.parquet").stat().st_size,
            ),
        ),
    )
    assert {t.name: t.num_embeddings for t in data_set.schema.tables} == {"item": 4, "shop/1": 3}
    assert data_set.schema.id_features == FEATURES
    assert data_set.columns == {"group_id", "true_cvr"}
    assert data_set.dropped == {"train": {"bad rows": 2}, "test": {}}
    assert data_set.dropped_rows == {"train": ("line 3: bad",), "test": ()}
    assert data_set.min_count == 1
    assert data_set.statistics.dense == {"price": PRICE}
    # ids / rows: three in three shared rows; of four impressions three, three and five.
    assert data_set.statistics.mean_values_per_bag == {
        "history": 1.0,
        "item": 0.75,
        "a.b": 0.75,
        "tags": 1.25,
    }
    # Shared row 1 is used by nobody.
    assert data_set.statistics.impressions_per_shared_row == 2.0
    assert data_set.vocabulary("shop/1").raw_ids.to_pylist() == ["x", "y"]
    (file,) = data_set.impression_files("test")
    assert pq.read_table(file).to_pylist() == impressions().to_pylist()
    assert pq.read_schema(file).names == data_set.impression_columns.names
    (file,) = data_set.shared_files("test")
    assert pq.read_table(file).to_pylist() == shared().to_pylist()
    assert sorted(p.name for p in data_set.path.iterdir()) == [
        "dataset.json",
        "rare",
        "test",
        "train",
        "vocabulary",
    ]


def test_bytes_depend_on_nothing_but_the_rows(tmp_path: Path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", pieces=3)
    assert first.fingerprint == second.fingerprint
    assert set(first.checksums) == {
        str(file.relative_to(second.path)) for file in second.path.rglob("*.parquet")
    }
    for name, checksum in first.checksums.items():
        assert Location.of(second.path / name).sha256() == checksum


def test_files_and_row_groups_have_a_fixed_number_of_rows(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(split_writer, "ROWS_PER_GROUP", {"impressions": 3, "shared": 2})
    monkeypatch.setattr(split_writer, "ROW_GROUPS_PER_FILE", 2)
    with writer(tmp_path / "ds") as to:
        write_vocabularies(to)
        for split, times in (("train", 4), ("test", 1)):
            to.write_shared(split, shared())
            for _ in range(times):
                to.write_impressions(split, impressions())
    data_set = PreparedDataSet.open(tmp_path / "ds")
    data_set.verify()
    groups = [
        [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        for metadata in map(pq.read_metadata, data_set.impression_files("train"))
    ]
    assert groups == [[3, 3], [3, 3], [3, 1]]
    rows = [row for f in data_set.impression_files("train") for row in pq.read_table(f).to_pylist()]
    assert rows == impressions().to_pylist() * 4


def test_an_interruption_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with writer(tmp_path / "ds") as to:
            write_vocabularies(to)
            to.write_impressions("train", impressions())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_does_not_open_and_is_replaced(tmp_path: Path):
    complete = write(tmp_path / "other")
    shutil.copytree(complete.path, tmp_path / "ds.partial")
    (tmp_path / "ds.partial" / "train" / "impressions-00007.parquet").write_text("half")
    with pytest.raises(DataError, match="interrupted: prepare the data set again"):
        PreparedDataSet.open(tmp_path / "ds")
    assert write(tmp_path / "ds").fingerprint == complete.fingerprint
    assert not (tmp_path / "ds.partial").exists()


def test_a_folder_that_exists_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "mine").write_text("x")
    with pytest.raises(DataError, match="ds already exists; remove it or choose another"):
        write(tmp_path / "ds")
    assert (tmp_path / "ds" / "mine").read_text() == "x"


def write_one(path: Path, kind: str, table: pa.Table) -> None:
    with writer(path) as to:
        write_vocabularies(to)
        (to.write_shared if kind == "shared" else to.write_impressions)("train", table)


LISTS = pa.list_(pa.int32())
FLOATS = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"click": pa.array([1, 0, 2, 0], pa.int8())}, "'click', row 2: the label 2 is neither"),
        ({"conversion": pa.array([1, 1, 0, 0], pa.int8())}, "row 1: conversion without click"),
        ({"sample_id": pa.array([1, 2, None, 4])}, "'sample_id', row 2: a value is missing"),
        ({"item": ints([1, None, 4, 0])}, "'item', row 2: id 4 is outside table 'item' of 4 rows"),
        ({"item": ints([1, None, -1, 0])}, "'item', row 2: id -1 is outside"),
        (
            {"tags": pa.array([[1], [], [1, 3], [2]], LISTS)},
            "'tags', row 2: id 3 is outside table 'shop/1' of 3 rows",
        ),
        ({"tags": pa.array([[1], None, [1], [2]], LISTS)}, "'tags', row 1: a value is missing"),
        ({"tags": pa.array([[1], [None], [1], [2]], LISTS)}, "'tags', row .: a list holds a null"),
        ({"price": pa.array([0, 1, 2, None], pa.float32())}, "'price', row 3: a value is missing"),
        ({"price": pa.array([0, np.inf, 2, 3], pa.float32())}, "'price', row 1: inf is not a fin"),
        (
            {"a.b__weight": pa.array([None, np.nan, 1, 1], pa.float32())},
            "'a.b__weight', row 1: nan is not a finite",
        ),
        (
            {"a.b__weight": pa.array([1, 1, 1, 1], pa.float32())},
            "'a.b__weight', row .: an id without a weight",
        ),
        ({"true_cvr": pa.array([0, 0, 1.5, 0], pa.float32())}, "row 2: 1.5 is not a probability"),
        ({"shared_row": ints([0, -1, 0, 0])}, "a shared row is below 0"),
        ({"item": pa.array([1, 2, 3, 0])}, "has int64 in column 'item' where int32 belongs"),
        ({"more": ints([1, 2, 3, 0])}, "has the foreign column 'more'"),
    ],
)
def test_a_wrong_impression_is_refused(tmp_path: Path, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        write_one(tmp_path / "ds", "impressions", impressions(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"history": pa.array([[1, 3], [], [4]], LISTS)}, "'history', row 2: id 4 is outside"),
        (
            {"history__weight": pa.array([[1], [], [2]], FLOATS)},
            "not as many weights as ids in 'history'",
        ),
        (
            {"history__weight": pa.array([[1, np.inf], [], [2]], FLOATS)},
            "'history__weight', row .: a weight is not a finite number",
        ),
    ],
)
def test_a_wrong_shared_row_is_refused(tmp_path: Path, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        write_one(tmp_path / "ds", "shared", shared(**changes))


def test_a_split_without_what_training_needs_is_refused(tmp_path: Path):
    none = pa.array([0, 0, 0, 0], pa.int8())

    def prepare(train: pa.Table | None, test: pa.Table | None) -> None:
        with writer(tmp_path / "ds") as to:
            write_vocabularies(to)
            for split, table in (("train", train), ("test", test)):
                to.write_shared(split, shared())
                if table is not None:
                    to.write_impressions(split, table)

    with pytest.raises(DataError, match="the test split has no impression"):
        prepare(impressions(), None)
    with pytest.raises(DataError, match="the train split has no impression"):
        prepare(None, impressions())
    with pytest.raises(DataError, match="the train split has 4 impressions but no click"):
        prepare(impressions(click=none, conversion=none), impressions())
    with pytest.raises(DataError, match="points to shared row 3, but there are 3"):
        prepare(impressions(shared_row=ints([0, 0, 3, 0])), impressions())
    assert list(tmp_path.iterdir()) == []
    prepare(impressions(), impressions(click=none, conversion=none))
    assert PreparedDataSet.open(tmp_path / "ds").splits["test"].happened["click"] == 0


def change_description(path: Path, change: Callable[[dict], Any]) -> None:
    description = description_of(path)
    change(description)
    (path / "dataset.json").write_text(json.dumps(description))


def test_a_folder_that_is_no_data_set_does_not_open(tmp_path: Path):
    with pytest.raises(DataError, match=r"dataset\.json is missing\); create one with"):
        PreparedDataSet.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a prepared data set"):
        PreparedDataSet.open(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda d: d.update(format_version=9),
            "format version 9, but this library reads versions 2 and 3",
        ),
        (lambda d: d.pop("format_version"), r"dataset\.json is broken"),
        (lambda d: d["splits"].pop("test"), r"dataset\.json is broken"),
        (lambda d: d["splits"]["test"].update(impressions="x"), r"dataset\.json is broken"),
        (lambda d: d["splits"]["test"].update(impressions=5), "test has 4 rows in its impression"),
        (lambda d: d["splits"]["train"].update(shared_rows=2), "train has 3 rows in its shared"),
        (lambda d: d["schema"]["tables"][0].update(num_embeddings=9), "has 3 ids, but .* says 8"),
        (lambda d: d["schema"].update(dense_features=[]), "other dense features than its schema"),
        (
            lambda d: d["splits"]["test"]["happened"].update(click=-1),
            r"'int' >= 0 - at '\$\.splits",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, change, sentence):
    path = write(tmp_path / "ds").path
    change_description(path, change)
    with pytest.raises(DataError, match=sentence):
        PreparedDataSet.open(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["columns"].remove("true_cvr"), "has the foreign column 'true_cvr'"),
        (lambda d: d["columns"].append("timestamp"), "lacks the column 'timestamp'"),
        (
            lambda d: d["splits"]["test"]["impression_parts"][0].update(row_groups=[2, 2]),
            "has 4 rows in 1 row groups, but dataset.json says 4 in 2",
        ),
    ],
)
def test_what_does_not_fit_a_file_is_found_when_it_is_read(tmp_path: Path, change, sentence):
    path = write(tmp_path / "ds").path
    change_description(path, change)
    with pytest.raises(DataError, match=sentence):
        PreparedDataSet.open(path).verify()


def as_version_2(path: Path) -> None:
    """Describes a data set as the version before did."""

    def change(description: dict) -> None:
        description["format_version"] = 2
        del description["key"]
        for split in description["splits"].values():
            happened = split.pop("happened")
            split |= {"clicks": happened["click"], "conversions": happened["conversion"]}
            for kind in ("impression", "shared"):
                parts = split.pop(f"{kind}_parts")
                split[f"{kind}_files"] = [part["file"] for part in parts]

    change_description(path, change)


def test_the_version_before_is_read(tmp_path: Path):
    now = write(tmp_path / "ds")
    as_version_2(now.path)
    before = PreparedDataSet.open(now.path)
    before.verify()
    assert before.splits["train"].happened == {"click": 2, "conversion": 1}
    assert before.impression_files("train") == now.impression_files("train")
    (part,) = before.splits["train"].impression_parts
    assert part == replace(now.splits["train"].impression_parts[0], happened={})
    assert list(before.checked_rows("train", "impressions")) == list(
        now.checked_rows("train", "impressions")
    )
    shutil.rmtree(now.path / "train")
    assert PreparedDataSet.open(now.path, data_files=False).schema == now.schema
    with pytest.raises(DataError, match=r"impressions-00000\.parquet is missing"):
        PreparedDataSet.open(now.path)


def test_a_changed_value_of_the_description_is_found(tmp_path: Path):
    path = write(tmp_path / "ds").path
    text = (path / "dataset.json").read_text()
    assert '"min_count": 1' in text
    (path / "dataset.json").write_text(text.replace('"min_count": 1', '"min_count": 2'))
    with pytest.raises(DataError, match=r"is broken \(its content does not match its checksum\)"):
        PreparedDataSet.open(path)


def test_what_an_earlier_version_wrote_says_so(tmp_path: Path):
    """Its description has other fields, too."""
    path = write(tmp_path / "ds").path
    old = {"format_version": 1, "columns": {"group_id": True}, "statistics": {"dense": {}}}
    (path / "dataset.json").write_text(json.dumps(old))
    with pytest.raises(
        DataError, match="of format version 1, but this library reads versions 2 and 3;"
    ):
        PreparedDataSet.open(path)


def test_impressions_may_have_weights(tmp_path: Path):
    given = pa.array([0.5, 2.0, 0.0, 1.0], pa.float32())
    with PreparedWriter(
        tmp_path / "ds",
        id_features=[IdFeature("item", "item")],
        columns=["sample_weight"],
        source={},
        min_count=1,
    ) as to:
        to.write_vocabulary("item", ITEMS)
        names = ["click", "conversion", "sample_id", "sample_weight", "item"]
        table = impressions(sample_weight=given).select(names)
        for split in ("train", "test"):
            to.write_impressions(split, table)
        place = names.index("sample_weight")
        negative = table.set_column(place, names[place], pa.array([0, -1, 0, 0], pa.float32()))
        with pytest.raises(DataError, match=r"row 1: the weight -1\.0 is negative"):
            to.write_impressions("train", negative)
    data_set = PreparedDataSet.open(tmp_path / "ds")
    split = MappedSplit.open(data_set, "train")
    assert split.scalars["sample_weight"].tolist() == given.to_pylist()


def test_shares_are_of_impressions_also_where_rows_are_shared(tmp_path: Path):
    statistics = write(tmp_path / "ds").statistics
    # Of four impressions, three use the shared row with two ids and one the row with one.
    assert statistics.missing["history"] == {"train": 0.0, "test": 0.0}
    assert statistics.unknown["history"] == {"train": 0.0, "test": 0.0}
    assert statistics.missing["item"] == {"train": 0.25, "test": 0.25}
    assert statistics.unknown["item"]["test"] == pytest.approx(1 / 3)
    assert statistics.missing["tags"]["train"] == 0.25
    assert statistics.unknown["tags"]["train"] == pytest.approx(1 / 5)
    with writer(tmp_path / "other") as to:
        write_vocabularies(to)
        history = pa.array([[0, 3], [], [2]], LISTS)
        for split in ("train", "test"):
            to.write_impressions(split, impressions(shared_row=ints([0, 0, 2, 1])))
            to.write_shared(split, shared(history=history))
    statistics = PreparedDataSet.open(tmp_path / "other").statistics
    assert statistics.missing["history"]["test"] == 0.25
    assert statistics.unknown["history"]["test"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    "name",
    ["vocabulary/item.parquet", "train/shared-00000.parquet", "test/impressions-00000.parquet"],
)
def test_missing_and_shortened_files_are_named(tmp_path: Path, name):
    path = write(tmp_path / "ds").path
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-20])
    with pytest.raises(DataError, match=rf"{name} (is broken or cut short|has \d+ bytes, but)"):
        PreparedDataSet.open(path)
    (path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        PreparedDataSet.open(path)


def test_verify_finds_a_changed_file(tmp_path: Path):
    data_set = write(tmp_path / "ds")
    (file,) = data_set.impression_files("test")
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    PreparedDataSet.open(data_set.path)
    with pytest.raises(DataError, match=r"impressions-00000\.parquet was changed"):
        data_set.verify()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"item": ints([1, None, 9, 0])}, r"row group 0, column 'item', row 2: id 9 is outside"),
        ({"shared_row": ints([0, 1, 2, 3])}, "row 3: 3 is outside the 3 shared rows"),
        ({"click": pa.array([0, 0, 0, 0], pa.int8())}, "row 0: conversion without click"),
    ],
)
def test_verify_finds_wrong_values_under_a_right_checksum(tmp_path: Path, changes, sentence):
    path = write(tmp_path / "ds").path
    name = "test/impressions-00000.parquet"
    pq.write_table(impressions(**changes), path / name)
    record_changed_file(path, name)
    with pytest.raises(DataError, match=sentence):
        PreparedDataSet.open(path).verify()
