"""`esmm-torchrec export`: the program, in a process with torch alone, scores as `score` does."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esmm_torchrec.cli.main import main
from tests.prepared_data import DENSE, FEATURES, ROWS, write_data_set

TEST_ROWS = 333

# Puts the features of prepared impressions before the program by their names. It knows the form
# of the files from inputs.json alone.
SERVE = """
import json, sys
import numpy, pyarrow.parquet, torch


def as_lists(column):
    return [x if isinstance(x, list) else [] if x is None else [x] for x in column.to_pylist()]


out, impressions, shared, scores = sys.argv[1:]
inputs = json.load(open(out + "/inputs.json"))
rows = pyarrow.parquet.read_table(impressions)
shared = pyarrow.parquet.read_table(shared).take(rows["shared_row"])
model = torch.export.load(out + "/model.pt2").module()
values, lengths, weights = {}, {}, {}
for feature in inputs["id_features"]:
    name = feature["name"]
    table = rows if name in rows.column_names else shared
    lists = as_lists(table[name])
    lengths[name] = [len(x) for x in lists]
    values[name] = [i for x in lists for i in x]
    if feature["weighted"]:
        weights[name] = [w for x in as_lists(table[name + "__weight"]) for w in x]
dense = [rows[feature["name"]].to_pylist() for feature in inputs["dense_features"]]


def call(start, end):
    given = {"values": {}, "lengths": {}, "weights": {}}
    for name in lengths:
        first, last = sum(lengths[name][:start]), sum(lengths[name][:end])
        given["lengths"][name] = torch.tensor(lengths[name][start:end])
        given["values"][name] = torch.tensor(values[name][first:last], dtype=torch.int64)
        if name in weights:
            given["weights"][name] = torch.tensor(weights[name][first:last], dtype=torch.float32)
    return model(**given, dense=torch.tensor(dense).T[start:end])


whole = call(0, len(rows))
assert list(whole) == inputs["outputs"]
for start, end in ((0, 1), (5, 7), (100, 300)):
    for name, probability in call(start, end).items():
        assert torch.allclose(probability, whole[name][start:end], atol=1e-7)
foreign = [m for m in ("esmm_torchrec", "torchrec", "fbgemm_gpu") if m in sys.modules]
assert not foreign, foreign
numpy.savez(scores, **{name: probability.numpy() for name, probability in whole.items()})
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("export") / "data", test=TEST_ROWS).path


def _train(run: Path, data: Path, *more: str) -> None:
    given = ["--data", str(data), "--out", str(run), "--batch-size", "64"]
    main(
        [
            "train",
            *given,
            "--embedding-dim",
            "8",
            "--tower",
            "16",
            "--sparse-lr",
            "0.5",
            *(more if "--epochs" in more else ("--epochs", "1", *more)),
        ]
    )


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    run = data.with_name("run")
    _train(run, data, "--epochs", "2", "--checkpoint-every", "10")
    return run


def _served(out: Path, data: Path) -> dict[str, np.ndarray]:
    """What the program gives for the test half, in a process of its own."""
    scores = out.with_suffix(".npz")
    arguments = [data / "test/impressions-00000.parquet", data / "test/shared-00000.parquet"]
    command = [sys.executable, "-c", SERVE, out, *arguments, scores]
    subprocess.run(list(map(str, command)), check=True, timeout=120, cwd=out.parent)
    return dict(np.load(scores))


@pytest.mark.parametrize(
    ("method", "weights"),
    [("esmm", "normalised"), ("base", "normalised"), ("division", "raw")],
)
def test_the_program_scores_as_score_does(
    method: str, weights: str, data: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "exported"
    _train(run, data, "--method", method, "--history-weights", weights)
    main(["export", str(run), str(out)])
    main(["score", str(run), "--data", str(data), "--out", str(tmp_path / "scores.parquet")])
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    served = _served(out, data)
    assert set(served) == {name for name in scores.columns[1:] if scores[name].notna().all()}
    for name, probability in served.items():
        assert probability.shape == (TEST_ROWS,)
        assert np.ptp(probability) > 0.01
        np.testing.assert_allclose(probability, scores[name], atol=1e-6, rtol=1e-6)


def test_what_the_program_takes_is_described(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    main(["export", str(run), str(out)])
    files = ["README.txt", "inputs.json", "model.pt2", "preprocessing"]
    assert sorted(path.name for path in out.iterdir()) == files
    inputs = json.loads((out / "inputs.json").read_text())
    assert [one["name"] for one in inputs["id_features"]] == [one.name for one in FEATURES]
    for one, feature in zip(inputs["id_features"], FEATURES, strict=True):
        assert one["rows"] == ROWS[feature.table] + 1
        assert (one["multi_valued"], one["weighted"]) == (feature.multi_valued, feature.weighted)
        vocabulary = pd.read_parquet(out / one["vocabulary"])
        assert len(vocabulary) == ROWS[feature.table]
    assert [
        (one["name"], one["transform"]["mean"], one["transform"]["std"])
        for one in inputs["dense_features"]
    ] == [(name, mean, std) for name, (mean, std) in DENSE.items()]
    readme = (out / "README.txt").read_text()
    for name in ("model.pt2", "values", "lengths", "weights", "dense", "pctcvr"):
        assert name in readme


def test_the_checkpoint_is_chosen_and_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        main(["export", str(run), str(tmp_path / "out"), "--step", "10"])
    assert not [one for one in warned if "torch.distributed" in str(one.message)]
    assert f"model: {run}, step 10\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "inputs.json").read_text())["step"] == 10


def test_what_cannot_be_exported_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Path | str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["export", *map(str, arguments)])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("esmm-torchrec: ")

    there = tmp_path / "there"
    there.mkdir()
    assert refused(run, there) == f"{there} exists already; remove it or choose another folder"
    assert refused(tmp_path, tmp_path / "x").startswith(f"{tmp_path} is not a run folder")
    assert "no checkpoint of step 7" in refused(run, tmp_path / "x", "--step", "7")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((run / "config.json").read_bytes())
    (bare / "checkpoints").symlink_to(run / "checkpoints")
    assert refused(bare, tmp_path / "x").startswith(f"{bare} has lost its preprocessing/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "there"]


def test_a_full_disk_is_told_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # of one file; the model has more
    try:
        with pytest.raises(SystemExit) as stop:
            main(["export", str(run), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"esmm-torchrec: cannot write {tmp_path / 'out'}: file too large; make room and give the "
        "same command again"
    )
    assert list(tmp_path.iterdir()) == []
