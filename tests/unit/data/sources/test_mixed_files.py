"""Files of one log that pandas, polars, Arrow and text wrote differently, and files given twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.cli.prepare_table import Options, run
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import DataError, OptionError
from tests.unit.data.sources.test_tabular import stored

ROWS = 200
ROLES: dict[str, Any] = {"click": "click", "ids": ["item"], "min_count": 1}
LARGE = 12_345_678_901


def log(seed: int = 0, **columns: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    click = (np.arange(ROWS) % 3 == 0).astype(np.int8)
    return {"click": click, "item": random.integers(0, 9, ROWS), **columns}


def users(seed: int = 0) -> np.ndarray:
    return LARGE + np.random.default_rng(seed).integers(0, 50, ROWS)


def in_both(data_set: PreparedDataSet) -> set[int]:
    """Returns the groups that occur both in training and in test."""
    return set(stored(data_set, "train")["group_id"]) & set(stored(data_set, "test")["group_id"])


@pytest.mark.parametrize(
    "second",
    [
        pa.array(users().astype(float)),
        pa.array(users()).cast(pa.decimal128(22, 2)),
        pa.array(users()).cast(pa.string()),
    ],
    ids=["float64", "decimal", "text"],
)
def test_a_group_is_in_one_split_whatever_types_its_files_have(
    tmp_path: Path, second: pa.Array
) -> None:
    first = tmp_path / "a.parquet"
    pq.write_table(pa.table(log(u=users())), first)
    if pa.types.is_string(second.type):  # text has no type: 7 and 7.0 are one id
        other = tmp_path / "b.csv"
        pa.table(log(u=second)).to_pandas().assign(u=lambda f: f["u"] + ".0").to_csv(
            other, index=False
        )
    else:
        other = tmp_path / "b.parquet"
        pq.write_table(pa.table(log(u=second)), other)
    data_set = prepare_table(
        tmp_path / "out", train=[first, other], split="group:u:0.5", group_id="u", **ROLES
    )
    assert min(split.impressions for split in data_set.splits.values()) > ROWS // 2
    assert not in_both(data_set)


def test_rows_with_nan_for_a_group_are_groups_of_their_own(tmp_path: Path) -> None:
    nan = pa.array(np.full(ROWS, np.nan))
    assert nan.null_count == 0
    sizes = [
        tuple(
            split.impressions
            for split in prepare_table(
                tmp_path / name, train=pa.table(log(u=column)), split="group:u:0.5", **ROLES
            ).splits.values()
        )
        for name, column in (("nan", nan), ("null", pa.nulls(ROWS, pa.float64())))
    ]
    assert sizes[0] == sizes[1]
    assert min(sizes[0]) > ROWS // 4


@pytest.mark.parametrize("column", [[[1]] * ROWS, [b"\xff"] * ROWS], ids=["list", "binary"])
def test_a_column_that_cannot_be_a_group_is_named(tmp_path: Path, column: list[Any]) -> None:
    with pytest.raises(DataError, match=r"column 'u' holds .*; name a column of integers or text"):
        prepare_table(tmp_path / "out", train=pa.table(log(u=column)), split="group:u:0.5", **ROLES)


def test_a_pattern_of_folders_and_files_gives_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "log" / "sub").mkdir(parents=True)
    for seed, name in enumerate(("a.csv", "sub/b.csv")):
        pd.DataFrame(log(seed)).to_csv(tmp_path / "log" / name, index=False)
    data_set = prepare_table(
        tmp_path / "out", train=f"{tmp_path}/log/**", split="share:0.5", **ROLES
    )
    assert sum(split.impressions for split in data_set.splits.values()) == 2 * ROWS


def test_a_file_given_twice_is_refused_and_one_of_both_splits_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    for seed, name in enumerate(("a.csv", "b.csv")):
        pd.DataFrame(log(seed)).to_csv(folder / name, index=False)
    with pytest.raises(DataError, match=r"a\.csv is given twice as a train file; give it once"):
        prepare_table(
            tmp_path / "out", train=[folder, folder / "a.csv"], split="share:0.5", **ROLES
        )
    run(
        Options(
            tmp_path / "out",
            train=(str(folder),),
            test=(str(folder / "b.csv"),),
            click="click",
            id=("item",),
        )
    )
    assert "warning: b.csv is both a training and a test file" in capsys.readouterr().out


def test_lists_in_a_categorical_column_are_lists(tmp_path: Path) -> None:
    texts = np.array(["1|5", "9", "5|1|7"])[np.arange(ROWS) % 3]
    for name, column in (("text", texts), ("categories", pd.Categorical(texts))):
        pd.DataFrame(log(seen=column)).to_parquet(tmp_path / f"{name}.parquet")
    for files in (["categories"], ["text", "categories"]):
        data_set = prepare_table(
            tmp_path / "-".join(files),
            train=[tmp_path / f"{name}.parquet" for name in files],
            split="share:0.8",
            list_separator="|",
            **(ROLES | {"ids": ["seen"]}),
        )
        assert data_set.schema.id_features[0].multi_valued
        assert data_set.schema.tables[0].num_embeddings == 5


def test_a_label_that_is_nan_is_missing(tmp_path: Path) -> None:
    click = np.arange(ROWS) % 2
    order = pa.array(np.where(click == 1, np.arange(ROWS) % 4 == 1, np.nan))
    assert order.null_count == 0
    data_set = prepare_table(
        tmp_path / "out",
        train=pa.table(log(order=order) | {"click": click}),
        split="share:0.8",
        conversion="order",
        **ROLES,
    )
    assert sum(split.impressions for split in data_set.splits.values()) == ROWS
    assert sum(split.happened["conversion"] for split in data_set.splits.values()) == ROWS // 4


def test_times_of_two_forms_are_refused(tmp_path: Path) -> None:
    typed = pa.array(1_700_000_000_000 + 1000 * np.arange(ROWS)).cast(pa.timestamp("ms"))
    frames = {
        "typed": pa.table(log(t=typed)),
        "integers": pa.table(log(t=1_600_000_000_000 + 1000 * np.arange(ROWS))),
    }
    for name, table in frames.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    frames["typed"].to_pandas().to_csv(tmp_path / "text.csv", index=False)
    integers, text = tmp_path / "integers.parquet", tmp_path / "text.csv"
    for first, second in (("typed.parquet", integers), ("integers.parquet", text)):
        with pytest.raises(DataError, match=r"column 't' and .* has .*; give both one form"):
            prepare_table(
                tmp_path / "out", train=[tmp_path / first, second], split="time:t:0.5", **ROLES
            )
    prepare_table(
        tmp_path / "out", train=[tmp_path / "typed.parquet", text], split="time:t:0.5", **ROLES
    )


def test_times_that_are_none_are_named(tmp_path: Path) -> None:
    table = pa.table(log(t=["03/15/2026 09:30"] * ROWS))
    with pytest.raises(DataError, match=r"row 0, column 't': '03/15/2026 09:30' is not a time"):
        prepare_table(tmp_path / "out", train=table, split="time:t:0.5", **ROLES)


@pytest.mark.parametrize(
    ("roles", "name"),
    [
        ({"ids": ["item", "t__hour"], "time_features": ["t"]}, "t__hour"),
        ({"ids": ["timestamp", "timestamp__id"]}, "timestamp__id"),
        ({"ids": ["item"], "dense": ["item", "item__dense"]}, "item__dense"),
    ],
)
def test_two_features_of_one_name_are_refused(
    tmp_path: Path, roles: dict[str, Any], name: str
) -> None:
    with pytest.raises(OptionError, match=f"two features would be called '{name}'"):
        prepare_table(tmp_path / "out", train=pa.table(log()), split="share:0.5", **(ROLES | roles))


@pytest.mark.parametrize("split", ["share:0.5", "group:u:0.5"])
def test_string_views_are_text(tmp_path: Path, split: str) -> None:
    texts = pa.array([f"u{n}" for n in range(ROWS)]).cast(pa.string_view())
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.table(log(u=texts)).schema) as file:
        file.write_table(pa.table(log(u=texts)))
    data_set = prepare_table(
        tmp_path / "out",
        train=tmp_path / "a.arrow",
        split=split,
        **(ROLES | {"ids": ["item", "u"]}),
    )
    assert sum(of.impressions for of in data_set.splits.values()) == ROWS


def test_a_list_too_long_for_training_is_a_bad_row(tmp_path: Path) -> None:
    lists = [[1, 2]] * ROWS
    lists[7] = [1] * 70_000
    train = pa.table(log(seen=lists))
    roles = ROLES | {"ids": ["seen"]}
    with pytest.raises(DataError, match="row 7, column 'seen': the list holds more than 65535 ids"):
        prepare_table(tmp_path / "out", train=train, split="share:0.5", **roles)
    data_set = prepare_table(
        tmp_path / "out", train=train, split="share:0.5", max_bad_rows=1, **roles
    )
    assert sum(of.impressions for of in data_set.splits.values()) == ROWS - 1


def test_a_suffix_of_compression_may_be_in_capitals(tmp_path: Path) -> None:
    pd.DataFrame(log()).to_csv(tmp_path / "log.csv.gz", index=False)
    (tmp_path / "log.csv.gz").rename(tmp_path / "LOG.CSV.GZ")
    data_set = prepare_table(
        tmp_path / "out", train=tmp_path / "LOG.CSV.GZ", split="share:0.5", **ROLES
    )
    assert sum(of.impressions for of in data_set.splits.values()) == ROWS


def test_a_day_reports_how_its_own_text_was_read(tmp_path: Path) -> None:
    pd.DataFrame(log()).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(log(1)).to_csv(tmp_path / "b.tsv", index=False, sep="\t")
    prepare_table(tmp_path / "out", train=tmp_path / "a.csv", split="share:0.5", **ROLES)
    added = append_table(tmp_path / "out", train=tmp_path / "b.tsv")
    assert added.source["text_forms"] == ["separator tab, encoding UTF-8"]


@pytest.mark.parametrize(
    "options",
    [
        {"dense": ("price:log", "price:quantile")},
        {"click": None, "actions": ("click=a", "click=b", "order=c")},
    ],
)
def test_a_name_given_twice_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    values: dict[str, Any] = {"train": ("a.csv",), "split": "share:0.5", "id": ("item",)}
    with pytest.raises(OptionError, match="twice; name it once"):
        run(Options(tmp_path / "out", **(values | {"click": "click"} | options)))


def test_a_column_without_any_value_is_of_the_kind_of_the_others(tmp_path: Path) -> None:
    pq.write_table(pa.table(log(u=[f"u{n % 9}" for n in range(ROWS)])), tmp_path / "a.parquet")
    pq.write_table(pa.table(log(u=np.full(ROWS, np.nan))), tmp_path / "b.parquet")
    data_set = prepare_table(
        tmp_path / "out",
        train=[tmp_path / "a.parquet", tmp_path / "b.parquet"],
        split="share:0.8",
        **(ROLES | {"ids": ["u"]}),
    )
    assert data_set.schema.tables[0].num_embeddings == 10
    assert abs(data_set.statistics.missing["u"]["train"] - 0.5) < 0.1
