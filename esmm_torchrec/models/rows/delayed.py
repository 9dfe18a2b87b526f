"""Clicked impressions in time order, when conversions come days after the click.

A model that is trained every day sees the conversions that have happened by then. An epoch here
simulates such a history: its periods are days, and a row is used on the day on which its label
becomes known, possibly more than once. Labels that become known after `until` are not used.

Notation: t time of the click, c time of the conversion, both in days. The label of a row in the
training replaces the conversion label of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.choices import NotNegative, Positive
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.parts import LoggedImpressions, Rows, TrainingRows


class _Clicks(NamedTuple):
    """M clicks of the log."""

    rows: NDArray[np.integer]
    """int (M,), rows of their impressions."""
    time: NDArray[np.float64]
    """(M,), t: days since the first impression."""
    converted: NDArray[np.float64]
    """(M,), c; infinite without a conversion."""
    until: float
    """Day up to which impressions and conversions are known."""
    names: tuple[str, str]
    """Labels of the click and of the conversion."""

    def entries(
        self,
        clicks: NDArray[np.integer],
        at: NDArray[np.float64],
        label: NDArray[np.bool_],
        **labels: NDArray[np.number],
    ) -> TrainingRows:
        """Builds training rows from clicks, with the days as periods.

        Args:
            clicks: int (K,), indices among the M clicks; a click may occur more than once.
            at: (K,), day on which each is used; days after `until` are dropped.
            label: bool (K,), whether each counts as converted.
            labels: further labels, (K,).
        """
        known = np.flatnonzero(at <= self.until)
        known = known[np.argsort(self.rows[clicks[known]], kind="stable")]
        labels = {self.names[1]: label.astype(np.int8)} | labels
        return TrainingRows(
            self.rows[clicks[known]],
            labels={name: values[known] for name, values in labels.items()},
            periods=np.floor(at[known]).astype(np.int64),
        )


@dataclass(frozen=True)
class DelayedRows(Rows):
    """Base class of the parts below."""

    day: Positive = 86_400
    """Length of a day in the unit of the data set's times."""
    until: int | None = None
    """Time up to which impressions and conversions are known; None: time of the last impression."""

    def _clicks(self, impressions: LoggedImpressions) -> _Clicks:
        times, converted = impressions.times, impressions.conversion_times
        if times is None or converted is None:
            raise OptionError(
                "this rows part needs times; prepare the data with `timestamp` and "
                "`conversion_time`"
            )
        first, last = times.min(), times.max() if self.until is None else self.until
        rows = np.flatnonzero(impressions.clicked & (times <= last))
        happened = impressions.converted[rows]
        days = np.full(len(rows), np.inf)
        days[happened] = (converted[rows[happened]] - first) / self.day
        tasks = impressions.tasks
        return _Clicks(
            rows,
            (times[rows] - first) / self.day,
            days,
            float(last - first) / self.day,
            (tasks[0].label, tasks[-1].label),
        )


@dataclass(frozen=True)
class ObservedRows(DelayedRows):
    """Every click on its own day, with the label that is known at the end of that day.

    Further labels: "elapsed", days from the click to the observation, and "delay", days from the
    click to the observed conversion, or 0 without one.
    """

    gives_labels: ClassVar[frozenset[str]] = frozenset({"elapsed", "delay"})

    at_end: bool = False
    """Observe all days at the end, as for a model that is trained once."""
    hindsight: bool = False
    """Label by the whole log, including conversions after the end, which no training can know;
    for comparisons only."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects each click once."""
        clicks = self._clicks(impressions)
        observed = np.minimum(np.floor(clicks.time) + 1, clicks.until)
        if self.at_end:
            observed = np.full_like(observed, clicks.until)
        label = clicks.converted <= (np.inf if self.hindsight else observed)
        label &= np.isfinite(clicks.converted)
        delay = np.where(label, clicks.converted - clicks.time, 0.0)
        return clicks.entries(
            np.arange(len(clicks.rows)),
            clicks.time,
            label,
            elapsed=(observed - clicks.time).astype(np.float32),
            delay=delay.astype(np.float32),
        )


@dataclass(frozen=True)
class WaitedRows(DelayedRows):
    """Every click once it is `wait` days old, with its label at that time."""

    wait: NotNegative = 1.0
    """Days from a click until it is used."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects each click once, except those of the last days."""
        clicks = self._clicks(impressions)
        at = clicks.time + self.wait
        return clicks.entries(np.arange(len(at)), at, clicks.converted <= at)


@dataclass(frozen=True)
class FakeNegativeRows(DelayedRows):
    """Every click immediately as a negative, and again as a positive when it converts; the
    objective fnw corrects for this (Ktena et al., RecSys 2019)."""

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects each click once or twice."""
        clicks = self._clicks(impressions)
        each = np.arange(len(clicks.rows))
        return clicks.entries(
            np.concatenate([each, each]),
            np.concatenate([clicks.time, clicks.converted]),
            np.repeat([False, True], len(each)),
        )


@dataclass(frozen=True)
class ElapsedTimeRows(DelayedRows):
    """Every click once it is `wait` days old, with its label at that time, and again as a positive
    if it converts later; the objective es-dfm corrects for this (Yang et al., AAAI 2021).

    A click is used again when it is `window` days old and its outcome counts as final. It then
    trains only the two networks that predict the weights: its click label is 0.
    Further labels: "matured", 1 for these rows; among them "observed_negative", no conversion when
    the click was `wait` days old; "delayed_positive", a later one; "real_negative", none.
    """

    gives_labels: ClassVar[frozenset[str]] = frozenset(
        {"matured", "observed_negative", "delayed_positive", "real_negative"}
    )

    wait: float = 0.25
    """Days from a click until it is used."""
    window: float = 7.0
    """Days after which no conversion is expected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.wait < self.window:
            raise OptionError(
                f"`rows.wait` {self.wait:g} is not from 0 to `rows.window` {self.window:g}"
            )

    def select(self, impressions: LoggedImpressions) -> TrainingRows:
        """Selects each click up to three times."""
        clicks = self._clicks(impressions)
        size = len(clicks.rows)
        at, mature = clicks.time + self.wait, clicks.time + self.window
        early = clicks.converted <= at
        late = ~early & (clicks.converted <= mature)
        again = np.flatnonzero(~early & np.isfinite(clicks.converted))
        kind = np.repeat([0, 1, 2], [size, len(again), size])
        matured = kind == 2

        def of_matured(values: NDArray[np.bool_]) -> NDArray[np.int8]:
            padding = np.zeros(size + len(again), np.int8)
            return np.concatenate([padding, values.astype(np.int8)])

        return clicks.entries(
            np.concatenate([np.arange(size), again, np.arange(size)]),
            np.concatenate([at, clicks.converted[again], mature]),
            np.concatenate([early, np.ones(len(again), bool), np.zeros(size, bool)]),
            **{clicks.names[0]: (~matured).astype(np.int8)},
            matured=matured.astype(np.int8),
            observed_negative=of_matured(~early),
            delayed_positive=of_matured(late),
            real_negative=of_matured(~early & ~late),
        )
