"""A model returns the same scores for a run and its packages, for files, frames and requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from google.protobuf import text_format
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score
from tritonclient.grpc import model_config_pb2

from esmm_torchrec.cli.main import main
from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.errors import DataError, OptionError, RunError
from esmm_torchrec.metrics.calibration import PlattCurve
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.package import Package
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.serving.server import ServerOptions
from tests.unit.serving.conftest import COLUMNS, ROWS, SCORES, serve


@pytest.fixture(scope="module", params=["run", "package"])
def predictor(folder: Path, request: pytest.FixtureRequest) -> Predictor:
    return Predictor(folder / request.param)


def _assert_same(scores: Any, expected: pd.DataFrame) -> None:
    for name in SCORES:
        assert np.ptp(expected[name]) > 0.01
        np.testing.assert_allclose(np.asarray(scores[name]), expected[name], rtol=0, atol=2e-7)


def test_files_frames_and_requests_score_alike(
    predictor: Predictor, folder: Path, columns: dict[str, list[Any]], expected: pd.DataFrame
) -> None:
    _assert_same(predictor.score(folder / "test.parquet", batch_size=50), expected)
    frame = pd.read_parquet(folder / "test.parquet")
    _assert_same(predictor.score(frame), expected)
    _assert_same(predictor.predict(columns), expected)
    _assert_same(predictor.predict({name: frame[name] for name in COLUMNS}), expected)
    table = pa.Table.from_pandas(frame)
    _assert_same(predictor.predict({name: table[name] for name in COLUMNS}), expected)
    rows = [{name: columns[name][row] for name in COLUMNS} for row in range(ROWS)]
    _assert_same(predictor.predict(rows), expected)
    alone = [predictor.predict(row) for row in rows]
    _assert_same({name: np.concatenate([s[name] for s in alone]) for name in SCORES}, expected)


def test_what_a_request_leaves_out_is_missing(predictor: Predictor) -> None:
    nothing = predictor.predict({})
    given: dict[str, Any] = dict.fromkeys(["user", "shop", "age", "price"])
    given |= {"tags": [], "history": [], "history_weight": []}
    for name, score in predictor.predict(given).items():
        assert score.shape == (1,)
        assert score == nothing[name]
    assert predictor.predict({"user": []})["pctr"].shape == (0,)
    assert predictor.predict([])["pctr"].shape == (0,)
    assert predictor.predict([{}, {}])["pctr"].tolist() == [nothing["pctr"][0]] * 2


def test_one_value_stands_for_all_impressions(predictor: Predictor) -> None:
    shops = ["Oslo", "Rome", "nowhere", None]
    together = predictor.predict({"user": 3, "tags": [1, 2], "shop": shops})
    for row, shop in enumerate(shops):
        alone = predictor.predict({"user": 3, "tags": [1, 2], "shop": shop})
        np.testing.assert_allclose(together["pcvr"][row], alone["pcvr"][0], atol=2e-7)


@pytest.mark.parametrize("tags", [3, np.int64(3), [3]])
def test_rows_keep_their_own_lists(predictor: Predictor, tags: Any) -> None:
    """Next to other rows, a value outside a list is not taken as part of a list for all rows."""
    alone = [predictor.predict({"user": 1, "tags": tags}), predictor.predict({"user": 2})]
    alone.append(predictor.predict({"user": 2, "tags": [5, 3]}))
    rows = [{"user": 1, "tags": tags}, {"user": 2}, {"user": 2, "tags": [5, 3]}]
    for some in ([0, 1], [0, 1, 2], [2, 0], [0, 0, 0]):
        together = predictor.predict([rows[row] for row in some])
        for name in SCORES:
            separate = np.concatenate([alone[row][name] for row in some])
            np.testing.assert_allclose(together[name], separate, rtol=0, atol=2e-7)
    assert alone[0]["pctr"] != predictor.predict({"user": 1})["pctr"]


@pytest.mark.parametrize(
    "value", [7, 7.0, "7", " 7 ", np.int64(7), np.array([7]), pa.array([7.0]), pd.Series([7])]
)
def test_one_id_is_one_id(predictor: Predictor, value: Any) -> None:
    assert predictor.predict({"user": value})["pctr"] == predictor.predict({"user": 7})["pctr"]


@pytest.mark.parametrize("value", ["", "NULL", None, float("nan")])
def test_one_missing_id_is_one_missing_id(predictor: Predictor, value: Any) -> None:
    for name in ("user", "shop"):
        assert predictor.predict({name: value})["pctr"] == predictor.predict({})["pctr"]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"usr": 3}, "there is no feature 'usr'; did you mean 'user'?"),
        ({"click": 1}, "there is no feature 'click'; there are 'user', 'shop', "),
        ({"user": [1, 2], "shop": ["Oslo"] * 3}, "'user' has 2 values and 'shop' has 3; "),
        ({"user": "x"}, "column 'user': 'x' is not an integer"),
        ({"user": 7.5}, "column 'user': 7.5 is not an integer"),
        ({"shop": 7.0}, "column 'shop' holds double but the ids are text"),
        ({"shop": True}, "column 'shop' holds bool but the ids are text"),
        ({"user": [1, 2**70]}, "column 'user': its values are not of one type"),
        ({"user": [1, "x"]}, "column 'user': its values are not of one type"),
        ({"user": {"id": 1}}, "column 'user' holds struct"),
        ({"shop": 5}, "column 'shop' holds int64 but the ids are text"),
        ({"tags": [[1], ["a"]]}, "column 'tags': its values are not of one type"),
        ({"tags": ["a"]}, "column 'tags': the list holds a value that is not an id"),
        ({"tags": list(range(70_000))}, "the list holds more than 65535 ids"),
        ({"history": [1]}, "'history' comes without its weights 'history_weight'; give both"),
        ({"history": [1], "history_weight": [1.0, 2.0]}, "2 weights beside 1 ids in 'history'"),
        ({"history": [1], "history_weight": [np.nan]}, "a weight that is missing or not finite"),
        ({"age": [40, float("inf")]}, "row 1, column 'age': inf is not a finite number"),
        ({"age": 10**400}, "column 'age': "),
        ({"age": "old"}, "column 'age': 'old' is not a finite number"),
    ],
)
def test_a_request_that_cannot_be_scored_is_told(
    predictor: Predictor, request_: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError) as error:
        predictor.predict(request_)
    assert sentence in str(error.value)


def test_threads_share_a_predictor(
    predictor: Predictor, columns: dict[str, list[Any]], expected: pd.DataFrame
) -> None:
    rows = [{name: columns[name][row] for name in COLUMNS} for row in range(ROWS)]
    with ThreadPoolExecutor(8) as threads:
        scores = list(threads.map(predictor.predict, rows * 5))
    pctr = np.concatenate([score["pctr"] for score in scores])
    np.testing.assert_allclose(pctr, np.tile(expected["pctr"], 5), atol=2e-7)


def test_the_program_refuses_what_does_not_fit(folder: Path) -> None:
    package = Package.open(folder / "package")
    run = package.load()
    predictor = Predictor(folder / "package")
    inputs = predictor.encode(package.example()[0])
    names = [one.name for one in package.signature.inputs]

    def spoilt(name: str, change: Any) -> None:
        tensors = inputs.tensors(package.signature, torch.device("cpu"))
        place = names.index(name)
        tensors[place] = change(tensors[place])
        run(tensors)

    spoilt("user", torch.clone)
    with pytest.raises(RuntimeError, match="the lengths of tags are negative or do not sum"):
        spoilt("tags.lengths", lambda lengths: lengths + 1)
    with pytest.raises(RuntimeError, match="an id is outside the rows of its table"):
        spoilt("user", lambda rows: rows + 100)
    with pytest.raises(RuntimeError, match="an id is outside the rows of its table"):
        spoilt("tags.values", lambda rows: rows - 100)
    with pytest.raises(RuntimeError, match="a dense value is infinite"):
        spoilt("dense", lambda dense: dense * float("inf"))


def test_the_transforms_in_the_program_are_those_of_the_data(folder: Path) -> None:
    """Values beyond the clipping bounds, values under the logarithm, and missing values."""
    predictor, rows = Predictor(folder / "package"), RowEncoder.load(folder / "data")
    transform = rows.dense["price"]
    assert transform.method == "log"
    assert transform.high is not None
    low, high = transform.low, transform.high
    pctr = predictor.predict({"price": [high, high * 100, low, -1e300]})["pctr"]
    assert pctr[0] == pctr[1]
    assert pctr[2] == pctr[3]
    assert pctr[0] != pctr[2]


def _spoil_checksum(package: Path) -> None:
    with (package / "preprocessing" / "dataset.json").open("a") as file:
        file.write(" ")


def _spoil_version(package: Path) -> None:
    content = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(json.dumps(content | {"format_version": 1}))


def _spoil_json(package: Path) -> None:
    (package / "package.json").write_text("{}")


def _lose_program(package: Path) -> None:
    (package / "model.pt2").unlink()


def _other_example(package: Path) -> None:
    content = json.loads((package / "example.json").read_text())
    content["scores"]["pctr"][0] += 0.01
    (package / "example.json").write_text(json.dumps(content))
    opened = json.loads((package / "package.json").read_text())
    del opened["checksums"]["example.json"]
    opened["checksums"]["example.json"] = _sha256(package / "example.json")
    (package / "package.json").write_text(json.dumps(opened))


def _sha256(path: Path) -> str:
    given = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    return given.stdout.split()[0]


def _other_machine(package: Path) -> None:
    opened = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(
        json.dumps(opened | {"form": "aoti", "machine": "x86_64 AVX1024"})
    )


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_spoil_checksum, "dataset.json was changed after it was exported"),
        (_spoil_version, "is an exported model of format version 1, but this library reads"),
        (_spoil_json, "package.json is broken ('format_version'); export again"),
        (_lose_program, "model.pt2 cannot be read (No such file or directory); export again"),
        (
            _other_example,
            "scores its example differently from when it was exported (pctr differs by",
        ),
        (_other_machine, "was compiled for x86_64 AVX1024, but this machine has "),
    ],
)
def test_a_damaged_package_is_refused(
    folder: Path, tmp_path: Path, spoil: Any, sentence: str
) -> None:
    package = tmp_path / "package"
    shutil.copytree(folder / "package", package)
    spoil(package)
    with pytest.raises(RunError) as error:
        Predictor(package)
    assert sentence in str(error.value)


def test_score_takes_a_package(
    folder: Path, tmp_path: Path, expected: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["score", str(folder / "package"), "--input", str(folder / "test.parquet")]
    main([*given, "--out", str(tmp_path / "x.parquet"), "--keep", "impression"])
    assert f"{ROWS} impressions scored: " in capsys.readouterr().out
    written = pd.read_parquet(tmp_path / "x.parquet")
    assert written["impression"].tolist() == written["sample_id"].tolist()
    _assert_same(written, expected)
    main([*given, "--out", str(tmp_path / "files")])
    _assert_same(pd.read_parquet(tmp_path / "files" / "test.parquet"), expected)
    for wrong in (["--step", "3"], ["--data", str(folder / "data")]):
        with pytest.raises(SystemExit):
            main(["score", str(folder / "package"), *wrong, "--out", str(tmp_path / "y.csv")])
    assert not (tmp_path / "y.csv").exists()


COMPILED = """
import sys
import numpy, pandas
from esmm_torchrec import Predictor

package, rows, scores = sys.argv[1:]
predictor = Predictor(package)
assert predictor.package.form == "aoti"
scored = predictor.score(rows)
expected = pandas.read_parquet(scores)
for name in ("pctr", "pcvr", "pctcvr"):
    numpy.testing.assert_allclose(scored[name], expected[name], rtol=0, atol=5e-7)
one = predictor.predict({"user": 3, "shop": ["Rome", "Oslo"]})
assert one["pctr"].shape == (2,)
try:
    predictor._run([t.fill_(99) for t in predictor.encode({}).tensors(
        predictor.encoder.signature, predictor.device)])
except RuntimeError as error:
    assert "do not sum" in str(error) or "outside the rows" in str(error), error
else:
    raise AssertionError("99 is a row of every table")
foreign = [m for m in ("torchrec", "fbgemm_gpu", "torch._inductor") if m in sys.modules]
assert not foreign, foreign
"""


def test_a_compiled_package_scores_the_same_without_torchrec(folder: Path, compiled: Path) -> None:
    files = [compiled, folder / "test.parquet", folder / "scores.parquet"]
    subprocess.run([sys.executable, "-c", COMPILED, *map(str, files)], check=True, timeout=250)


def test_triton_finds_the_program_as_its_config_says(folder: Path, compiled: Path) -> None:
    """Tests without Triton: its protobuf message parses the config, and the program takes those
    tensors."""
    model = compiled / "triton" / "esmm"
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.platform) == ("esmm", "pytorch", "torch_aoti")
    assert config.max_batch_size == 0
    program = model / "1" / config.default_model_filename
    loaded = torch._C._aoti.AOTIModelPackageLoader(str(program), "model", False, 1, -1)
    predictor = Predictor(folder / "package")
    request = {"user": [3, 4], "tags": [[1], [2, 3]]}
    tensors = predictor.encode(request).tensors(predictor.encoder.signature, torch.device("cpu"))
    types = {torch.int64: "TYPE_INT64", torch.float32: "TYPE_FP32", torch.float64: "TYPE_FP64"}
    assert [one.name for one in config.input] == [f"INPUT__{n}" for n in range(len(tensors))]
    for one, tensor in zip(config.input, tensors, strict=True):
        assert model_config_pb2.DataType.Name(one.data_type) == types[tensor.dtype]
        assert len(one.dims) == tensor.ndim
        assert all(size in (-1, real) for size, real in zip(one.dims, tensor.shape, strict=True))
    scores = loaded.boxed_run([*tensors])
    assert [one.name for one in config.output] == [f"OUTPUT__{n}" for n in range(len(scores))]
    for score, expected in zip(scores, predictor.predict(request).values(), strict=True):
        np.testing.assert_allclose(score.numpy(), expected, atol=5e-7)


@pytest.fixture(scope="module")
def calibrated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run, a package of it, and the scores that `score --calibrated` writes."""
    out = tmp_path_factory.mktemp("calibrated")
    run = shutil.copytree(folder / "run", out / "run")
    main(["calibrate", str(run), "--data", str(folder / "data"), "--kind", "platt"])
    to = ["--out", str(out / "scores.parquet"), "--calibrated"]
    main(["score", str(run), "--data", str(folder / "data"), *to])
    main(["export", str(run), str(out / "package"), "--calibrated"])
    return out


def test_calibrated_scores_are_the_same_on_every_road(
    folder: Path, calibrated: Path, columns: dict[str, list[Any]], expected: pd.DataFrame
) -> None:
    scores = pd.read_parquet(calibrated / "scores.parquet")
    curves = RunFolder.open(calibrated / "run").calibration(Predictor(calibrated / "run").step)
    click = curves.curves["ctr"]
    assert isinstance(click, PlattCurve)
    pctr = expected["pctr"].to_numpy(np.float64)
    own = expit(click.slope * logit(pctr) + click.intercept)
    np.testing.assert_allclose(scores["pctr"], own, atol=1e-6)
    np.testing.assert_allclose(scores["pctcvr"], scores["pctr"] * scores["pcvr"], rtol=1e-5)
    assert np.abs(scores["pctr"] - expected["pctr"]).max() > 0.01

    parts = calibrated / "parts"
    score = ["score", str(calibrated / "run"), "--data", str(folder / "data"), "--calibrated"]
    main([*score, "--out", str(parts)])
    _assert_same(pd.concat(map(pd.read_parquet, sorted(parts.glob("*.parquet")))), scores)

    raw, files = str(folder / "test.parquet"), calibrated / "files"
    for model in ("run", "package"):
        out = files / f"{model}.parquet"
        main(["score", str(calibrated / model), "--input", raw, "--out", str(out), "--calibrated"])
        _assert_same(pd.read_parquet(out), scores)
    _assert_same(Predictor(calibrated / "run", calibrated=True).predict(columns), scores)
    package = Predictor(calibrated / "package")
    assert package.package is not None
    assert package.package.calibration == "platt"
    _assert_same(package.predict(columns), scores)
    assert "They are calibrated (platt)" in (calibrated / "package/MODEL_CARD.md").read_text()
    with serve(calibrated / "package", ServerOptions(watch_seconds=0)) as client:
        ages = [None if age is None or np.isnan(age) else age for age in columns["age"]]
        answer = client.post("/score", json={"columns": columns | {"age": ages}})
        _assert_same(answer.json()["scores"], scores)


def test_isotonic_scores_are_the_same_compiled(
    folder: Path, tmp_path: Path, columns: dict[str, list[Any]]
) -> None:
    run = str(shutil.copytree(folder / "run", tmp_path / "run"))
    main(["calibrate", run, "--data", str(folder / "data"), "--kind", "isotonic"])
    scores = Predictor(run, calibrated=True).predict(columns)
    for form in ("export", "aoti"):
        package = tmp_path / form
        main(["export", run, str(package), "--calibrated", "--format", form])
        for name, values in Predictor(package).predict(columns).items():
            np.testing.assert_allclose(values, scores[name], rtol=0, atol=5e-7)


def test_scores_of_another_calibration_are_not_mixed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(shutil.copytree(folder / "run", tmp_path / "run"))
    out, raw = str(tmp_path / "scores"), str(folder / "test.parquet")
    score = ["score", run, "--input", raw, "--out", out, "--calibrated"]
    main(["calibrate", run, "--data", str(folder / "data"), "--kind", "platt"])
    main(score)
    main(["calibrate", run, "--data", str(folder / "data"), "--kind", "isotonic"])
    with pytest.raises(SystemExit):
        main(score)
    assert "holds scores of another model or of other options" in capsys.readouterr().err


def test_a_calibration_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(RunError, match=r"has no calibration\.json; run 'esmm-torchrec calibrate'"):
        Predictor(folder / "run", calibrated=True)
    with pytest.raises(OptionError, match="is an exported model without a calibration; export it"):
        Predictor(folder / "package", calibrated=True)


def test_the_card_shows_figures_by_value(folder: Path, expected: pd.DataFrame) -> None:
    test = pd.read_parquet(folder / "test.parquet").join(expected["pctr"])
    rome = test[test["shop"] == "Rome"]
    figures = roc_auc_score(rome["click"], rome["pctr"]), rome["pctr"].sum() / rome["click"].sum()
    row = f"| Rome | {len(rome)} | {figures[0]:.4f} | {figures[1]:.4f} |"
    assert row in (folder / "package" / "MODEL_CARD.md").read_text()
