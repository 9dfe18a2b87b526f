from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data import storage
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.data.storage import HashedOutput, Location, staged
from esmm_torchrec.errors import DataError
from tests.prepared_data import write_data_set
from tests.store import CREDENTIALS, Store, serve


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with serve() as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    server.requests.clear()
    server.failures.clear()
    return server


def names(store: Store, folder: str) -> list[str]:
    found = store.filesystem().get_file_info(
        pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    )
    return [info.path for info in found if info.type == pafs.FileType.File]


def test_paths_and_file_uris_are_local(tmp_path: Path):
    for place in (tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a"):
        location = Location.of(place)
        assert location.local == tmp_path / "a"
        assert str(location / "b") == f"{tmp_path}/a/b"
    location = Location.of(tmp_path) / "deep/file"
    assert location.size() is None
    location.write_bytes(b"content")
    assert (location.size(), location.read_bytes()) == (7, b"content")
    with pytest.raises(FileNotFoundError):
        (Location.of(tmp_path) / "none").open_input()


def test_a_uri_of_an_unknown_kind_is_refused_without_its_credentials():
    with pytest.raises(DataError, match=r"^the URI ftp://host/folder cannot be used") as told:
        Location.of("ftp://me:secret@host/folder")
    assert "secret" not in str(told.value)


def test_a_store_is_read_and_written(store: Store):
    folder = Location.of(store.uri("bucket/a"))
    assert folder.local is None
    assert str(folder / "file") == "s3://bucket/a/file"
    file = folder / "file"
    assert file.size() is None
    output = HashedOutput(file)
    output.write(b"con")
    output.write(b"tent")
    assert file.size() is None  # not before it is whole
    output.close()
    assert file.read_bytes() == b"content"
    assert output.checksum == file.sha256()
    with file.open_input() as opened:
        opened.seek(3)
        assert opened.read(2) == b"te"
    file.delete()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()


def test_what_passes_is_tried_again_and_what_does_not_is_told(store: Store):
    file = Location.of(store.uri("bucket/again"))
    file.write_bytes(b"content")
    store.failures["GET"] = 3
    assert file.read_bytes() == b"content"
    attempts = 0

    def fails() -> None:
        nonlocal attempts
        attempts += 1
        raise OSError("AWS Error ACCESS_DENIED during GetObject operation")

    with pytest.raises(OSError, match="ACCESS_DENIED"):
        file.retried(fails)
    assert attempts == 1


def test_a_data_set_in_a_store_is_that_on_the_disk(store: Store, tmp_path: Path):
    local = write_data_set(tmp_path / "local")
    uri = store.uri("bucket/deep/prepared")
    remote = write_data_set(uri)
    written = [path for method, path, _ in store.requests if method == "PUT"]
    assert written[-1] == "/bucket/deep/prepared/dataset.json"
    assert str(remote.root) == "s3://bucket/deep/prepared"
    assert remote.schema == local.schema
    assert remote.statistics == local.statistics
    for split in ("train", "test"):
        for kind in ("impressions", "shared"):
            assert list(remote.checked_rows(split, kind)) == list(local.checked_rows(split, kind))
        (part,) = remote.splits[split].impression_parts
        assert "impressions-00000" not in part.file
    for table in local.schema.tables:
        assert remote.vocabulary(table.name).raw_ids == local.vocabulary(table.name).raw_ids
    with pytest.raises(DataError, match=r"^s3://bucket/deep/prepared already exists"):
        write_data_set(uri)
    with pytest.raises(DataError, match="is not on this machine"):
        _ = remote.path


def test_opening_reads_the_description_alone(store: Store):
    uri = store.uri("bucket/opened")
    write_data_set(uri)
    store.requests.clear()
    PreparedDataSet.open(uri)
    assert {path for _, path, _ in store.requests} == {"/bucket/opened/dataset.json"}
    with pytest.raises(DataError, match=r"^s3://bucket/none is not a prepared data set"):
        PreparedDataSet.open(store.uri("bucket/none"))


def test_a_preparation_that_fails_leaves_nothing_in_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esmm_torchrec.data.prepared_writer.Description", interrupted)
    with pytest.raises((KeyboardInterrupt, TypeError)):
        write_data_set(store.uri("bucket/failed"))
    assert any("bucket/failed/train" in path for method, path, _ in store.requests)
    assert names(store, "bucket/failed") == []


def test_raw_rows_may_be_in_a_store(store: Store, tmp_path: Path):
    """A file, a folder, and a pattern of folders; found as they are on a disk."""
    days = [("2026-10-31", 7), ("2026-11-01", 3), ("2026-11-02", 4)]
    for day, rows in days:
        for part in range(2):
            n = np.arange(rows * (part + 1))
            table = pa.table({"click": n % 2, "buy": n % 2 * (n % 3 == 0), "item": n % 5})
            for root in (str(tmp_path), store.uri("bucket")):
                beginning, question, query = root.partition("?")
                file = f"{beginning}/log/day={day}/part-{part}.parquet{question}{query}"
                with Location.of(file).open_output() as output:
                    pq.write_table(table, output)
    (Location.of(store.uri("bucket")) / "log/day=2026-11-01/_SUCCESS").write_bytes(b"")
    for root in (str(tmp_path), store.uri("bucket")):
        being_written = "log/day=2026-11-01/.part-2.parquet"
        (Location.of(root) / being_written).write_bytes(b"not whole")
    columns = {"click": "click", "conversion": "buy", "ids": ["item"]}
    here = prepare_table(
        tmp_path / "here",
        train=f"{tmp_path}/log/day=2026-11-*",
        test=[f"{tmp_path}/log/day=2026-10-31", f"{tmp_path}/log/day=2026-11-01/part-1.parquet"],
        **columns,
    )
    there = prepare_table(
        tmp_path / "there",
        train=store.uri("bucket/log/day=2026-11-*"),
        test=[
            store.uri("bucket/log/day=2026-10-31"),
            store.uri("bucket/log/day=2026-11-01/part-1.parquet"),
        ],
        **columns,
    )
    assert (here.splits["train"].impressions, here.splits["test"].impressions) == (21, 27)
    assert there.description() == here.description()

    remote = store.uri("bucket/prepared")
    prepare_table(remote, train=f"{tmp_path}/log/day=2026-11-*", split="share:0.7", **columns)
    prepare_table(
        tmp_path / "local", train=f"{tmp_path}/log/day=2026-11-*", split="share:0.7", **columns
    )
    more = f"{tmp_path}/log/day=2026-10-31"
    append_table(tmp_path / "local", train=more, day="late")
    (Location.of(remote) / "days/late/dataset.json").write_bytes(b"of one that was killed")
    added = append_table(remote, train=more, day="late")
    assert str(added.root) == "s3://bucket/prepared/days/late"
    whole, expected = (PreparedDataSet.open(place) for place in (remote, tmp_path / "local"))
    assert whole.days == ("late",)
    assert whole.statistics == expected.statistics
    assert whole.splits["train"].happened == expected.splits["train"].happened
    whole.verify()
    with pytest.raises(DataError, match="already has the day late"):
        append_table(remote, train=more, day="late")

    with pytest.raises(DataError, match=r"has \*\*, which URIs do not support; use one \* per"):
        prepare_table(tmp_path / "no", train=store.uri("bucket/**/*"), split="share:0.5", **columns)
    for missing in ("none", "log/day=2025-*", "log/day=2026-11-01/_SUCCESS"):
        with pytest.raises(
            DataError, match=f"s3://bucket/{missing.replace('*', '.')} is not|no Parquet"
        ):
            prepare_table(
                tmp_path / "no", train=store.uri(f"bucket/{missing}"), split="share:0.5", **columns
            )


def test_what_is_staged_comes_to_the_store_when_it_is_whole(store: Store, tmp_path: Path):
    with staged(str(tmp_path / "x")) as path:
        assert path == tmp_path / "x"
    with staged(store.uri("bucket/package"), last="b.json") as path:
        for name in ("b.json", "a", "deep/c"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(name)
        assert names(store, "bucket/package") == []
    puts = [path for method, path, _ in store.requests if method == "PUT" and "package" in path]
    assert puts[-1] == "/bucket/package/b.json"
    assert sorted(puts)[:2] == ["/bucket/package/a", "/bucket/package/b.json"]
    assert (Location.of(store.uri("bucket/package")) / "deep/c").read_bytes() == b"deep/c"
    with pytest.raises(DataError, match="package already exists"):
        staged(store.uri("bucket/package")).__enter__()
    one = staged(store.uri("bucket/one.parquet"))
    one.__enter__().write_text("half")
    assert not one.__exit__(KeyError, KeyError(), None)
    assert names(store, "bucket/one.parquet") == []


def test_missing_and_truncated_objects_are_named(store: Store):
    uri = store.uri("bucket/damaged")
    data_set = write_data_set(uri)
    name = data_set.splits["test"].impression_parts[0].file
    file = data_set.root / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=rf"{name} was changed after it was written"):
        PreparedDataSet.open(uri).verify()
    file.delete()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        PreparedDataSet.open(uri).verify()
    file.write_bytes(whole)
    PreparedDataSet.open(uri).verify()
    with file.open_input() as opened:
        assert pq.ParquetFile(opened).metadata.num_rows == 333
