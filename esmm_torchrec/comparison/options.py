"""Options of a comparison of methods, and the fixed part of its protocol."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from esmm_torchrec.choices import check_choices, check_positive
from esmm_torchrec.comparison.data import HeldOutBy
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.methods import (
    AFTER_METHODS,
    ARCHITECTURES,
    CLICK_METHOD,
    METHODS,
    PAPER_METHODS,
)
from esmm_torchrec.models.rows.everything import AllRows
from esmm_torchrec.sharding.planner import ShardingOption, SparseOptimizerOption
from esmm_torchrec.sharding.process_group import DeviceOption
from esmm_torchrec.training.options import TrainOptions


@dataclass(frozen=True)
class Setting:
    """One of the settings that tuning tries."""

    sparse_lr: float
    """Learning rate of the embedding tables."""
    dense_lr: float
    """Learning rate of the towers."""
    weight_decay: float
    """Weight decay of the towers."""
    min_count: int
    """Minimum count of an id in a method's own training rows; rarer ids become the unknown id."""
    init_scale: float
    """Scale factor of the embeddings' initial range."""

    @property
    def training(self) -> dict[str, Any]:
        """Fields that are options of a training, by name."""
        return {name: value for name, value in asdict(self).items() if name != "min_count"}


SETTINGS = (
    Setting(0.1, 0.001, 0.0, 1, 1.0),
    Setting(0.2, 0.002, 1e-4, 5, 1.0),
    Setting(0.05, 0.002, 0.0, 20, 0.3),
    Setting(0.4, 0.001, 1e-5, 2, 0.3),
    Setting(0.02, 0.004, 1e-5, 2, 1.0),
    Setting(0.1, 0.0005, 1e-4, 5, 3.0),
    Setting(0.2, 0.004, 0.0, 1, 0.1),
    Setting(0.05, 0.001, 1e-4, 50, 3.0),
    Setting(0.4, 0.002, 1e-3, 20, 3.0),
    Setting(0.8, 0.0005, 0.0, 5, 1.0),
    Setting(0.1, 0.008, 1e-4, 2, 3.0),
    Setting(0.01, 0.002, 1e-5, 1, 1.0),
    Setting(0.2, 0.00025, 1e-5, 20, 1.0),
    Setting(0.02, 0.001, 0.0, 5, 10.0),
    Setting(1.6, 0.0005, 1e-5, 5, 1.0),
    Setting(0.8, 0.00025, 1e-4, 10, 0.3),
)
"""Settings of tuning, the same for every method and tried in this order. The first ones are
conventional, for comparisons with few trials; each range is wider than what preliminary worlds
needed. A method with options of its own (`Method.tune`) goes through their values in the same
trials and gets no extra ones."""

FINALISTS = 2
"""Number of trials of a method that go from the first round of tuning to the second."""

FIRST_ROUND_SHARE, FIRST_ROUND_UPDATES = 1 / 8, 1 / 3
"""Share of the users kept for training that the first round trains on, and share of a full pass's
updates that its one pass takes. Both the number of updates and the batch size shrink, neither by
much, so that the best setting is close to the best one of a full pass."""

LAST_ROUND_SHARE = 1 / 3
"""Share of the users kept for training that the second round trains on."""

CLICK_NETWORK = CLICK_METHOD
MIN_UPDATES_PER_PASS = 200
"""Minimum number of updates per pass with "--batch-size auto"."""

CHUNK = 8
"""Consecutive impressions of a user that stay together if a method trains on all rows."""

COMPARED: tuple[str, ...] = tuple(name for name in METHODS if name != CLICK_NETWORK)

GROUPS: dict[str, tuple[str, ...]] = {
    "paper": PAPER_METHODS,
    "after": ("base", "esmm", "shared-bottom", *AFTER_METHODS),
    "all": COMPARED,
}
"""Groups of methods, by the names that "--methods" accepts for them."""


class Trial(NamedTuple):
    """A setting, and options of the method itself, to try in one training."""

    setting: Setting
    own: tuple[tuple[str, Any], ...] = ()
    """Options of the method's parts, such as ("rows.rate", 0.5)."""


class Round(NamedTuple):
    """A round of tuning: all trials on a part of the data, or the best of them on a larger part."""

    share: float
    """Share of the users kept for training that the round trains on."""
    updates: float
    """Updates of a pass, as a share of those of a pass over all training rows."""
    epochs: int
    """Number of passes; the model is measured after each."""
    trials: int
    """Number of trials; after the first round, the best of the round before."""


def rounds_of(trials: int, epochs: int) -> tuple[Round, ...]:
    """Returns the rounds of tuning for a number of trials and of passes: successive halving
    (Jamieson and Talwalkar, AISTATS 2016) in two steps, or one round if there are few trials."""
    if trials <= FINALISTS:
        return (Round(1.0, 1.0, epochs, trials),)
    return (
        Round(FIRST_ROUND_SHARE, FIRST_ROUND_UPDATES, 1, trials),
        Round(LAST_ROUND_SHARE, 1.0, epochs, FINALISTS),
    )


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of a comparison of methods.

    Raises:
        OptionError: a value is out of its range, or a method is unknown.
    """

    methods: tuple[str, ...] = ("paper",)
    """Methods to compare: names of 'train --method', or groups of them. paper: the paper's seven,
    UNBIAS with weights, and shared-bottom; after: methods published after it, plus base, esmm and
    shared-bottom; all: all methods."""
    architecture: str | None = None
    """Architecture of every method, instead of its own; a name of 'train --architecture'."""
    seeds: int = 5
    """Number of runs of each method. With generated data, each run has its own world (data, split
    and initial weights); with --data, each has its own initial weights and order of rows."""
    fractions: tuple[float, ...] = (1.0,)
    """Fractions of the training users to train on; smaller ones are subsets of larger ones."""
    trials: int = len(SETTINGS)
    """Number of settings tried for each method in tuning, the same for all methods: all of them on
    a part of the data, then the best two on a larger part."""
    epochs: int = 3
    """Maximum number of passes of a method over its own training rows; tuning chooses from 1 to
    this number."""
    processes: int | Literal["auto"] = "auto"
    """Number of processes that share the trainings; auto: one per core, but only one under torchrun
    or if there is a GPU. Figures do not depend on it."""
    held_out_by: HeldOutBy = "auto"
    """Impressions that stay together when training users of a prepared data set are held out or a
    fraction of them is drawn. group: those with the same group_id; shared-row: those with the same
    shared row; impression: none; auto: shared-row if the data set has shared rows, else impression.
    Except with group, group_id affects only metrics."""
    validation_share: float = 0.3
    """Share of the training users to hold out for tuning; tuned methods are retrained on all."""
    test_impressions: int = 1_500_000
    """Approximate maximum number of test impressions to score; their users are drawn from the test
    split by hash."""
    embedding_dim: int = 8
    """Columns of every embedding table; a multiple of 4."""
    tower: tuple[int, ...] = (64, 32)
    """Widths of the hidden layers of each tower."""
    batch_size: int | Literal["auto"] = "auto"
    """Impressions per step over all ranks in a pass over the whole training split; auto: the
    largest power of two with which this pass takes at least 200 steps. Every pass, of any method
    and fraction, takes the same number of updates, so fewer rows mean smaller batches."""
    sparse_optimizer: SparseOptimizerOption = "rowwise_adagrad"
    """Optimiser of the embedding tables (the paper: adam); towers use Adam, as in the paper."""
    sharding: ShardingOption = "auto"
    """Sharding type of the tables; auto leaves it to TorchRec's planner."""
    device: DeviceOption = "auto"
    """Device to train on; auto: CUDA if there is a GPU for each rank."""

    def __post_init__(self) -> None:
        check_choices(self)
        self.chosen_methods  # noqa: B018
        check_positive(
            seeds=self.seeds,
            epochs=self.epochs,
            test_impressions=self.test_impressions,
            processes=1 if self.processes == "auto" else self.processes,
        )
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
        self.train(CLICK_NETWORK, Trial(SETTINGS[0]), seed=0)

    @property
    def chosen_methods(self) -> tuple[str, ...]:
        """Names of the methods to compare, in the order of the paper's table."""
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
        """Distinct fractions, ascending; the table shows the last."""
        return tuple(sorted(set(self.fractions)))

    @property
    def rounds(self) -> tuple[Round, ...]:
        """Rounds of tuning."""
        return rounds_of(self.trials, self.epochs)

    def for_rows(self, impressions: int) -> ComparisonOptions:
        """Returns these options with the batch size that "auto" resolves to.

        Args:
            impressions: number of impressions in the training split.
        """
        if self.batch_size != "auto":
            return self
        size = 1 << max(0, (impressions // MIN_UPDATES_PER_PASS).bit_length() - 1)
        return replace(self, batch_size=size)

    def trials_of(self, method: str) -> list[Trial]:
        """Returns the trials of a method. Of the R values of an option, trial n takes number n +
        ⌊R/2⌋·⌊n/R⌋ (modulo R), so that a value meets other settings in each cycle through the
        values; for a second option, n counts these cycles."""
        trials = []
        for place, setting in enumerate(SETTINGS[: self.trials]):
            own, step = [], place
            for option, values in METHODS[method].tune.items():
                size = len(values)
                own.append((option, values[(step + size // 2 * (step // size)) % size]))
                step //= size
            trials.append(Trial(setting, tuple(own)))
        return trials

    def train(self, method: str, trial: Trial, *, seed: int, epochs: int = 1) -> TrainOptions:
        """Returns the options of one training."""
        shared = {field.name for field in fields(self)} & {
            field.name for field in fields(TrainOptions)
        }
        common: dict[str, Any] = {name: getattr(self, name) for name in shared}
        common["architecture"] = None
        if self.architecture is not None and method != CLICK_NETWORK:
            common["architecture"] = ARCHITECTURES[self.architecture]()
        preset = METHODS[method]
        own: dict[str, Any] = {"method": method, "seed": seed, "epochs": epochs}
        # The papers' models have no first-order terms, and tuning holds out users itself.
        own |= {"first_order": False, "validation_share": 0.0}
        for option, value in trial.own:
            part, _, name = option.partition(".")
            own[part] = replace(own.get(part, getattr(preset, part)), **{name: value})
        # With few rows, a user has few impressions, which a chunk would put into one batch.
        own["shuffle_chunk"] = CHUNK if isinstance(preset.rows, AllRows) else 1
        return TrainOptions(**common | own | trial.setting.training)
