"""The conversion methods of the ESMM paper, and what stands beside them; each one small piece.

A `Method` says which impressions it trains on and with which weight, which networks or towers it
has, and its objective on logits. How its scores are read follows from the logits it gives:
`read_scores`. Nothing else in the library knows one method from another. To add one, write a
subclass of `Method`, give it a name in `MethodOption` and an entry in `METHODS`.

Notation: y click, z conversion (z ≤ y), D all impressions, O the clicked ones. The methods that
train on a part of D select rows before batches are made; nothing is masked inside a batch.

Ma et al., "Entire Space Multi-Task Model", SIGIR 2018, section 3.2 describes the competitors in a
sentence each; where it leaves something open, the docstring says how it is read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models import losses
from esmm_torchrec.models.embeddings import (
    EmbeddingBagCollections,
    PooledFeatures,
    embedding_bag_collections,
)
from esmm_torchrec.models.esmm import (
    ESMM,
    EsmmObjective,
    EsmmTowers,
    Logits,
    TrainTask,
)
from esmm_torchrec.models.networks import Network, SeparateNetworks
from esmm_torchrec.models.towers import Tower
from esmm_torchrec.schema import Schema

MethodOption = Literal[
    "esmm",
    "esmm-ns",
    "base",
    "aman",
    "oversampling",
    "unbias",
    "unbias-weighted",
    "division",
    "shared-bottom",
    "ctr",
]
DtypeOption = Literal["float32", "bfloat16"]

CLICK_NETWORK_PREFIX = "click_"
"""Before the names of the tables of a click network that stands beside a conversion network."""

_SAMPLING_STREAM = 0x5EED


@dataclass(frozen=True)
class ModelOptions:
    """What, beside a schema, decides the shape of a model."""

    method: MethodOption = "esmm"
    embedding_dim: int = 16
    tower: tuple[int, ...] = (360, 200, 80)
    dtype: DtypeOption = "float32"
    detach_click: bool = False


class LoggedImpressions(NamedTuple):
    """What a method may look at when it selects its rows; every column (n,)."""

    click: NDArray[np.integer]
    conversion: NDArray[np.integer]
    pctr: NDArray[np.floating] | None = None
    """Probability of a click from a network that was not trained on the row; for methods with
    `needs_pctr`."""
    seed: int = 0
    """Of what a method samples; sampled once for a training, not anew for each epoch."""

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) to sample by, (size,); from a stream that the seed gives to nothing
        else, or a sample may go together with the order of rows."""
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


@dataclass(frozen=True)
class Builder:
    """Makes the parts of a model. Equal parts of two methods start from equal weights: what a
    comparison finds is then not the luck of the draw."""

    schema: Schema
    options: ModelOptions
    seed: int
    click_prior: float | None
    """Share of clicks among the method's training rows, weighted as they are."""
    conversion_prior: float | None
    """Share of conversions among the clicks of those rows."""
    embedding_device: torch.device | str

    @property
    def ctcvr_prior(self) -> float | None:
        """Share of conversions among the method's training rows."""
        if self.click_prior is None or self.conversion_prior is None:
            return None
        return self.click_prior * self.conversion_prior

    def network(
        self, name: Literal["click", "conversion"], *, prior: float | None, prefix: str = ""
    ) -> Network:
        """Embeddings and a tower; `name` and the seed decide the tower's weights, the tables'
        names (with `prefix` before them) and the seed those of the embeddings."""
        features = PooledFeatures(
            *self._collections(name, prefix=prefix),
            dense_in_features=len(self.schema.dense_features),
        )
        return Network(features, self._tower(name, features.out_features, prior=prior))

    def _collections(
        self, name: Literal["click", "conversion"], *, prefix: str = ""
    ) -> EmbeddingBagCollections:
        with _drawn_from(self.seed, name):
            return embedding_bag_collections(
                self.schema,
                self.options.embedding_dim,
                device=self.embedding_device,
                name_prefix=prefix,
            )

    def _tower(
        self, name: Literal["click", "conversion"], in_features: int, *, prior: float | None
    ) -> Tower:
        with _drawn_from(self.seed, name):
            return Tower(
                in_features,
                self.options.tower,
                prior=prior,
                dtype=getattr(torch, self.options.dtype),
            )

    @property
    def esmm_objective(self) -> EsmmObjective:
        """ESMM's loss, as the options ask for it."""
        return EsmmObjective(detach_click=self.options.detach_click)

    def two_towers(self) -> ESMM:
        """A click and a conversion tower over one set of embeddings: the towers start as those of
        separate networks, the embeddings as those of a conversion network."""
        collections = self._collections("conversion")
        num_dense = len(self.schema.dense_features)
        width = PooledFeatures(*collections, dense_in_features=num_dense).out_features
        towers = EsmmTowers(
            width,
            self.options.tower,
            dtype=getattr(torch, self.options.dtype),
            device=torch.device("meta"),
        )
        towers.click = self._tower("click", width, prior=self.click_prior)
        towers.conversion = self._tower("conversion", width, prior=self.conversion_prior)
        return ESMM(*collections, dense_in_features=num_dense, towers=towers)


@contextmanager
def _drawn_from(seed: int, name: str) -> Iterator[None]:
    """Draws torch's random numbers from a stream of its own, and leaves the global one alone."""
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest) >> 1)
        yield


def click_objective(logits: Logits, batch: ImpressionBatch) -> torch.Tensor:
    """mean BCE(y, pCTR) over the impressions."""
    assert logits.click is not None
    loss = losses.binary_cross_entropy(logits.click, batch.click)
    return losses.weighted_mean(loss, batch.weight, batch.mean_weight)


def conversion_objective(logits: Logits, batch: ImpressionBatch) -> torch.Tensor:
    """mean BCE(y·z, pCVR) over the impressions of a batch, which are the method's own."""
    assert logits.conversion is not None
    loss = losses.binary_cross_entropy(logits.conversion, batch.click * batch.conversion)
    return losses.weighted_mean(loss, batch.weight, batch.mean_weight)


def division_objective(logits: Logits, batch: ImpressionBatch) -> torch.Tensor:
    """mean BCE(y, pCTR) + mean BCE(y·z, pCTCVR), both over all impressions. The two networks have
    no parameter in common and Adam and Adagrad look at each parameter alone, so that one training
    of the sum is two trainings side by side."""
    assert logits.click is not None
    assert logits.ctcvr is not None
    click = losses.binary_cross_entropy(logits.click, batch.click)
    ctcvr = losses.binary_cross_entropy(logits.ctcvr, batch.click * batch.conversion)
    return losses.weighted_mean(click + ctcvr, batch.weight, batch.mean_weight)


def click_space_objective(logits: Logits, batch: ImpressionBatch) -> torch.Tensor:
    """mean over D of BCE(y, pCTR) + mean over O of BCE(z, pCVR). The second is a mean over the
    clicks of all ranks; a batch without a click gives 0. It pulls about 1 / CTR times as hard as
    ESMM's second term, which is a mean over D; `EsmmObjective.ctcvr_loss_weight` would even that
    out, and is 1 here as in the paper."""
    assert logits.click is not None
    assert logits.conversion is not None
    click = losses.binary_cross_entropy(logits.click, batch.click)
    conversion = losses.binary_cross_entropy(logits.conversion, batch.conversion)
    click_weight = batch.click if batch.weight is None else batch.click * batch.weight
    return losses.weighted_mean(click, batch.weight, batch.mean_weight) + losses.weighted_mean(
        conversion, click_weight, batch.mean_click_weight
    )


class Method:
    """One way to learn p(conversion | click); the defaults are those of a method that trains on
    all impressions and has no rate."""

    name: ClassVar[str]
    """As the paper and the reports write it."""
    summary: ClassVar[str]
    """What it is, in one sentence for a report."""
    rates: ClassVar[tuple[float, ...]] = ()
    """Values of the method's own rate to choose among, the first being the default of `train`."""
    rate_name: ClassVar[str] = ""
    """What the rate is, for a report."""
    needs_pctr: ClassVar[bool] = False
    """Whether `rows` looks at a pCTR."""

    def rows(
        self,
        impressions: LoggedImpressions,  # noqa: ARG002
        rate: float | None,  # noqa: ARG002
    ) -> TrainingRows | None:
        """What the method trains on, None being every impression once.

        Args:
            impressions: labels of the training impressions, and pCTR where it is needed.
            rate: the method's own.
        """
        return None

    def task(self, builder: Builder) -> TrainTask:
        """The networks or towers, and what they are trained for."""
        raise NotImplementedError

    def checked_rate(self, rate: float | None) -> float | None:
        """The rate to train with: the one given, or the method's default.

        Raises:
            OptionError: the method has no rate, or not this one.
        """
        if not self.rates:
            if rate is not None:
                raise OptionError(f"--rate {rate:g}: {self.name} has no rate; leave the option out")
            return None
        if rate is None:
            return self.rates[0]
        if not rate > 0:
            raise OptionError(f"--rate {rate:g} of {self.name} is not positive; give one above 0")
        return rate


class Base(Method):
    """BASE: one conversion network, BCE on clicked impressions alone."""

    name = "BASE"
    summary = "a conversion network trained on clicked impressions alone"

    def rows(
        self,
        impressions: LoggedImpressions,
        rate: float | None,  # noqa: ARG002
    ) -> TrainingRows:
        return TrainingRows(np.flatnonzero(impressions.click))

    def task(self, builder: Builder) -> TrainTask:
        network = builder.network("conversion", prior=builder.ctcvr_prior)
        return TrainTask(SeparateNetworks(conversion=network), conversion_objective)


class Aman(Base):
    """AMAN, "all missing as negative": BASE with unclicked impressions, sampled with the rate's
    probability, as negatives (Pan et al., "One-Class Collaborative Filtering", ICDM 2008)."""

    name = "AMAN"
    summary = "BASE with sampled unclicked impressions as negatives"
    rates = (0.1, 0.2, 0.5, 1.0)
    rate_name = "share of the unclicked impressions taken"

    def rows(self, impressions: LoggedImpressions, rate: float | None) -> TrainingRows:
        assert rate is not None
        taken = impressions.uniform(len(impressions.click)) < rate
        return TrainingRows(np.flatnonzero(taken | (impressions.click == 1)))

    def checked_rate(self, rate: float | None) -> float | None:
        rate = super().checked_rate(rate)
        assert rate is not None
        if rate > 1:
            raise OptionError(f"--rate {rate:g} of AMAN is above 1, all unclicked impressions")
        return rate


class Oversampling(Base):
    """OVERSAMPLING: BASE with each conversion `rate` times in all. Its pCVR is biased as this must
    bias it: the odds of a conversion are `rate` times too high."""

    name = "OVERSAMPLING"
    summary = "BASE with conversions copied"
    rates = (2, 3, 5, 10)
    rate_name = "times each conversion occurs"

    def rows(self, impressions: LoggedImpressions, rate: float | None) -> TrainingRows:
        assert rate is not None
        clicked = np.flatnonzero(impressions.click)
        times = np.where(impressions.conversion[clicked] == 1, int(rate), 1)
        return TrainingRows(np.repeat(clicked, times))

    def checked_rate(self, rate: float | None) -> float | None:
        rate = super().checked_rate(rate)
        assert rate is not None
        if rate != int(rate):
            raise OptionError(f"--rate {rate:g} of OVERSAMPLING is not a whole number of copies")
        return rate


class Unbias(Base):
    """UNBIAS: BASE on clicked impressions thinned out until they follow the distribution of all
    impressions.

    The paper says only "rejection sampling … pCTR is taken as the rejection probability". Read
    here as: a click is accepted with a probability proportional to 1 / pCTR (p(x | click) ∝
    p(click | x)·p(x), so this undoes the selection by clicks), where 1 / pCTR is cut at its
    `rate` quantile over the clicks so that a few sure rejections do not decide everything. pCTR
    must come from networks that were not trained on the row.
    """

    name = "UNBIAS"
    summary = "BASE on clicks accepted with probability ∝ 1 / pCTR, capped at a quantile"
    rates = (0.9, 0.5, 0.8, 0.95)
    rate_name = "quantile that 1 / pCTR is cut at"
    needs_pctr = True

    def rows(self, impressions: LoggedImpressions, rate: float | None) -> TrainingRows:
        clicked, acceptance = self._acceptance(impressions, rate)
        accepted = impressions.uniform(len(clicked)) < acceptance
        return TrainingRows(
            clicked[accepted],
            notes={
                "acceptance_rate": float(accepted.mean()),
                "effective_sample_size": float(accepted.sum()),
            },
        )

    def _acceptance(
        self, impressions: LoggedImpressions, rate: float | None
    ) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
        """The clicked rows and the probability to accept each."""
        assert rate is not None
        assert impressions.pctr is not None
        clicked = np.flatnonzero(impressions.click)
        inverse = 1.0 / impressions.pctr[clicked].astype(np.float64)
        cap = np.quantile(inverse, rate, method="higher")
        return clicked, np.minimum(inverse, cap) / cap

    def checked_rate(self, rate: float | None) -> float | None:
        rate = super().checked_rate(rate)
        assert rate is not None
        if rate > 1:
            raise OptionError(f"--rate {rate:g} of {self.name} is a quantile; give one up to 1")
        return rate


class UnbiasWeighted(Unbias):
    """UNBIAS with weights in place of rejections: no click is thrown away."""

    name = "UNBIAS-weighted"
    summary = "BASE on clicks weighted by 1 / pCTR, capped at a quantile"

    def rows(self, impressions: LoggedImpressions, rate: float | None) -> TrainingRows:
        clicked, acceptance = self._acceptance(impressions, rate)
        weights = (acceptance / acceptance.mean()).astype(np.float32)
        return TrainingRows(
            clicked,
            weights,
            notes={
                "acceptance_rate": float(acceptance.mean()),
                "effective_sample_size": float(acceptance.sum() ** 2 / (acceptance**2).sum()),
            },
        )


class Division(Method):
    """DIVISION: a CTR and a CTCVR network trained apart on all impressions; pCVR = pCTCVR / pCTR,
    which may exceed 1."""

    name = "DIVISION"
    summary = "CTR and CTCVR networks trained apart; pCVR is their quotient"

    def task(self, builder: Builder) -> TrainTask:
        model = SeparateNetworks(
            click=builder.network("click", prior=builder.click_prior, prefix=CLICK_NETWORK_PREFIX),
            ctcvr=builder.network("conversion", prior=builder.ctcvr_prior),
        )
        return TrainTask(model, division_objective)


class Esmm(Method):
    """ESMM, see `models.esmm`."""

    name = "ESMM"
    summary = "click and conversion towers over shared embeddings, trained through pCTR · pCVR"

    def task(self, builder: Builder) -> TrainTask:
        return TrainTask(builder.two_towers(), builder.esmm_objective)


class EsmmNs(Esmm):
    """ESMM-NS: ESMM without the shared embedding."""

    name = "ESMM-NS"
    summary = "ESMM with embeddings of its own for each tower"

    def task(self, builder: Builder) -> TrainTask:
        model = SeparateNetworks(
            click=builder.network("click", prior=builder.click_prior, prefix=CLICK_NETWORK_PREFIX),
            conversion=builder.network("conversion", prior=builder.conversion_prior),
        )
        return TrainTask(model, builder.esmm_objective)


class SharedBottom(Method):
    """Shared embeddings, two towers, the conversion loss over clicked impressions: the strong
    baseline that the paper left out."""

    name = "shared-bottom"
    summary = "ESMM's towers and embeddings, with the conversion loss on clicked impressions"

    def task(self, builder: Builder) -> TrainTask:
        return TrainTask(builder.two_towers(), click_space_objective)


class Ctr(Method):
    """A click network and nothing else: what supplies pCTR to all methods of a comparison."""

    name = "CTR"
    summary = "a click network alone"

    def task(self, builder: Builder) -> TrainTask:
        network = builder.network("click", prior=builder.click_prior)
        return TrainTask(SeparateNetworks(click=network), click_objective)


METHODS: dict[MethodOption, Method] = {
    "base": Base(),
    "aman": Aman(),
    "oversampling": Oversampling(),
    "unbias": Unbias(),
    "unbias-weighted": UnbiasWeighted(),
    "division": Division(),
    "esmm-ns": EsmmNs(),
    "esmm": Esmm(),
    "shared-bottom": SharedBottom(),
    "ctr": Ctr(),
}
"""By the names of `--method`, in the order of the paper's table."""


def build_train_task(
    schema: Schema,
    options: ModelOptions,
    *,
    seed: int = 0,
    click_prior: float | None = None,
    conversion_prior: float | None = None,
    embedding_device: torch.device | str = "meta",
) -> TrainTask:
    """A method's model and its objective; the towers are drawn from the seed.

    Args:
        schema: tables and features.
        options: method and shape of the model.
        seed: of the towers' weights, and of the tables' where they are not on "meta".
        click_prior: share of clicks among the impressions the method trains on.
        conversion_prior: share of conversions among the clicks of those.
        embedding_device: "meta" leaves the tables to `sharding.shard`.
    """
    builder = Builder(schema, options, seed, click_prior, conversion_prior, embedding_device)
    return METHODS[options.method].task(builder)


class Scores(NamedTuple):
    """How B impressions are ranked, each float32 (B,), None where a method has no such score."""

    click_logit: torch.Tensor | None
    conversion_logit: torch.Tensor | None
    log_pcvr: torch.Tensor | None
    """log pCVR in place of its logit, where pCVR is a quotient and may exceed 1."""
    ctcvr_score: torch.Tensor | None
    """Exact logit of the method's own pCTCVR."""


def read_scores(logits: Logits) -> Scores:
    """The scores of a method: its logits as they are, and what follows from two of them. The
    quotient is not cut: cutting changes the ranking."""
    click, conversion, ctcvr = logits
    log_pcvr = None
    if click is not None and ctcvr is not None and conversion is None:
        log_pcvr = losses.log_conversion_ratio(ctcvr, click)
    if click is not None and conversion is not None and ctcvr is None:
        ctcvr = losses.ctcvr_logit(click, conversion)
    return Scores(click, conversion, log_pcvr, ctcvr)
