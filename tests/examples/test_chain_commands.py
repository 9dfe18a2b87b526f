"""docs/chains.md as its reader would follow it: from a log of three actions to scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from esmm_torchrec import Predictor
from tests.pages import follow

STEPS = ("click", "cart", "order")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains")
    commands = ["prepare", "train", "evaluate", "score", "export", "compare", "prepare", "train"]
    follow("chains.md", folder, commands)
    return folder


@pytest.fixture(scope="module")
def test_half(folder: Path) -> pd.DataFrame:
    """Scores, labels and true probabilities of the test split."""
    scores = pd.read_parquet(folder / "scores.parquet").set_index("sample_id")
    truth = pd.read_parquet(folder / "truth.parquet").add_prefix("true_")
    return scores.join(pd.read_parquet(folder / "log.parquet")).join(truth)


def test_each_task_is_counted(folder: Path) -> None:
    log = pd.read_parquet(folder / "log.parquet")
    splits = json.loads((folder / "prepared" / "dataset.json").read_text())["splits"]
    for step in STEPS:
        assert sum(of["happened"][step] for of in splits.values()) == log[step].sum()


@pytest.mark.parametrize(
    ("column", "key", "given", "factors"),
    [
        ("p_click", "click", None, ("click",)),
        ("p_cart_given_click", "cart_given_click", "click", ("cart",)),
        ("p_cart", "cart", None, ("click", "cart")),
        ("p_order_given_cart", "order_given_cart", "cart", ("order",)),
        ("p_order", "order", None, STEPS),
    ],
)
def test_each_probability_is_learned(
    folder: Path,
    test_half: pd.DataFrame,
    column: str,
    key: str,
    given: str | None,
    factors: tuple[str, ...],
) -> None:
    """Over the impressions where it means something; beside the probabilities it was drawn from."""
    space = test_half if given is None else test_half[test_half[given] == 1]
    label = space[factors[-1]]
    ours = roc_auc_score(label, space[column])
    oracle = roc_auc_score(label, space[[f"true_{name}" for name in factors]].prod(axis=1))
    metrics = json.loads((folder / "runs/chain/metrics.json").read_text())["test"]
    assert ours == pytest.approx(metrics[f"{key}_auc"], abs=1e-4)
    assert 0.5 + 0.6 * (oracle - 0.5) < ours < oracle + 0.02
    assert space[column].mean() == pytest.approx(label.mean(), abs=0.05)


def test_products_are_products(test_half: pd.DataFrame) -> None:
    cart = test_half["p_click"] * test_half["p_cart_given_click"]
    np.testing.assert_allclose(test_half["p_cart"], cart, rtol=1e-4)
    np.testing.assert_allclose(
        test_half["p_order"], cart * test_half["p_order_given_cart"], rtol=1e-4
    )


def test_windowed_figures_and_plots_follow_the_chain(folder: Path) -> None:
    last = json.loads((folder / "runs/chain/history.jsonl").read_text().splitlines()[-1])
    assert {f"{name}_auc" for name in ("click", "cart", "order_given_cart", "order")} <= set(last)
    assert (folder / "runs/chain/plots/calibration.png").stat().st_size > 0


def test_the_export_has_every_score(folder: Path) -> None:
    names = ["p_click", "p_cart_given_click", "p_cart", "p_order_given_cart", "p_order"]
    example = json.loads((folder / "exported/example.json").read_text())
    assert list(example["scores"]) == names
    scores = Predictor(folder / "exported").predict({"user": [1], "item": [1]})
    assert list(scores) == names
    assert "p_order_given_cart" in (folder / "exported/MODEL_CARD.md").read_text()


def test_compare_takes_the_last_task_for_the_conversion(folder: Path) -> None:
    results = json.loads((folder / "comparison/results.json").read_text())
    assert set(results["methods"]) == {"ESMM", "shared-bottom"}
    figures = results["methods"]["ESMM"]["1"]
    counts = json.loads((folder / "prepared/dataset.json").read_text())["splits"]["test"]
    assert figures["conversions"]["runs"] == [counts["happened"]["order"]] * 2
    assert figures["cvr_auc"]["mean"] > 0.5


def test_esm2_learns_a_chain_that_branches(folder: Path) -> None:
    test = json.loads((folder / "runs/esm2/metrics.json").read_text())["test"]
    assert {"cart_given_click_auc", "order_given_click_auc", "order_auc"} <= set(test)
    assert test["order_given_click_auc"] > 0.6
    assert test["order_calibration"] == pytest.approx(1, abs=0.2)
