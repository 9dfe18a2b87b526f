"""Data of a comparison: one prepared data set, or a new generated world for each seed.

A world is drawn when the first training needs it and removed when its trainings are done, so that
disk and memory hold only one or two at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from esmm_torchrec.comparison.worlds import DrawnWorld, World, draw_mapped
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.subsets import sample_rows, user_column
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import GROUP_ID, SAMPLE_ID, SHARED_ROW, WEIGHT, Schema
from esmm_torchrec.sharding.process_group import Ranks

Regime = Literal["paper", "public", "dense"]

REGIMES: Mapping[Regime, World] = {
    # 2 650 training conversions are expected; no world should have fewer than 2 500.
    "paper": World(impressions=6_800_000, ctr=0.039, cvr=0.02),
    # 2 150 training conversions are expected; no world should have fewer than 2 000.
    "public": World(impressions=20_000_000, ctr=0.039, cvr=0.0055),
    "dense": World(impressions=720_000, ctr=0.09, cvr=0.18),
}
"""Worlds of a comparison by name; other settings are the defaults of `World` (correlation .6).

The order of the methods depends on the rates. The paper's logs have 3.9 clicks per 100 impressions
and one conversion per 180 clicks, so a method that trains on clicks alone trains its embeddings on
one impression in 26, and ESMM on all of them. "public" has the rates of the paper's Public data
set. "paper" has the same CTR, and a CVR with which a quarter of the impressions yields as many
conversions. "dense" has 62 impressions per conversion instead of 1 280: it removes the sparsity
that ESMM addresses, and is included to show the effect. The numbers were fixed before any result
was seen.
"""

DEFAULT_WORLD = REGIMES["paper"]

TUNING_WORLD = 1_000_000
"""Offset of the seed of the tuning world, so that no method is compared on that world."""

WORLD_MIN_COUNT = 5

HeldOutBy = Literal["auto", "group", "shared-row", "impression"]


@dataclass(frozen=True)
class ComparisonData:
    """An open data set."""

    train: MappedSplit
    """Training split; its group_id, if any, is the user when users are held out or drawn."""
    test: MappedSplit
    test_rows: np.ndarray | None
    """int (M,), test impressions to score; None: all."""
    min_count: int
    """Minimum count of an id in the vocabularies."""

    @property
    def test_users(self) -> np.ndarray:
        """int (M,), user of each scored test impression."""
        users = self.test.scalars[user_column(self.test)]
        return users if self.test_rows is None else users[self.test_rows]

    @property
    def test_weights(self) -> np.ndarray | None:
        """float32 (M,), weight of each scored test impression; None: all 1."""
        weights = self.test.scalars.get(WEIGHT)
        return weights if weights is None or self.test_rows is None else weights[self.test_rows]


class Source:
    """A data set with its identity, opened on first use."""

    def __init__(
        self,
        identity: Mapping[str, Any],
        *,
        open_data: Callable[[], ComparisonData],
        impressions: int,
        drawn: Path | None = None,
        draw: Callable[[], object] = lambda: None,
        remove: Callable[[], object] = lambda: None,
    ) -> None:
        self.identity = identity
        """Identity of the data set, by which stored trainings are found."""
        self.impressions = impressions
        """Number of impressions in the training split."""
        self.drawn = drawn
        """File that exists once the data set can be opened; None: it always can."""
        self.draw = draw
        """Function that writes `drawn`; called on every rank of one process group."""
        self._open_data = open_data
        self._remove = remove

    @cached_property
    def data(self) -> ComparisonData:
        """The data set, opened on first use.

        Raises:
            DataError: it cannot be read, or its test split has no clicks or no conversions.
        """
        data = self._open_data()
        first, *_, last = data.test.schema.tasks
        for task in (first, last):
            if not data.test.scalars[task.label].any():
                raise DataError(
                    f"the test split has no {task.name} to compare methods on; "
                    "prepare the data set with later data"
                )
        return data

    def close(self) -> None:
        """Releases the data set, and removes it if it was generated."""
        self.__dict__.pop("data", None)
        self._remove()


def prepared_source(path: Path, *, held_out_by: HeldOutBy, test_impressions: int) -> Source:
    """Returns a prepared data set as the source for all seeds."""
    dataset = PreparedDataSet.open(path)

    def open_data() -> ComparisonData:
        test = MappedSplit.open(dataset, "test")
        return ComparisonData(
            with_users(MappedSplit.open(dataset, "train"), held_out_by),
            test,
            sample_rows(test, test_impressions),
            dataset.min_count,
        )

    return Source(
        {"data": dataset.fingerprint, "held_out_by": held_out_by},
        open_data=open_data,
        impressions=dataset.splits["train"].impressions,
    )


def with_users(train: MappedSplit, held_out_by: HeldOutBy) -> MappedSplit:
    """Returns the training split with the users to hold out or to draw as its group_id.

    The data set's own group_id is for metrics alone: "auto" is the shared row, or each impression
    separately if no feature is shared.

    Raises:
        OptionError: the data set lacks the column that `held_out_by` needs.
    """
    if held_out_by == "auto":
        held_out_by = "shared-row" if SHARED_ROW in train.scalars else "impression"
    column = {"group": GROUP_ID, "shared-row": SHARED_ROW, "impression": SAMPLE_ID}[held_out_by]
    if column not in train.scalars:
        raise OptionError(
            f"`held_out_by` {held_out_by}: the data set has no column {column}; choose another"
        )
    users = train.scalars[column].astype(np.int64)
    return replace(train, scalars=dict(train.scalars) | {GROUP_ID: users})


def world_source(world: World, folder: Path, ranks: Ranks, *, test_impressions: int) -> Source:
    """Returns a source whose world is drawn below `folder` and removed when it is closed."""
    identity = {"world": asdict(world), "min_count": WORLD_MIN_COUNT}
    name = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    drawn_in = folder / f"world-{world.seed}-{name}"
    schema_file = folder / f"{drawn_in.name}.json"

    def draw() -> None:
        def make() -> None:
            shutil.rmtree(drawn_in, ignore_errors=True)
            drawn = draw_mapped(world, drawn_in, min_count=WORLD_MIN_COUNT)
            partial = schema_file.with_suffix(".partial")
            partial.write_text(json.dumps(drawn.schema.to_dict()))
            partial.rename(schema_file)

        ranks.from_first(make)

    def open_data() -> ComparisonData:
        schema = Schema.from_dict(json.loads(schema_file.read_text()))
        drawn = DrawnWorld(drawn_in, schema)
        train, test = drawn.open("train"), drawn.open("test")
        return ComparisonData(
            replace(train, mean_values_per_bag=_mean_lengths(train)),
            test,
            sample_rows(test, test_impressions),
            WORLD_MIN_COUNT,
        )

    def remove() -> None:
        ranks.barrier()
        if ranks.is_first:
            schema_file.unlink(missing_ok=True)
            shutil.rmtree(drawn_in, ignore_errors=True)

    return Source(
        identity,
        open_data=open_data,
        impressions=world.split_impressions["train"],
        drawn=schema_file,
        draw=draw,
        remove=remove,
    )


def _mean_lengths(split: MappedSplit) -> dict[str, float]:
    """Returns the mean number of ids per stored row of each feature, missing values included."""
    return {
        name: float(mean)
        for stores in split.bags.values()
        for store in stores
        for name, mean in zip(store.features, store.lengths.mean(axis=0), strict=True)
    }


def tuning_world(world: World) -> World:
    """Returns the world that methods are tuned on."""
    return replace(world, seed=world.seed + TUNING_WORLD)


def world_of_seed(world: World, seed: int) -> World:
    """Returns the world of one run."""
    return replace(world, seed=world.seed + seed)
