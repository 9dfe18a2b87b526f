"""Base classes of the three parts of a method, and their inputs.

    rows           which impressions a method trains on, and with which weights
    architecture   features → logits, after an optional interaction of the features
    objective      logits, batch → loss

Each part is a frozen dataclass whose fields are its options. An objective declares the logits it
needs (`Head`), and any architecture builds them. To add a part, subclass one of the three and
register it, see `models.registry`.

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
    """Columns from which the rows part of a method selects impressions."""

    labels: Mapping[str, NDArray[np.integer]]
    """Label column → (N,), 0 or 1."""
    tasks: TaskChain
    pctr: NDArray[np.floating] | None = None
    """(N,), click probabilities from networks that were not trained on the row; only for parts
    with `needs_pctr`."""
    seed: int = 0
    """Seed of the samples, which are drawn once per training, not for each epoch."""
    times: NDArray[np.int64] | None = None
    """(N,), time of each impression; None if the data set has no times."""
    conversion_times: NDArray[np.int64] | None = None
    """(N,), time of the last task, in the same unit; `schema.NEVER` if it did not happen."""

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
        """Draws numbers in [0, 1) for sampling, (size,), from a separate random stream: a sample
        must not be correlated with the order of rows, which has the same seed."""
        return np.random.default_rng([self.seed, _SAMPLING_STREAM]).random(size)


@dataclass(frozen=True)
class TrainingRows:
    """Impressions that a method trains on."""

    rows: NDArray[np.integer]
    """int (M,), ascending; a row may occur more than once."""
    weights: NDArray[np.float32] | None = None
    """float32 (M,); None: all 1."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """Figures of the selection to show in a report."""
    labels: Mapping[str, NDArray[np.number]] = field(default_factory=dict)
    """Label → (M,), values that replace a label of the data or are added to the labels."""
    periods: NDArray[np.integer] | None = None
    """int (M,), not negative. An epoch visits the rows in the order of their periods and shuffles
    within each period. None: a single period."""


@dataclass(frozen=True)
class Part(ABC):
    """Base class of the parts of a method.

    Raises:
        OptionError: an option is not one of its choices, or outside its range.
    """

    part_name: ClassVar[str]
    """Prefix of the part's options, as in "objective.click_loss_weight"."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_ranges(self, of=self.part_name)


@dataclass(frozen=True)
class Rows(Part):
    """Selection of the impressions that a method trains on, and of their weights."""

    part_name = "rows"
    needs_pctr: ClassVar[bool] = False
    """Whether `select` uses the pCTR of networks that were not trained on the row."""
    gives_labels: ClassVar[frozenset[str]] = frozenset()
    """Labels that `select` returns in addition to those of the tasks."""

    @abstractmethod
    def select(self, impressions: LoggedImpressions) -> TrainingRows | None:
        """Selects the rows to train on; None means every impression once."""


class Head(NamedTuple):
    """A logit that an objective needs, and the labels that determine its base rate."""

    name: str
    """Name of the logit; the name of a task if it is the logit of P(task | given)."""
    label: str | None = None
    """Label that it predicts; its base rate initialises the last bias. None: torch's default."""
    given: str | None = None
    """Label of the impressions over which it predicts; None: all training impressions."""
    starts_as: str | None = None
    """Name of the head whose initial weights it shares; None: its own."""


@dataclass(frozen=True)
class Objective(Part):
    """Training objective of a method: the logits that it needs, and their loss."""

    part_name = "objective"
    needs_labels: ClassVar[frozenset[str]] = frozenset()
    """Labels that `loss` uses in addition to those of the tasks; the rows part must return them."""

    @abstractmethod
    def heads(self, tasks: TaskChain) -> tuple[Head, ...]:
        """Returns the logits that `loss` needs."""

    @abstractmethod
    def loss(self, logits: Logits, batch: ImpressionBatch, tasks: TaskChain) -> torch.Tensor:
        """Computes the loss of a batch, float32 (), from float32 logits.

        With several ranks, it is each rank's share of the global mean, see `losses.weighted_mean`.
        TorchRec's pipelines trace it with torch.fx, so its control flow must not depend on the
        values of tensors.
        """

    def figures(
        self,
        logits: Logits,  # noqa: ARG002
        labels: NamedTensors,  # noqa: ARG002
        tasks: TaskChain,  # noqa: ARG002
    ) -> Mapping[str, torch.Tensor]:
        """Computes figures of a step that the history shows in addition to its loss, each
        float32 () and equal on all ranks. Call it on every rank, outside the pipeline.

        Args:
            logits: logits of this rank's impressions, without gradient.
            labels: labels of the same impressions, as in `TrainOutput`.
            tasks: the chain.
        """
        return {}

    def complete(self, model: nn.Module, tasks: TaskChain) -> nn.Module:  # noqa: ARG002
        """Returns the model that is trained, scored and exported: the architecture's model, or
        that model with further logits, such as that of a task derived from several heads.

        Args:
            model: maps `BatchFeatures` to `Logits` with a logit for each head.
            tasks: the chain.
        """
        return model

    def bind(self, tasks: TaskChain) -> Callable[[Logits, ImpressionBatch], torch.Tensor]:
        """Returns the loss function of a chain, for a train task."""
        return partial(self.loss, tasks=tasks)


@dataclass(frozen=True)
class Architecture(Part):
    """Architecture that maps features to logits."""

    part_name = "architecture"

    @abstractmethod
    def build(self, heads: Sequence[Head], builder: Builder) -> nn.Module:
        """Builds a module that maps `BatchFeatures` to `Logits` with a logit for each head."""


class InteractionModule(nn.Module):
    """Maps pooled features (B, F) to (B, `out_features`), float32."""

    out_features: int


@dataclass(frozen=True)
class Interaction(Part):
    """Interaction of the features, applied before the towers of any architecture."""

    part_name = "interaction"

    @abstractmethod
    def build(
        self, in_features: int, num_embeddings: int, embedding_dim: int
    ) -> InteractionModule | None:
        """Builds the module; None leaves the features unchanged.

        Args:
            in_features: F, of which the first num_embeddings·embedding_dim are pooled embeddings
                and the others dense features.
            num_embeddings: number of embeddings, one per id feature.
            embedding_dim: dim of each embedding.
        """


class AfterInteraction(nn.Module):
    """Towers over the interactions of features, (B, F) → output of the towers."""

    def __init__(self, interaction: nn.Module, towers: nn.Module) -> None:
        super().__init__()
        self.interaction = interaction
        self.towers = towers

    def forward(self, features: torch.Tensor) -> Any:
        """Applies the interaction and then the towers."""
        return self.towers(self.interaction(features))


@dataclass(frozen=True)
class BaseRates:
    """Weighted counts of each label among the impressions that a method trains on. They are counts
    rather than shares, so that a share of 0 or 1 among few rows is not taken as certain."""

    impressions: float
    positives: Mapping[str, float]
    """Label → Σ weight over the impressions that have it."""

    def prior(self, label: str, given: str | None) -> float:
        """Returns the share of `label` among the impressions with `given`, clamped to half an
        impression from 0 and 1."""
        total = self.impressions if given is None else self.positives[given]
        if total <= 0:
            return 0.5
        margin = min(0.5, 0.5 / total)
        return min(max(self.positives[label] / total, margin), 1 - margin)


@dataclass(frozen=True)
class Builder:
    """Builds the components of an architecture. Equal heads of two methods start from equal
    weights, so that a comparison does not depend on random initialisation."""

    schema: Schema
    embedding_dim: int
    layer_sizes: tuple[int, ...]
    """Widths of the hidden layers of each tower."""
    dtype: torch.dtype
    """Dtype in which the hidden layers of the towers compute."""
    seed: int
    base_rates: BaseRates | None
    """Base rates that initialise the last biases; None: torch's initialisation."""
    embedding_device: torch.device | str
    """Device of the tables; "meta" leaves drawing them to `sharding.shard`."""
    interaction: Interaction
    """Interaction between the embeddings and the towers."""
    init_scale: float = 1.0
    """Factor of the initial range of embeddings, see `embedding_bag_collections`."""
    first_order: bool = False
    """Whether each logit has a first-order term."""

    def features(self, name: str, *, num_logits: int = 0, prefix: str = "") -> PooledFeatures:
        """Builds the embeddings of every id feature, concatenated with the dense features.

        Args:
            name: name of the embeddings' head, which determines the weights together with the seed.
            num_logits: number of logits with a first-order term of these features, see `over`.
            prefix: prefix of the tables' names, for a model with more than one set of tables.

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
        """Builds the tower of a head; the head's name and the seed determine its weights.

        Args:
            head: head whose logit the tower computes.
            in_features: F.
            layer_sizes: widths of the hidden layers; None: `self.layer_sizes`.
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
        """Builds a tower for each head; the arguments are those of `tower`."""
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
        """Builds towers over pooled features, with the interaction before the towers and
        first-order terms added to their logits.

        Args:
            features: the pooled features.
            name: name of the embeddings' head, which determines the interaction's weights together
                with the seed.
            towers: builds the towers' module for a number of inputs.
            num_logits: number of logits of that module.

        Returns:
            a module that maps the output of `features` to logits.
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
    """Draws torch's random numbers from a separate stream and leaves the global one unchanged."""
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest) >> 1)
        yield
