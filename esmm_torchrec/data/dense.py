"""Raw dense values → inputs of a model, by a transform that is fitted to each training column.

A `DenseFitter` reads the training rows once, block by block, and keeps a uniform sample of them.
`DenseTransform.fit` turns the sample of a column into a few numbers, which dataset.json keeps, and
`DenseTransform.apply` uses the same numbers on training rows, test rows and rows to score.

By default ("auto") the training column decides:

1. Values far outside the bulk of the column are clipped: beyond its 1 % and 99 % quantiles by more
   than five times the distance between these.
2. A column whose skewness is beyond ±1, or whose excess kurtosis is over 10, is replaced by its
   signed logarithm, sign(x) log(1 + |x| / scale), if that at least halves the one or the other. The
   outermost 0.1 % of the values do not count. A column of two values is never replaced, because no
   monotone function changes its skewness.
3. It is standardised and clipped at five standard deviations.

Missing values (NaN) become the training mean. If the training rows have any, a further feature
(`schema.missing_column`) is 1 if the value is missing, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from esmm_torchrec.choices import check_choices
from esmm_torchrec.data.hashing import splitmix64
from esmm_torchrec.errors import DataError

DenseMethod = Literal["auto", "standard", "log", "quantile", "as-is"]
"""auto: see the head of this module. standard: (x - mean) / std, never clipped. log: the signed
logarithm, standardised and clipped. quantile: the rank of the value in training, standardised.
as-is: unchanged."""

DENSE_METHODS: tuple[DenseMethod, ...] = get_args(DenseMethod)

TOO_FAR = (
    "too far from its training values for a 32-bit float; fix the value or prepare the column as "
    "auto, log or quantile"
)

MIN_SAMPLE_ROWS = 1 << 17
"""Rows of a sample. All rows are in it while they are no more than this; beyond, between once and
twice as many."""

_MAX_DEVIATIONS = 5.0
_FENCE_WIDTHS = 5.0
_MAX_SKEWNESS = 1.0
_MAX_EXCESS_KURTOSIS = 10.0
_LOG_DECADES = 12
"""Decades between the largest absolute value and the smallest that a logarithm tells apart."""
_QUANTILES = 129


@dataclass(frozen=True)
class DenseTransform:
    """How the values of one dense column become inputs of a model.

    With `knots`, the result is interpolated linearly between the points (knots, heights), and
    constant outside of them. Without, it is (f(x) - mean) / std for x clipped to [low, high], where
    f(x) is sign(x) log(1 + |x| / scale) if there is a scale, else x.
    """

    method: Literal["standard", "log", "quantile", "as-is"]
    mean: float = 0.0
    """Of f(x), over the training sample."""
    std: float = 1.0
    low: float | None = None
    """Raw value; None: not clipped."""
    high: float | None = None
    """Raw value; None: not clipped."""
    scale: float | None = None
    knots: tuple[float, ...] = ()
    """Raw values, ascending."""
    heights: tuple[float, ...] = ()
    missing: float = 0.0
    """Result for a missing value."""
    has_indicator: bool = False
    """Whether a further feature says whether a value is missing."""

    def __post_init__(self) -> None:
        check_choices(self)
        numbers = (self.mean, self.std, self.low, self.high, self.scale, self.missing)
        finite = all(n is None or math.isfinite(n) for n in (*numbers, *self.knots, *self.heights))
        ascending = all(a < b for a, b in zip(self.knots, self.knots[1:], strict=False))
        whole = len(self.knots) == len(self.heights) and len(self.knots) != 1 and ascending
        if not (finite and whole and self.std > 0 and (self.scale is None or self.scale > 0)):
            raise ValueError("the numbers of a dense transform are not finite or contradictory")

    @staticmethod
    def parse(text: str) -> tuple[str, DenseMethod]:
        """Column and method of "price:log"; the method of "price" is auto."""
        column, colon, method = text.rpartition(":")
        if colon and column and method in DENSE_METHODS:
            return column, method
        return text, "auto"

    @classmethod
    def fit(cls, values: np.ndarray, method: DenseMethod, *, has_missing: bool) -> DenseTransform:
        """The transform of a column.

        Args:
            values: float64 (n,), a sample of the training column, finite or NaN.
            method: which transform.
            has_missing: whether any training row lacks the value.
        """
        transform = cls._of_present(values[~np.isnan(values)], method)
        return replace(transform, has_indicator=has_missing)

    @classmethod
    def _of_present(cls, values: np.ndarray, method: DenseMethod) -> DenseTransform:
        if len(values) == 0:
            # Nothing is known of the column, so whatever comes later says nothing either.
            return cls("standard", low=0.0, high=0.0)
        mean, std = _mean_and_std(values)
        if method == "as-is":
            return cls("as-is", missing=mean)
        if method == "standard":
            return cls("standard", mean, std)
        if values.min() == values.max():
            return cls("standard", mean, low=mean, high=mean)
        if method == "quantile":
            knots, heights = _ranks(values)
            return cls("quantile", knots=knots, heights=heights)
        low, high = _fences(values)
        clipped = np.clip(values, low, high)
        scale = _log_scale(clipped)
        logged = _signed_log(clipped, scale)
        if method == "auto" and not _log_helps(clipped, logged):
            mean, std = _mean_and_std(clipped)
            low = max(low, mean - _MAX_DEVIATIONS * std)
            high = min(high, mean + _MAX_DEVIATIONS * std)
            return cls("standard", mean, std, low, high)
        mean, std = _mean_and_std(logged)
        low = max(low, _inverse_log(mean - _MAX_DEVIATIONS * std, scale))
        high = min(high, _inverse_log(mean + _MAX_DEVIATIONS * std, scale))
        return cls("log", mean, std, low, high, scale)

    def apply(self, values: Any, xp: Any = np) -> Any:
        """Inputs of a model, of the shape and type of `values`.

        Args:
            values: float64 of any shape, NaN where missing; an array of `xp`.
            xp: numpy or torch.
        """
        if self.knots:
            knots = xp.asarray(self.knots, dtype=xp.float64, device=values.device)
            heights = xp.asarray(self.heights, dtype=xp.float64, device=values.device)
            inside = xp.clip(values, self.knots[0], self.knots[-1])
            right = xp.clip(xp.searchsorted(knots, inside), 1, len(self.knots) - 1)
            share = (inside - knots[right - 1]) / (knots[right] - knots[right - 1])
            result = heights[right - 1] + share * (heights[right] - heights[right - 1])
        else:
            result = values
            if self.low is not None or self.high is not None:
                result = xp.clip(result, self.low, self.high)
            if self.scale is not None:
                result = xp.sign(result) * xp.log1p(xp.abs(result) / self.scale)
            result = (result - self.mean) / self.std
        return xp.where(xp.isnan(values), self.missing, result)

    def inverse(self, inputs: np.ndarray) -> np.ndarray:
        """Raw values, float64 (n,), of inputs that came from `apply`; those of clipped values are
        the ends that they were clipped to."""
        if self.knots:
            return np.interp(inputs, self.heights, self.knots)
        raw = inputs * self.std + self.mean
        if self.scale is not None:
            raw = np.sign(raw) * np.expm1(np.abs(raw)) * self.scale
        low = -math.inf if self.low is None else self.low
        return np.clip(raw, low, math.inf if self.high is None else self.high)

    @property
    def reach(self) -> float:
        """Absolute values up to this one have a result that a float32 can hold."""
        if self.knots or None not in (self.low, self.high):
            return math.inf
        largest = float(np.finfo(np.float32).max)
        return max(0.0, 0.999 * largest * min(1.0, self.std) - abs(self.mean))

    def encode(self, values: np.ndarray, name: str) -> np.ndarray:
        """float32 (n,) from float64 (n,), NaN where missing.

        Raises:
            DataError: a result is too large for a float32; names the column.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            encoded = self.apply(values).astype(np.float32)
        if not np.isfinite(encoded).all():
            highest = np.nanmax(np.abs(values))
            raise DataError(f"column {name!r} holds {highest:g}, {TOO_FAR}")
        return encoded


class DenseFitter:
    """Keeps a uniform sample of rows that come in blocks, in bounded memory.

    Which rows are in the sample follows from a hash of their number, so that it depends on the
    rows alone and not on the blocks they came in.

    Args:
        columns: how many columns the rows have.
        of_rows: how many rows will be merged in all, about: this fitter then keeps no more than
            its part of the sample. None: not known, or it gets all rows.
    """

    def __init__(self, columns: int, of_rows: int | None = None) -> None:
        self._threshold = np.uint64(2**64 - 1)
        # Generous, because many of the rows may be bad, or in the test split. Keeping too many does
        # not change the sample of all.
        while of_rows is not None and of_rows > 64 * MIN_SAMPLE_ROWS:
            self._threshold >>= np.uint64(1)
            of_rows //= 2
        self._hashes = np.zeros(0, np.uint64)
        self._sample = np.empty((0, columns))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._has_missing = np.zeros(columns, np.bool_)
        self._low = np.full(columns, np.inf)
        self._high = np.full(columns, -np.inf)

    def add(self, values: np.ndarray, numbers: np.ndarray) -> None:
        """Takes float64 (rows, columns), NaN where missing, and the number of each row."""
        hashes = splitmix64(numbers.astype(np.uint64))
        self._has_missing |= np.isnan(values).any(axis=0)
        self._low = np.fmin(self._low, np.fmin.reduce(values, axis=0, initial=np.inf))
        self._high = np.fmax(self._high, np.fmax.reduce(values, axis=0, initial=-np.inf))
        kept = hashes <= self._threshold
        self._waiting.append((hashes[kept], values[kept]))
        if (
            len(self._hashes) + sum(len(hashes) for hashes, _ in self._waiting)
            > 2 * MIN_SAMPLE_ROWS
        ):
            self._shrink()

    def merge(self, other: DenseFitter) -> None:
        """Takes the rows that another fitter was given."""
        self._has_missing |= other._has_missing
        self._low = np.fmin(self._low, other._low)
        self._high = np.fmax(self._high, other._high)
        self._threshold = min(self._threshold, other._threshold)
        self._waiting += [(other._hashes, other._sample), *other._waiting]
        self._shrink()

    def _shrink(self) -> None:
        hashes, values = zip((self._hashes, self._sample), *self._waiting, strict=True)
        self._hashes, self._sample = np.concatenate(hashes), np.concatenate(values)
        self._waiting = []
        self._keep_up_to_threshold()
        while len(self._hashes) > 2 * MIN_SAMPLE_ROWS:
            self._threshold >>= np.uint64(1)
            self._keep_up_to_threshold()

    def _keep_up_to_threshold(self) -> None:
        kept = self._hashes <= self._threshold
        if not kept.all():
            self._hashes, self._sample = self._hashes[kept], self._sample[kept]

    def fit(self, methods: Mapping[str, DenseMethod]) -> dict[str, DenseTransform]:
        """The transform of each column, from the method of each, in the order of the columns.

        Raises:
            DataError: the values of a column are too far apart for its method.
        """
        self._shrink()
        transforms = {}
        for place, (name, method) in enumerate(methods.items()):
            sample = self._sample[:, place]
            low, high = self._low[place], self._high[place]
            if low < high and np.nanmin(sample) == np.nanmax(sample):
                # Too rare to be sampled, but not constant.
                sample = np.append(sample, [low, high])
            has_missing = bool(self._has_missing[place])
            try:
                with np.errstate(all="ignore"):
                    transforms[name] = DenseTransform.fit(sample, method, has_missing=has_missing)
            except ValueError:
                raise DataError(
                    f"the dense column {name!r} holds values too far apart for the method "
                    f"{method}; fix them or choose another method"
                ) from None
        return transforms


class _Shape(NamedTuple):
    skewness: float
    excess_kurtosis: float


def _mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """In units of the largest value, so that no square overflows; a constant has std 1."""
    unit = float(np.abs(values).max()) or 1.0
    scaled = values / unit
    mean, std = float(scaled.mean()) * unit, float(scaled.std()) * unit
    if values.min() == values.max():
        return float(values[0]), 1.0
    return mean, std or 1.0


def _shape(values: np.ndarray) -> _Shape:
    mean, std = _mean_and_std(values)
    deviations = values / std - mean / std
    return _Shape(float((deviations**3).mean()), float((deviations**4).mean()) - 3.0)


def _fences(values: np.ndarray) -> tuple[float, float]:
    """What lies outside is far from the bulk of the values."""
    low, high = float(values.min()), float(values.max())
    bulk_low, bulk_high = np.quantile(values, (0.01, 0.99), method="nearest").tolist()
    reach = _FENCE_WIDTHS * (bulk_high - bulk_low)
    if reach == 0 or not math.isfinite(reach):
        return low, high
    return max(low, bulk_low - reach), min(high, bulk_high + reach)


def _log_scale(values: np.ndarray) -> float:
    """1, or less for a column of small values, so that its logarithm is not a straight line."""
    sizes = np.abs(values[values != 0])
    small = float(np.quantile(sizes, 0.05, method="nearest"))
    return max(min(1.0, small), float(sizes.max()) * 10.0**-_LOG_DECADES, 5e-324 * 2**52)


def _signed_log(values: np.ndarray, scale: float) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values) / scale)


def _inverse_log(value: float, scale: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.sign(value) * np.expm1(np.abs(value)) * scale)


def _log_helps(values: np.ndarray, logged: np.ndarray) -> bool:
    if np.ptp(logged) < 1e-6 * np.abs(logged).max():
        return False  # Values far from zero and close together: the logarithm merges them.
    # Without the outermost 0.1 %, or a single outlier would decide.
    low, high = np.quantile(values, (0.0005, 0.9995), method="nearest")
    inside = (values >= low) & (values <= high)
    raw, log = _shape(values[inside]), _shape(logged[inside])
    is_skewed = abs(raw.skewness) > _MAX_SKEWNESS
    has_tails = raw.excess_kurtosis > _MAX_EXCESS_KURTOSIS
    return (is_skewed and abs(log.skewness) <= abs(raw.skewness) / 2) or (
        has_tails and log.excess_kurtosis <= raw.excess_kurtosis / 2
    )


def _ranks(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Quantiles of the values, each once, and the standardised share of values below them; equal
    values count half, as in a mid-rank."""
    ordered = np.sort(values)
    places = np.linspace(0, len(ordered) - 1, _QUANTILES).round().astype(np.int64)
    knots = np.unique(ordered[places])
    below = np.searchsorted(ordered, knots, "left") + np.searchsorted(ordered, knots, "right")
    ranks = below / (2 * len(ordered))
    mean, std = _mean_and_std(np.interp(values, knots, ranks))
    return tuple(knots.tolist()), tuple(((ranks - mean) / std).tolist())
