"""Runs that are resumed, evaluated and scored on another number of ranks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from esmm_torchrec.checkpoints.files import checkpoint_folders
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import DataError, RunError
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.runs.restore import restore
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.serving.scoring import encode_rows, score
from esmm_torchrec.sharding.planner import ShardingOption
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from tests.plain_esmm import read_frame
from tests.prepared_data import DENSE, description_of, write_data_set
from tests.ranks import run_on_ranks, torchrun, train_here

TEST_ROWS = 10_007
OPTIONS = TrainOptions(
    batch_size=128, embedding_dim=8, tower=(16, 8), epochs=2, sharding="table_wise", seed=1
)


def _score(run: Path, data: Path, out: Path, sharding: ShardingOption, batch_size: int) -> None:
    def on_rank() -> None:
        folder = RunFolder.open(run)
        split = MappedSplit.open(PreparedDataSet.open(data), "test")
        model = restore(folder, ranks, batch_size=batch_size, sharding=sharding)
        score(model, split, out, ranks, batch_size=batch_size)

    with process_group("cpu") as ranks:
        on_rank()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=900, test=TEST_ROWS, users=150)
    return path


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """Run trained table_wise on two ranks."""
    out = data.parent / "run"
    run_on_ranks(2, train_here, data, out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def scores(run: Path, data: Path) -> pd.DataFrame:
    """Scores of the run, computed row_wise on one rank."""
    out = data.parent / "scores.parquet"
    run_on_ranks(1, _score, run, data, out, "row_wise", 1000)
    return pd.read_parquet(out)


def test_every_row_is_scored_once_in_order_on_three_ranks(
    run: Path, data: Path, scores: pd.DataFrame
) -> None:
    out = data.parent / "three.parquet"
    run_on_ranks(3, _score, run, data, out, "table_wise", 4096)
    three = pd.read_parquet(out)
    assert list(three.columns) == ["sample_id", "pctr", "pcvr", "pctcvr"]
    assert three["sample_id"].tolist() == list(range(1, TEST_ROWS + 1))
    assert scores["sample_id"].tolist() == three["sample_id"].tolist()
    for column in ("pctr", "pcvr", "pctcvr"):
        np.testing.assert_allclose(three[column], scores[column], atol=1e-5)
    np.testing.assert_allclose(three["pctcvr"], three["pctr"] * three["pcvr"], rtol=1e-5)


def test_the_run_folder_is_whole(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["impressions"] == TEST_ROWS
    assert metrics["throughput"]["train_samples_per_second"] > 0
    assert metrics["throughput"]["peak_rss_bytes"] > 1 << 20
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 * -(-900 // 128)
    assert {"loss", "ctr_auc", "cvr_auc", "ctcvr_auc", "ctr_ne"} <= set(lines[-1])
    for picture in ("history.png", "calibration.png"):
        assert (run / "plots" / picture).read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2


def test_metrics_equal_scikit_learns_on_the_scores(
    run: Path, data: Path, scores: pd.DataFrame
) -> None:
    test = json.loads((run / "metrics.json").read_text())["test"]
    frame = read_frame(PreparedDataSet.open(data), "test")
    click, conversion = frame["click"].to_numpy(), frame["conversion"].to_numpy()
    clicked = click == 1
    assert test["ctr_auc"] == pytest.approx(roc_auc_score(click, scores["pctr"]), abs=1e-5)
    assert test["cvr_auc"] == pytest.approx(
        roc_auc_score(conversion[clicked], scores["pcvr"][clicked]), abs=1e-5
    )
    assert test["ctcvr_auc"] == pytest.approx(
        roc_auc_score(click * conversion, scores["pctcvr"]), abs=1e-5
    )
    assert test["ctr_log_loss"] == pytest.approx(log_loss(click, scores["pctr"]), rel=1e-5)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run: Path, data: Path) -> None:
    out = data.parent / "resumed"
    # 5 of the 8 steps of the first epoch on two ranks, the rest on one.
    first = replace(OPTIONS, max_steps=5)
    run_on_ranks(2, train_here, data, out, first)
    run_on_ranks(1, train_here, data, out, OPTIONS)
    whole = json.loads((run / "metrics.json").read_text())
    resumed = json.loads((out / "metrics.json").read_text())
    for key, value in whole["test"].items():
        if isinstance(value, float):
            assert resumed["test"][key] == pytest.approx(value, abs=2e-5), key


@pytest.mark.parametrize("options", [TrainOptions(), replace(OPTIONS, batch_size=61)])
def test_one_rank_and_two_train_the_same_model(
    options: TrainOptions, data: Path, tmp_path: Path
) -> None:
    """Also at the default batch size, and if the ranks do not divide a step."""
    tests = []
    for num_ranks in (1, 2):
        out = tmp_path / str(num_ranks)
        tests.append(run_on_ranks(num_ranks, train_here, data, out, options)[0]["test"])
        config = json.loads((out / "config.json").read_text())
        assert config["options"]["batch_size"] == (64 if options.batch_size == "auto" else 61)
    for key in ("ctr_auc", "cvr_auc", "ctcvr_auc", "ctr_log_loss", "cvr_log_loss"):
        assert tests[0][key] == pytest.approx(tests[1][key], abs=1e-4), key


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_that_is_resumed_on_other_ranks_reads_every_row(
    before: int, after: int, data: Path, tmp_path: Path
) -> None:
    last_step = 2 * -(-900 // 128)
    options = replace(OPTIONS, checkpoint_every=4)
    run_on_ranks(before, train_here, data, tmp_path, options)
    run_on_ranks(after, train_here, data, tmp_path, replace(options, resume="4"))
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert (lines[-1]["step"], lines[-1]["epoch"]) == (last_step, 2)
    assert max(checkpoint_folders(tmp_path / "checkpoints")) == last_step
    throughput = json.loads((tmp_path / "metrics.json").read_text())["throughput"]
    assert throughput["train_samples_per_second"] * throughput["train_seconds"] == pytest.approx(
        2 * 900
    )
    config = json.loads((tmp_path / "config.json").read_text())
    entries = [(entry["step"], entry["ranks"]) for entry in config["history"]]
    assert entries == [(0, before), (4, after)]


def test_scores_are_the_same_with_whole_tables_on_every_rank(
    run: Path, data: Path, scores: pd.DataFrame
) -> None:
    out = data.parent / "data_parallel.parquet"
    run_on_ranks(2, _score, run, data, out, "data_parallel", 4096)
    for column in ("pctr", "pcvr", "pctcvr"):
        np.testing.assert_allclose(pd.read_parquet(out)[column], scores[column], atol=1e-5)


def test_data_of_the_same_form_and_other_meaning_is_refused(
    run: Path, data: Path, tmp_path: Path
) -> None:
    """Dense features that were standardised otherwise; tables are of the same sizes."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    description = description_of(other)
    description["statistics"]["dense"]["price"]["mean"] += 1
    (other / "dataset.json").write_text(json.dumps(description))
    RunFolder.open(run).check_data(data)
    with pytest.raises(RunError, match="standardised its dense features differently from"):
        RunFolder.open(run).check_data(other)


def test_predictor_scores_raw_rows_like_the_prepared_ones(
    run: Path, data: Path, scores: pd.DataFrame
) -> None:
    dataset = PreparedDataSet.open(data)
    frame = read_frame(dataset, "test").head(300)
    raw = _raw_rows(dataset, frame)
    predicted = Predictor(run).score(raw.set_index(pd.Index(range(5000, 5300))))
    assert predicted.index[0] == 5000
    for column in ("sample_id", "pctr", "pcvr", "pctcvr"):
        np.testing.assert_allclose(predicted[column], scores[column].head(300), atol=1e-6)


def _raw_rows(dataset: PreparedDataSet, frame: pd.DataFrame) -> pd.DataFrame:
    """Converts rows to raw rows: raw ids instead of table rows, 999 for unknown ids."""
    raw: dict[str, Any] = {"sample_id": frame.index.to_numpy()}
    for feature in dataset.schema.id_features:
        names = [999, *dataset.vocabulary(feature.table).raw_ids.to_pylist()]
        column = frame[feature.name]
        if feature.multi_valued:
            raw[feature.name] = [[names[row] for row in bag] for bag in column]
        else:
            raw[feature.name] = pd.array(
                [None if pd.isna(row) else names[int(row)] for row in column], dtype="Int64"
            )
        if feature.weighted:
            raw[f"{feature.name}__weight"] = frame[f"{feature.name}__weight"].to_numpy()
    for name, (mean, std) in DENSE.items():
        raw[name] = frame[name].to_numpy(np.float64) * std + mean
    return pd.DataFrame(raw)


def _predict_on_rank_1(run: Path, raw: pd.DataFrame) -> list[float]:
    with process_group("cpu") as ranks:
        if ranks.rank == 0:
            return []
        return Predictor(run).score(raw)["pctr"].tolist()


def test_predictor_on_one_rank_of_two_does_not_wait_for_the_other(
    run: Path, data: Path, scores: pd.DataFrame
) -> None:
    dataset = PreparedDataSet.open(data)
    raw = _raw_rows(dataset, read_frame(dataset, "test").head(20))
    none, predicted = run_on_ranks(2, _predict_on_rank_1, run, raw)
    assert none == []
    np.testing.assert_allclose(predicted, scores["pctr"].head(20), atol=1e-6)


def test_one_users_history_weight_moves_that_users_scores_alone(run: Path, data: Path) -> None:
    dataset = PreparedDataSet.open(data)
    frame = read_frame(dataset, "test").head(400)
    raw = _raw_rows(dataset, frame)
    owner = frame["shared_row"].to_numpy()
    long_history = [len(bag) >= 3 for bag in raw["history"]]
    user = owner[np.flatnonzero(long_history)[0]]
    changed = raw.copy()
    changed["history__weight"] = [
        np.r_[weights[0] * 5, weights[1:]] if who == user else weights
        for who, weights in zip(owner, raw["history__weight"], strict=True)
    ]
    predictor = Predictor(run)
    before, after = predictor.score(raw), predictor.score(changed)
    moved = (before["pcvr"] != after["pcvr"]).to_numpy()
    assert moved[owner == user].all()
    assert not moved[owner != user].any()


def test_with_the_last_layers_zeroed_every_auc_is_exactly_a_half(run: Path, data: Path) -> None:
    predictor = Predictor(run)
    dataset = PreparedDataSet.open(data)
    frame = read_frame(dataset, "test").head(500)
    with torch.no_grad():
        for name, parameter in predictor.task.named_parameters():
            # The first-order weights of an id are columns of its embedding.
            if any(part in name for part in (".logit.", ".tables.", ".dense.")):
                parameter.zero_()
    scored = predictor.score(_raw_rows(dataset, frame))
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(500)
        click = frame["click"].to_numpy()[order]
        assert auc(scored["pctr"].to_numpy()[order], click) == 0.5
        assert auc(scored["pctcvr"].to_numpy()[order], click) == 0.5


def test_scores_are_never_written_over(run: Path, data: Path, scores: pd.DataFrame) -> None:
    assert len(scores) == TEST_ROWS
    out = data.parent / "scores.parquet"
    before = out.read_bytes()
    failed = torchrun(2, "-m", "esmm_torchrec", "score", run, "--data", data, "--out", out)
    assert failed.returncode == 1
    assert failed.stderr.count("esmm-torchrec: ") == 1
    assert f"{out} already exists; remove it or choose another --out" in failed.stderr
    assert "exitcode: 2" in failed.stderr
    assert out.read_bytes() == before


def test_rows_without_any_row_are_refused(run: Path, data: Path, tmp_path: Path) -> None:
    dataset = PreparedDataSet.open(data)
    raw = _raw_rows(dataset, read_frame(dataset, "test").head(1))
    pq.write_table(pa.Table.from_pandas(raw).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="has no row"):
        encode_rows(RunFolder.open(run), tmp_path / "none.parquet", tmp_path / "rows")
