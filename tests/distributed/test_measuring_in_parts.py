"""Figures of impressions distributed over several ranks, against scikit-learn over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from esmm_torchrec.metrics.in_parts import auc_in_parts, measure_in_parts
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.sharding.process_group import process_group
from tests.ranks import run_on_ranks

ROWS = 5000


def _impressions(*, weighted: bool) -> ScoredImpressions:
    """Makes scores with many ties, most of them at one value."""
    random = np.random.default_rng(3)
    ctr, cvr = random.normal(-1, 1, (2, ROWS)).round(1).astype(np.float32)
    ctr[: ROWS // 2] = 0.5
    click = random.random(ROWS) < 1 / (1 + np.exp(-ctr))
    buy = click & (random.random(ROWS) < 1 / (1 + np.exp(-cvr)))
    return ScoredImpressions(
        {"click": click.astype(np.int8), "conversion": buy.astype(np.int8)},
        {"ctr": Prediction(ctr, "logit"), "cvr": Prediction(cvr, "logit")},
        weight=random.random(ROWS).astype(np.float32) if weighted else None,
    )


def _on_rank(weighted: bool) -> tuple[dict[str, Any], float | None]:
    with process_group("cpu") as ranks:
        # The last rank of four has nothing.
        bounds = [*np.linspace(0, ROWS, max(2, ranks.world_size)).astype(int).tolist(), ROWS]
        rows = np.zeros(ROWS, np.bool_)
        rows[bounds[ranks.rank] : bounds[ranks.rank + 1]] = True
        own = _impressions(weighted=weighted).of(rows)
        nothing = auc_in_parts(np.zeros(1, np.float32), np.ones(1, np.bool_))
        return measure_in_parts(own)["test"], nothing


@pytest.mark.parametrize(("ranks", "weighted"), [(1, False), (4, False), (4, True)])
def test_what_ranks_measure_together_is_what_one_measures(ranks: int, weighted: bool) -> None:
    whole = _impressions(weighted=weighted)
    results = run_on_ranks(ranks, _on_rank, weighted)
    alone = measure(whole)["test"]
    click, weights = whole.happened("click"), whole.weight
    probability = whole.scores["ctr"].probability
    for test, nothing in results:
        assert nothing is None  # one class
        assert test["ctr_auc"] == pytest.approx(
            roc_auc_score(click, whole.scores["ctr"].values, sample_weight=weights), abs=1e-12
        )
        assert test["ctr_log_loss"] == pytest.approx(
            log_loss(click, probability.astype(np.float64), sample_weight=weights), rel=1e-6
        )
        if not weighted:
            assert (test["ctr_auc"], test["cvr_auc"]) == (alone["ctr_auc"], alone["cvr_auc"])
        for name in test.keys() - {"reasons"}:
            if alone[name] is None:
                assert test[name] is None
            else:
                assert test[name] == pytest.approx(alone[name], rel=1e-9), name
        assert test["reasons"]["ctcvr_auc"] == "the model gives no ctcvr score"
