"""Damaged files of a real log: either the result is right and every row is accounted for, or one
sentence explains the error."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import DataError
from tests.mutations import mutated

HILLSTROM = Path(
    os.environ.get(
        "HILLSTROM_CSV", Path(__file__).parents[4] / "../shared/data/hillstrom/hillstrom.csv"
    )
)
ROWS = 200
MUTATIONS = [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]

pytestmark = pytest.mark.skipif(
    not HILLSTROM.exists(),
    reason="the Hillstrom e-mail log is not here; HILLSTROM_CSV says where it is",
)


def log_rows() -> pd.DataFrame:
    frame = pd.read_csv(HILLSTROM, nrows=20_000, dtype=str)
    some = frame[frame["conversion"] == "1"][: ROWS // 4]
    return pd.concat([some, frame[: ROWS - len(some)]], ignore_index=True)


def prepare(path: Path, out: Path) -> PreparedDataSet:
    shutil.rmtree(out, ignore_errors=True)
    return prepare_table(
        out,
        train=path,
        test=path,
        click="visit",
        conversion="conversion",
        ids=["zip_code", "channel", "segment", "newbie"],
        dense=["recency", "history"],
        max_bad_rows=10_000,
        unclicked_conversions="drop",
    )


def accounted(data_set: PreparedDataSet) -> dict[str, int]:
    """Returns the number of rows that became impressions or were dropped, by split."""
    return {
        split: data_set.splits[split].impressions + sum(data_set.dropped[split].values())
        for split in ("train", "test")
    }


def reference_channels(content: bytes) -> Counter[str | None]:
    """Counts each channel in the usable rows, read line by line."""
    header, *rows = reference_rows(content)
    found: Counter[str | None] = Counter()
    for row in rows:
        values = dict(zip(header, row, strict=False))
        if len(row) == len(header) and usable(values):
            missing = values["channel"] in ("", "NaN", "nan", "NULL", "null")
            found[None if missing else values["channel"]] += 1
    return found


def reference_rows(content: bytes) -> list[list[str]]:
    text = io.StringIO(content.decode("utf-8-sig"), newline="")
    return [row for row in csv.reader(text, strict=True) if row]


LABELS = {"no": 0, "n": 0, "false": 0, "f": 0, "yes": 1, "y": 1, "true": 1, "t": 1}


def label(text: str) -> float:
    text = text.strip().lower()
    try:
        return LABELS[text] if text in LABELS else float(text)
    except ValueError:
        return np.nan


def usable(values: dict[str, str]) -> bool:
    visit, conversion = label(values["visit"]), label(values["conversion"])
    if visit == 0 and values["conversion"] in ("", "NaN", "nan", "NULL", "null"):
        return True
    return visit in (0, 1) and conversion in (0, 1) and conversion <= visit


def test_the_reference_agrees_on_the_log_itself(tmp_path: Path) -> None:
    log_rows().to_csv(tmp_path / "log.csv", index=False)
    data_set = prepare(tmp_path / "log.csv", tmp_path / "out")
    assert accounted(data_set) == {"train": ROWS, "test": ROWS}
    assert channels(data_set) == reference_channels((tmp_path / "log.csv").read_bytes())


def channels(data_set: PreparedDataSet) -> Counter[str | None]:
    raw = [None, *data_set.vocabulary("channel").raw_ids.to_pylist()]
    rows = pa.concat_tables(map(pq.read_table, data_set.impression_files("train")))["channel"]
    return Counter(None if row is None else raw[row] or "unknown" for row in rows.to_pylist())


@pytest.mark.parametrize("mutations", MUTATIONS)
def test_damaged_text(mutations: int, tmp_path: Path) -> None:
    content = log_rows().to_csv(index=False).encode()
    random, path = np.random.default_rng(0), tmp_path / "log.csv"
    outcomes: Counter[str] = Counter()
    for _ in range(mutations):
        damaged = mutated(content, random)
        path.write_bytes(damaged)
        try:
            data_set = prepare(path, tmp_path / "out")
        except DataError as error:
            outcomes["sentence"] += 1
            outcomes["lines"] += str(error).count("\n") + 1
            continue
        outcomes["result"] += 1
        rows = len(reference_rows(damaged)) - 1
        assert accounted(data_set) == {"train": rows, "test": rows}, damaged
        simple = data_set.dropped["train"].get("bad rows", 0) == 0
        if simple:
            expected = reference_channels(damaged)
            rare = sum(times for channel, times in expected.items() if channel and times < 2)
            found = channels(data_set)
            assert found.pop("unknown", 0) == rare
            assert found == Counter({c: n for c, n in expected.items() if c is None or n >= 2})
    assert min(outcomes["sentence"], outcomes["result"]) > mutations // 10
    assert outcomes["lines"] == outcomes["sentence"]


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("mutations", MUTATIONS)
def test_damaged_parquet(mutations: int, checksums: bool, tmp_path: Path) -> None:
    frame = log_rows().astype({"visit": int, "conversion": int, "history": float})
    path = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pandas(frame), path, write_page_checksum=checksums)
    content = path.read_bytes()
    expected = prepare(path, tmp_path / "out").checksums
    random = np.random.default_rng(1)
    outcomes: Counter[str] = Counter()
    for _ in range(mutations):
        path.write_bytes(mutated(content, random))
        try:
            data_set = prepare(path, tmp_path / "out")
        except DataError as error:
            outcomes["sentence"] += 1
            outcomes["lines"] += str(error).count("\n") + 1
            continue
        rows = pq.read_metadata(path).num_rows
        assert accounted(data_set) == {"train": rows, "test": rows}
        outcomes["same"] += data_set.checksums == expected
    assert outcomes["sentence"] > mutations // 10
    assert outcomes["same"] > 0
    assert outcomes["lines"] == outcomes["sentence"]
