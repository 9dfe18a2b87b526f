"""Raw dense values → model inputs, by a transform that is fitted to each training column.

A `DenseFitter` reads the training rows once, block by block, and keeps a uniform sample of them.
`DenseTransform.fit` reduces the sample of a column to a few parameters, stored in dataset.json.
`DenseTransform.apply` applies them to training rows, test rows and rows to score.

The default method ("auto") depends on the training column:

1. Values far outside the bulk of the column are clipped: beyond its 1 % and 99 % quantiles by more
   than five times the distance between these.
2. A column whose skewness is beyond ±1, or whose excess kurtosis is over 10, is replaced by its
   signed logarithm, sign(x) log(1 + |x| / scale), if that at least halves the offending statistic.
   The outermost 0.1 % of the values are ignored. A column of two values is never replaced, because
   no monotone function changes its skewness.
3. The column is standardised and clipped at five standard deviations.

Missing values (NaN) become the training mean. If any training row lacks the value, an indicator
feature (`schema.missing_column`) is added: 1 if the value is missing, else 0.
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
"""auto: see the module docstring. standard: (x - mean) / std, never clipped. log: the signed
logarithm, standardised and clipped. quantile: the rank of the value in training, standardised.
as-is: unchanged."""

DENSE_METHODS: tuple[DenseMethod, ...] = get_args(DenseMethod)

TOO_FAR = (
    "too far from its training values for a 32-bit float; fix the value or prepare the column as "
    "auto, log or quantile"
)

MIN_SAMPLE_ROWS = 1 << 17
"""Minimum size of a sample, in rows. Smaller columns are kept whole; otherwise the sample has
between one and two times this many rows."""

_MAX_DEVIATIONS = 5.0
_FENCE_WIDTHS = 5.0
_MAX_SKEWNESS = 1.0
_MAX_EXCESS_KURTOSIS = 10.0
_LOG_DECADES = 12
"""Decades between the largest absolute value and the smallest that the logarithm resolves."""
_QUANTILES = 129


@dataclass(frozen=True)
class DenseTransform:
    """Transform of one dense column to a model input.

    With `knots`, the result is interpolated linearly between the points (knots, heights), and
    constant outside them. Without, it is (f(x) - mean) / std for x clipped to [low, high], with
    f(x) = sign(x) log(1 + |x| / scale) if `scale` is set, else f(x) = x.
    """

    method: Literal["standard", "log", "quantile", "as-is"]
    mean: float = 0.0
    """Mean of f(x) over the training sample."""
    std: float = 1.0
    low: float | None = None
    """Lower clipping bound, a raw value; None: not clipped."""
    high: float | None = None
    """Upper clipping bound, a raw value; None: not clipped."""
    scale: float | None = None
    knots: tuple[float, ...] = ()
    """Raw values to interpolate between, ascending."""
    heights: tuple[float, ...] = ()
    missing: float = 0.0
    """Result for a missing value."""
    has_indicator: bool = False
    """Whether the column has an indicator feature for missing values."""

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
        """Splits "price:log" into column and method; "price" alone has the method auto."""
        column, colon, method = text.rpartition(":")
        if colon and column and method in DENSE_METHODS:
            return column, method
        return text, "auto"

    @classmethod
    def fit(cls, values: np.ndarray, method: DenseMethod, *, has_missing: bool) -> DenseTransform:
        """Fits the transform of a column.

        Args:
            values: sample of the training column, float64 (n,), finite or NaN.
            method: method to fit.
            has_missing: whether any training row lacks the value.
        """
        transform = cls._of_present(values[~np.isnan(values)], method)
        return replace(transform, has_indicator=has_missing)

    @classmethod
    def _of_present(cls, values: np.ndarray, method: DenseMethod) -> DenseTransform:
        if len(values) == 0:
            # The training values are all missing, so map every later value to the same input.
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
        """Transforms raw values to model inputs of the same shape and type.

        Args:
            values: array of `xp`, float64 of any shape, NaN for missing values.
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
        """Maps inputs from `apply` back to raw values, float64 (n,); a clipped value becomes the
        bound it was clipped to."""
        if self.knots:
            return np.interp(inputs, self.heights, self.knots)
        raw = inputs * self.std + self.mean
        if self.scale is not None:
            raw = np.sign(raw) * np.expm1(np.abs(raw)) * self.scale
        low = -math.inf if self.low is None else self.low
        return np.clip(raw, low, math.inf if self.high is None else self.high)

    @property
    def reach(self) -> float:
        """Largest absolute raw value whose result fits in a float32."""
        if self.knots or None not in (self.low, self.high):
            return math.inf
        largest = float(np.finfo(np.float32).max)
        return max(0.0, 0.999 * largest * min(1.0, self.std) - abs(self.mean))

    def encode(self, values: np.ndarray, name: str) -> np.ndarray:
        """Transforms raw values, float64 (n,) with NaN for missing values, to float32 (n,).

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

    A hash of the row number decides whether a row is sampled, so the sample does not depend on how
    the rows were divided into blocks.

    Args:
        columns: number of columns.
        of_rows: approximate number of rows of all fitters that will be merged; this one then keeps
            only its part of the sample. None: unknown, or this fitter receives all rows.
    """

    def __init__(self, columns: int, of_rows: int | None = None) -> None:
        self._threshold = np.uint64(2**64 - 1)
        # With a margin, because many rows may be bad or in the test split. Keeping too many does
        # not change the merged sample.
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
        """Adds a block, float64 (rows, columns), NaN for missing values, with its row numbers."""
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
        """Adds the rows of another fitter."""
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
        """Fits the transform of each column.

        Args:
            methods: column → method, in the order of the columns.

        Raises:
            DataError: the values of a column are too far apart for its method.
        """
        self._shrink()
        transforms = {}
        for place, (name, method) in enumerate(methods.items()):
            sample = self._sample[:, place]
            low, high = self._low[place], self._high[place]
            if low < high and np.nanmin(sample) == np.nanmax(sample):
                # The other values are too rare to be sampled, but the column is not constant.
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
    """Computed in units of the largest value, so that no square overflows; a constant has std 1."""
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
    """Returns the bounds beyond which a value is far from the bulk of the column."""
    low, high = float(values.min()), float(values.max())
    bulk_low, bulk_high = np.quantile(values, (0.01, 0.99), method="nearest").tolist()
    reach = _FENCE_WIDTHS * (bulk_high - bulk_low)
    if reach == 0 or not math.isfinite(reach):
        return low, high
    return max(low, bulk_low - reach), min(high, bulk_high + reach)


def _log_scale(values: np.ndarray) -> float:
    """Returns 1, or less for a column of small values, whose log would else be nearly linear."""
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
        return False  # values far from zero and close together, which the logarithm would merge
    # Ignore the outermost 0.1 %, so that a single outlier does not decide.
    low, high = np.quantile(values, (0.0005, 0.9995), method="nearest")
    inside = (values >= low) & (values <= high)
    raw, log = _shape(values[inside]), _shape(logged[inside])
    is_skewed = abs(raw.skewness) > _MAX_SKEWNESS
    has_tails = raw.excess_kurtosis > _MAX_EXCESS_KURTOSIS
    return (is_skewed and abs(log.skewness) <= abs(raw.skewness) / 2) or (
        has_tails and log.excess_kurtosis <= raw.excess_kurtosis / 2
    )


def _ranks(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the distinct quantiles of the values and the standardised share of values below each;
    equal values count half, as in a mid-rank."""
    ordered = np.sort(values)
    places = np.linspace(0, len(ordered) - 1, _QUANTILES).round().astype(np.int64)
    knots = np.unique(ordered[places])
    below = np.searchsorted(ordered, knots, "left") + np.searchsorted(ordered, knots, "right")
    ranks = below / (2 * len(ordered))
    mean, std = _mean_and_std(np.interp(values, knots, ranks))
    return tuple(knots.tolist()), tuple(((ranks - mean) / std).tolist())
