from pathlib import Path

import pytest

from esmm_torchrec.cli.main import main
from esmm_torchrec.data.prepared import PreparedDataSet

COMMON = "00000000000000ff,1,101\x027\x031.0\n"
SKELETON = (
    "1,1,1,00000000000000ff,1,205\x025\x031.0\n"
    "2,0,0,00000000000000ff,1,205\x026\x031.0\n"
    "3,0,0,00000000000000ff,1,205\x025\x031.0\n"
    "4,0,1,00000000000000ff,1,205\x025\x031.0\n"
    "5,0,0,00000000000000ff\n"
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"common_features_{split}.csv").write_text(COMMON)
        (folder / f"sample_skeleton_{split}.csv").write_text(SKELETON)
    return folder


def test_the_report_holds_the_counts(raw: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    main(["prepare", "ali-ccp", str(raw), str(out), "--min-count", "2", "--max-bad-rows", "2"])
    captured = capsys.readouterr()
    lines = [" ".join(line.split()) for line in captured.out.splitlines()]
    for line in (
        "train test",
        "impressions 3 3",
        "clicks 1 1",
        "CTR 33.333% 33.333%",
        "conversions 1 1",
        "CVR of clicks 100.000% 100.000%",
        "shared rows 1 1",
        "conversions without a click (drop) 1 1",
        "dropped: bad skeleton rows 1 1",
        "205 2 2 205",
        "109_14 1 0 109_14 (list, weighted)",
        "205 0.0% 0.0% 33.3% 33.3%",
        f"prepared data set: {out}",
        f"next: esmm-torchrec train --data {out} --out runs/out",
    ):
        assert line in lines
    named = [line for line in lines if "line 5: 4 columns instead of 6" in line]
    assert len(named) == 2
    assert "sample_skeleton_train.csv" in captured.err, "progress goes to stderr"
    assert PreparedDataSet.open(out).min_count == 2


def test_options_reach_the_preparation(raw: Path, tmp_path: Path, capsys):
    options = ["--max-bad-rows", "2", "--unclicked-purchases", "keep"]
    main(["prepare", "ali-ccp", str(raw), str(tmp_path / "out"), *options])
    assert PreparedDataSet.open(tmp_path / "out").splits["train"].impressions == 4
    assert "conversions without a click (keep)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "sample_skeleton_train.csv, line 5: 4 columns instead of 6; fix it, or"),
        (["--max-bad-rows", "1"], "sample_skeleton_test.csv, line 5"),
        (
            ["--max-bad-rows", "2", "--unclicked-purchases", "error"],
            "line 4: a purchase without a click",
        ),
        (["--min-count", "0"], "--min-count must be 1 or more, not 0"),
        (["--unclicked-purchases", "maybe"], "--unclicked-purchases"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    raw: Path, tmp_path: Path, capsys, options, sentence
):
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "ali-ccp", str(raw), str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("esmm-torchrec: ")
    assert sentence in last
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_help_names_every_option(capsys):
    main(["prepare", "ali-ccp", "--help"])
    shown = capsys.readouterr().out
    for option in ("--min-count", "--max-bad-rows", "--unclicked-purchases", "truth.parquet"):
        assert option in shown
