"""The command `prepare table`, called with its arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esmm_torchrec.cli.main import main
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.sharding.host import usable_cores

COMMAND = ["prepare", "table"]
LABELS = ["--click", "visit", "--conversion", "sale"]
FILES = ["--train", "train-1.csv", "--test", "test.csv"]
TOWN = [*FILES, *LABELS, "--id", "town"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files of two splits."""
    random = np.random.default_rng(0)
    rows = 400
    visit = random.random(rows) < 0.25
    frame = pd.DataFrame(
        {
            "visit": visit.astype(int),
            "sale": (visit & (random.random(rows) < 0.4)).astype(int),
            "buyer": random.integers(0, 90, rows),
            "seller": random.integers(0, 90, rows),
            "town": random.choice(["Oslo", "Rome"], rows),
            "price": random.lognormal(2, 1, rows).round(2),
            "force": random.random(rows),
        }
    )
    frame[:150].to_csv(tmp_path / "train-1.csv", index=False)
    frame[150:300].to_parquet(tmp_path / "train-2.parquet")
    frame[300:].to_csv(tmp_path / "test.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the single line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        main([*COMMAND, *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("esmm-torchrec: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_it_prints_what_the_data_set_holds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--train", "train-1.csv", "train-2.parquet", "--test", "test.csv"]
    features = ["--id", "buyer", "seller", "town", "--dense", "price"]
    shared = ["--share-table", "people=buyer,seller", "--weights", "buyer:force", "seller:force"]
    main([*COMMAND, "out", *files, *LABELS, *features, *shared])
    printed = capsys.readouterr().out
    data_set = PreparedDataSet.open(folder / "out")
    train, test = data_set.splits["train"], data_set.splits["test"]
    for label, *numbers in (
        ("impressions", 300, 100),
        ("clicks", train.happened["click"], test.happened["click"]),
        ("conversions", train.happened["conversion"], test.happened["conversion"]),
        (r"conversions without a click \(error\)", 0, 0),
    ):
        assert re.search(rf"^{label} +{numbers[0]} +{numbers[1]}$", printed, re.MULTILINE)
    people = data_set.schema.table("people").num_embeddings
    features_line = rf"^people +{people} +\d+  buyer \(weighted\), seller \(weighted\)$"
    assert re.search(features_line, printed, re.MULTILINE)
    assert re.search(r"^town +3 +\d+  town$", printed, re.MULTILINE)
    of_price = data_set.statistics.dense["price"]
    assert re.search(
        rf"^price +log +{of_price.mean:.6g} +{of_price.std:.6g} +0.0% +0.0%$", printed, re.MULTILINE
    )
    assert printed.endswith(
        "prepared data set: out\nnext: esmm-torchrec train --data out --out runs/out\n"
    )
    assert "skipped" not in printed


def test_it_says_what_it_skipped_and_dropped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "train-1.csv").open("a") as file:
        file.write("1,1,5,5,Oslo,cheap,1\n0,1,5,5,Oslo,3,1\n7,7\n")
    options = ["--dense", "price", "--max-bad-rows", "2", "--unclicked-conversions", "drop"]
    main([*COMMAND, "out", *TOWN, *options])
    printed = capsys.readouterr().out
    assert re.search(r"^impressions +150 +100$", printed, re.MULTILINE)
    assert re.search(r"^dropped: bad rows +2 +0$", printed, re.MULTILINE)
    assert re.search(r"^dropped: conversions without a click +1 +0$", printed, re.MULTILINE)
    assert "line 152, column 'price': 'cheap' is not a finite number" in printed
    assert "train-1.csv, line 154: 2 fields, but the header has 7" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--train", "train-1.csv", *LABELS, "--id", "town"],
            "give either --test files or --split",
        ),
        (["--test", "test.csv", *LABELS, "--id", "town"], "--train"),
        (["--train", "no.csv", *TOWN[2:]], "no.csv does not exist"),
        ([*FILES, *LABELS], "there is no feature; name at least one column"),
        ([*FILES, *LABELS, "--id", "Town"], "has no column 'Town' (--id); did you mean 'town'"),
        ([*TOWN, "--weights", "town"], "--weights 'town' is not of the form COL:WCOL"),
        ([*TOWN, "--share-table", "a=town", "a=buyer"], "--share-table names 'a' twice"),
        ([*TOWN, "--unclicked-conversions", "forget"], "forget"),
        ([*TOWN, "--min-cuont", "3"], "--min-cuont"),
    ],
)
def test_what_it_cannot_use_is_said_in_a_sentence(
    arguments: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert sentence in complaint(["out", *arguments], capsys)
    assert sorted(folder.iterdir()) == before


def test_it_does_not_load_torch_to_prepare(folder: Path) -> None:
    """Importing torch takes seconds, and preparing a table does not need it."""
    program = (
        "import sys; from esmm_torchrec.cli.main import main; main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *COMMAND, "out", *TOWN],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_ends_cleanly_on_a_busy_machine(folder: Path) -> None:
    """Runs more processes than processors. One process in 200 used to abort when one of Arrow's
    threads released a Python object while the interpreter was shutting down."""

    def prepare(number: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "esmm_torchrec", *COMMAND, f"data-{number}", *TOWN]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2 * usable_cores()) as pool:
        for done in pool.map(prepare, range(600)):
            assert done.returncode == 0, done.stderr
            assert "terminate" not in done.stderr
