"""Spark tasks prepare the same data set as this process, value by value."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.cli.main import main
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.data.storage import Location
from esmm_torchrec.errors import DataError, OptionError
from tests.store import CREDENTIALS, serve

pytestmark = [pytest.mark.spark, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[4]

OPTIONS: dict[str, Any] = {
    "click": "click",
    "conversion": "buy",
    "ids": ["user", "item", "seen", "ID", "id"],  # column names in Spark ignore case
    "weights": {"seen": "weights"},
    "shared_tables": {"item": ["item", "seen"]},
    "dense": ["price"],
    "group_id": "user",
    "hashed": {"id": 3},
    "min_count": 3,
    "max_bad_rows": 9,
    "unclicked_conversions": "drop",
}


def _table(seed: int, rows: int) -> pa.Table:
    random = np.random.default_rng(seed)
    click = random.random(rows) < 0.3
    buy = (click & (random.random(rows) < 0.4)) | (np.arange(rows) % 501 == 500)
    item = np.minimum(random.geometric(0.01, rows), 500)
    return pa.table(
        {
            "click": np.where(np.arange(rows) % 700 == 3, 5, click).astype(np.int8),
            "buy": buy.astype(np.int8),
            "user": [f"u{n}" if n % 7 else None for n in random.geometric(0.02, rows).tolist()],
            "item": pa.array(item, mask=random.random(rows) < 0.05),
            "seen": [random.geometric(0.01, n).tolist() for n in item % 4],
            "weights": [random.random(n).tolist() for n in item % 4],
            "price": np.where(random.random(rows) < 0.1, np.nan, random.lognormal(2, 1, rows)),
            "ID": random.integers(0, 9, rows),
            "id": random.integers(0, 5, rows),
        }
    )


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    for number in range(2):
        file = folder / f"train-{number}.parquet"
        pq.write_table(_table(number, 2000), file, row_group_size=900)
    pq.write_table(_table(9, 600), folder / "test.parquet", row_group_size=400)
    return folder


def _files(logs: Path) -> dict[str, Any]:
    return {"train": str(logs / "train-*.parquet"), "test": str(logs / "test.parquet")}


def _session(master: str) -> Any:
    from pyspark.sql import SparkSession  # noqa: PLC0415  # pyright: ignore

    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ |= CREDENTIALS
    builder = SparkSession.builder.master(master).config("spark.ui.enabled", "false")
    session = builder.config("spark.sql.shuffle.partitions", "2").getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    return session


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    session = _session("local[2]")
    yield session
    session.stop()


def _rows(data_set: PreparedDataSet, split: str) -> pa.Table:
    files = data_set.impression_files(split)  # pyright: ignore[reportArgumentType]
    return pa.concat_tables(map(pq.read_table, files))


def _assert_same(here: PreparedDataSet, there: PreparedDataSet) -> None:
    assert here.vocabulary_tables
    for table in here.vocabulary_tables:
        for name in ("raw_ids", "counts"):
            ours, theirs = (getattr(of.vocabulary(table), name) for of in (here, there))
            assert ours.tolist() == theirs.tolist()
        assert here.rare_ids(table).equals(there.rare_ids(table))
    for split in SPLITS:
        ours, theirs = (_rows(of, split) for of in (here, there))
        assert ours.schema.equals(theirs.schema)
        for name in set(ours.column_names) - set(here.schema.dense_features):
            assert ours[name].equals(theirs[name])
        for name in here.schema.dense_features:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert here.schema == there.schema
    assert here.statistics.tables == there.statistics.tables
    assert here.statistics.mean_values_per_bag == there.statistics.mean_values_per_bag
    assert (here.statistics.missing, here.statistics.unknown) == (
        there.statistics.missing,
        there.statistics.unknown,
    )
    assert (here.source, here.dropped, here.dropped_rows) == (
        there.source,
        there.dropped,
        there.dropped_rows,
    )
    there.verify()


@pytest.mark.parametrize("key", [None, "user"])
def test_tasks_prepare_what_this_process_prepares(
    key: str | None, logs: Path, spark: Any, tmp_path: Path
) -> None:
    options = OPTIONS | _files(logs) | {"key": key}
    here = prepare_table(tmp_path / "here", **options)
    there = prepare_table(tmp_path / "there", engine=spark, **options)
    _assert_same(here, there)
    named = {file.name for split in SPLITS for file in there.impression_files(split)}
    assert {file.name for file in there.path.glob("*/impressions-*")} == named
    assert here.dropped["train"]["bad rows"] == 6


def test_tasks_append_what_this_process_appends(logs: Path, spark: Any, tmp_path: Path) -> None:
    for engine, name in ((None, "here"), (spark, "there")):
        files = {"train": str(logs / "train-0.parquet"), "test": str(logs / "test.parquet")}
        prepare_table(tmp_path / name, key="user", **OPTIONS, **files)
        append_table(tmp_path / name, train=str(logs / "train-1.parquet"), engine=engine)
    here, there = (PreparedDataSet.open(tmp_path / name) for name in ("here", "there"))
    assert here.days == there.days == ("0001",)
    _assert_same(here, there)
    days = [PreparedDataSet.open(tmp_path / name / "days" / "0001") for name in ("here", "there")]
    _assert_same(*days)


def test_errors_of_tasks_are_sentences(logs: Path, spark: Any, tmp_path: Path) -> None:
    options = OPTIONS | _files(logs)
    with pytest.raises(DataError) as here:
        prepare_table(tmp_path / "out", **(options | {"max_bad_rows": 0}))
    with pytest.raises(DataError) as there:
        prepare_table(tmp_path / "out", engine=spark, **(options | {"max_bad_rows": 0}))
    assert str(there.value) == str(here.value)
    (tmp_path / "rows.csv").write_text("click,buy,id\n1,1,3\n")
    with pytest.raises(OptionError, match=r"rows\.csv cannot be divided"):
        prepare_table(
            tmp_path / "out",
            train=tmp_path / "rows.csv",
            test=tmp_path / "rows.csv",
            click="click",
            conversion="buy",
            ids=["id"],
            engine=spark,
        )
    assert not (tmp_path / "out").exists()


def test_tasks_read_and_write_a_store(logs: Path, spark: Any, tmp_path: Path) -> None:
    options = OPTIONS | {"max_bad_rows": 20}
    with serve() as store:
        for file in logs.iterdir():
            Location.of(store.uri(f"bucket/log/{file.name}")).copy_from(file)
        files = {
            "train": store.uri("bucket/log/train-*.parquet"),
            "test": store.uri("bucket/log/test.parquet"),
        }
        there = prepare_table(store.uri("bucket/out"), key="user", engine=spark, **options, **files)
        here = prepare_table(tmp_path / "here", key="user", **options, **_files(logs))
        for split in SPLITS:
            tables = []
            for part in there.splits[split].impression_parts:
                with (there.root / part.file).open_input() as source:
                    tables.append(pq.read_table(source))
            assert (
                pa.concat_tables(tables)
                .drop_columns(["price"])
                .equals(_rows(here, split).drop_columns(["price"]))
            )


_ON_A_CLUSTER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from tests.unit.data.sources.test_spark import OPTIONS, _files, _session
from esmm_torchrec.data.sources.tabular import prepare_table
session = _session("local-cluster[2,1,1536]")
print("ready", flush=True)
prepare_table({out!r}, engine=session, key="user", **OPTIONS, **_files(Path({logs!r})))
print("prepared", flush=True)
session.stop()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_executors_prepare_what_this_process_prepares(
    killed: bool, logs: Path, tmp_path: Path
) -> None:
    """Executors are separate processes; one of them is killed while tasks write."""
    here = prepare_table(tmp_path / "here", key="user", **OPTIONS, **_files(logs))
    out = tmp_path / "there"
    program = _ON_A_CLUSTER.format(root=str(ROOT), out=str(out), logs=str(logs))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    struck: list[int] = []
    if killed:
        threading.Thread(target=_kill_an_executor, args=(process.pid, out, struck)).start()
    try:
        said, _ = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert said.split() == ["ready", "prepared"]
    assert len(struck) == killed
    _assert_same(here, PreparedDataSet.open(out))


def _kill_an_executor(driver: int, out: Path, struck: list[int]) -> None:
    """Kills an executor as soon as a file of impressions exists."""
    partial = out.with_name(f"{out.name}.partial")
    while Path(f"/proc/{driver}").exists() and not struck:
        if any(partial.glob("train/impressions-*")):
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    command = (path / "cmdline").read_bytes()
                    session = int((path / "stat").read_text().rpartition(")")[2].split()[3])
                except (OSError, IndexError):
                    continue
                if b"CoarseGrainedExecutorBackend" in command and session == driver:
                    os.kill(int(path.name), signal.SIGKILL)
                    struck.append(int(path.name))
                    return
        time.sleep(0.01)


@pytest.mark.parametrize("packages", ["ours", "oldest"])
def test_a_bundle_is_all_that_spark_submit_needs(logs: Path, tmp_path: Path, packages: str) -> None:
    python = sys.executable if packages == "ours" else os.environ.get("OLDEST_PYTHON")
    if python is None:
        pytest.skip(
            "OLDEST_PYTHON names no Python with the oldest packages; `make test-spark` does"
        )
    python = os.path.abspath(python)  # not resolved: the link identifies the environment
    main(["bundle", str(tmp_path / "esmm_torchrec.zip")])
    found = "import pyspark; print(pyspark.__path__[0])"
    home = Path(subprocess.check_output([python, "-c", found], text=True).strip())
    command = [
        *(str(home / "bin" / "spark-submit"), "--master", "local[2]"),
        *("--py-files", str(tmp_path / "esmm_torchrec.zip"), str(tmp_path / "esmm_spark.py")),
        *("prepare", "table", str(tmp_path / "out")),
        *("--train", str(logs / "train-*.parquet"), "--test", str(logs / "test.parquet")),
        *("--click", "click", "--id", "item", "--max-bad-rows", "9"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"SPARK_HOME": str(home), "PYSPARK_PYTHON": python},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prepared data set" in done.stdout
    here = prepare_table(
        tmp_path / "here", click="click", ids=["item"], max_bad_rows=9, **_files(logs)
    )
    _assert_same(here, PreparedDataSet.open(tmp_path / "out"))
