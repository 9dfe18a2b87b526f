"""Runs that stream their data are the same on any number of ranks, from a disk and a store."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist

from esmm_torchrec.cli import evaluate
from esmm_torchrec.data import split_writer
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.stream import StreamedSplit, stream_in_order
from esmm_torchrec.errors import OptionError, RunError
from esmm_torchrec.metrics.in_parts import measure_in_parts
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.runs.restore import restore
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving import scorer
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.serving.scoring import score_streamed
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.fit import build_loop, training_part
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.reading import open_splits
from esmm_torchrec.training.run import train
from tests.prepared_data import write_data_set
from tests.ranks import run_on_ranks, torchrun, train_here
from tests.store import CREDENTIALS, serve

ROWS = {"train": 900, "test": 433, "users": 60}
OPTIONS = TrainOptions(
    batch_size=64,
    embedding_dim=8,
    tower=(16, 8),
    epochs=2,
    sharding="table_wise",
    seed=1,
    read="stream",
    lanes=4,
    window=70,
    device="cpu",
)
STEPS_PER_EPOCH = 16  # 225 rows a lane in windows of 70, 70, 70 and 15, 16 rows of each in a step


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streaming") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_writer, "ROWS_PER_GROUP", {"impressions": 101, "shared": 9})
        patch.setattr(split_writer, "ROW_GROUPS_PER_FILE", 2)
        write_data_set(path, **ROWS)
    return path


class _Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        self.losses.append(output.loss.detach())


def _losses(data: str | Path) -> list[float]:
    """Returns the loss of each step over all ranks."""

    def on_rank(ranks: Ranks) -> list[float]:
        dataset = PreparedDataSet.open(data)
        split = open_splits(dataset, OPTIONS, ranks)["train"]
        losses = _Losses()
        loop = build_loop(
            split,
            OPTIONS,
            ranks,
            part=training_part(split, OPTIONS),
            callbacks=[losses],
        )
        loop.run()
        together = torch.stack(losses.losses)
        dist.all_reduce(together)
        return (together / ranks.world_size).tolist()

    with process_group("cpu") as ranks:
        return on_rank(ranks)


def _measured(run: Path, data: Path) -> dict[str, Any] | None:
    """Measures the model of a run on the mapped test split."""

    def on_rank(ranks: Ranks) -> dict[str, Any] | None:
        split = MappedSplit.open(PreparedDataSet.open(data), "test")
        model = restore(RunFolder.open(run), ranks, batch_size=64, sharding="table_wise")
        scored = score_split(model, split, ranks, batch_size=64)
        return None if scored is None else measure(scored)

    with process_group("cpu") as ranks:
        return on_rank(ranks)


def _scored(run: Path, data: str | Path, out: Path) -> dict[str, Any]:
    """Writes the scores; returns the metrics if no rank has the scores of all impressions."""
    scorer.MAX_GATHERED = 10

    def on_rank(ranks: Ranks) -> dict[str, Any]:
        split = StreamedSplit(PreparedDataSet.open(data), "test", lanes=ranks.world_size, window=60)
        model = restore(RunFolder.open(run), ranks, batch_size=64, sharding="table_wise")
        score_streamed(model, split, out, ranks, batch_size=50)
        with pytest.raises(RunError, match="holds scores already"):
            score_streamed(model, split, out, ranks, batch_size=50)
        own = score_split(model, split, ranks, batch_size=50)
        assert own is not None
        assert own.size < 250 or ranks.world_size == 1
        return measure_in_parts(own)["test"]

    with process_group("cpu") as ranks:
        return on_rank(ranks)


def test_one_two_and_four_ranks_have_the_same_losses(data: Path) -> None:
    (one,) = run_on_ranks(1, _losses, data)
    assert len(one) == 2 * STEPS_PER_EPOCH
    assert one[-1] < one[0]
    for ranks in (2, 4):
        for losses in run_on_ranks(ranks, _losses, data):
            np.testing.assert_allclose(losses, one, rtol=2e-4)


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    out = data.parent / "whole"
    run_on_ranks(2, train_here, data, out, OPTIONS)
    return out


def test_a_run_is_resumed_exactly_on_other_ranks(data: Path, whole: Path) -> None:
    out = data.parent / "resumed"
    run_on_ranks(4, train_here, data, out, replace(OPTIONS, max_steps=19))
    run_on_ranks(1, train_here, data, out, OPTIONS)
    losses = {
        run: json.loads((run / "history.jsonl").read_text().splitlines()[-1])["loss"]
        for run in (out, whole)
    }
    np.testing.assert_allclose(losses[out], losses[whole], rtol=2e-4)
    figures = [json.loads((run / "metrics.json").read_text())["test"] for run in (out, whole)]
    for name in ("ctr_auc", "ctcvr_auc", "ctr_ne"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=2e-3)


def test_a_streamed_test_half_measures_what_a_mapped_one_does(data: Path, whole: Path) -> None:
    streamed = json.loads((whole / "metrics.json").read_text())
    (mapped,) = run_on_ranks(1, _measured, whole, data)
    for part in ("test", "truth"):
        assert streamed[part].keys() == mapped[part].keys()
        for name, value in mapped[part].items():
            assert streamed[part][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_each_rank_writes_the_scores_of_its_stretch(data: Path, whole: Path) -> None:
    """The scores are in stored order and the same as on one rank."""
    tables = []
    for ranks in (1, 2):
        out = data.parent / f"scores-of-{ranks}"
        measured = run_on_ranks(ranks, _scored, whole, data, out)
        expected = json.loads((whole / "metrics.json").read_text())["test"]
        for of_rank in measured:
            assert of_rank.pop("reasons") == {}
            assert of_rank == pytest.approx({name: expected[name] for name in of_rank}, rel=1e-4)
        files = json.loads((out / "scores.json").read_text())["files"]
        assert len(files) == ranks
        assert sum(file["rows"] for file in files) == ROWS["test"]
        tables.append(pd.concat([pd.read_parquet(out / file["file"]) for file in files]))
    assert tables[0]["sample_id"].tolist() == list(range(1, ROWS["test"] + 1))
    for name, column in tables[0].items():
        np.testing.assert_allclose(tables[1][name], column, atol=1e-5)


def _in_parts(data: Path, out: Path) -> dict[str, Any]:
    """Trains and evaluates as on data in a store, whose scores do not fit in rank 0's memory."""
    scorer.MAX_GATHERED, evaluate.open_in_order = 10, stream_in_order
    with process_group("cpu") as ranks:
        metrics = train(data, out, OPTIONS, ranks)
        chosen = evaluate.Options(run=out, data=str(data), batch_size=64, json=out / "again.json")
        evaluate._evaluate(chosen, ranks)
    return metrics


def test_a_run_measures_what_no_rank_can_hold(data: Path, whole: Path) -> None:
    out = data.parent / "in-parts"
    expected = json.loads((whole / "metrics.json").read_text())["test"]
    measured = run_on_ranks(2, _in_parts, data, out)
    assert measured[0] == json.loads((out / "metrics.json").read_text())
    again = json.loads((out / "again.json").read_text())["test"]
    for found in (measured[0]["test"], again):
        assert found["reasons"] == {}
        assert found.keys() <= expected.keys()
        for name in found.keys() - {"reasons"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert not (out / "plots" / "calibration.png").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lanes": 2}, "`lanes` 4 and this one has 2"),
        ({"window": 80}, "`window` 70 and this one has 80"),
        ({"read": "mapped"}, "`lanes` 4 and this one has none"),
    ],
)
def test_lanes_and_window_are_those_of_the_run(
    data: Path, whole: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(RunError, match=said):
        train_here(data, whole, replace(OPTIONS, **change))


def test_what_chooses_impressions_needs_the_mapped_copy(data: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`method` base chooses the impressions"):
        train_here(data, tmp_path / "run", replace(OPTIONS, method="base"))
    with pytest.raises(OptionError, match="`validation_share` holds out rows by"):
        train_here(data, tmp_path / "run", replace(OPTIONS, validation_share=0.1))


@pytest.mark.slow
def test_a_run_from_a_store_is_that_from_a_disk(
    data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_writer, "ROWS_PER_GROUP", {"impressions": 101, "shared": 9})
    monkeypatch.setattr(split_writer, "ROW_GROUPS_PER_FILE", 2)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    out = data.parent / "from-store"
    with serve() as store:
        uri = store.uri("bucket/prepared")
        write_data_set(uri, **ROWS)
        arguments = ["train", "--data", uri, "--out", out, "--epochs", 2, "--batch-size", 64]
        arguments += ["--embedding-dim", 8, "--tower", 16, 8, "--sharding", "table_wise"]
        arguments += ["--seed", 1, "--lanes", 4, "--window", 70, "--device", "cpu"]
        done = torchrun(2, "-m", "esmm_torchrec", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    figures = [json.loads((run / "metrics.json").read_text())["test"] for run in (out, whole)]
    reasons = [found.pop("reasons") for found in figures]
    assert reasons[0] == reasons[1]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    assert json.loads((out / "config.json").read_text())["history"][0]["data"]["path"] == (
        "s3://bucket/prepared"
    )
    assert not os.path.exists("s3:")
