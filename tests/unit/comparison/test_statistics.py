"""Intervals and corrections against SciPy and against plain repetition of rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from esmm_torchrec.comparison.statistics import (
    UserBootstrap,
    bootstrap_interval,
    bootstrap_p_value,
    holm,
    paired_difference,
    summary,
)
from esmm_torchrec.metrics.ranking import auc, auc_within_strata, soft_auc


def test_paired_difference_is_scipys_paired_test() -> None:
    rng = np.random.default_rng(0)
    runs = rng.normal(0.65, 0.02, 6)
    baseline = runs - rng.normal(0.004, 0.003, 6)
    found = paired_difference(runs.tolist(), baseline.tolist())
    expected = stats.ttest_rel(runs, baseline)
    interval = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx((runs - baseline).mean())
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_one_pair_has_a_difference_and_no_interval() -> None:
    assert paired_difference([0.7], [0.6]) == (pytest.approx(0.1), None, None, None)
    assert summary([0.7]) == (0.7, None)
    assert summary([0.7, None]) == (None, None)
    assert summary([0.6, 0.8]).std == pytest.approx(np.std([0.6, 0.8], ddof=1))


def test_equal_runs_are_no_finding_and_a_constant_difference_is_one() -> None:
    assert paired_difference([0.5, 0.6], [0.5, 0.6]).p_value == 1.0
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p_value == 0.0


def test_holm_steps_down() -> None:
    # Holm, "A simple sequentially rejective multiple test procedure", worked by hand.
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


def test_a_resampled_auc_is_that_of_repeated_users() -> None:
    rng = np.random.default_rng(3)
    users = rng.integers(0, 12, 200)
    scores = np.round(rng.normal(size=200), 1).astype(np.float32)
    labels = (rng.random(200) < 0.4).astype(np.int8)
    rows = rng.random(200) < 0.7
    bootstrap = UserBootstrap(users, resamplings=20, seed=1)
    for kept in (None, rows):
        found = bootstrap.auc(scores, labels, kept)
        mask = np.ones(200, bool) if kept is None else kept
        for times, value in zip(bootstrap._times.T, found, strict=True):
            repeated = np.repeat(np.flatnonzero(mask), times[users[mask]].astype(int))
            assert value == pytest.approx(auc(scores[repeated], labels[repeated]))
    assert all(times.sum() == 12 for times in bootstrap._times.T)


def test_resampled_figures_of_the_truth_are_those_of_repeated_users() -> None:
    rng = np.random.default_rng(4)
    users = rng.integers(0, 15, 300)
    scores = np.round(rng.normal(size=300), 1).astype(np.float32)
    truth = rng.random(300).astype(np.float32)
    pctr = np.repeat([0.1, 0.2, 0.3], 100).astype(np.float32)
    bootstrap = UserBootstrap(users, resamplings=20, seed=1)
    whole = bootstrap.auc(scores, truth)
    strata = bootstrap.auc_within_strata(scores, truth, pctr, num_strata=3)
    mean = bootstrap.mean(truth)
    for place, times in enumerate(bootstrap._times.T):
        rows = np.repeat(np.arange(300), times[users].astype(int))
        assert whole[place] == pytest.approx(soft_auc(scores[rows], truth[rows]))
        assert mean[place] == pytest.approx(truth[rows].mean(dtype=np.float64))
        # Three kinds of pCTR are three strata however often each occurs.
        total = 0.0
        for kind in (0.1, 0.2, 0.3):
            of_kind = rows[pctr[rows] == np.float32(kind)]
            value = soft_auc(scores[of_kind], truth[of_kind])
            assert value is not None
            total += value * len(of_kind)
        assert strata[place] == pytest.approx(total / len(rows))
    untouched = UserBootstrap(np.arange(300), resamplings=1)
    untouched._times[:] = 1
    assert untouched.auc_within_strata(scores, truth, pctr, num_strata=3) == [
        pytest.approx(auc_within_strata(scores, truth, pctr, num_strata=3))
    ]


def test_p_value_of_resamplings_counts_the_rarer_side() -> None:
    assert bootstrap_p_value([1.0] * 999) == pytest.approx(2 / 1000)
    assert bootstrap_p_value([1.0] * 989 + [-1.0] * 10) == pytest.approx(22 / 1000)
    assert bootstrap_p_value([-1.0] * 989 + [0.0] * 10) == pytest.approx(22 / 1000)
    assert bootstrap_p_value([-1.0, 1.0]) == 1.0


def test_models_are_resampled_together_and_a_missing_class_is_none() -> None:
    users = np.arange(40) // 10
    scores = np.linspace(0, 1, 40).astype(np.float32)
    labels = np.zeros(40, np.int8)
    labels[:3] = 1
    first, second = UserBootstrap(users, resamplings=50), UserBootstrap(users, resamplings=50)
    values = first.auc(scores, labels)
    assert values == second.auc(scores, labels)
    assert None in values, "the only user with a positive is missing now and then"


def test_interval_holds_the_middle() -> None:
    low, high = bootstrap_interval(list(range(1001)))
    assert (low, high) == pytest.approx((25, 975))


def test_weights_count_as_repetitions_of_impressions() -> None:
    rng = np.random.default_rng(5)
    users, times = rng.integers(0, 15, 300), rng.integers(0, 4, 300)
    scores = np.round(rng.normal(size=300), 1).astype(np.float32)
    truth, labels = rng.random(300), (rng.random(300) < 0.4).astype(np.int8)
    pctr = np.repeat([0.1, 0.2, 0.3], 100)
    weighted = UserBootstrap(users, times.astype(np.float32), resamplings=30)
    each = np.repeat(np.arange(300), times)
    repeated = UserBootstrap(np.r_[users[each], users], resamplings=30)
    kept = np.r_[np.ones(len(each), bool), np.zeros(300, bool)]  # every user is drawn from
    for target in (truth, labels):
        expected = repeated.auc(np.r_[scores[each], scores], np.r_[target[each], target], kept)
        assert weighted.auc(scores, target) == pytest.approx(expected)
    one_stratum = weighted.auc_within_strata(scores, truth, np.zeros(300))
    assert one_stratum == pytest.approx(weighted.auc(scores, truth))
    untouched = UserBootstrap(np.arange(300), times.astype(np.float32), resamplings=1)
    untouched._times[:] = 1
    assert untouched.mean(truth) == [pytest.approx(np.average(truth, weights=times))]
    strata = auc_within_strata(scores, truth, pctr, times.astype(float), num_strata=3)
    assert untouched.auc_within_strata(scores, truth, pctr, num_strata=3) == [pytest.approx(strata)]
