"""Days appended to a prepared data set, compared with all days prepared together."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.cli.main import main
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import EsmmTorchrecError

OPTIONS = {
    "click": "click",
    "conversion": "buy",
    "ids": ["user", "item", "seen"],
    "shared_tables": {"item": ["item", "seen"]},
    "dense": ["price"],
    "group_id": "user",
    "min_count": 3,
}


def _day(number: int, rows: int = 700) -> pd.DataFrame:
    """Returns the rows of a day: new users and items come each day; those of all days are
    skewed."""
    random = np.random.default_rng(number)
    users = np.minimum(random.geometric(0.02, rows), 300) + 20 * number
    items = np.minimum(random.geometric(0.01, rows), 400) + 30 * number
    click = random.random(rows) < 0.3
    return pd.DataFrame(
        {
            "click": click.astype(int),
            "buy": (click & (random.random(rows) < 0.4)).astype(int),
            "user": [f"u{user}" for user in users],
            "item": pd.array(items, "Int64").insert(0, pd.NA)[:rows],
            "seen": [(random.geometric(0.01, n) + 30 * number).tolist() for n in items % 4],
            "price": np.where(random.random(rows) < 0.1, np.nan, random.lognormal(2, 1, rows)),
        }
    )


def _rows(data_set: PreparedDataSet, split: str = "train") -> pa.Table:
    return pa.concat_tables(map(pq.read_table, data_set.impression_files(split)))  # type: ignore[arg-type]


def _raw_ids(data_set: PreparedDataSet, table: pa.Table, column: str, of: str) -> list:
    """Returns the ids of the rows in a column; None for row 0."""
    ids = [None, *data_set.vocabulary(of).raw_ids.to_pylist()]
    return [
        [ids[row] for row in rows]
        if isinstance(rows, list)
        else rows
        if rows is None
        else ids[rows]
        for rows in table[column].to_pylist()
    ]


@pytest.fixture
def days(tmp_path: Path) -> Path:
    """Prepares a data set that trains on day 0 and tests on day 1."""
    prepare_table(tmp_path / "days", train=_day(0), test=_day(1), **OPTIONS)
    return tmp_path / "days"


def test_days_added_one_by_one_are_the_days_prepared_together(days: Path) -> None:
    before = PreparedDataSet.open(days)
    added = [append_table(days, train=_day(n), test=_day(n + 1)) for n in (1, 2)]
    together = prepare_table(
        days.with_name("together"), train=[_day(n) for n in range(3)], test=_day(3), **OPTIONS
    )
    after = PreparedDataSet.open(days)
    assert after.days == ("0001", "0002")
    for table in ("user", "item"):
        first, last, whole = (of.vocabulary(table) for of in (before, after, together))
        assert len(first.raw_ids) < len(last.raw_ids)
        assert last.raw_ids.slice(0, len(first.raw_ids)).equals(first.raw_ids)
        assert (
            added[0]
            .vocabulary(table)
            .raw_ids.equals(last.raw_ids.slice(0, added[0].schema.table(table).num_embeddings - 1))
        )
        counts = dict(zip(whole.raw_ids.to_pylist(), whole.counts.tolist(), strict=True))
        assert dict(zip(last.raw_ids.to_pylist(), last.counts.tolist(), strict=True)) == counts
        assert after.rare_ids(table).equals(together.rare_ids(table))
        assert after.statistics.tables[table] == together.statistics.tables[table]

    rows, whole = _rows(after), _rows(together)
    first = before.splits["train"].impressions
    assert rows.slice(0, first).equals(_rows(before))
    for name in ("click", "conversion", "sample_id", "group_id"):
        assert rows[name].equals(whole[name])
    # Ids with a row on the last day are the same as when all days are prepared together.
    last = added[1].splits["train"].impressions
    for column, table in (("user", "user"), ("item", "item"), ("seen", "item")):
        parts = (after, rows), (together, whole)
        ours, theirs = (_raw_ids(of, r.slice(len(r) - last), column, table) for of, r in parts)
        assert ours == theirs
    # Dense values keep the statistics of the first day.
    assert after.statistics.dense == before.statistics.dense
    ours, theirs = after.statistics, together.statistics
    assert ours.mean_values_per_bag == pytest.approx(theirs.mean_values_per_bag)
    for name, shares in theirs.missing.items():
        assert ours.missing[name] == pytest.approx(shares)
    assert after.splits["train"].happened == together.splits["train"].happened
    assert after.source["files"] == {"train": ["DataFrame"] * 3, "test": ["DataFrame"]}
    for data_set in (after, *added):
        data_set.verify()


def test_shares_of_unknown_ids_are_those_of_the_files(days: Path) -> None:
    append_table(days, train=_day(1), test=_day(2))
    after = PreparedDataSet.open(days)
    for split in SPLITS:
        ids = pa.concat_tables(map(pq.read_table, after.impression_files(split)))["seen"]
        flat = ids.combine_chunks().flatten().to_numpy()
        assert after.statistics.unknown["seen"][split] == pytest.approx((flat == 0).mean())


def test_without_a_test_half_the_one_that_is_there_stays(days: Path) -> None:
    before = PreparedDataSet.open(days)
    added = append_table(days, train=_day(1), day="monday")
    after = PreparedDataSet.open(days)
    assert added.path == days / "days" / "monday"
    assert after.splits["test"] == before.splits["test"]
    assert _rows(added, "test").equals(_rows(before, "test"))
    for name in ("missing", "unknown"):
        for column, shares in getattr(before.statistics, name).items():
            assert getattr(added.statistics, name)[column]["test"] == shares["test"]
            assert getattr(after.statistics, name)[column]["test"] == shares["test"]


@pytest.mark.parametrize("until", ["days/0001.partial", "days/0001/dataset.json"])
def test_a_killed_append_leaves_the_data_set_as_it_was(days: Path, until: str) -> None:
    before = (days / "dataset.json").read_bytes()
    _day(1, rows=60_000).to_parquet(days.with_name("day.parquet"))
    command = [sys.executable, "-m", "esmm_torchrec", "prepare", "append", str(days)]
    process = subprocess.Popen([*command, "--train", str(days.with_name("day.parquet"))])
    deadline = time.monotonic() + 120
    while not (days / until).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    if (days / "dataset.json").read_bytes() == before:
        PreparedDataSet.open(days).verify()
        append_table(days, train=_day(1), test=_day(2))
    whole = PreparedDataSet.open(days)
    whole.verify()
    assert whole.days == ("0001",)
    folders = [path.name for path in (days / "days").iterdir() if path.is_dir()]
    assert folders == ["0001"]


def test_what_cannot_be_appended_is_said(
    days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["prepare", "append", *arguments])
        assert stop.value.code == 2
        (line,) = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith("esmm-torchrec: ")
        ]
        return line.removeprefix("esmm-torchrec: ")

    _day(1).to_parquet(tmp_path / "day.parquet")
    _day(1).drop(columns="item").to_parquet(tmp_path / "less.parquet")
    day = str(tmp_path / "day.parquet")
    append_table(days, train=_day(1), day="monday")
    before = (days / "dataset.json").read_bytes()
    assert refusal(str(days), "--train", day, "--day", "monday") == (
        f"{days} already has the day monday; append each day once"
    )
    assert "--day 'a/b' is not a name" in refusal(str(days), "--train", day, "--day", "a/b")
    assert re.search(
        r"less.parquet has no column 'item'", refusal(str(days), "--train", f"{tmp_path}/less.*")
    )
    with (days / "days" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is appending" in refusal(str(days), "--train", day)
    assert (days / "dataset.json").read_bytes() == before
    PreparedDataSet.open(days).verify()


def test_a_text_file_is_read_as_the_first_day_was(tmp_path: Path) -> None:
    """Ids that look like numbers remain text if the ids of the first day included text."""
    first = pd.DataFrame({"y": [1, 0] * 4, "c": [1, 0] * 4, "id": ["007", "7", "a", "a"] * 2})
    first.to_csv(tmp_path / "first.tsv", sep="\t", index=False)
    next_day = first.assign(id=["007", "8", "8", "7"] * 2)
    next_day.to_csv(tmp_path / "next.tsv", sep="\t", index=False)
    prepare_table(
        tmp_path / "data",
        train=tmp_path / "first.tsv",
        test=tmp_path / "first.tsv",
        click="y",
        conversion="c",
        ids=["id"],
    )
    added = append_table(tmp_path / "data", train=tmp_path / "next.tsv")
    vocabulary = added.vocabulary("id")
    assert vocabulary.raw_ids.to_pylist() == ["a", "007", "7", "8"]
    assert vocabulary.counts.tolist() == [4, 4, 4, 4]
    assert _rows(added)["id"].to_pylist() == [2, 4, 4, 3] * 2


def test_other_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EsmmTorchrecError, match="not a prepared data set"):
        append_table(tmp_path / "nothing", train=_day(0))


def test_a_day_is_stored_by_the_key_of_the_data_set(tmp_path: Path):
    """The rows of each user are contiguous within a day, and the test split keeps its order."""
    options = {**OPTIONS, "key": "user"}
    first = prepare_table(tmp_path / "data", train=_day(0), test=_day(9, 90), **options)  # type: ignore[arg-type]
    added = append_table(tmp_path / "data", train=_day(1))
    whole = PreparedDataSet.open(tmp_path / "data")
    whole.verify()
    assert (first.key, added.key, whole.key) == ("user", "user", "user")
    groups = _rows(added)["group_id"].to_numpy()
    assert 1 + np.count_nonzero(np.diff(groups)) == len(set(groups))
    assert _rows(added, "test")["sample_id"] == _rows(first, "test")["sample_id"]


def test_a_day_without_a_name_gets_a_number_that_is_free(days: Path) -> None:
    append_table(days, train=_day(1), day="0002")
    append_table(days, train=_day(2))
    append_table(days, train=_day(3))
    assert PreparedDataSet.open(days).days == ("0002", "0003", "0004")
