"""The steps of docs/delayed_feedback.md, and its objectives on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.objectives.delayed import (
    DelayedFeedbackObjective,
    ElapsedTimeObjective,
    FakeNegativeObjective,
)
from esmm_torchrec.models.objectives.single import ConversionObjective
from esmm_torchrec.models.parts import Objective, Rows
from esmm_torchrec.models.rows.delayed import ElapsedTimeRows, FakeNegativeRows, ObservedRows
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.fit import fit, training_part
from esmm_torchrec.training.options import TrainOptions
from tests.pages import follow
from tests.ranks import run_on_ranks

PAIRS: dict[str, tuple[Rows, Objective]] = {
    "dfm": (ObservedRows(), DelayedFeedbackObjective()),
    "fnw": (FakeNegativeRows(), FakeNegativeObjective()),
    "es-dfm": (ElapsedTimeRows(window=2.0), ElapsedTimeObjective()),
    "naive": (ObservedRows(), ConversionObjective()),
}


def _options(name: str) -> TrainOptions:
    rows, objective = PAIRS[name]
    return TrainOptions(
        method="base", rows=rows, objective=objective, batch_size=128, embedding_dim=4,
        tower=(8,), dense_lr=0.01, device="cpu",
    )  # fmt: skip


def _trained(data: Path) -> dict[str, np.ndarray]:
    dataset = PreparedDataSet.open(data)
    train, test = (MappedSplit.open(dataset, name) for name in ("train", "test"))
    scores = {}
    with process_group("cpu") as ranks:
        for name in PAIRS:
            options = _options(name)
            part = training_part(train, options)
            model = fit(train, options, ranks, part=part)
            scored = score_split(model, test, ranks, progress=False)
            if scored is not None:
                scores[name] = scored.scores["cvr"].values
    return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delayed")
    follow("delayed_feedback.md", folder, ["prepare", "train"])
    return folder


@pytest.fixture(scope="module")
def scores(folder: Path) -> list[dict[str, np.ndarray]]:
    """Method → scores, on one rank and on two ranks."""
    return [run_on_ranks(ranks, _trained, folder / "prepared")[0] for ranks in (1, 2)]


def test_the_page_trains(folder: Path) -> None:
    config = json.loads((folder / "runs/es-dfm/config.json").read_text())
    assert config["options"]["rows"]["name"] == "elapsed-time"
    test: dict[str, Any] = json.loads((folder / "runs/es-dfm/metrics.json").read_text())["test"]
    assert test["cvr_auc"] > 0.6


@pytest.mark.parametrize("name", list(PAIRS))
def test_two_ranks_train_what_one_trains(scores: list[dict[str, np.ndarray]], name: str) -> None:
    alone, both = (of[name] for of in scores)
    assert np.ptp(alone) > 0.5
    np.testing.assert_allclose(both, alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["dfm", "fnw", "es-dfm"])
def test_late_conversions_are_not_negatives(
    folder: Path, scores: list[dict[str, np.ndarray]], name: str
) -> None:
    """Predicted over final conversions of the test clicks: naive training predicts too few."""
    test = MappedSplit.open(PreparedDataSet.open(folder / "prepared"), "test")
    clicked = test.scalars["click"] == 1

    def pcoc(method: str) -> float:
        predicted = 1 / (1 + np.exp(-scores[0][method][clicked].astype(np.float64)))
        return predicted.sum() / test.scalars["conversion"][clicked].sum()

    assert pcoc("naive") < 0.8
    assert abs(pcoc(name) - 1) < 0.6 * abs(pcoc("naive") - 1)


def test_an_objective_without_its_rows_is_refused(folder: Path) -> None:
    train = MappedSplit.open(PreparedDataSet.open(folder / "prepared"), "train")
    options = TrainOptions(method="base", objective=ElapsedTimeObjective(), device="cpu")
    with pytest.raises(OptionError, match="matured"):
        training_part(train, options)
