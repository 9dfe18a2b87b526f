"""Exposure in a synthetic world: users' profiles and histories, and the items shown in each visit.

Items are chosen by the user's past and taste, so that histories and crosses carry information about
the user. `world` adds clicks and conversions, on which nothing here depends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esmm_torchrec.comparison.worlds.catalogue import (
    HABITS,
    HISTORY_DRIFT,
    LATENT_DIM,
    NUM_AGES,
    NUM_GROUPS,
    NUM_SEGMENTS,
    USER_PARTS,
    Catalogue,
    Floats,
    Ints,
    Ragged,
    Split,
    Streams,
    Visits,
    aranges,
    zipf_rank,
)

PROFILE_KNOWN = 0.870
KNOWN_WITHIN_PROFILE = {"126": 0.416 / PROFILE_KNOWN, "129": 0.637 / PROFILE_KNOWN}
USER_ID_KNOWN = 0.998
NODES_KNOWN = 0.998
OTHER_HISTORIES_KNOWN = 0.991
"""Share of common rows with the other histories; this and the shares above are Ali-CCP's."""
HABIT_STRENGTH = 0.7
"""Probability that a profile field has the segment's preferred value instead of a random one."""

CATEGORY_PULL = 2.8
"""Increase of the log-odds of an event in a category per unit of affinity."""
INTENTION_SHARE = 0.09
"""Share of events whose intention nodes enter the history; the latest event's always do."""
MAX_REPEATS = 100
MAX_TIMES = 9_999
"""Maximum occurrences of a value in a history; MAX_REPEATS is that of an event."""
EXPOSURE = {"shop": 0.12, "category": 0.38, "taste": 0.35}
"""Reason for showing an item → share of impressions: the shop or the category of a past event, or
the user's taste. The other items are shown by popularity only."""
POSITION_SHARES = (0.25, 0.5, 0.25)


class Counts(NamedTuple):
    """Concatenated lists of distinct numbers, with the occurrences of each."""

    offsets: Ints
    """(lists + 1,): list i is the range offsets[i]:offsets[i + 1] of the other two arrays."""
    values: Ints
    times: Ints
    """Occurrences, 1 to MAX_TIMES; the weight in the log is ln(1 + times)."""


@dataclass(frozen=True)
class Exposure:
    """A stretch of consecutive visits of a split and their impressions, in the order of the log.

    Users, items and their attributes are numbered from 0 (`Catalogue`); -1 means missing.
    """

    split: Split
    first_visit: int
    """Number of the first visit within the split."""
    first_impression: int
    """Number of the first impression within the split; its sample_id is one more."""

    user: Ints
    """(visits,) user of each visit, whether or not the log has the id."""
    user_logged: npt.NDArray[np.bool_]
    """(visits,) whether the log has the user id."""
    profile: Mapping[str, Ints]
    """Profile field → (visits,) values."""
    categories: Counts
    shops: Counts
    brands: Counts
    nodes: Counts
    """Intention nodes of the user's past events. The four histories have a list per visit."""

    visit: Ints
    """(impressions,) number of the visit within the stretch."""
    item: Ints
    """(impressions,) item shown."""
    position: Ints
    """(impressions,) position: 0, 1 or 2."""
    category_times: Ints
    shop_times: Ints
    brand_times: Ints
    """(impressions,) occurrences of the item's brand in the history, 0 if there are none; likewise
    for category and shop."""
    node_hits: Counts
    """Intention nodes of the item that occur in the history, a list per impression."""

    latents: Floats
    """(visits, 2 * LATENT_DIM) latents of the user, in the order of `Catalogue.latents`."""
    inclination: Floats
    """(visits, 2) inclination of the user to click and to convert, whatever the item; unit
    variance."""


class _Users(NamedTuple):
    """A range of users, which are the first axis of every array."""

    first: int
    logged: npt.NDArray[np.bool_]
    profile: dict[str, Ints]
    latents: Floats
    inclination: Floats
    shares: Floats
    """(users, categories) cumulative shares of the categories in the user's events."""


class _Events(NamedTuple):
    """Past events of a range of users; events are the first axis of every array."""

    item: Ints
    intended: npt.NDArray[np.bool_]
    """Whether the intention of the event is known, so that the item's nodes enter the history."""
    times: Ints


class _Windows(NamedTuple):
    """The range of past events of each visit, (visits,)."""

    start: Ints
    length: Ints

    def logged(self, known: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Returns visit and event for all events in known windows."""
        lengths = np.where(known, self.length, 0)
        return np.repeat(np.arange(len(lengths)), lengths), aranges(self.start, lengths)


class Exposer:
    """Draws the exposure of any stretch of visits."""

    def __init__(
        self, catalogue: Catalogue, visits: Visits, *, rare_share: float, seed: int
    ) -> None:
        self._catalogue = catalogue
        self._visits = visits
        self._rare_share = rare_share
        self._streams = Streams(seed)
        self._popularity = np.cumsum(catalogue.category_popularity)[None, :]

    def expose(self, split: Split, first_visit: int, num_visits: int) -> Exposure:
        """Draws visits `first_visit` to `first_visit + num_visits` (exclusive) of a split."""
        catalogue, visits, streams = self._catalogue, self._visits, self._streams
        stretch = slice(first_visit, first_visit + num_visits)
        user = visits.user[split][stretch]
        users = self._users(int(user[0]), int(user[-1]) + 1)
        of_visit = user - users.first
        events = self._events(users)
        length = visits.events[user]
        drift = np.floor(HISTORY_DRIFT * length * visits.ordinal[split][stretch]).astype(np.int64)
        start = visits.event_offsets[user] - visits.event_offsets[users.first] + drift
        windows = _Windows(start, length)

        known = streams.uniform("history", visits.place(split, first_visit), num_visits)
        # Every common row has at least one feature.
        known = np.where(users.logged[of_visit], known, 0.0)
        past_visit, past = windows.logged(known < OTHER_HISTORIES_KNOWN)
        past_item, times = events.item[past], events.times[past]
        categories = _History.of(past_visit, catalogue.category[past_item], times, num_visits)
        shops = _History.of(past_visit, catalogue.shop[past_item], times, num_visits)
        brands = _History.of(past_visit, catalogue.brand[past_item], times, num_visits)
        past_visit, past = windows.logged(known < NODES_KNOWN)
        latest = np.diff(past_visit, append=-1) != 0
        intended = events.intended[past] | latest
        past_visit, past = past_visit[intended], past[intended]
        lengths, past_nodes = catalogue.nodes.take(events.item[past])
        nodes = _History.of(
            np.repeat(past_visit, lengths),
            past_nodes,
            np.repeat(events.times[past], lengths),
            num_visits,
        )

        offsets = visits.offsets[split][first_visit : first_visit + num_visits + 1]
        visit = np.repeat(np.arange(num_visits), np.diff(offsets))
        place = visits.impression_place(split, int(offsets[0]))
        item = self._items(
            place, visit, of_visit[visit], users=users, events=events, windows=windows
        )
        uniform = streams.uniform("position", place, len(visit))
        position = np.searchsorted(np.cumsum(POSITION_SHARES)[:-1], uniform, side="right")
        return Exposure(
            split=split,
            first_visit=first_visit,
            first_impression=int(offsets[0]),
            user=user,
            user_logged=users.logged[of_visit],
            profile={field: values[of_visit] for field, values in users.profile.items()},
            categories=categories.counts,
            shops=shops.counts,
            brands=brands.counts,
            nodes=nodes.counts,
            visit=visit,
            item=item,
            position=position,
            category_times=categories.times_of(visit, catalogue.category[item]),
            shop_times=shops.times_of(visit, catalogue.shop[item]),
            brand_times=brands.times_of(visit, catalogue.brand[item]),
            node_hits=nodes.hits(visit, item, catalogue.nodes),
            latents=users.latents[of_visit],
            inclination=users.inclination[of_visit],
        )

    def _users(self, first: int, end: int) -> _Users:
        catalogue, count = self._catalogue, end - first
        width = 5 + 2 * len(HABITS)
        uniform = self._streams.uniform("users", first * width, count * width)
        uniform = uniform.reshape(count, width).T
        segment = (NUM_SEGMENTS * uniform[0] ** 1.3).astype(np.int64)
        group = segment // (NUM_SEGMENTS // NUM_GROUPS)
        profile = {
            "121": segment,
            "122": group,
            "124": group // NUM_AGES,
            "125": group % NUM_AGES,
        }
        for place, (field, values) in enumerate(HABITS.items()):
            keeps, other = uniform[5 + 2 * place], uniform[6 + 2 * place]
            profile[field] = np.where(
                keeps < HABIT_STRENGTH,
                catalogue.segment_habits[field][segment],
                (values * other).astype(np.int64),
            )
        for place, (field, share) in enumerate(KNOWN_WITHIN_PROFILE.items()):
            profile[field] = np.where(uniform[1 + place] < share, profile[field], -1)
        known = uniform[3] < PROFILE_KNOWN
        profile = {field: np.where(known, values, -1) for field, values in profile.items()}

        own = self._streams.normal("users' latents", first, count, width=2 * LATENT_DIM + 2)
        latents = (
            catalogue.segment_latents[segment] + np.float32(math.sqrt(USER_PARTS["own"])) * own
        )
        # Component by component: the rounding of a matrix product depends on the number of users.
        affinity = np.zeros((count, catalogue.num_categories))
        for component in range(2 * LATENT_DIM):
            affinity += np.multiply.outer(
                latents[:, component], catalogue.category_latents[:, component]
            )
        odds = np.exp(affinity * (CATEGORY_PULL / math.sqrt(2 * LATENT_DIM)))
        shares = np.cumsum(odds * catalogue.category_popularity, axis=1)
        shares /= shares[:, -1:]
        return _Users(
            first=first,
            logged=uniform[4] < USER_ID_KNOWN,
            profile=profile,
            latents=latents[:, : 2 * LATENT_DIM],
            inclination=latents[:, 2 * LATENT_DIM :],
            shares=shares,
        )

    def _events(self, users: _Users) -> _Events:
        """Draws all events of the users by their taste."""
        catalogue, streams = self._catalogue, self._streams
        offsets = self._visits.event_offsets[users.first : users.first + len(users.logged) + 1]
        place, count = int(offsets[0]), int(offsets[-1] - offsets[0])
        of_event = np.repeat(np.arange(len(users.logged)), np.diff(offsets))
        category = _pick(users.shares, of_event, streams.uniform("event category", place, count))
        item = _member(catalogue.by_category, category, streams.uniform("event item", place, count))
        intended = streams.uniform("event intention", place, count) < INTENTION_SHARE
        times = (1.0 - streams.uniform("event times", place, count)) ** (-1 / 1.5)
        times = np.minimum(times, MAX_REPEATS).astype(np.int64)
        return _Events(item, intended, times)

    def _items(
        self,
        place: int,
        visit: Ints,
        user: Ints,
        *,
        users: _Users,
        events: _Events,
        windows: _Windows,
    ) -> Ints:
        """Draws the (impressions,) items; `place` is the first impression's place in its stream."""
        catalogue, count = self._catalogue, len(visit)

        def uniform(name: str) -> Floats:
            return self._streams.uniform(name, place, count)

        past = windows.start[visit] + (uniform("past event") * windows.length[visit]).astype(int)
        past_item = events.item[past]
        within, which = uniform("category"), uniform("item")
        reason = uniform("reason")
        by_shop = reason < EXPOSURE["shop"]
        by_category = reason < EXPOSURE["shop"] + EXPOSURE["category"]
        by_taste = reason < sum(EXPOSURE.values())
        category = np.where(
            by_category,
            catalogue.category[past_item],
            np.where(
                by_taste,
                _pick(users.shares, user, within),
                _pick(self._popularity, np.zeros(count, dtype=np.int64), within),
            ),
        )
        item = np.where(
            by_shop,
            _member(catalogue.by_shop, catalogue.shop[past_item], which),
            _member(catalogue.by_category, category, which),
        )
        rare = uniform("rare") < self._rare_share
        return np.where(rare, (which * catalogue.num_items).astype(np.int64), item)


class _History(NamedTuple):
    """A history with a sorted index of its values."""

    counts: Counts
    keys: Ints
    """visit * size + value of each entry, in ascending order."""
    size: int
    """Exclusive upper bound of the values."""

    @classmethod
    def of(cls, visit: Ints, value: Ints, times: Ints, num_visits: int) -> _History:
        """Sums the occurrences of each value by visit; values of -1 are ignored."""
        size = int(value.max(initial=0)) + 1
        there = value >= 0
        keys = visit[there] * size + value[there]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(times[there][order], first) if len(first) else times[:0]
        sums, keys = np.minimum(sums, MAX_TIMES), keys[first]
        ends = np.cumsum(np.bincount(keys // size, minlength=num_visits))
        return cls(Counts(np.concatenate([[0], ends]), keys % size, sums), keys, size)

    def times_of(self, visit: Ints, value: Ints) -> Ints:
        """Returns the occurrences of each value in the history of its visit; 0 for -1."""
        if not len(self.keys):
            return np.zeros(len(visit), dtype=np.int64)
        keys = visit * self.size + value
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found = (self.keys[at] == keys) & (value >= 0) & (value < self.size)
        return np.where(found, self.counts.times[at], 0)

    def hits(self, visit: Ints, item: Ints, values_of_item: Ragged) -> Counts:
        """Returns the values of each item that occur in the history of its visit."""
        lengths, values = values_of_item.take(item)
        times = self.times_of(np.repeat(visit, lengths), values)
        hit = times > 0
        ends = np.concatenate([[0], np.cumsum(hit)])
        offsets = ends[np.concatenate([[0], np.cumsum(lengths)])]
        return Counts(offsets, values[hit], times[hit])


def _pick(cumulative: Floats, row: Ints, uniform: Floats) -> Ints:
    """Draws a column for each of the given rows by their cumulative shares."""
    columns = cumulative.shape[1]
    flat = (cumulative + np.arange(len(cumulative))[:, None]).ravel()
    picked = np.searchsorted(flat, row + uniform, side="right") - row * columns
    return np.clip(picked, 0, columns - 1)


def _member(groups: Ragged, group: Ints, uniform: Floats) -> Ints:
    """Draws a member of each group, early ones more often."""
    start = groups.offsets[group]
    return groups.values[start + zipf_rank(uniform, groups.offsets[group + 1] - start)]
