"""A world: its settings, and the clicks and conversions of its impressions.

Every random number has a fixed place in a stream of the seed, so that any stretch of visits can be
drawn separately, in any order and on any thread, with the same result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esmm_torchrec.comparison.worlds.catalogue import (
    LATENT_DIM,
    SPLITS,
    Catalogue,
    Floats,
    Split,
    Streams,
    Visits,
)
from esmm_torchrec.comparison.worlds.exposure import Exposer, Exposure
from esmm_torchrec.errors import OptionError

TASTE_PARTS = {"item": 0.30, "user": 0.25, "affinity": 0.45}
"""Shares of the variance of a taste: the item's appeal, the user's inclination, and their match."""
CLICK_SCALE = 0.75
CONVERSION_SCALE = 1.05
"""Standard deviation of the taste in the conversion logit; CLICK_SCALE is that in the click logit.
They lead to oracle AUCs of about 0.73 (click) and 0.77 (conversion)."""

VISITS_PER_BLOCK = 512
PILOT_STRETCHES = 16
PILOT_VISITS = 256
"""Number of visits per stretch used to standardise tastes and find intercepts: 16 stretches of 256
visits, if there are as many."""


@dataclass(frozen=True)
class World:
    """Settings of a world of users, items and impressions.

    Raises:
        OptionError: a setting is out of its range.
    """

    impressions: int = 1_000_000
    """Number of impressions; the earlier half is for training, the later half for testing."""
    seed: int = 0
    """Random seed; the same seed and settings give the same bytes."""
    ctr: float = 0.06
    """Clicks per impression."""
    cvr: float = 0.08
    """Conversions per click."""
    correlation: float = 0.6
    """Correlation of the taste for clicking with the taste for converting, from -1 to 1."""
    rare_share: float = 0.1
    """Share of impressions whose item is drawn uniformly from all items, so mostly a rare one."""
    position_effect: float = 0.5
    """Decrease of the click logit per position (field 301); conversions are not affected."""
    confounding: float = 0.0
    """Weight, in both logits, of a standard normal factor per impression that is not logged."""
    noise: float = 0.25
    """Standard deviation of independent noise on each logit, which is not logged either."""
    history_scale: float = 0.07
    """Scale of the users' history lengths; 1 gives those of Ali-CCP, 70 to 252 values per field."""

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "impressions": (1000, 90_000_000),
            "seed": (0, 2**63 - 1),
            "ctr": (0.001, 0.5),
            "cvr": (0.001, 0.5),
            "correlation": (-1, 1),
            "rare_share": (0, 1),
            "position_effect": (-3, 3),
            "confounding": (0, 3),
            "noise": (0, 3),
            "history_scale": (0.01, 2),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(f"`{name}` is {value}; it must be from {low:,} to {high:,}")

    @property
    def split_impressions(self) -> dict[Split, int]:
        """Impressions of each half."""
        return {"train": self.impressions // 2, "test": self.impressions - self.impressions // 2}


@dataclass(frozen=True)
class Block:
    """A stretch of visits of a split, with impressions, clicks and conversions."""

    exposure: Exposure
    """Visits and impressions shown."""
    true_ctr: npt.NDArray[np.float32]
    """(impressions,) p(click), given all variables of the world's formula."""
    true_cvr: npt.NDArray[np.float32]
    """(impressions,) p(conversion | do(click)), given the same variables."""
    click: npt.NDArray[np.int8]
    """(impressions,) whether the impression is clicked, 0 or 1."""
    conversion_if_clicked: npt.NDArray[np.int8]
    """(impressions,) whether a click leads, or would have led, to a conversion, 0 or 1."""

    @property
    def conversion(self) -> npt.NDArray[np.int8]:
        """(impressions,) logged conversions; there are none without a click."""
        return self.click * self.conversion_if_clicked


class _Tastes(NamedTuple):
    """Terms of the two logits before standardisation and intercepts, (impressions,)."""

    click: Floats
    other: Floats
    """Taste that affects only conversions."""
    click_shift: Floats
    """Position, hidden factor and noise in the click logit."""
    conversion_shift: Floats
    """Hidden factor and noise in the conversion logit."""


class _Scales(NamedTuple):
    """Standardises the two tastes and makes them uncorrelated."""

    click_mean: float
    click_std: float
    other_mean: float
    other_slope: float
    other_std: float

    @classmethod
    def of(cls, tastes: _Tastes) -> _Scales:
        click_mean, click_std = float(tastes.click.mean()), float(tastes.click.std())
        click = (tastes.click - click_mean) / click_std
        other_mean = float(tastes.other.mean())
        slope = float(np.mean(click * (tastes.other - other_mean)))
        std = float(np.std(tastes.other - other_mean - slope * click))
        return cls(click_mean, click_std, other_mean, slope, std)

    def apply(self, tastes: _Tastes) -> tuple[Floats, Floats]:
        """Returns the taste for clicking and the taste that affects only conversions."""
        click = (tastes.click - self.click_mean) / self.click_std
        other = (tastes.other - self.other_mean - self.other_slope * click) / self.other_std
        return click, other


class Simulation:
    """Draws any stretch of visits of a world, in any order and from any thread."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.catalogue = Catalogue.draw(world.impressions, world.seed)
        self.visits = Visits.draw(
            world.split_impressions, history_scale=world.history_scale, seed=world.seed
        )
        self._exposer = Exposer(
            self.catalogue, self.visits, rare_share=world.rare_share, seed=world.seed
        )
        self.streams = Streams(world.seed)
        self._calibrate()

    def num_visits(self, split: Split) -> int:
        """Returns the number of visits, that is, of common rows, of a split."""
        return len(self.visits.user[split])

    def visit_index(
        self, split: Split, first_visit: int, num_visits: int
    ) -> npt.NDArray[np.uint64]:
        """Returns the common_feature_index of visits of a split, (num_visits,)."""
        index = self.streams.generator("index", self.visits.place(split, first_visit))
        return index.bit_generator.random_raw(num_visits)

    def stretches(self, split: Split, visits_per_block: int) -> list[tuple[Split, int, int]]:
        """Returns arguments of `block` that together cover a split once."""
        total = self.num_visits(split)
        return [
            (split, first, min(visits_per_block, total - first))
            for first in range(0, total, visits_per_block)
        ]

    def block(self, split: Split, first_visit: int, num_visits: int) -> Block:
        """Draws visits `first_visit` to `first_visit + num_visits` (exclusive) of a split."""
        exposure = self._exposer.expose(split, first_visit, num_visits)
        click_logit, conversion_logit = self._logits(self._tastes(exposure))
        true_ctr = _sigmoid(click_logit + self._click_intercept).astype(np.float32)
        true_cvr = _sigmoid(conversion_logit + self._conversion_intercept).astype(np.float32)
        place = self.visits.impression_place(split, exposure.first_impression)
        click = self.streams.uniform("click", place, len(true_ctr)) < true_ctr
        converts = self.streams.uniform("conversion", place, len(true_ctr)) < true_cvr
        return Block(
            exposure=exposure,
            true_ctr=true_ctr,
            true_cvr=true_cvr,
            click=click.astype(np.int8),
            conversion_if_clicked=converts.astype(np.int8),
        )

    def _calibrate(self) -> None:
        """Standardises the tastes and finds the intercepts for the CTR and CVR of the settings."""
        pilots: list[_Tastes] = []
        for split in SPLITS:
            total, stretches = self.num_visits(split), PILOT_STRETCHES // len(SPLITS)
            size = PILOT_VISITS
            if total <= stretches * size:
                stretches, size = 1, total
            for start in np.linspace(0, total - size, stretches).astype(int):
                pilots.append(self._tastes(self._exposer.expose(split, int(start), size)))
        pilot = _Tastes(*map(np.concatenate, zip(*pilots, strict=True)))
        self._scales = _Scales.of(pilot)
        click_logit, conversion_logit = self._logits(pilot)
        even = np.full(len(click_logit), 1 / len(click_logit))
        self._click_intercept = _intercept(click_logit, even, self.world.ctr)
        clicks = _sigmoid(click_logit + self._click_intercept)
        self._conversion_intercept = _intercept(
            conversion_logit, clicks / clicks.sum(), self.world.cvr
        )

    def _tastes(self, exposure: Exposure) -> _Tastes:
        world, catalogue = self.world, self.catalogue
        visit, item = exposure.visit, exposure.item
        match = exposure.latents[visit] * catalogue.latents[item]
        by_taste = [
            math.sqrt(TASTE_PARTS["item"]) * catalogue.appeal[item, taste]
            + math.sqrt(TASTE_PARTS["user"]) * exposure.inclination[visit, taste]
            + math.sqrt(TASTE_PARTS["affinity"] / LATENT_DIM) * component.sum(axis=1)
            for taste, component in enumerate((match[:, :LATENT_DIM], match[:, LATENT_DIM:]))
        ]
        place = self.visits.impression_place(exposure.split, exposure.first_impression)
        chance = self.streams.normal("noise", place, len(visit), width=4)
        hidden = world.confounding * chance[:, 0]
        return _Tastes(
            click=by_taste[0],
            other=by_taste[1],
            click_shift=hidden
            + world.noise * chance[:, 1]
            - world.position_effect * exposure.position,
            conversion_shift=hidden + world.noise * chance[:, 2],
        )

    def _logits(self, tastes: _Tastes) -> tuple[Floats, Floats]:
        """Returns the logits of click and of conversion, without the intercepts."""
        click, other = self._scales.apply(tastes)
        correlation = self.world.correlation
        conversion = correlation * click + math.sqrt(1 - correlation**2) * other
        return (
            CLICK_SCALE * click + tastes.click_shift,
            CONVERSION_SCALE * conversion + tastes.conversion_shift,
        )


def _sigmoid(logit: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-logit))


def _intercept(logits: Floats, weights: Floats, rate: float) -> float:
    """Returns the intercept for which the weighted mean of the logits' sigmoids is `rate`."""
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        if float(weights @ _sigmoid(logits + middle)) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
