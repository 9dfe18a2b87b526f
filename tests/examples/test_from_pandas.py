"""A DataFrame in, a trained model out, scores back as a DataFrame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from esmm_torchrec import Predictor
from examples.from_pandas import made_up_log, main


def true_probabilities(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """pCTR and pCVR that the log is drawn from, written down once more."""
    item = rows["item"].str.removeprefix("item-").astype(int).to_numpy()
    return 0.1 + 0.08 * (item % 5), 0.1 + 0.5 / 3 * (item % 3)


def test_scores_come_back_in_order_and_know_the_items(tmp_path: Path) -> None:
    table = main(tmp_path)
    assert list(table) == ["user", "item", "seen", "price", "pctr", "pcvr", "pctcvr"]
    expected = made_up_log(5, seed=2).drop(columns=["visit", "purchase"])
    pd.testing.assert_frame_equal(table.drop(columns=["pctr", "pcvr", "pctcvr"]), expected)

    rows = made_up_log(4_000, seed=3)
    pctr, pcvr = true_probabilities(rows)
    scores = Predictor(tmp_path / "run").score(rows.drop(columns=["visit", "purchase"]))
    assert len(scores) == len(rows)
    assert scores[["pctr", "pcvr", "pctcvr"]].stack().between(0, 1, inclusive="neither").all()
    np.testing.assert_allclose(scores["pctcvr"], scores["pctr"] * scores["pcvr"], rtol=1e-5)
    # Row by row: scores in another order would miss by more than a constant does.
    for name, truth, share in (("pctr", pctr, 0.5), ("pcvr", pcvr, 0.9)):
        assert np.abs(scores[name] - truth).mean() < share * np.abs(truth - truth.mean()).mean()
    clicked = rows["visit"] == 1
    best = roc_auc_score(rows["purchase"][clicked], pcvr[clicked])
    assert roc_auc_score(rows["purchase"][clicked], scores["pcvr"][clicked]) > 0.25 + best / 2
    assert best > 0.65

    backwards = Predictor(tmp_path / "run").score(
        rows.iloc[::-1].drop(columns=["visit", "purchase"])
    )
    np.testing.assert_allclose(backwards["pcvr"].to_numpy()[::-1], scores["pcvr"], rtol=1e-5)
