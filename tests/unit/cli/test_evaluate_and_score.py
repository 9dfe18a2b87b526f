"""The commands `evaluate` and `score` on one rank, called with their arguments."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from esmm_torchrec.cli.main import main
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.data.storage import Location
from esmm_torchrec.errors import RunError
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.predictor import Predictor
from tests.store import CREDENTIALS, serve

SCORES = ["sample_id", "pctr", "pcvr", "pctcvr"]
TEST_ROWS = 150
LAST_STEP = 14


def _impressions(rows: int, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    user, shop = random.integers(0, 30, rows), random.choice(["Oslo", "Rome", "Bonn"], rows)
    click = random.random(rows) < 0.2 + 0.5 * (user % 3 == 0)
    return pd.DataFrame(
        {
            "user": user,
            "shop": shop,
            "age": random.normal(40, 9, rows).round(1),
            "click": click.astype(int),
            "buy": (click & (random.random(rows) < 0.2 + 0.6 * (shop == "Rome"))).astype(int),
            "impression": 1000 + 7 * np.arange(rows),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw rows, the data set prepared from them, and a run trained on it."""
    folder = tmp_path_factory.mktemp("scoring")
    _impressions(400, 0).to_csv(folder / "train.csv", index=False)
    _impressions(TEST_ROWS, 1).to_csv(folder / "test.csv", index=False)
    _impressions(TEST_ROWS, 1).drop(columns=["click", "buy"]).to_parquet(folder / "new.parquet")
    prepare_table(
        folder / "data",
        train=[folder / "train.csv"],
        test=[folder / "test.csv"],
        click="click",
        conversion="buy",
        ids=["user", "shop"],
        dense=["age"],
        sample_id="impression",
    )
    run = ["--data", str(folder / "data"), "--out", str(folder / "run"), "--batch-size", "64"]
    model = ["--embedding-dim", "8", "--tower", "16", "--checkpoint-every", "3"]
    main(["train", *run, *model, "--epochs", "2"])
    return folder


def _score(folder: Path, out: str, *more: str) -> pd.DataFrame:
    main(["score", str(folder / "run"), "--out", str(folder / out), *more])
    return pd.read_parquet(folder / out)


@pytest.fixture(scope="module")
def scores(folder: Path) -> pd.DataFrame:
    return _score(folder, "scores.parquet", "--data", str(folder / "data"))


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("esmm-torchrec: ")


def test_the_test_split_measures_what_training_ended_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = str(folder / "run"), str(folder / "data")
    main(["evaluate", run, "--data", data, "--json", str(tmp_path / "test.json")])
    shown = capsys.readouterr().out
    recorded = json.loads((folder / "run" / "metrics.json").read_text())["test"]
    written = json.loads((tmp_path / "test.json").read_text())
    assert written.pop("test") == recorded
    whence = {"run": run, "step": LAST_STEP, "finished": True, "data": data, "split": "test"}
    assert written == whence
    assert shown.startswith("test split ")
    assert re.search(rf"^click, all impressions +{recorded['ctr_auc']:.4f} ", shown, flags=re.M)
    assert f"{TEST_ROWS} impressions, {recorded['clicks']} clicks, " in shown


def test_calibration_is_shown_by_value_of_a_field(
    folder: Path, scores: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recorded = str(tmp_path / "figures.json"), str(folder / "run" / "metrics.json")
    given = [str(folder / "run"), "--data", str(folder / "data"), "--json", out]
    main(["evaluate", *given, "--by", "shop", "age", "--against", recorded])
    shown = capsys.readouterr().out
    written = json.loads(Path(out).read_text())
    assert written["test"]["cvr_relaimpr"] == pytest.approx(0)
    assert re.search(r"^test split .* RelaImpr$", shown, flags=re.M)
    frame = _impressions(TEST_ROWS, 1)
    pcvr, buy = scores["pcvr"].to_numpy().astype(float), frame["buy"].to_numpy()
    for of in written["by"]["shop"]["cvr"]:
        own = ((frame["shop"] == of["value"]) & (frame["click"] == 1)).to_numpy()
        assert of["impressions"] == own.sum()
        assert of["pcoc"] == pytest.approx(pcvr[own].sum() / buy[own].sum(), rel=1e-4)
    assert {of["value"] for of in written["by"]["shop"]["cvr"]} == {"Oslo", "Rome", "Bonn"}
    heading = r"^cvr by shop +impressions +observed +predicted +PCOC +ECE +z$"
    assert re.search(heading, shown, flags=re.M)
    tenths = written["by"]["age"]["ctr"]
    assert len(tenths) == 10
    assert all(abs(of["impressions"] - TEST_ROWS / 10) <= 6 for of in tenths)


def test_a_field_that_is_not_there_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / "run"), "--data", str(folder / "data")]
    said = _refused(["evaluate", *given, "--by", "colour"], capsys)
    assert said.startswith("--by colour is not a feature of the data set; choose from user, shop")
    said = _refused(["evaluate", *given, "--against", str(folder / "no.json")], capsys)
    assert "has no figures for the test split" in said


def test_a_model_is_calibrated_on_the_test_half(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = str(tmp_path / "run"), str(folder / "data")
    shutil.copytree(folder / "run", run)
    main(["calibrate", run, "--data", data, "--kind", "platt"])
    shown = capsys.readouterr().out
    assert re.search(
        r"^test split +PCOC +calibrated +ECE +calibrated +NE +calibrated$", shown, re.M
    )
    recorded = json.loads((folder / "run" / "metrics.json").read_text())["test"]
    assert re.search(rf"^cvr +{recorded['cvr_pcoc']:.4f} ", shown, flags=re.M)
    main(["evaluate", run, "--data", data, "--calibrated", "--json", str(tmp_path / "c.json")])
    calibrated = json.loads((tmp_path / "c.json").read_text())["test"]
    # On the data it was fitted to, the intercept makes the sums equal.
    assert calibrated["cvr_pcoc"] == pytest.approx(1, abs=1e-3)
    assert calibrated["cvr_auc"] == pytest.approx(recorded["cvr_auc"])
    found = RunFolder.open(Path(run)).calibration(LAST_STEP)
    assert set(found.curves) == {"ctr", "cvr"}
    with pytest.raises(RunError, match="is of step 14 and the model is of step 3"):
        RunFolder.open(Path(run)).calibration(3)
    with pytest.raises(RunError, match="run 'esmm-torchrec calibrate' first"):
        RunFolder.open(folder / "run").calibration(LAST_STEP)


def test_the_training_split_is_another_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(folder / "data"), "--split", "train", "--step", "3"]
    main(["evaluate", str(folder / "run"), *given, "--json", str(tmp_path / "train.json")])
    written = json.loads((tmp_path / "train.json").read_text())
    assert (written["split"], written["step"]) == ("train", 3)
    assert written["train"]["impressions"] == 400
    assert "test" not in written
    shown = capsys.readouterr().out
    assert shown.startswith("train split ")
    assert "400 impressions, " in shown


def test_an_earlier_checkpoint_is_another_model(folder: Path, scores: pd.DataFrame) -> None:
    earlier = _score(folder, "earlier.parquet", "--data", str(folder / "data"), "--step", "3")
    assert earlier["sample_id"].tolist() == scores["sample_id"].tolist()
    assert (earlier["pcvr"] != scores["pcvr"]).all()


def test_the_checkpoint_is_told_and_whether_the_training_ended(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folder / "data")]
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run, ignore=shutil.ignore_patterns("metrics.json"))
    shutil.rmtree(run / "checkpoints" / f"step-{LAST_STEP:08d}")
    main(["score", str(folder / "run"), *data, "--out", str(tmp_path / "whole.parquet")])
    assert f"model: {folder / 'run'}, step {LAST_STEP}\n" in capsys.readouterr().out
    unfinished = f"model: {run}, step 12, from an unfinished training\n"
    main(["score", str(run), *data, "--out", str(tmp_path / "part.parquet")])
    assert unfinished in capsys.readouterr().out
    main(["evaluate", str(run), *data, "--json", str(tmp_path / "part.json")])
    assert unfinished in capsys.readouterr().out
    assert json.loads((tmp_path / "part.json").read_text())["finished"] is False


def test_a_folder_that_is_there_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw rows are laid out temporarily in OUT.rows, a name that the user may already have."""
    own = tmp_path / "x.parquet.rows"
    (own / "deeper").mkdir(parents=True)
    out = ["--out", str(tmp_path / "x.parquet")]
    raw = ["--input", str(folder / "new.parquet")]
    assert _refused(["score", str(folder / "run"), *raw, *out], capsys) == (
        f"{own} already exists; remove it or choose another --out"
    )
    assert (own / "deeper").is_dir()
    main(["score", str(folder / "run"), "--data", str(folder / "data"), *out])
    assert (own / "deeper").is_dir()


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_score_that_is_ended_leaves_nothing(
    signal_name: str, folder: Path, tmp_path: Path
) -> None:
    """A batch system ends it with these signals. There are enough rows that it is still scoring."""
    frame = pd.read_parquet(folder / "new.parquet")
    pd.concat([frame] * 4000, ignore_index=True).to_parquet(tmp_path / "many.parquet")
    given = ["--input", "many.parquet", "--out", "x.parquet", "--batch-size", "16"]
    command = [sys.executable, "-m", "esmm_torchrec", "score", str(folder / "run"), *given]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if (tmp_path / "x.parquet.partial").exists():
                break
            time.sleep(0.1)
        assert (tmp_path / "x.parquet.rows").exists()
        process.send_signal(getattr(signal, signal_name))
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (130, 143)
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["many.parquet"]


def test_scores_come_in_the_order_of_the_data(scores: pd.DataFrame) -> None:
    assert list(scores.columns) == SCORES
    assert scores["sample_id"].tolist() == [1000 + 7 * row for row in range(TEST_ROWS)]
    assert scores.dtypes.astype(str).tolist() == ["int64", "float32", "float32", "float32"]
    for name in SCORES[1:]:
        assert scores[name].between(0, 1, inclusive="neither").all()
    np.testing.assert_allclose(scores["pctcvr"], scores["pctr"] * scores["pcvr"], rtol=1e-5)


def test_a_data_set_is_scored_in_parts(
    folder: Path, scores: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "parts"
    given = ["score", str(folder / "run"), "--data", str(folder / "data"), "--out", str(out)]
    main(given)
    (part,) = json.loads((out / "scores.json").read_text())["files"]
    assert part["rows"] == TEST_ROWS
    in_parts = pd.read_parquet(out / part["file"])
    assert in_parts["sample_id"].tolist() == scores["sample_id"].tolist()
    for name in SCORES[1:]:
        np.testing.assert_allclose(in_parts[name], scores[name], atol=1e-6)
    capsys.readouterr()
    assert f"{out} holds scores already" in _refused(given, capsys)


@pytest.mark.parametrize("name", ["new.parquet", "test.csv"])
def test_raw_rows_score_like_the_prepared_ones(
    name: str, folder: Path, scores: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw rows without labels, or with labels, which are ignored."""
    out = f"{name}-scores.parquet"
    scored = _score(folder, out, "--input", str(folder / name), "--batch-size", "50")
    assert f"{TEST_ROWS} impressions scored: {folder / out}\n" in capsys.readouterr().out
    assert scored["sample_id"].tolist() == scores["sample_id"].tolist()
    for column in SCORES[1:]:
        np.testing.assert_allclose(scored[column], scores[column], atol=1e-6)


def test_the_predictor_scores_the_same(folder: Path, scores: pd.DataFrame) -> None:
    predicted = Predictor(folder / "run").score(folder / "new.parquet")
    for column in SCORES:
        np.testing.assert_allclose(predicted[column], scores[column], atol=1e-6)


def test_ids_that_training_never_saw_score_as_unknown(folder: Path, tmp_path: Path) -> None:
    row = {"user": 3, "shop": "Rome", "age": 40.0, "impression": 1}
    new = [row | {"impression": 2, "user": user} for user in (-5, 10**12)]
    pd.DataFrame([row, *new]).to_parquet(tmp_path / "rows.parquet")
    scored = Predictor(folder / "run").score(tmp_path / "rows.parquet")
    assert scored["pctr"][1] == scored["pctr"][2]
    assert scored["pctr"][0] != scored["pctr"][1]


@pytest.mark.usefixtures("scores")
def test_what_is_there_is_never_written_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "scores.parquet"
    before = out.read_bytes()
    again = ["score", str(folder / "run"), "--data", str(folder / "data"), "--out", str(out)]
    assert _refused(again, capsys) == f"{out} already exists; remove it or choose another --out"
    assert out.read_bytes() == before


def _no_such_column(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    return frame.drop(columns="user"), "has no column 'user' (an id feature)"


def _no_number(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    frame["age"] = frame["age"].astype(str)
    frame.loc[4, "age"] = "old"
    return frame, "row 4, column 'age': "


def _no_row(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    return frame.head(0), "has no row"


@pytest.mark.parametrize("spoil", [_no_such_column, _no_number, _no_row])
def test_rows_that_cannot_be_scored_are_named(
    spoil: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, sentence = spoil(pd.read_parquet(folder / "new.parquet"))
    frame.to_parquet(tmp_path / "rows.parquet")
    arguments = ["--input", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "x.parquet")]
    said = _refused(["score", str(folder / "run"), *arguments], capsys)
    assert said.startswith(str(tmp_path / "rows.parquet"))
    assert sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


@pytest.mark.parametrize("command", [["evaluate"], ["score", "--out", "{tmp}/x.parquet"]])
@pytest.mark.parametrize(
    ("run", "data", "more", "sentence"),
    [
        (
            "{tmp}",
            "{folder}/data",
            [],
            "{tmp} is not a run folder: it has no config.json; give the",
        ),
        (
            "{folder}/run",
            "{tmp}",
            [],
            "{tmp} is not a prepared data set (dataset.json is missing);",
        ),
        (
            "{folder}/run",
            "{folder}/other",
            [],
            "{folder}/other has other features or vocabularies than the data of {folder}/run; give "
            "the data set that the run was trained on",
        ),
        (
            "{folder}/run",
            "{folder}/data",
            ["--step", "5"],
            "{folder}/run/checkpoints has no checkpoint of step 5; it has: 3, 6, 9, 12, 14",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(
    command: list[str],
    run: str,
    data: str,
    more: list[str],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not (folder / "other").exists():
        prepare_table(
            folder / "other",
            train=[folder / "test.csv"],
            test=[folder / "test.csv"],
            click="click",
            conversion="buy",
            ids=["user"],
        )
    name, *given = command
    arguments = [name, run, "--data", data, *given, *more]
    places = {"tmp": str(tmp_path), "folder": str(folder)}
    said = _refused([argument.format(**places) for argument in arguments], capsys)
    assert said.startswith(sentence.format(**places))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((folder / "run" / "config.json").read_bytes())
    shutil.copytree(folder / "run" / "preprocessing", tmp_path / "preprocessing")
    out = str(tmp_path / "x.parquet")
    raw = ["score", str(tmp_path), "--input", str(folder / "new.parquet"), "--out", out]
    for command in (["evaluate", str(tmp_path), "--data", str(folder / "data")], raw):
        assert _refused(command, capsys) == (
            f"{tmp_path} has no checkpoint yet; wait for its training to end"
        )
    (tmp_path / "checkpoints").symlink_to(folder / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "preprocessing")
    assert _refused(raw, capsys) == (
        f"{tmp_path} has lost its preprocessing/, which encodes raw rows; copy it from a run on "
        "the same data, or score a prepared data set"
    )


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow"])
def test_the_name_says_what_is_written(
    suffix: str, folder: Path, tmp_path: Path, scores: pd.DataFrame
) -> None:
    out = tmp_path / f"scores{suffix}"
    given = ["--input", str(folder / "new.parquet"), "--keep", "shop", "user"]
    main(["score", str(folder / "run"), *given, "--out", str(out)])
    if suffix == ".csv":
        written = pd.read_csv(out)
    elif suffix == ".arrow":
        written = pa.ipc.open_file(out).read_pandas()
    else:
        written = pd.read_parquet(out)
    assert list(written.columns) == [*SCORES, "shop", "user"]
    new = pd.read_parquet(folder / "new.parquet")
    assert written["shop"].tolist() == new["shop"].tolist()
    assert written["user"].tolist() == new["user"].tolist()
    np.testing.assert_allclose(written["pcvr"], scores["pcvr"], atol=1e-6)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--out", "x.json"],
            "--out x.json has an unknown file type; its name must end in one of .parquet, ",
        ),
        (["--out", "x.csv", "--keep", "pctr"], "new.parquet has no column 'pctr'"),
        (["--out", "x", "--data", "data"], "give what to score, as either --data or --input"),
    ],
)
def test_an_output_that_cannot_be_is_refused(
    more: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["score", str(folder / "run"), "--input", str(folder / "new.parquet"), *more]
    assert sentence in _refused(given, capsys)


def _day(folder: Path, day: Path, files: int) -> list[str]:
    """Writes the log of a day to files."""
    day.mkdir()
    new = pd.read_parquet(folder / "new.parquet")
    for number, rows in enumerate(np.array_split(np.arange(len(new)), files)):
        new.iloc[rows].to_parquet(day / f"part-{number}.parquet")
    return ["--input", str(day / "*.parquet")]


def test_a_folder_of_files_is_scored_file_by_file_and_goes_on(
    folder: Path, tmp_path: Path, scores: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    day = _day(folder, tmp_path / "day", 3)
    out = tmp_path / "scores"
    command = ["score", str(folder / "run"), *day, "--out", str(out)]
    main(command)
    names = [f"part-{number}.parquet" for number in range(3)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "scores.json"]
    whole = pd.concat([pd.read_parquet(out / name) for name in names])
    assert whole["sample_id"].tolist() == scores["sample_id"].tolist()
    np.testing.assert_allclose(whole["pctr"], scores["pctr"], atol=1e-6)

    (out / names[1]).unlink()
    times = {name: (out / name).stat().st_mtime_ns for name in (names[0], names[2])}
    capsys.readouterr()
    main(command)
    assert "50 impressions scored" in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert (out / names[1]).exists()

    assert "holds scores of another model or of other options" in _refused(
        [*command, "--step", "3"], capsys
    )
    (tmp_path / "day" / names[2]).write_bytes((tmp_path / "day" / names[0]).read_bytes())
    assert f"has changed since {out / names[2]} was made" in _refused(command, capsys)


def test_rows_and_scores_may_be_in_a_store(
    folder: Path,
    scores: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with serve() as store:
        Location.of(store.uri("bucket/new.parquet")).copy_from(folder / "new.parquet")
        out = store.uri("bucket/scores.parquet")
        given = ["score", str(folder / "run"), "--input", store.uri("bucket/new.parquet")]
        main([*given, "--out", out])
        with Location.of(out).open_input() as file:
            scored = pd.read_parquet(file)
        np.testing.assert_allclose(scored[SCORES[1:]], scores[SCORES[1:]], atol=1e-6)
        capsys.readouterr()
        assert "s3://bucket/scores.parquet already exists" in _refused(
            [*given, "--out", out], capsys
        )
        assert "give an --out that ends in .parquet" in _refused(
            [*given, "--out", "folder"], capsys
        )


def test_several_inputs_go_to_one_file_in_order(
    folder: Path, tmp_path: Path, scores: pd.DataFrame
) -> None:
    day = _day(folder, tmp_path / "day", 4)
    main(["score", str(folder / "run"), *day, "--out", str(tmp_path / "all.parquet")])
    whole = pd.read_parquet(tmp_path / "all.parquet")
    assert whole["sample_id"].tolist() == scores["sample_id"].tolist()


def test_rows_that_cannot_be_scored_are_null_where_allowed(
    folder: Path, tmp_path: Path, scores: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_parquet(folder / "new.parquet")
    frame["user"] = frame["user"].astype(float)
    frame.loc[[3, 70], "user"] = 0.5
    frame.loc[9, "age"] = np.inf
    frame.to_parquet(tmp_path / "rows.parquet")
    given = ["score", str(folder / "run"), "--input", str(tmp_path / "rows.parquet")]
    out = tmp_path / "x.parquet"
    said = _refused([*given, "--out", str(out), "--max-bad-rows", "2"], capsys)
    assert "there are more than 2 bad rows (--max-bad-rows)" in said
    main([*given, "--out", str(out), "--max-bad-rows", "3", "--keep", "shop"])
    shown = capsys.readouterr().out
    assert "3 rows without scores; the first of them:" in shown
    assert "row 3, column 'user': 0.5 is not an integer" in shown
    written = pd.read_parquet(out)
    assert np.flatnonzero(written["pctr"].isna()).tolist() == [3, 9, 70]
    assert written["sample_id"].isna().sum() == 3
    assert written["shop"].tolist() == frame["shop"].tolist()
    good = written["pctr"].notna()
    np.testing.assert_allclose(written["pctr"][good], scores["pctr"][good], atol=1e-6)


def test_far_more_unknown_ids_than_in_training_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_parquet(folder / "new.parquet")
    frame["user"] += 10_000
    frame.to_parquet(tmp_path / "rows.parquet")
    given = ["--input", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "x.parquet")]
    main(["score", str(folder / "run"), *given])
    shown = capsys.readouterr().out
    assert "warning: 100.0% of the ids of 'user' are unknown to the model" in shown
    assert "'shop' are unknown" not in shown


def test_options_of_scoring_are_checked_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / "run"), "--input", str(folder / "test.csv"), "--out"]
    out = str(folder / "never.parquet")
    for more, expected in (
        (["--keep", "user", "user"], "--keep names 'user' twice; name it once"),
        (["--batch-size", "0"], "--batch-size 0 is not positive; give at least 1"),
    ):
        assert _refused(["score", *given, out, *more], capsys) == expected
    data = ["--data", str(folder / "data"), "--batch-size", "-5"]
    for command in ("evaluate", "calibrate"):
        said = _refused([command, str(folder / "run"), *data], capsys)
        assert said == "--batch-size -5 is not positive; give at least 1"
    assert _refused(["report", str(folder / "run"), "--sample", "0"], capsys) == (
        "--sample 0 is not positive; give at least 1"
    )


def test_a_column_to_keep_cannot_be_called_as_a_score(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.read_csv(folder / "test.csv").assign(pctr=0.5)
    rows.to_csv(folder / "scored_before.csv", index=False)
    given = ["--input", str(folder / "scored_before.csv"), "--keep", "pctr"]
    out = ["--out", str(folder / "again.parquet")]
    assert _refused(["score", str(folder / "run"), *given, *out], capsys) == (
        "--keep pctr is the name of a column of scores; rename it in the input"
    )
    assert not (folder / "again.parquet").exists()
