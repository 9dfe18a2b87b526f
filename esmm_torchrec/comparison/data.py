"""The data of a comparison: one prepared data set, or a new generated world for each seed.

A world is generated when the first training needs it and removed when its trainings are done, so
that disk and memory hold one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from esmm_torchrec.comparison.worlds import World, generate
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.ali_ccp import prepare_ali_ccp
from esmm_torchrec.data.subsets import sample_rows, user_column
from esmm_torchrec.errors import DataError
from esmm_torchrec.sharding.process_group import Ranks

DEFAULT_WORLD = World(impressions=720_000, ctr=0.09, cvr=0.18)
"""360 000 training impressions, about 31 000 clicks and 5 400 conversions; everything else as
`World` has it. docs/methods.md tells when it was fixed."""

TUNING_WORLD = 1_000_000
"""Added to the seed of the world that is tuned on, which is none of those compared on."""

WORLD_MIN_COUNT = 5


@dataclass(frozen=True)
class ComparisonData:
    """A data set that is open."""

    dataset: PreparedDataSet
    train: MappedSplit
    test: MappedSplit
    test_rows: np.ndarray | None
    """int (M,), test impressions to score; None: all."""

    @property
    def user_column(self) -> str:
        """The column that says whose an impression is."""
        return user_column(self.train)


class Source:
    """A data set by what identifies it, opened when it is first asked for."""

    def __init__(
        self,
        identity: Mapping[str, Any],
        *,
        open_dataset: Callable[[], PreparedDataSet],
        test_impressions: int,
        remove: Callable[[], object] = lambda: None,
    ) -> None:
        self.identity = identity
        """What trainings on it are remembered by."""
        self._open_dataset = open_dataset
        self._test_impressions = test_impressions
        self._remove = remove

    @cached_property
    def data(self) -> ComparisonData:
        """The data set.

        Raises:
            DataError: it cannot be read, or its test half has nothing to measure.
        """
        dataset = self._open_dataset()
        for what in ("clicks", "conversions"):
            if not getattr(dataset.splits["test"], what):
                raise DataError(
                    f"the test split of {dataset.path} holds no {what}; methods are compared on "
                    "them, so prepare it with later data"
                )
        test = MappedSplit.open(dataset, "test")
        return ComparisonData(
            dataset,
            MappedSplit.open(dataset, "train"),
            test,
            sample_rows(test, self._test_impressions),
        )

    def close(self) -> None:
        """Lets go of the data set, and removes it where it was generated."""
        self.__dict__.pop("data", None)
        self._remove()


def prepared_source(path: Path, *, test_impressions: int) -> Source:
    """One data set for all seeds."""
    dataset = PreparedDataSet.open(path)
    return Source(
        {"data": dataset.fingerprint},
        open_dataset=lambda: dataset,
        test_impressions=test_impressions,
    )


def world_source(world: World, folder: Path, ranks: Ranks, *, test_impressions: int) -> Source:
    """A world that is generated in `folder` and removed when it is closed."""
    prepared = folder / f"world-{world.seed}"

    def open_dataset() -> PreparedDataSet:
        def make() -> None:
            raw = prepared.with_name(f"{prepared.name}-raw")
            for stale in (raw, prepared):
                shutil.rmtree(stale, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            generate(world, raw)
            prepare_ali_ccp(raw, prepared, min_count=WORLD_MIN_COUNT)
            shutil.rmtree(raw)

        ranks.from_first(make)
        return PreparedDataSet.open(prepared)

    def remove() -> None:
        ranks.barrier()
        if ranks.is_first:
            shutil.rmtree(prepared, ignore_errors=True)

    return Source(
        {"world": asdict(world), "min_count": WORLD_MIN_COUNT},
        open_dataset=open_dataset,
        test_impressions=test_impressions,
        remove=remove,
    )


def tuning_world(world: World) -> World:
    """The world that methods are tuned on."""
    return replace(world, seed=world.seed + TUNING_WORLD)


def world_of_seed(world: World, seed: int) -> World:
    """The world of one run."""
    return replace(world, seed=world.seed + seed)
