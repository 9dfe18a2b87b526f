"""Values of the fields of Ali-CCP in a world: numbers of the world, and their raw ids, in ranges
like those of the real data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from esmm_torchrec.comparison.worlds.catalogue import PROFILE_VALUES, Catalogue, Ints
from esmm_torchrec.comparison.worlds.exposure import POSITION_SHARES, Counts, Exposure
from esmm_torchrec.comparison.worlds.world import Simulation


class Values(NamedTuple):
    """Values of a field in n rows."""

    numbers: Ints
    """(n,) numbers of the world, -1 if missing; or the concatenated numbers of n lists."""
    times: Ints | None = None
    """Occurrences of each number, 0 if it is missing; None if the field is not weighted."""
    offsets: Ints | None = None
    """(n + 1,): list i is offsets[i]:offsets[i + 1]; None if the field is single-valued."""

    @property
    def lengths(self) -> Ints:
        """(n,) number of values in each row."""
        if self.offsets is None:
            return (self.numbers >= 0).astype(np.int64)
        return np.diff(self.offsets)


def item_values(catalogue: Catalogue, item: Ints) -> dict[str, Values]:
    """Returns the attributes of each item, by field."""
    lengths, nodes = catalogue.nodes.take(item)
    return {
        "205": Values(item),
        "206": Values(catalogue.category[item]),
        "207": Values(catalogue.shop[item]),
        "210": Values(nodes, offsets=np.concatenate([[0], np.cumsum(lengths)])),
        "216": Values(catalogue.brand[item]),
    }


def impression_values(catalogue: Catalogue, exposure: Exposure) -> dict[str, Values]:
    """Returns the values of each impression that do not belong to its item, by field."""

    def cross(of_item: Ints, times: Ints) -> Values:
        return Values(np.where(times > 0, of_item[exposure.item], -1), times)

    return {
        "508": cross(catalogue.category, exposure.category_times),
        "509": cross(catalogue.shop, exposure.shop_times),
        "702": cross(catalogue.brand, exposure.brand_times),
        "853": _lists(exposure.node_hits),
        "301": Values(exposure.position),
    }


def visit_values(exposure: Exposure) -> dict[str, Values]:
    """Returns the values that the impressions of each visit share, by field."""
    return {
        "101": Values(np.where(exposure.user_logged, exposure.user, -1)),
        **{field: Values(numbers) for field, numbers in exposure.profile.items()},
        "109_14": _lists(exposure.categories),
        "110_14": _lists(exposure.shops),
        "127_14": _lists(exposure.brands),
        "150_14": _lists(exposure.nodes),
    }


def _lists(counts: Counts) -> Values:
    return Values(counts.values, counts.times, counts.offsets)


ID_RANGES: Mapping[str, tuple[int, int]] = {
    "101": (1, 449_000),
    "109_14": (449_000, 460_000),
    "110_14": (1_400_000, 1_850_000),
    "121": (3_438_656, 3_438_754),
    "122": (3_438_754, 3_438_768),
    "124": (3_438_768, 3_438_770),
    "125": (3_438_770, 3_438_777),
    "126": (3_438_777, 3_438_780),
    "127": (3_438_780, 3_438_783),
    "127_14": (3_490_000, 3_820_000),
    "128": (3_864_885, 3_864_887),
    "129": (3_864_887, 3_864_891),
    "150_14": (3_870_000, 3_941_000),
    "205": (4_900_000, 6_500_000),
    "206": (8_310_000, 8_321_000),
    "207": (8_330_000, 9_025_000),
    "210": (9_030_000, 9_115_000),
    "216": (9_120_000, 9_351_000),
    "301": (9_351_665, 9_351_668),
    "508": (9_355_000, 9_366_000),
    "509": (9_370_000, 9_700_000),
    "702": (9_710_000, 9_940_000),
    "853": (9_950_000, 10_050_000),
}
"""Field → first id, exclusive end. Ranges are disjoint and near those of the real files."""


def raw_ids(simulation: Simulation) -> dict[str, Ints]:
    """Returns the raw id of each number, (values,), by field. It depends on the seed."""
    catalogue = simulation.catalogue
    num_values = {
        "101": simulation.visits.num_users,
        **dict.fromkeys(("109_14", "206", "508"), catalogue.num_categories),
        **dict.fromkeys(("110_14", "207", "509"), catalogue.num_shops),
        **dict.fromkeys(("127_14", "216", "702"), catalogue.num_brands),
        **dict.fromkeys(("150_14", "210", "853"), catalogue.num_nodes),
        "205": catalogue.num_items,
        "301": len(POSITION_SHARES),
        **PROFILE_VALUES,
    }
    ids = {}
    for field, (low, end) in ID_RANGES.items():
        generator = simulation.streams.generator(f"ids of {field}")
        ids[field] = low + generator.choice(end - low, num_values[field], replace=False)
    return ids
