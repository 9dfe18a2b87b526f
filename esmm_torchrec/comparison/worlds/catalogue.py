"""The parts of a synthetic world that exist before any impression: items, segments, visits.

Their size depends on users and items, not on impressions. `exposure` draws impressions from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

IMPRESSIONS_PER_USER = 210
IMPRESSIONS_PER_ITEM = 20
"""Number of impressions per item. Both ratios are Ali-CCP's: 0.4 M users and 4.3 M items for 84 M
impressions."""
VISITS_PER_HALF = 2.0
"""Mean of the geometric number of visits of a user in a split, for users who visit at all. With the
share of absent users it leads to 58 impressions per visit, as per common row of Ali-CCP."""
ABSENT_FROM_A_HALF = 0.1
MAX_ITEMS = 1_600_000
"""Width of the range of item ids in Ali-CCP."""

EVENTS_AT_FULL_LENGTH = 380.0
"""Number of past events of a visit at which histories are about as long as in Ali-CCP."""
HISTORY_DRIFT = 0.3
"""Share of a history that is new at the user's next visit."""

NUM_AGES = 7
NUM_GROUPS = 2 * NUM_AGES
NUM_SEGMENTS = 7 * NUM_GROUPS
HABITS = {"126": 3, "127": 3, "128": 2, "129": 4}
"""Profile field for which a segment prefers a value without fixing it → number of its values."""
PROFILE_VALUES = {"121": NUM_SEGMENTS, "122": NUM_GROUPS, "124": 2, "125": NUM_AGES} | HABITS
"""Profile field → number of its values."""

BRAND_KNOWN = 0.711
"""Share of items that have a brand, as in Ali-CCP."""
NODES_PER_CATEGORY = 8
OTHER_NODES_PER_ITEM = 7.5
"""Mean number of draws of an item's intention nodes after the first; repeated nodes count once."""

LATENT_DIM = 4
"""Number of components of a latent per taste; there are two tastes."""
ITEM_PARTS = {"category": 0.35, "shop": 0.15, "brand": 0.15, "nodes": 0.15, "own": 0.20}
USER_PARTS = {"group": 0.3, "segment": 0.3, "own": 0.4}
"""Part → share of the variance of a user's latents; ITEM_PARTS are those of an item."""


class Ragged(NamedTuple):
    """Concatenated lists of different lengths."""

    offsets: Ints
    """(lists + 1,): list i is values[offsets[i]:offsets[i + 1]]."""
    values: Ints

    @property
    def lengths(self) -> Ints:
        """(lists,) length of each list."""
        return np.diff(self.offsets)

    def take(self, lists: Ints) -> tuple[Ints, Ints]:
        """Returns the lengths and the concatenated values of the given lists."""
        starts = self.offsets[lists]
        lengths = self.offsets[lists + 1] - starts
        return lengths, self.values[aranges(starts, lengths)]


def aranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenates the ranges starts[i], starts[i] + 1, …, each with lengths[i] numbers."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def zipf_rank(uniform: Floats, sizes: Ints) -> Ints:
    """Maps uniform numbers to ranks 0 to sizes - 1, with probabilities near ∝ 1 / (rank + 1)."""
    ranks = np.exp(uniform * np.log(sizes + 1.0)).astype(np.int64) - 1
    return np.minimum(ranks, sizes - 1)


class Streams:
    """Named streams of random numbers. Any range of a stream can be drawn separately; the numbers
    do not depend on how a stream is divided."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generator(self, name: str, start: int = 0) -> np.random.Generator:
        """Returns a generator of the stream `name`, starting at number `start`."""
        bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=tuple(name.encode())))
        return np.random.Generator(bits.advance(start))

    def uniform(self, name: str, start: int, count: int) -> Floats:
        """Returns (count,) numbers of a stream from `start` on, float64 in [0, 1)."""
        return self.generator(name, start).random(count)

    def normal(self, name: str, start: int, count: int, *, width: int) -> Floats:
        """Returns (count, width) standard normals, rows from `start` on, float32; `width` is even.

        Uses the Box-Muller transform, because NumPy's normals consume a variable number of draws.
        """
        pairs = self.generator(name, start * width).random((count, width // 2, 2))
        radius = np.sqrt(-2.0 * np.log1p(-pairs[..., 0]))
        angle = 2.0 * np.pi * pairs[..., 1]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return both.astype(np.float32)


@dataclass(frozen=True)
class Catalogue:
    """The items of a world and the segments of its users, all numbered from 0."""

    num_items: int
    num_categories: int
    num_shops: int
    num_brands: int
    num_nodes: int
    category: Ints
    """(items,) category of each item."""
    shop: Ints
    """(items,) shop of each item."""
    brand: Ints
    """(items,) brand of each item; -1 if it has none."""
    nodes: Ragged
    """Distinct intention nodes of each item, at least one."""
    by_category: Ragged
    """Items of each category, popular ones first; at least one."""
    by_shop: Ragged
    """Items of each shop, popular ones first."""
    category_popularity: Floats
    """(categories,) share of each category apart from any taste."""
    category_latents: Floats
    """(categories, 2 * LATENT_DIM) latents of each category, with unit variance."""
    latents: Floats
    """(items, 2 * LATENT_DIM) latents of each item, with unit variance: first those of clicks, then
    those of conversions only."""
    appeal: Floats
    """(items, 2) appeal of each item to all users, in the same order, with unit variance."""
    segment_latents: Floats
    """(segments, 2 * LATENT_DIM + 2) segment's part of a user's latents and inclination."""
    segment_habits: Mapping[str, Ints]
    """Profile field → (segments,) preferred value of each segment."""

    @classmethod
    def draw(cls, impressions: int, seed: int) -> Catalogue:
        """Draws a catalogue whose size matches a number of impressions."""
        rng = Streams(seed).generator("catalogue")
        num_items = min(max(impressions // IMPRESSIONS_PER_ITEM, 200), MAX_ITEMS)
        num_categories = int(num_items**0.6)
        num_shops, num_brands = num_items // 6, num_items // 12
        num_nodes = NODES_PER_CATEGORY * num_categories

        popularity = 1.0 / (np.arange(num_categories) + 3.0)
        popularity /= popularity.sum()
        shop = (num_shops * rng.random(num_items) ** 2).astype(np.int64)
        category = rng.choice(num_categories, num_shops, p=popularity)[shop]
        strays = rng.random(num_items) < 0.15
        category[strays] = rng.choice(num_categories, strays.sum(), p=popularity)
        # Every category has at least one item.
        category[:num_categories] = np.arange(num_categories)
        brand = _draw_brands(rng, category, shop, num_categories, num_brands)
        nodes = _draw_nodes(rng, category, num_categories)

        width = 2 * LATENT_DIM + 2

        def latents(count: int) -> Floats:
            return rng.standard_normal((count, width), dtype=np.float32)

        of_category, of_node = latents(num_categories), latents(num_nodes)
        item_parts = {
            "category": of_category[category],
            "shop": latents(num_shops)[shop],
            "brand": np.where((brand >= 0)[:, None], latents(num_brands)[brand], 0.0),
            "nodes": np.add.reduceat(of_node[nodes.values], nodes.offsets[:-1])
            / np.sqrt(nodes.lengths)[:, None],
            "own": latents(num_items),
        }
        of_item = sum(math.sqrt(ITEM_PARTS[part]) * item_parts[part] for part in ITEM_PARTS)
        of_item = np.asarray(of_item, dtype=np.float32)
        of_segment = math.sqrt(USER_PARTS["group"]) * np.repeat(
            latents(NUM_GROUPS), NUM_SEGMENTS // NUM_GROUPS, axis=0
        ) + math.sqrt(USER_PARTS["segment"]) * latents(NUM_SEGMENTS)
        return cls(
            num_items=num_items,
            num_categories=num_categories,
            num_shops=num_shops,
            num_brands=num_brands,
            num_nodes=num_nodes,
            category=category,
            shop=shop,
            brand=brand,
            nodes=nodes,
            by_category=_members(category, num_categories),
            by_shop=_members(shop, num_shops),
            category_popularity=popularity,
            category_latents=of_category[:, : 2 * LATENT_DIM].copy(),
            latents=of_item[:, : 2 * LATENT_DIM].copy(),
            appeal=of_item[:, 2 * LATENT_DIM :].copy(),
            segment_latents=np.asarray(of_segment, dtype=np.float32),
            segment_habits={
                field: rng.integers(count, size=NUM_SEGMENTS) for field, count in HABITS.items()
            },
        )


def _draw_brands(
    rng: np.random.Generator, category: Ints, shop: Ints, num_categories: int, num_brands: int
) -> Ints:
    """Draws a brand of the item's category for each item, often the main brand of its shop."""
    share = np.bincount(category, minlength=num_categories) / len(category)
    first = (np.cumsum(share) - share) * num_brands
    of_shop = rng.random(int(shop.max()) + 1)[shop]
    of_item = rng.random(len(category))
    line = np.where(rng.random(len(category)) < 0.6, of_shop, of_item) ** 2
    # Categories have brands in proportion to their items; neighbours share brands at the edge.
    brand = (first[category] + line * share[category] * num_brands).astype(np.int64)
    brand = np.minimum(brand, num_brands - 1)
    return np.where(rng.random(len(category)) < BRAND_KNOWN, brand, -1)


def _draw_nodes(rng: np.random.Generator, category: Ints, num_categories: int) -> Ragged:
    """Draws distinct intention nodes for each item from a range of nodes near its category's."""
    num_nodes = NODES_PER_CATEGORY * num_categories
    item = np.repeat(np.arange(len(category)), 1 + rng.poisson(OTHER_NODES_PER_ITEM, len(category)))
    # Ranges of neighbouring categories overlap; the first nodes of a range are the most frequent.
    near = (2 * NODES_PER_CATEGORY * rng.random(len(item)) ** 2).astype(np.int64)
    node = (category[item] * NODES_PER_CATEGORY + near) % num_nodes
    keys = np.unique(item * num_nodes + node)
    counts = np.bincount(keys // num_nodes, minlength=len(category))
    return Ragged(np.concatenate([[0], np.cumsum(counts)]), keys % num_nodes)


def _members(group: Ints, num_groups: int) -> Ragged:
    counts = np.bincount(group, minlength=num_groups)
    return Ragged(np.concatenate([[0], np.cumsum(counts)]), np.argsort(group, kind="stable"))


@dataclass(frozen=True)
class Visits:
    """Visits of users, with the number of their impressions and the length of their histories.

    A common row describes a visit. Within a split, visits are in the order of users.
    """

    num_users: int
    user: Mapping[Split, Ints]
    """(visits,) user of each visit, ascending."""
    ordinal: Mapping[Split, Ints]
    """(visits,) number of earlier visits of the user, in both splits."""
    offsets: Mapping[Split, Ints]
    """(visits + 1,) first impression of each visit within the split."""
    events: Ints
    """(users,) number of past events at each visit."""
    event_offsets: Ints
    """(users + 1,) first event of each user in the stream of all events."""

    @classmethod
    def draw(
        cls, split_impressions: Mapping[Split, int], *, history_scale: float, seed: int
    ) -> Visits:
        """Draws visits with exactly the given number of impressions in each split."""
        rng = Streams(seed).generator("visits")
        num_users = max(round(sum(split_impressions.values()) / IMPRESSIONS_PER_USER), 4)
        counts = {
            split: rng.geometric(1 / VISITS_PER_HALF, num_users)
            * (rng.random(num_users) >= ABSENT_FROM_A_HALF)
            for split in SPLITS
        }
        counts["test"] += (counts["train"] + counts["test"]) == 0
        # Each split has a visit, however few users there are.
        for split in SPLITS:
            counts[split][0] = max(counts[split][0], 1)
        before = np.zeros(num_users, dtype=np.int64)
        user: dict[Split, Ints] = {}
        ordinal: dict[Split, Ints] = {}
        offsets: dict[Split, Ints] = {}
        for split, total in split_impressions.items():
            sizes = rng.gamma(2.0, size=counts[split].sum())
            ends = np.rint(np.cumsum(sizes) * (total / sizes.sum())).astype(np.int64)
            kept = np.diff(ends, prepend=0) > 0
            user[split] = np.repeat(np.arange(num_users), counts[split])[kept]
            ordinal[split] = aranges(before, counts[split])[kept]
            offsets[split] = np.concatenate([[0], ends[kept]])
            before = before + counts[split]
        lengths = history_scale * EVENTS_AT_FULL_LENGTH * rng.lognormal(-0.125, 0.5, num_users)
        events = np.maximum(np.rint(lengths), 1).astype(np.int64)
        drawn = np.ceil(events * (1 + HISTORY_DRIFT * np.maximum(before - 1, 0))).astype(np.int64)
        event_offsets = np.concatenate([[0], np.cumsum(drawn)])
        return cls(num_users, user, ordinal, offsets, events, event_offsets)

    def place(self, split: Split, visit: int) -> int:
        """Returns the number of a split's visit among those of both splits."""
        return visit + (0 if split == "train" else len(self.user["train"]))

    def impression_place(self, split: Split, impression: int) -> int:
        """Returns the number of a split's impression among those of both splits."""
        return impression + (0 if split == "train" else int(self.offsets["train"][-1]))
