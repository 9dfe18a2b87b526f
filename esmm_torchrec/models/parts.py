"""The three parts that make a method, and what they are given.

    rows           which impressions are trained on, and with which weight
    architecture   features → logits, after an interaction of the features if there is one
    objective      logits, batch → loss

Each part is a frozen dataclass whose fields are its options. An objective says which logits it
needs (`Head`); any architecture builds them. To add a part, subclass one of the three and register
it, see `models.registry`.

Shapes: N logged impressions, B impressions of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from esmm_torchrec.batch import ImpressionBatch, NamedTensors
from esmm_torchrec.choices import check_choices, check_ranges
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.embeddings import PooledFeatures, embedding_bag_collections
from esmm_torchrec.models.first_order import FirstOrder
from esmm_torchrec.models.towers import Logits, Tower, Towers
from esmm_torchrec.schema import Schema
from esmm_torchrec.tasks import TaskChain

_SAMPLING_STREAM = 0x5EED


class LoggedImpressions(NamedTuple):
    """What the rows part of a method may look at when it selects impressions."""

    labels: Mapping[str, NDArray[np.integer]]
    """Label column → (N,), 0 or 1."""
    tasks: TaskChain
    pctr: NDArray[np.floating] | None = None
    """(N,), probability of a click from a network that was not trained on the row; only for parts
    with `needs_pctr`."""
    seed: int = 0
    """Of what a part samples; sampled once per training, not anew for each epoch."""
    times: NDArray[np.int64] | None = None
    """(N,), time of each impression, if the data set has it."""
    conversion_times: NDArray[np.int64] | None = None
    """(N,), when the last task happened, in the same unit, and `schema.NEVER` where it did not."""

    @property
    def clicked(self) -> NDArray[np.bool_]:
        """bool (N,), impressions with the first task of the chain."""
        return self.labels[self.tasks[0].label] == 1

    @property
    def converted(self) -> NDArray[np.bool_]:
        """bool (N,), impressions with the last task of the chain and all tasks before it."""
        happened = self.tasks.happened({label: of == 1 for label, of in self.labels.items()})
        return happened[self.tasks[-1].name]

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) to sample by, (size,), from a stream of their own: a sample must not
        be correlated with the order of rows, which has the same seed."""
        return np.random.default_rng([self.seed, _SAMPLING_STREAM]).random(size)


@dataclass(frozen=True)
class TrainingRows:
    """Impressions that a method trains on."""

    rows: NDArray[np.integer]
    """int (M,), ascending; a row may occur more than once."""
    weights: NDArray[np.float32] | None = None
    """float32 (M,), None: all 1."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures of the selection that a report should show."""
    labels: Mapping[str, NDArray[np.number]] = field(default_factory=dict)
    """Label → (M,): what takes the place of a label of the data, or is added to the labels."""
    periods: NDArray[np.integer] | None = None
    """int (M,), not negative: an epoch goes through the rows in the order of their periods, and
    shuffles within each. None: all are of one period."""


@dataclass(frozen=True)
class Part(ABC):
    """What the parts of a method have in common.

    Raises:
        OptionError: an option is not one of its choices, or not in its range.
    """

    part_name: ClassVar[str]
    """Stands before its options: "objective.click_loss_weight"."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, of=self.part_name)


@dataclass(frozen=True)
class Rows(Part):
    """Which impressions a method trains on, and with which weight."""

    part_name = "rows"
    needs_pctr: ClassVar[bool] = False
    """Whether `select` looks at a pCTR from networks that were not trained on the row."""
    gives_labels: ClassVar[frozenset[str]] = frozenset()
    """Labels that `select` gives beside those of the tasks."""

    @abstractmethod
    def select(self, impressions: LoggedImpressions) -> TrainingRows | None:
        """What to train on, None being every impression once."""


class Head(NamedTuple):
    """A logit that an objective needs, and what its base rate is."""

    name: str
    """Of the logit. The name of a task if it is the logit of that task given the one before."""
    label: str | None = None
    """The label that it predicts, from which its last bias starts; None: the bias starts as torch
    initialises it."""
    given: str | None = None
    """The label of the impressions over which it predicts; None: all that are trained on."""
    starts_as: str | None = None
    """Name of the head whose initial weights it shares; None: its own."""


@dataclass(frozen=True)
class Objective(Part):
    """What a method is trained for."""

    part_name = "objective"
    needs_labels: ClassVar[frozenset[str]] = frozenset()
    """Labels that `loss` looks at beside those of the tasks; the rows part must give them."""

    @abstractmethod
    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """The logits that `loss` needs."""

    @abstractmethod
    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Loss of a batch, float32 (), from float32 logits.

        Over several ranks it is each rank's share of the global mean, see `losses.weighted_mean`.
        TorchRec's pipelines trace through it with torch.fx, so that its control flow must not
        depend on the values of tensors.
        """

    def figures(
        self,
        logits: Logits,  # noqa: ARG002
        labels: NamedTensors,  # noqa: ARG002
        tasks: TaskChain,  # noqa: ARG002
    ) -> Mapping[str, torch.Tensor]:
        """What a history should show of a step beside its loss, each float32 () and the same on
        all ranks; to be called on every rank, outside of the pipeline.

        Args:
            logits: of this rank's impressions, without gradient.
            labels: of the same, as `TrainOutput` has them.
            tasks: the chain.
        """
        return {}

    def complete(self, model: nn.Module, tasks: TaskChain) -> nn.Module:  # noqa: ARG002
        """The model that is trained, scored and exported: what the architecture built, or that
        with further logits, such as the logit of a task that follows from those of several heads.

        Args:
            model: maps `BatchFeatures` to `Logits` with a logit for each head.
            tasks: the chain.
        """
        return model

    def bind(self, tasks: TaskChain) -> Callable[[Logits, ImpressionBatch], torch.Tensor]:
        """The loss of one chain, as a train task takes it."""
        return partial(self.loss, tasks=tasks)


@dataclass(frozen=True)
class Architecture(Part):
    """How features become logits."""

    part_name = "architecture"

    @abstractmethod
    def build(self, heads: Sequence[Head], builder: Builder) -> nn.Module:
        """A module that maps `BatchFeatures` to `Logits` with a logit for each head."""


class InteractionModule(nn.Module):
    """Maps pooled features (B, F) to (B, `out_features`), float32."""

    out_features: int


@dataclass(frozen=True)
class Interaction(Part):
    """What features become before the towers of any architecture see them."""

    part_name = "interaction"

    @abstractmethod
    def build(
        self, in_features: int, num_embeddings: int, embedding_dim: int
    ) -> InteractionModule | None:
        """The module, None: the features stay as they are.

        Args:
            in_features: F, of which the first num_embeddings·embedding_dim are pooled embeddings
                and the others dense features.
            num_embeddings: one for each id feature.
            embedding_dim: of each.
        """


class AfterInteraction(nn.Module):
    """Towers over the interactions of features: (B, F) → what the towers give."""

    def __init__(self, interaction: nn.Module, towers: nn.Module) -> None:
        super().__init__()
        self.interaction = interaction
        self.towers = towers

    def forward(self, features: torch.Tensor) -> Any:
        """What the towers make of the interactions."""
        return self.towers(self.interaction(features))


@dataclass(frozen=True)
class BaseRates:
    """How often each label occurs among the impressions a method trains on, weighted as they are;
    counts, not shares, so that a share of 0 or 1 of few rows is not taken for certainty."""

    impressions: float
    positives: Mapping[str, float]
    """Label → Σ weight over the impressions that have it."""

    def prior(self, label: str, given: str | None) -> float:
        """Share of `label` among the impressions with `given`, kept half an impression away from
        0 and 1."""
        total = self.impressions if given is None else self.positives[given]
        if total <= 0:
            return 0.5
        margin = min(0.5, 0.5 / total)
        return min(max(self.positives[label] / total, margin), 1 - margin)


@dataclass(frozen=True)
class Builder:
    """What an architecture is built from. Equal heads of two methods start from equal weights:
    what a comparison finds is then not the luck of the draw."""

    schema: Schema
    embedding_dim: int
    layer_sizes: tuple[int, ...]
    """Widths of the hidden layers of each tower."""
    dtype: torch.dtype
    """What the hidden layers of the towers compute in."""
    seed: int
    base_rates: BaseRates | None
    """None: last biases start as torch initialises them."""
    embedding_device: torch.device | str
    """"meta" leaves drawing the tables to `sharding.shard`."""
    interaction: Interaction
    """Between the embeddings and the towers."""
    init_scale: float = 1.0
    """As in `embedding_bag_collections`."""
    first_order: bool = False
    """Whether each logit has a first-order term."""

    def features(self, name: str, *, num_logits: int = 0, prefix: str = "") -> PooledFeatures:
        """Embeddings of every id feature, and the dense features.

        Args:
            name: of the head whose embeddings they are; it and the seed decide the weights.
            num_logits: that have a first-order term of them; see `over`.
            prefix: of the tables' names, for a model with more than one set of tables.

        Raises:
            OptionError: the embeddings have fewer columns than there are first-order terms.
        """
        zero_columns = num_logits if self.first_order else 0
        if zero_columns > self.embedding_dim:
            raise OptionError(
                f"`embedding_dim` {self.embedding_dim} is below {num_logits}, the number of "
                "first-order terms; use a larger one, or no first-order terms"
            )
        with drawn_from(self.seed, name):
            collections = embedding_bag_collections(
                self.schema,
                self.embedding_dim,
                device=self.embedding_device,
                prefix=prefix,
                init_scale=self.init_scale,
                zero_columns=zero_columns,
            )
        return PooledFeatures(*collections, dense_in_features=len(self.schema.dense_features))

    def tower(
        self, head: Head, in_features: int, *, layer_sizes: Sequence[int] | None = None
    ) -> Tower:
        """The tower of a head; the head's name and the seed decide its weights.

        Args:
            head: whose logit it gives.
            in_features: F.
            layer_sizes: widths of the hidden layers; None: those of the options.
        """
        prior = None
        if self.base_rates is not None and head.label is not None:
            prior = self.base_rates.prior(head.label, head.given)
        with drawn_from(self.seed, head.starts_as or head.name):
            widths = self.layer_sizes if layer_sizes is None else layer_sizes
            return Tower(in_features, widths, prior=prior, dtype=self.dtype)

    def towers(
        self, heads: Sequence[Head], in_features: int, *, layer_sizes: Sequence[int] | None = None
    ) -> Towers:
        """A tower for each head; the arguments are those of `tower`."""
        return Towers(
            {head.name: self.tower(head, in_features, layer_sizes=layer_sizes) for head in heads}
        )

    def over(
        self,
        features: PooledFeatures,
        name: str,
        towers: Callable[[int], nn.Module],
        *,
        num_logits: int,
    ) -> nn.Module:
        """Towers over pooled features, with the interaction of the options between the two and
        first-order terms beside them.

        Args:
            features: what the towers see.
            name: of the head whose embeddings they are; it and the seed decide the weights of the
                interaction.
            towers: builds a module for that many inputs.
            num_logits: of that module.

        Returns:
            a module that takes what `features` gives.
        """
        num_embeddings = (features.out_features - features.dense_in_features) // self.embedding_dim
        with drawn_from(self.seed, f"{name} interaction"):
            interaction = self.interaction.build(
                features.out_features, num_embeddings, self.embedding_dim
            )
        module = (
            towers(features.out_features)
            if interaction is None
            else AfterInteraction(interaction, towers(interaction.out_features))
        )
        if not self.first_order:
            return module
        return FirstOrder(
            module,
            num_embeddings=num_embeddings,
            embedding_dim=self.embedding_dim,
            num_logits=num_logits,
            dense_in_features=features.dense_in_features,
        )


@contextmanager
def drawn_from(seed: int, name: str) -> Iterator[None]:
    """Draws torch's random numbers from a stream of their own, and leaves the global one alone."""
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest) >> 1)
        yield
