"""Dense columns: the rule on columns of many shapes, held against scikit-learn and by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from esmm_torchrec.data import dense
from esmm_torchrec.data.dense import DenseFitter, DenseMethod, DenseTransform
from esmm_torchrec.errors import DataError

ROWS = 20_000
RANDOM = np.random.default_rng(0)

NORMAL = RANDOM.normal(100, 15, ROWS)
LOGNORMAL = RANDOM.lognormal(3, 2, ROWS)
ONE_OUTLIER = np.append(RANDOM.normal(size=ROWS - 1), 1e30)
COLUMNS = {
    "normal": NORMAL,
    "lognormal": LOGNORMAL,
    "small lognormal": LOGNORMAL * 1e-9,
    "both signs": RANDOM.standard_cauchy(ROWS),
    "counts": RANDOM.poisson(0.5, ROWS).astype(float),
    "binary": (RANDOM.random(ROWS) < 0.3).astype(float),
    "rare binary": (RANDOM.random(ROWS) < 5e-4).astype(float),
    "constant": np.full(ROWS, 0.1),
    "one outlier": ONE_OUTLIER,
    "huge": LOGNORMAL * 1e30,
    "beyond squares": RANDOM.normal(size=ROWS) * 1e300,
    "int64": RANDOM.integers(-(2**63), 2**63 - 1, ROWS).astype(float),
    "timestamps": 1.7e9 + RANDOM.integers(0, 10**6, ROWS),
    "far from zero": 1e16 + 2.0 * RANDOM.integers(0, 2, ROWS),
    "tiny": LOGNORMAL * 1e-300,
    "mostly zero": np.where(RANDOM.random(ROWS) < 0.99, 0, LOGNORMAL),
}


def fit(values: np.ndarray, method: DenseMethod = "auto") -> DenseTransform:
    fitter = DenseFitter(1)
    fitter.add(values[:, None], np.arange(len(values)))
    return fitter.fit({"x": method})["x"]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("method", ["auto", "log", "quantile"])
def test_inputs_are_bounded_and_keep_the_order_of_the_values(name: str, method: DenseMethod):
    values = COLUMNS[name]
    transform = fit(values, method)
    inputs = transform.encode(values, name)
    if method != "quantile":
        assert np.abs(inputs).max() <= 5.001
        # What scoring meets may be anything.
        extremes = np.array([-1.7e308, -1e30, 0.0, 1e30, 1.7e308])
        assert np.abs(transform.encode(extremes, name)).max() <= 5.001
    assert np.all(np.diff(inputs[np.argsort(values)]) >= 0)
    if name not in ("constant", "rare binary", "mostly zero", "far from zero"):
        assert abs(inputs.mean()) < 0.02
        assert 0.9 < inputs.std() < 1.1


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("normal", "standard"),
        ("lognormal", "log"),
        ("small lognormal", "log"),
        ("both signs", "log"),
        ("counts", "standard"),
        ("binary", "standard"),
        ("rare binary", "standard"),
        ("constant", "standard"),
        ("huge", "log"),
        ("int64", "standard"),
        ("timestamps", "standard"),
        ("far from zero", "standard"),
    ],
)
def test_a_logarithm_is_taken_if_the_training_values_ask_for_it(name: str, method: str):
    assert fit(COLUMNS[name]).method == method


def test_one_outlier_does_not_squeeze_the_others():
    inputs = fit(ONE_OUTLIER).encode(ONE_OUTLIER, "x")
    np.testing.assert_allclose(inputs[:-1], ONE_OUTLIER[:-1], atol=0.1)
    assert 4.5 < inputs[-1] <= 5.001


def test_both_values_of_a_rare_binary_column_stay_apart():
    inputs = fit(COLUMNS["rare binary"]).encode(np.array([0.0, 1.0]), "x")
    assert inputs[1] - inputs[0] > 4
    fitter = DenseFitter(1)
    values = np.zeros(600_000)
    values[7] = 1.0  # not in the sample
    fitter.add(values[:, None], np.arange(len(values)))
    inputs = fitter.fit({"x": "auto"})["x"].encode(np.array([0.0, 1.0]), "x")
    assert inputs[1] - inputs[0] > 4


def test_standard_equals_scikit_learn():
    for name in ("normal", "lognormal", "timestamps", "huge"):
        values = COLUMNS[name]
        expected = StandardScaler().fit_transform(values[:, None])[:, 0]
        np.testing.assert_allclose(
            fit(values, "standard").encode(values, name), expected, rtol=1e-4, atol=1e-5
        )


def test_log_is_the_standardised_logarithm():
    transform = fit(LOGNORMAL, "log")
    assert transform.scale == pytest.approx(np.quantile(LOGNORMAL, 0.05), rel=1e-2)
    bulk = (LOGNORMAL > 1) & (LOGNORMAL < 1000)
    logged = np.log1p(LOGNORMAL / transform.scale)
    slope = np.polyfit(logged[bulk], transform.encode(LOGNORMAL, "x")[bulk], 1)[0]
    assert slope == pytest.approx(1 / transform.std, rel=1e-4)


def test_quantiles_are_mid_ranks():
    values = np.repeat([1.0, 2.0, 5.0], [50, 30, 20])
    inputs = fit(values, "quantile").encode(np.array([1.0, 2.0, 5.0, -9.0, 9.0]), "x")
    ranks = np.array([0.25, 0.65, 0.9])
    in_rows = np.repeat(ranks, [50, 30, 20])
    expected = (ranks - in_rows.mean()) / in_rows.std()
    np.testing.assert_allclose(inputs, [*expected, expected[0], expected[2]], rtol=1e-6)


@pytest.mark.parametrize("method", ["auto", "standard", "log", "quantile", "as-is"])
def test_a_missing_value_is_the_training_mean(method: DenseMethod):
    values = np.where(RANDOM.random(ROWS) < 0.2, np.nan, LOGNORMAL)
    transform = fit(values, method)
    assert transform.has_indicator
    missing = transform.encode(np.array([np.nan]), "x")[0]
    there = transform.encode(values[~np.isnan(values)], "x")
    assert missing == pytest.approx(there.astype(float).mean(), rel=1e-3, abs=1e-3)
    assert not fit(LOGNORMAL, method).has_indicator


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("method", ["auto", "standard", "log", "quantile", "as-is"])
def test_the_inverse_gives_raw_values_back(name: str, method: DenseMethod):
    values = COLUMNS[name]
    transform = fit(values, method)
    raw = transform.inverse(transform.apply(values))
    low = -np.inf if transform.low is None else transform.low
    clipped = np.clip(values, low, np.inf if transform.high is None else transform.high)
    spread = clipped.std() if np.abs(clipped).max() < 1e150 else 1e300
    np.testing.assert_allclose(raw, clipped, rtol=1e-6, atol=1e-9 * spread)


def test_a_column_without_any_value_is_zero():
    transform = fit(np.full(10, np.nan))
    assert transform.has_indicator
    assert transform.encode(np.array([np.nan, 3.0]), "x").tolist() == [0.0, 0.0]


def test_the_result_depends_on_the_rows_and_not_on_the_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "MIN_SAMPLE_ROWS", 1000)
    values = np.stack([NORMAL, LOGNORMAL], axis=1)
    methods: dict[str, DenseMethod] = {"a": "auto", "b": "quantile"}
    whole, pieces = DenseFitter(2), DenseFitter(2)
    numbers = np.arange(len(values))
    whole.add(values, numbers)
    apart = [DenseFitter(2), DenseFitter(2)]
    for place, piece in enumerate(np.array_split(numbers, 37)):
        pieces.add(values[piece], piece)
        apart[place > 20].add(values[piece], piece)
    assert whole.fit(methods) == pieces.fit(methods)
    apart[0].merge(apart[1])
    assert apart[0].fit(methods) == whole.fit(methods)
    # A part of many keeps its share of the sample alone.
    monkeypatch.setattr(dense, "MIN_SAMPLE_ROWS", 100)
    everything, parts = DenseFitter(2), [DenseFitter(2, of_rows=len(values)) for _ in range(9)]
    everything.add(values, numbers)
    for part, piece in zip(parts, np.array_split(numbers, 9), strict=True):
        part.add(values[piece], piece)
    assert sum(len(pickle.dumps(part)) for part in parts) < len(pickle.dumps(values)) // 2
    together = DenseFitter(2)
    for part in parts:
        together.merge(part)
    assert together.fit(methods) == everything.fit(methods)
    monkeypatch.undo()
    # A sample: near the whole, and not equal to it.
    mean = whole.fit(methods)["a"].mean
    assert mean == pytest.approx(NORMAL.mean(), abs=2.0)
    assert mean != NORMAL.mean()


@pytest.mark.parametrize("method", ["auto", "standard", "log", "quantile", "as-is"])
def test_torch_gives_what_numpy_gives(method: DenseMethod):
    transform = fit(LOGNORMAL, method)
    values = np.array([np.nan, 0.0, -3.0, 1.0, 20.0, 1e9])
    in_torch = transform.apply(torch.from_numpy(values), torch)
    np.testing.assert_allclose(in_torch.numpy(), transform.apply(values), rtol=1e-12)

    class Module(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return transform.apply(values, torch)

    rows = {"values": {0: torch.export.Dim("rows")}}
    program = torch.export.export(Module(), (torch.zeros(3).double(),), dynamic_shapes=rows)
    np.testing.assert_allclose(
        program.module()(torch.from_numpy(values)).numpy(), transform.apply(values), rtol=1e-12
    )


def test_a_result_beyond_float32_names_the_column():
    with pytest.raises(DataError, match=r"column 'price' holds 1e\+300, too far from its train"):
        fit(NORMAL, "standard").encode(np.array([1.0, 1e300]), "price")


def test_parse():
    assert DenseTransform.parse("price") == ("price", "auto")
    assert DenseTransform.parse("price:log") == ("price", "log")
    assert DenseTransform.parse("ns:price:as-is") == ("ns:price", "as-is")
    assert DenseTransform.parse("ns:price") == ("ns:price", "auto")
