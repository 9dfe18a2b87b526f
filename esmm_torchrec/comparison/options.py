"""What a comparison of methods is asked for, and the fixed part of its rules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from esmm_torchrec.choices import check_choices
from esmm_torchrec.comparison.data import HeldOutBy
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.methods import (
    AFTER_METHODS,
    ARCHITECTURES,
    CLICK_METHOD,
    METHODS,
    PAPER_METHODS,
)
from esmm_torchrec.sharding.planner import ShardingOption, SparseOptimizerOption
from esmm_torchrec.sharding.process_group import DeviceOption
from esmm_torchrec.training.options import TrainOptions


@dataclass(frozen=True)
class Setting:
    """One of the settings that tuning chooses among."""

    sparse_lr: float
    dense_lr: float
    weight_decay: float
    """Of the towers."""


SETTINGS = (
    Setting(0.02, 0.001, 0.0),
    Setting(0.05, 0.002, 0.0),
    Setting(0.1, 0.002, 1e-4),
    Setting(0.02, 0.001, 3e-4),
    Setting(0.01, 0.002, 0.0),
    Setting(0.05, 0.0005, 1e-5),
    Setting(0.1, 0.001, 0.0),
    Setting(0.02, 0.002, 1e-3),
)
"""The same for every method, tried in this order; spread over what trains at all. A method with a
rate of its own goes through its rates in the same trials, and gets no more of them: trial n of S
settings and R rates takes rate n + ⌊R/2⌋·⌊n/R⌋ (modulo R), so that a rate meets other settings in
each round."""

CLICK_NETWORK = CLICK_METHOD
COMPARED: tuple[str, ...] = tuple(name for name in METHODS if name != CLICK_NETWORK)

GROUPS: dict[str, tuple[str, ...]] = {
    "paper": PAPER_METHODS,
    "after": ("base", "esmm", "shared-bottom", *AFTER_METHODS),
    "all": COMPARED,
}
"""What "--methods" names several methods by."""


class Trial(NamedTuple):
    """What a training of a method is tried with."""

    setting: Setting
    rate: float | None


@dataclass(frozen=True)
class ComparisonOptions:
    """How methods are compared.

    Raises:
        OptionError: a value is out of its range, or a method is unknown.
    """

    methods: tuple[str, ...] = ("paper",)
    """What is compared, by the names of 'train --method' and of groups of them. paper: the paper's
    seven, UNBIAS with weights, and shared-bottom; after: what came after, beside base, esmm and
    shared-bottom; all: all."""
    architecture: str | None = None
    """The architecture of every method, by the names of 'train --architecture', instead of its
    own."""
    seeds: int = 5
    """Runs of each method. With generated data each has a world of its own (data, split and
    initial weights); with --data, initial weights and order of its own."""
    fractions: tuple[float, ...] = (1.0,)
    """Parts of the training users to train on; each part lies within the larger ones."""
    trials: int = len(SETTINGS)
    """Settings tried for each method in tuning, the same number for all."""
    epochs: int = 3
    """Tuning chooses among 1 to this many passes of a method over its own training rows."""
    held_out_by: HeldOutBy = "auto"
    """What stays together when training users of a prepared data set are held out or a fraction of
    them is drawn: impressions of a group_id, of a shared row, or each impression by itself; auto:
    of a shared row if there are any. The group_id decides metrics alone otherwise."""
    validation_share: float = 0.2
    """Part of the training users to tune on; chosen methods are retrained on all."""
    test_impressions: int = 1_500_000
    """Test impressions scored, at most about; users are drawn from the test half by hash."""
    embedding_dim: int = 8
    """Columns of every embedding table; a multiple of 4."""
    tower: tuple[int, ...] = (64, 32)
    """Widths of the hidden layers of each tower."""
    batch_size: int = 2048
    """Impressions of a step, over all ranks, of a pass over the whole training half. Every pass, of
    any method and fraction, takes as many updates as that one: fewer rows make smaller batches."""
    sparse_optimizer: SparseOptimizerOption = "rowwise_adagrad"
    """Optimiser of the embedding tables (the paper: adam); towers have Adam as in the paper."""
    sharding: ShardingOption = "auto"
    """How tables are placed on ranks."""
    device: DeviceOption = "auto"
    """auto: CUDA where there is a GPU for each rank."""

    def __post_init__(self) -> None:
        check_choices(self)
        self.chosen_methods  # noqa: B018
        for option, value in (
            ("`seeds`", self.seeds),
            ("`epochs`", self.epochs),
            ("`test_impressions`", self.test_impressions),
        ):
            if value < 1:
                raise OptionError(f"{option} {value} is not positive; give at least 1")
        if not 1 <= self.trials <= len(SETTINGS):
            raise OptionError(f"`trials` {self.trials} is not from 1 to {len(SETTINGS)}")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise OptionError(
                    f"`fractions` {fraction:g} is not a fraction; give numbers above 0 up to 1"
                )
        if not self.fractions:
            raise OptionError("`fractions` needs at least one number above 0 up to 1")
        if not 0 < self.validation_share < 1:
            raise OptionError(
                f"`validation_share` {self.validation_share:g} is not between 0 and 1; give a share"
            )
        self.train(CLICK_NETWORK, Trial(SETTINGS[0], None), seed=0)

    @property
    def chosen_methods(self) -> tuple[str, ...]:
        """What is compared, in the order of the paper's table."""
        chosen: set[str] = set()
        for name in self.methods:
            if name not in (*GROUPS, *COMPARED):
                raise OptionError(
                    f"`methods` {name} is not a method to compare; choose from "
                    f"{', '.join((*GROUPS, *COMPARED))}"
                )
            chosen |= set(GROUPS.get(name, (name,)))
        if not chosen:
            raise OptionError(f"`methods` needs a name: {', '.join((*GROUPS, *COMPARED))}")
        return tuple(name for name in COMPARED if name in chosen)

    @property
    def ascending_fractions(self) -> tuple[float, ...]:
        """Each fraction once; the table shows the last."""
        return tuple(sorted(set(self.fractions)))

    def trials_of(self, method: str) -> list[Trial]:
        """What tuning tries."""
        rates = METHODS[method].tune.get("rows.rate", (None,))
        return [
            Trial(setting, rates[(place + len(rates) // 2 * (place // len(rates))) % len(rates)])
            for place, setting in enumerate(SETTINGS[: self.trials])
        ]

    def train(self, method: str, trial: Trial, *, seed: int, epochs: int = 1) -> TrainOptions:
        """Options of one training."""
        shared = {field.name for field in fields(self)} & {
            field.name for field in fields(TrainOptions)
        }
        common: dict[str, Any] = {name: getattr(self, name) for name in shared}
        common["architecture"] = None
        if self.architecture is not None and method != CLICK_NETWORK:
            common["architecture"] = ARCHITECTURES[self.architecture]()
        own: dict[str, Any] = {"method": method, "seed": seed, "epochs": epochs}
        if trial.rate is not None:
            own["rows"] = replace(METHODS[method].rows, **{"rate": trial.rate})
        # A method with few rows has few of each user, which would then all be in one batch.
        own["shuffle_chunk"] = 1
        return TrainOptions(**common | own | asdict(trial.setting))
