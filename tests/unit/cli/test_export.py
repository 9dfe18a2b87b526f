"""`esmm-torchrec export`: the program, in a process with only torch, scores like `score`."""

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
from esmm_torchrec.schema import IdFeature
from tests.prepared_data import DENSE, FEATURES, write_data_set

TEST_ROWS = 333

# Passes the features of prepared impressions to the program in the order of its inputs. It knows
# the form of the files only from package.json and dataset.json.
SERVE = """
import json, sys
import numpy, pyarrow.parquet, torch


def as_lists(column):
    return [x if isinstance(x, list) else [] if x is None else [x] for x in column.to_pylist()]


out, impressions, shared, scores = sys.argv[1:]
package = json.load(open(out + "/package.json"))
statistics = json.load(open(out + "/preprocessing/dataset.json"))["statistics"]["dense"]
rows = pyarrow.parquet.read_table(impressions)
shared = pyarrow.parquet.read_table(shared).take(rows["shared_row"])
model = torch.export.load(out + "/model.pt2").module()


def column(name):
    return (rows if name in rows.column_names else shared)[name]


def call(start, end):
    given = []
    for one in package["signature"]["inputs"]:
        name, _, part = one["name"].partition(".")
        if name == "dense":
            # Back to raw values, as the program standardises them.
            raw = [
                rows[c].to_numpy().astype("float64") * statistics[c]["std"] + statistics[c]["mean"]
                for c in package["signature"]["dense"]
            ]
            given.append(torch.tensor(numpy.stack(raw, axis=1)[start:end]))
            continue
        lists = as_lists(column(name))[start:end]
        if part == "lengths":
            given.append(torch.tensor([len(x) for x in lists]))
        elif part == "values":
            given.append(torch.tensor([i for x in lists for i in x], dtype=torch.int64))
        elif part == "weights":
            of_ids = as_lists(column(name + "__weight"))[start:end]
            if one["dims"] == ["impressions"]:
                of_ids = [x or [1.0] for x in of_ids]
            given.append(torch.tensor([w for x in of_ids for w in x], dtype=torch.float32))
        else:
            given.append(torch.tensor([x[0] if x else -1 for x in lists]))
    return dict(zip(package["signature"]["outputs"], model(*given), strict=True))


whole = call(0, len(rows))
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
    """Runs the program on the test split in a separate process."""
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
    files = ["MODEL_CARD.md", "example.json", "model.pt2", "package.json", "preprocessing"]
    assert sorted(path.name for path in out.iterdir()) == files
    package = json.loads((out / "package.json").read_text())
    signature = package["signature"]
    names = [name for feature in FEATURES for name in _inputs_of(feature)]
    assert [one["name"] for one in signature["inputs"]] == [*names, "dense"]
    assert signature["dense"] == list(DENSE)
    assert signature["outputs"] == ["pctr", "pcvr", "pctcvr"]
    assert set(package["checksums"]) == {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and path.name != "package.json"
    }
    card = (out / "MODEL_CARD.md").read_text()
    for name in (*names, "dense", "pctcvr", "ctr_auc", "price, recency"):
        assert name in card


def _inputs_of(feature: IdFeature) -> list[str]:
    name = feature.name
    first = [f"{name}.values", f"{name}.lengths"] if feature.multi_valued else [name]
    return [*first, f"{name}.weights"] if feature.weighted else first


def test_the_checkpoint_is_chosen_and_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        main(["export", str(run), str(tmp_path / "out"), "--step", "10"])
    assert not [one for one in warned if "torch.distributed" in str(one.message)]
    assert f"model: {run}, step 10\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "package.json").read_text())["step"] == 10


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
    assert refused(run, there) == f"{there} already exists; remove it or choose another folder"
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # per file; the model is larger
    try:
        with pytest.raises(SystemExit) as stop:
            main(["export", str(run), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"esmm-torchrec: cannot write {tmp_path / 'out'}: file too large; make room and rerun the "
        "same command"
    )
    assert list(tmp_path.iterdir()) == []
