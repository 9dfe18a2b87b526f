"""The mapped copy of a split: checked when it is made, whole or not there at all."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data import array_files
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import DataError
from tests.prepared_data import record_changed_file, write_data_set


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("mapped") / "data").path


@pytest.fixture
def dataset(original: Path, tmp_path: Path) -> PreparedDataSet:
    copy = shutil.copytree(original, tmp_path / "data", ignore=shutil.ignore_patterns(".mapped"))
    return PreparedDataSet.open(copy)


@pytest.fixture
def small_files(dataset: PreparedDataSet) -> Iterator[None]:  # noqa: ARG001  (is there before)
    """No file may grow beyond 8 KiB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_told_and_leaves_nothing(dataset: PreparedDataSet) -> None:
    with pytest.raises(DataError) as told:
        MappedSplit.open(dataset, "train")
    folder = dataset.path / ".mapped" / "train-normalised"
    assert str(told.value) == (
        f"cannot write {folder} (file too large), an uncompressed copy for random access; make "
        "room or copy the data set to a larger disk"
    )
    assert [path.name for path in folder.parent.iterdir()] == ["train-normalised.lock"]


READ = """
import os, sys
from esmm_torchrec.data import array_files
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import DataError

dataset = PreparedDataSet.open(sys.argv[1])
MappedSplit.open(dataset, "train")  # imports all there is to import
if os.getuid() == 0:
    os.setuid(65534)  # permissions do not bind root
print(MappedSplit.open(dataset, "train").impressions)
try:
    MappedSplit.open(dataset, "test")
except DataError as error:
    print(error)
"""


def test_a_current_copy_is_read_where_nothing_can_be_written(dataset: PreparedDataSet) -> None:
    impressions = MappedSplit.open(dataset, "train").impressions
    folders = [dataset.path, *(path for path in dataset.path.rglob("*") if path.is_dir())]
    for path in dataset.path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    dataset.path.chmod(0o555)
    for parent in dataset.path.parents[: len(dataset.path.parts) - 3]:
        parent.chmod(0o755)
    try:
        told = subprocess.run(
            [sys.executable, "-c", READ, str(dataset.path)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        ).stdout.splitlines()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert told == [
        str(impressions),
        f"cannot write {dataset.path / '.mapped'} (permission denied), an uncompressed copy for "
        "random access; make it writable or copy the data set to a writable location",
    ]


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("shared_row", [0, 40], "row 1: 40 is outside the 40 shared rows of the split"),
        ("shared_row", [-1, 0], "row 0: -1 is outside the 40 shared rows of the split"),
        ("click", [1, 2], "row 1: the label 2 is neither 0 nor 1"),
        ("conversion", [0, 1], "row 1: conversion without click"),
        ("item", [61, 0], "row 0: id 61 is outside table 'item' of 61 rows"),
    ],
)
def test_wrong_values_are_found_before_they_are_used(
    column: str, values: list[int], sentence: str, dataset: PreparedDataSet
) -> None:
    """Under a checksum that is right: of another writer of the form, say."""
    name = "train/impressions-00000.parquet"
    table = pq.read_table(dataset.path / name)
    own = {"click": [0, 0], "conversion": [0, 0], column: values}
    for changed, start in own.items():
        column_values = table.column(changed).to_numpy().copy()
        column_values[: len(start)] = start
        place = table.column_names.index(changed)
        field = table.schema.field(changed)
        table = table.set_column(place, field, pa.array(column_values, field.type))
    pq.write_table(table, dataset.path / name)
    record_changed_file(dataset.path, name)
    with pytest.raises(DataError) as told:
        MappedSplit.open(PreparedDataSet.open(dataset.path), "train")
    assert str(told.value) == (f"{dataset.path / name}, row group 0, column {column!r}, {sentence}")
    assert not list((dataset.path / ".mapped").glob("train-normalised*/*"))


def test_a_file_that_was_changed_is_found_when_it_is_laid_out(dataset: PreparedDataSet) -> None:
    name = dataset.path / "test" / "shared-00000.parquet"
    table = pq.read_table(name)
    order = np.arange(len(table))[::-1]
    pq.write_table(table.take(order), name)
    assert MappedSplit.open(dataset, "train").impressions == 700
    with pytest.raises(DataError, match=r"shared-00000\.parquet was changed after it was written"):
        MappedSplit.open(dataset, "test")


def _copy_of(dataset: PreparedDataSet) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder of a mapped copy, and what is in it."""
    split = MappedSplit.open(dataset, "train")
    (folder,) = (dataset.path / ".mapped").glob("train-*/")
    return folder, _contents(split)


def _contents(split: MappedSplit) -> dict[str, np.ndarray]:
    arrays = {name: column.copy() for name, column in split.scalars.items()}
    for name, stores in split.bags.items():
        for number, store in enumerate(stores):
            for kind in ("offsets", "lengths", "values", "weights"):
                array = getattr(store, kind)
                if array is not None:
                    arrays[f"{name}-{number}-{kind}"] = array.copy()
    return arrays | {"dense": split.dense.copy()}


def _assert_same(split: MappedSplit, expected: dict[str, np.ndarray]) -> None:
    found = _contents(split)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize("damage", ["short", "long", "missing", "description", "empty description"])
def test_a_damaged_copy_is_laid_out_again(damage: str, tmp_path: Path) -> None:
    dataset = write_data_set(tmp_path / "data", train=40, test=20)
    folder, before = _copy_of(dataset)
    file = folder / "click"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "long":
        file.write_bytes(file.read_bytes() + b"\0")
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "layout.json").write_text("{" if damage == "description" else "{}")
    _assert_same(MappedSplit.open(dataset, "train"), before)


def test_a_changed_byte_in_any_file_is_laid_out_again(tmp_path: Path) -> None:
    dataset = write_data_set(tmp_path / "data", train=40, test=20)
    folder, before = _copy_of(dataset)
    names = sorted(path.name for path in folder.iterdir())
    assert {"click", "dense", "layout.json", "checked.json"} < set(names)
    for name in names:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
        _assert_same(MappedSplit.open(dataset, "train"), before)


def test_a_copy_is_read_once_and_again_when_it_was_copied(
    dataset: PreparedDataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    checksum = array_files._checksum

    def noted(path: Path) -> str:
        read.append(path.name)
        return checksum(path)

    monkeypatch.setattr(array_files, "_checksum", noted)
    MappedSplit.open(dataset, "test")
    assert "click" in read
    read.clear()
    MappedSplit.open(dataset, "test")
    assert not read
    moved = PreparedDataSet.open(shutil.copytree(dataset.path, tmp_path / "moved"))
    MappedSplit.open(moved, "test")
    assert "click" in read
    read.clear()
    MappedSplit.open(moved, "test")
    assert not read
