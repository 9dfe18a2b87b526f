"""What a synthetic world is made of before anybody sees anything: items, segments, visits.

All of it grows with users and items, none with impressions. `exposure` draws impressions from it.
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
"""As in Ali-CCP: 0.4 M users and 4.3 M items for 84 M impressions."""
VISITS_PER_HALF = 2.0
"""Mean visits of a user who comes at all in a half, geometric; with the share of users who do not
it makes 58 impressions per visit, those of an Ali-CCP common row."""
ABSENT_FROM_A_HALF = 0.1
MAX_ITEMS = 1_600_000
"""Width of the range of ids that Ali-CCP gives to items."""

EVENTS_AT_FULL_LENGTH = 380.0
"""Past events of a visit whose histories are about as long as Ali-CCP's."""
HISTORY_DRIFT = 0.3
"""Share of a history that is new at the user's next visit."""

NUM_AGES = 7
NUM_GROUPS = 2 * NUM_AGES
NUM_SEGMENTS = 7 * NUM_GROUPS
HABITS = {"126": 3, "127": 3, "128": 2, "129": 4}
"""Profile field that a segment prefers a value of, without fixing it → number of its values."""
PROFILE_VALUES = {"121": NUM_SEGMENTS, "122": NUM_GROUPS, "124": 2, "125": NUM_AGES} | HABITS
"""Profile field → number of its values."""

BRAND_KNOWN = 0.711
"""Share of items that have a brand, as in Ali-CCP."""
NODES_PER_CATEGORY = 8
OTHER_NODES_PER_ITEM = 7.5
"""Mean draws of an item's intention nodes besides the first; repeated ones count once."""

LATENT_DIM = 4
"""Components of a latent for each of the two tastes."""
ITEM_PARTS = {"category": 0.35, "shop": 0.15, "brand": 0.15, "nodes": 0.15, "own": 0.20}
USER_PARTS = {"group": 0.3, "segment": 0.3, "own": 0.4}
"""Shares of the variance of the latents of an item and of a user."""


class Ragged(NamedTuple):
    """Lists of different lengths, end to end."""

    offsets: Ints
    """(lists + 1,) list i is values[offsets[i]:offsets[i + 1]]."""
    values: Ints

    @property
    def lengths(self) -> Ints:
        """(lists,)"""
        return np.diff(self.offsets)

    def take(self, lists: Ints) -> tuple[Ints, Ints]:
        """Lengths and, end to end, values of the given lists."""
        starts = self.offsets[lists]
        lengths = self.offsets[lists + 1] - starts
        return lengths, self.values[aranges(starts, lengths)]


def aranges(starts: Ints, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1, … lengths[0] of them, then those of starts[1], …"""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def zipf_rank(uniform: Floats, sizes: Ints) -> Ints:
    """Ranks 0 to sizes - 1, the r-th with a probability near 1 / (r + 1), from uniform numbers."""
    ranks = np.exp(uniform * np.log(sizes + 1.0)).astype(np.int64) - 1
    return np.minimum(ranks, sizes - 1)


class Streams:
    """Random numbers by name and place: any stretch of a stream, the same however it is cut."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def generator(self, name: str, start: int = 0) -> np.random.Generator:
        """The stream `name` from number `start` on."""
        bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=tuple(name.encode())))
        return np.random.Generator(bits.advance(start))

    def uniform(self, name: str, start: int, count: int) -> Floats:
        """(count,) numbers `start` to `start + count`, float64 in [0, 1)."""
        return self.generator(name, start).random(count)

    def normal(self, name: str, start: int, count: int, *, width: int) -> Floats:
        """(count, width) rows `start` to `start + count`, float32; `width` is even.

        Box and Muller's, because NumPy's own normals take an unforeseeable count of numbers.
        """
        pairs = self.generator(name, start * width).random((count, width // 2, 2))
        radius = np.sqrt(-2.0 * np.log1p(-pairs[..., 0]))
        angle = 2.0 * np.pi * pairs[..., 1]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return both.astype(np.float32)


@dataclass(frozen=True)
class Catalogue:
    """The items of a world and the segments of its users. All are numbers from 0."""

    num_items: int
    num_categories: int
    num_shops: int
    num_brands: int
    num_nodes: int
    category: Ints
    """(items,)"""
    shop: Ints
    """(items,)"""
    brand: Ints
    """(items,) -1 where the item has none."""
    nodes: Ragged
    """Intention nodes of each item: distinct, at least one."""
    by_category: Ragged
    """Items of each category, popular ones first, at least one."""
    by_shop: Ragged
    """Items of each shop, popular ones first."""
    category_popularity: Floats
    """(categories,) share of a category if no taste is at work."""
    category_latents: Floats
    """(categories, 2 * LATENT_DIM): the category's own part, unit variance."""
    latents: Floats
    """(items, 2 * LATENT_DIM): clicking first, then what concerns conversions alone; unit
    variance."""
    appeal: Floats
    """(items, 2) what every user finds in the item, in the same order; unit variance."""
    segment_latents: Floats
    """(segments, 2 * LATENT_DIM + 2): a user's latents and inclination, apart from their own."""
    segment_habits: Mapping[str, Ints]
    """Profile field → (segments,) the value that a segment prefers."""

    @classmethod
    def draw(cls, impressions: int, seed: int) -> Catalogue:
        """A catalogue of the size that suits a number of impressions."""
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
        # Every category has an item to show.
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
    """A brand of the item's category for each item, often the one its shop sells most."""
    share = np.bincount(category, minlength=num_categories) / len(category)
    first = (np.cumsum(share) - share) * num_brands
    of_shop = rng.random(int(shop.max()) + 1)[shop]
    of_item = rng.random(len(category))
    line = np.where(rng.random(len(category)) < 0.6, of_shop, of_item) ** 2
    # A category has brands in proportion to its items, neighbours sharing those at the edge.
    brand = (first[category] + line * share[category] * num_brands).astype(np.int64)
    brand = np.minimum(brand, num_brands - 1)
    return np.where(rng.random(len(category)) < BRAND_KNOWN, brand, -1)


def _draw_nodes(rng: np.random.Generator, category: Ints, num_categories: int) -> Ragged:
    """Distinct intention nodes for each item, from a stretch of nodes around its category's."""
    num_nodes = NODES_PER_CATEGORY * num_categories
    item = np.repeat(np.arange(len(category)), 1 + rng.poisson(OTHER_NODES_PER_ITEM, len(category)))
    # Stretches of neighbouring categories overlap; the first nodes of one are the common ones.
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
    """Who comes when, how many impressions a visit has and how long the histories are.

    A visit is what one common row describes. Within a split visits are in the order of users.
    """

    num_users: int
    user: Mapping[Split, Ints]
    """(visits,) ascending."""
    ordinal: Mapping[Split, Ints]
    """(visits,) how many visits of the user came before, in both halves."""
    offsets: Mapping[Split, Ints]
    """(visits + 1,) first impression of each visit within the split."""
    events: Ints
    """(users,) past events at any visit."""
    event_offsets: Ints
    """(users + 1,) first event of each user in the stream of all events."""

    @classmethod
    def draw(
        cls, split_impressions: Mapping[Split, int], *, history_scale: float, seed: int
    ) -> Visits:
        """Visits that have exactly the impressions asked for in each half."""
        rng = Streams(seed).generator("visits")
        num_users = max(round(sum(split_impressions.values()) / IMPRESSIONS_PER_USER), 4)
        counts = {
            split: rng.geometric(1 / VISITS_PER_HALF, num_users)
            * (rng.random(num_users) >= ABSENT_FROM_A_HALF)
            for split in SPLITS
        }
        counts["test"] += (counts["train"] + counts["test"]) == 0
        # However few users there are, each half has a visit.
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
        """Number over both halves of a visit of a split."""
        return visit + (0 if split == "train" else len(self.user["train"]))

    def impression_place(self, split: Split, impression: int) -> int:
        """Number over both halves of an impression of a split."""
        return impression + (0 if split == "train" else int(self.offsets["train"][-1]))
