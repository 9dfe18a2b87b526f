"""Exact AUCs against scikit-learn, against all pairs counted one by one, and by invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score
from torchrec.metrics.auc import compute_auc

from esmm_torchrec.errors import OptionError
from esmm_torchrec.metrics.ranking import (
    auc,
    auc_within_strata,
    equal_mass_edges,
    grouped_auc,
    soft_auc,
)

SCORES = st.one_of(
    st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, np.inf, -np.inf]),
    st.floats(allow_nan=False, width=32),
)


@st.composite
def scored_rows(draw: st.DrawFn, min_rows: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, labels, and weights of which some are 0."""
    n = draw(st.integers(min_rows, 30))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    scores = draw(hnp.arrays(dtype, n, elements=SCORES))
    labels = draw(hnp.arrays(np.int8, n, elements=st.integers(0, 1)))
    weights = draw(hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 0.25, 1.0, 3.0])))
    return scores, labels, weights


def pairs_auc(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float | None:
    """AUC of positive and negative masses, every pair looked at."""
    ordered = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    pairs = positive[:, None] * negative[None, :]
    return float((ordered * pairs).sum() / pairs.sum()) if pairs.sum() > 0 else None


def world(n: int, seed: int, decimals: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 scores with ties, true probabilities, and labels drawn from them."""
    random = np.random.default_rng(seed)
    logit = random.normal(-2.0, 1.0, n)
    probability = (1 / (1 + np.exp(-logit))).astype(np.float32)
    scores = np.round(logit + random.normal(0.0, 1.0, n), decimals).astype(np.float32)
    return scores, probability, (random.random(n) < probability).astype(np.int8)


@given(scored_rows())
def test_auc_counts_all_pairs(rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, labels, weights = rows
    assert auc(scores, labels) == pytest.approx(pairs_auc(scores, labels, 1 - labels), abs=1e-14)
    expected = pairs_auc(scores, weights * labels, weights * (1 - labels))
    assert auc(scores, labels, weights) == pytest.approx(expected, abs=1e-14)


@given(scored_rows(), st.randoms(use_true_random=False))
def test_auc_does_not_depend_on_the_order_of_rows(rows, random) -> None:
    scores, labels, weights = rows
    order = np.array(random.sample(range(scores.size), scores.size))
    assert auc(scores[order], labels[order]) == auc(scores, labels)
    shuffled = auc(scores[order], labels[order], weights[order])
    assert shuffled == pytest.approx(auc(scores, labels, weights), abs=1e-14)


@given(scored_rows())
def test_auc_is_antisymmetric_in_scores_and_in_labels(rows) -> None:
    scores, labels, _ = rows
    value = auc(scores, labels)
    if value is None:
        assert auc(-scores, labels) is None
        assert auc(scores, 1 - labels) is None
    else:
        assert auc(-scores, labels) == pytest.approx(1 - value, abs=1e-15)
        assert auc(scores, 1 - labels) == pytest.approx(1 - value, abs=1e-15)


@given(scored_rows())
def test_auc_depends_on_the_order_of_scores_alone(rows) -> None:
    scores, labels, weights = rows
    ranks = np.unique(scores, return_inverse=True)[1]
    mapped = np.exp(ranks / 10.0)
    assert auc(mapped, labels) == auc(scores, labels)
    assert auc(mapped, labels, weights) == auc(scores, labels, weights)
    probability = weights / 3.0
    assert soft_auc(mapped, probability) == soft_auc(scores, probability)


@given(scored_rows())
def test_soft_auc_counts_all_pairs_and_each_row_with_itself(rows) -> None:
    scores, _, weights = rows
    probability = weights / 3.0
    expected = pairs_auc(scores, probability, 1 - probability)
    assert soft_auc(scores, probability) == pytest.approx(expected, abs=1e-14)


@given(scored_rows())
def test_soft_auc_of_labels_is_auc(rows) -> None:
    scores, labels, _ = rows
    expected = auc(scores, labels)
    assert soft_auc(scores, labels.astype(np.float32)) == pytest.approx(expected, abs=1e-15)


@given(scored_rows(min_rows=2))
def test_rows_paired_with_themselves_matter_less_than_one_in_2n(rows) -> None:
    scores, _, weights = rows
    probability = weights / 4.0 + 0.125
    pairs = np.outer(probability, 1 - probability)
    np.fill_diagonal(pairs, 0.0)
    ordered = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    without = (ordered * pairs).sum() / pairs.sum()
    value = soft_auc(scores, probability)
    assert value is not None
    assert abs(value - without) <= 1 / (2 * scores.size) + 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_auc_equals_scikit_learn(dtype: type, share: float) -> None:
    random = np.random.default_rng(7)
    n = 20_000
    labels = (random.random(n) < share).astype(np.int8)
    scores = np.round(random.normal(labels * 0.7, 1.0), 1).astype(dtype)
    weights = random.exponential(size=n)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auc(scores, labels, weights) == pytest.approx(
        roc_auc_score(labels, scores, sample_weight=weights), abs=1e-12
    )


def test_soft_auc_equals_scikit_learn_over_rows_written_twice() -> None:
    scores, probability, _ = world(20_000, seed=1)
    n, p = scores.size, probability.astype(np.float64)
    expected = roc_auc_score(
        np.repeat([1, 0], n), np.tile(scores, 2), sample_weight=np.concatenate([p, 1 - p])
    )
    assert soft_auc(scores, probability) == pytest.approx(expected, abs=1e-12)


def test_auc_equals_torchrecs_where_no_scores_tie() -> None:
    random = np.random.default_rng(3)
    labels = (random.random(5_000) < 0.2).astype(np.int8)
    scores = (random.permutation(5_000) / 5_000 + 0.30005 * labels).astype(np.float32)
    assert np.unique(scores).size == scores.size
    weights = random.exponential(size=5_000)
    theirs = compute_auc(
        1,
        [torch.from_numpy(scores).double().view(1, -1)],
        [torch.from_numpy(labels).double().view(1, -1)],
        [torch.from_numpy(weights).view(1, -1)],
    )
    assert auc(scores, labels, weights) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 1001, 100_000])
def test_constant_scores_give_exactly_one_half(n: int) -> None:
    _, probability, labels = world(n, seed=n)
    labels[:2] = 0, 1
    scores = np.full(n, 0.1, np.float32)
    assert auc(scores, labels) == 0.5
    assert auc(scores, labels, probability.astype(np.float64)) == 0.5
    assert soft_auc(scores, probability) == 0.5
    assert auc_within_strata(scores, probability, probability) == pytest.approx(0.5, abs=1e-15)


def test_soft_auc_is_the_mean_of_auc_over_drawn_labels() -> None:
    scores, probability, _ = world(2_000, seed=5)
    random = np.random.default_rng(6)
    drawn = [
        auc(scores, (random.random(probability.size) < probability).astype(np.int8))
        for _ in range(300)
    ]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert soft_auc(scores, probability) == pytest.approx(np.mean(drawn), abs=4 * error)


def test_one_class_or_no_row_has_no_auc() -> None:
    scores = np.array([1.0, 2.0])
    assert auc(scores, np.array([1, 1])) is None
    assert auc(scores, np.array([0, 0])) is None
    assert auc(scores, np.array([0, 1]), np.array([0.0, 1.0])) is None
    assert soft_auc(scores, np.array([1.0, 1.0])) is None
    assert auc(scores[:0], np.zeros(0, np.int8)) is None
    assert soft_auc(scores[:0], scores[:0]) is None
    assert grouped_auc(scores[:0], np.zeros(0, np.int8), np.zeros(0, np.int64)) == (None, 0.0, 0)
    assert auc_within_strata(scores[:0], scores[:0], scores[:0]) is None


def test_arguments_are_left_as_they_were() -> None:
    scores, probability, labels = world(100, seed=2)
    before = scores.copy(), probability.copy(), labels.copy()
    auc(scores, labels)
    auc(scores, labels, probability)
    soft_auc(scores, probability)
    grouped_auc(scores, labels, np.arange(100) // 10)
    auc_within_strata(scores, probability, probability, num_strata=4)
    for now, then in zip((scores, probability, labels), before, strict=True):
        np.testing.assert_array_equal(now, then)


@settings(max_examples=200)
@given(scored_rows(), st.data())
def test_grouped_auc_is_the_mean_over_groups_with_both_classes(rows, data) -> None:
    scores, labels, _ = rows
    ids = st.sampled_from([-(2**62), -1, 0, 1, 2, 7, 2**62])
    groups = data.draw(hnp.arrays(np.int64, scores.size, elements=ids))
    weighted, covered, count = 0.0, 0, 0
    for group in np.unique(groups):
        rows_of = groups == group
        if len(np.unique(labels[rows_of])) == 2:
            value = pairs_auc(scores[rows_of], labels[rows_of], 1 - labels[rows_of])
            assert value is not None
            weighted += value * rows_of.sum()
            covered += int(rows_of.sum())
            count += 1
    result = grouped_auc(scores, labels, groups)
    assert result.coverage == pytest.approx(covered / scores.size)
    assert result.num_groups == count
    assert result.auc == (pytest.approx(weighted / covered, abs=1e-14) if covered else None)
    small = np.unique(groups, return_inverse=True)[1]
    assert grouped_auc(scores, labels, small) == result
    assert grouped_auc(scores, labels, groups.astype(str)) == result


def test_grouped_auc_of_one_group_is_auc() -> None:
    scores, _, labels = world(5_000, seed=11)
    result = grouped_auc(scores, labels, np.full(5_000, 42))
    assert result == (auc(scores, labels), 1.0, 1)


def test_auc_within_strata_is_the_mean_over_quantile_strata() -> None:
    scores, probability, _ = world(10_000, seed=4)
    strata_score = np.random.default_rng(8).permutation(10_000).astype(np.float32)
    order = np.argsort(strata_score).reshape(5, 2_000)
    expected = np.mean([soft_auc(scores[rows], probability[rows]) for rows in order])
    value = auc_within_strata(scores, probability, strata_score, num_strata=5)
    assert value == pytest.approx(expected, abs=1e-12)
    one = auc_within_strata(scores, probability, strata_score, num_strata=1)
    assert one == pytest.approx(soft_auc(scores, probability), abs=1e-12)


def test_rows_with_equal_strata_scores_share_a_stratum() -> None:
    scores, probability, labels = world(10_000, seed=9)
    coarse = (np.arange(10_000) % 3).astype(np.float32)
    expected = 0.0
    for stratum in range(3):
        rows = coarse == stratum
        value = soft_auc(scores[rows], probability[rows])
        assert value is not None
        expected += value * rows.sum() / 10_000
    value = auc_within_strata(scores, probability, coarse, num_strata=3)
    assert value == pytest.approx(expected, abs=1e-12)
    assert auc_within_strata(scores, labels, coarse * 0, num_strata=7) == pytest.approx(
        auc(scores, labels), abs=1e-12
    )


@example(np.full(3, np.inf, np.float32), 3)
@given(hnp.arrays(np.float32, st.integers(1, 40), elements=SCORES), st.integers(1, 8))
def test_bins_hold_equal_masses_but_for_ties(values: np.ndarray, num_bins: int) -> None:
    edges = equal_mass_edges(values, num_bins)
    bins = np.searchsorted(edges, values, side="right")
    for value in np.unique(values):
        ranks = np.flatnonzero(np.sort(values) == value)
        middle = int(np.ceil((ranks[0] + ranks[-1]) / 2))
        at = np.arange(1, num_bins) * values.size // num_bins
        assert set(bins[values == value]) == {np.searchsorted(at, middle, side="right")}


def test_knowing_pctr_alone_does_not_help_within_strata_of_pctr() -> None:
    random = np.random.default_rng(10)
    click_taste = random.normal(size=50_000)
    true_ctr = 1 / (1 + np.exp(3 - click_taste))
    true_cvr = 1 / (1 + np.exp(2 - 0.7 * click_taste - 0.7 * random.normal(size=50_000)))
    leaked = soft_auc(true_ctr, true_cvr)
    assert leaked is not None
    assert leaked > 0.65
    within = auc_within_strata(true_ctr, true_cvr, true_ctr)
    assert within == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: auc(np.array([np.nan, 1.0]), np.array([0, 1])), "1 of 2 scores are NaN"),
        (lambda: auc(np.array([0.0, 1.0]), np.array([0.5, 1.0])), "labels must be 0 or 1"),
        (lambda: auc(np.array([0.0, 1.0]), np.array([0, 1, 1])), "labels has shape"),
        (lambda: auc(np.array([0, 1]), np.array([0, 1])), "must be float32 or float64"),
        (lambda: auc(np.zeros(2), np.array([0, 1]), np.array([-1.0, 1.0])), "weights must be"),
        (lambda: auc(np.zeros(2), np.array([0, 1]), np.array([np.inf, 1.0])), "weights must be"),
        (lambda: soft_auc(np.zeros(2), np.array([0.0, 1.5])), "between 0 and 1"),
        (lambda: soft_auc(np.zeros(2), np.array([0.0, np.nan])), "between 0 and 1"),
        (
            lambda: auc_within_strata(np.zeros(2), np.zeros(2), np.zeros(2), num_strata=0),
            "num_strata must be positive",
        ),
        (lambda: grouped_auc(np.zeros(2), np.zeros(2), np.zeros(3)), "groups has shape"),
    ],
)
def test_unusable_arguments_are_named(call, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        call()
