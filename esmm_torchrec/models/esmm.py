"""The Entire Space Multi-Task Model and its train task.

ESMM (Ma et al., "Entire Space Multi-Task Model", SIGIR 2018, arXiv 1804.07931) trains two towers
over shared embeddings on all impressions. The click tower gives pCTR; the conversion tower gives
pCVR and is trained only through pCTCVR = pCTR · pCVR, whose label is known for every impression.
pCVR is read from its own tower; nothing is divided.

Shapes: B impressions, D dense features, F pooled features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models import losses
from esmm_torchrec.models.embeddings import PooledFeatures
from esmm_torchrec.models.towers import Tower


class Logits(NamedTuple):
    """What a model says of B impressions, each float32 (B,), None where it has no tower for it.
    ESMM gives the first two."""

    click: torch.Tensor | None = None
    """Logit of pCTR."""
    conversion: torch.Tensor | None = None
    """Logit of pCVR, the probability of a conversion given a click."""
    ctcvr: torch.Tensor | None = None
    """Logit of pCTCVR, from a tower of its own."""


class Labels(NamedTuple):
    """What is known of B impressions; all float32 (B,)."""

    click: torch.Tensor
    conversion: torch.Tensor
    weight: torch.Tensor | None


class TrainOutput(NamedTuple):
    """What a train task returns beside the loss it is differentiated by."""

    loss: torch.Tensor
    """The same loss, detached."""
    logits: Logits
    """Detached."""
    labels: Labels


class EsmmTowers(nn.Module):
    """The two towers of ESMM. They do not care what pooled the features, so they also stand
    behind another sparse architecture.

    Args:
        in_features: F.
        layer_sizes: widths of the hidden layers of each tower.
        click_prior: share of clicks among impressions, see `Tower`.
        conversion_prior: share of conversions among clicks.
        dtype: what the hidden layers compute in.
        device: where the parameters are.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int] = (360, 200, 80),
        *,
        click_prior: float | None = None,
        conversion_prior: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.click = Tower(in_features, layer_sizes, prior=click_prior, dtype=dtype, device=device)
        self.conversion = Tower(
            in_features, layer_sizes, prior=conversion_prior, dtype=dtype, device=device
        )

    def forward(self, features: torch.Tensor) -> Logits:
        """Logits of B impressions.

        Args:
            features: float32 (B, F), as `PooledFeatures` gives them.

        Returns:
            click and conversion, each float32 (B,).
        """
        features = features.to(self.click.dtype)
        return Logits(click=self.click(features), conversion=self.conversion(features))


class ESMM(nn.Module):
    """Shared embeddings, a click tower and a conversion tower (Ma et al., SIGIR 2018, figure 2).

    B impressions in, `Logits` with click and conversion out, each float32 (B,). At least one
    collection is needed.

    Args:
        embedding_bag_collection: unweighted id features, as in `torchrec.models.dlrm.DLRM`.
        weighted_embedding_bag_collection: weighted id features, or None.
        shared_embedding_bag_collection: unweighted features that impressions share, or None.
        shared_weighted_embedding_bag_collection: weighted features that impressions share.
        dense_in_features: D, number of dense features.
        towers: as `EsmmTowers` for `PooledFeatures.out_features` inputs; None builds the paper's.

    Raises:
        OptionError: there is no collection, one is weighted where it must not be or the other way
            round, or two have a feature of the same name.

    Example::

        esmm = ESMM(
            EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name="t_item", embedding_dim=16, num_embeddings=1000, feature_names=["item"]
                    )
                ]
            )
        )
        features = KeyedJaggedTensor.from_lengths_sync(
            keys=["item"], values=torch.tensor([7, 5]), lengths=torch.tensor([1, 1])
        )
        logits = esmm(features)
        pctr, pcvr = logits.click.sigmoid(), logits.conversion.sigmoid()
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection | None = None,
        weighted_embedding_bag_collection: EmbeddingBagCollection | None = None,
        shared_embedding_bag_collection: EmbeddingBagCollection | None = None,
        shared_weighted_embedding_bag_collection: EmbeddingBagCollection | None = None,
        *,
        dense_in_features: int = 0,
        towers: EsmmTowers | None = None,
    ) -> None:
        super().__init__()
        self.features = PooledFeatures(
            embedding_bag_collection,
            weighted_embedding_bag_collection,
            shared_embedding_bag_collection,
            shared_weighted_embedding_bag_collection,
            dense_in_features,
        )
        self.towers = EsmmTowers(self.features.out_features) if towers is None else towers

    def forward(
        self,
        sparse_features: KeyedJaggedTensor | None = None,
        weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_sparse_features: KeyedJaggedTensor | None = None,
        shared_weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_index: torch.Tensor | None = None,
        dense_features: torch.Tensor | None = None,
    ) -> Logits:
        """Logits of B impressions, each float32 (B,).

        A model takes what its collections need, and the rest is left out. `ImpressionBatch`
        describes the arguments: B bags a key in the first two, U shared bags a key in the next
        two, int64 (B,) with the shared bag of each impression, and float32 (B, D).
        """
        return self.towers(
            self.features(
                sparse_features,
                weighted_sparse_features,
                shared_sparse_features,
                shared_weighted_sparse_features,
                shared_index,
                dense_features,
            )
        )


Objective = Callable[[Logits, ImpressionBatch], torch.Tensor]
"""Loss of a batch, float32 (), from logits in float32. Over several ranks it is each rank's share
of the global mean, see `losses.weighted_mean`; TorchRec's pipelines trace through it."""


class TrainTask(nn.Module):
    """A model and its objective, in the form TorchRec's pipelines expect of a model.

    Args:
        model: maps the features of an `ImpressionBatch`, given by name, to `Logits`.
        objective: what the model is trained for.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: ImpressionBatch) -> tuple[torch.Tensor, TrainOutput]:
        """The loss of a batch, float32 (), and what there is to log."""
        logits = self.model(
            sparse_features=batch.sparse_features,
            weighted_sparse_features=batch.weighted_sparse_features,
            shared_sparse_features=batch.shared_sparse_features,
            shared_weighted_sparse_features=batch.shared_weighted_sparse_features,
            shared_index=batch.shared_index,
            dense_features=batch.dense_features,
        )
        loss = self.objective(logits, batch)
        return loss, TrainOutput(
            loss=loss.detach(),
            logits=Logits(
                click=_detached(logits.click),
                conversion=_detached(logits.conversion),
                ctcvr=_detached(logits.ctcvr),
            ),
            labels=Labels(batch.click, batch.conversion, batch.weight),
        )


def _detached(logit: torch.Tensor | None) -> torch.Tensor | None:
    return None if logit is None else logit.detach()


@dataclass(frozen=True)
class EsmmObjective:
    """mean BCE(click, pCTR) + mean BCE(click · conversion, pCTR · pCVR), both over all
    impressions (equation 2 of the paper, as a mean)."""

    click_loss_weight: float = 1.0
    """Factor of the first term."""
    ctcvr_loss_weight: float = 1.0
    """Factor of the second term."""
    detach_click: bool = False
    """Keeps the second term from training the click tower."""

    def __call__(self, logits: Logits, batch: ImpressionBatch) -> torch.Tensor:
        """Needs the click and the conversion logit."""
        assert logits.click is not None
        assert logits.conversion is not None
        click_logit = logits.click.detach() if self.detach_click else logits.click
        click = losses.binary_cross_entropy(logits.click, batch.click)
        ctcvr = losses.ctcvr_loss(click_logit, logits.conversion, batch.click * batch.conversion)
        return losses.weighted_mean(
            self.click_loss_weight * click + self.ctcvr_loss_weight * ctcvr,
            batch.weight,
            batch.mean_weight,
        )


class EsmmTrainTask(TrainTask):
    """ESMM's loss around a model (Ma et al., SIGIR 2018, equation 2, as a mean):

        w₁ · mean BCE(y, pCTR) + w₂ · mean BCE(y·z, pCTR · pCVR)        y click, z conversion

    both over all impressions, weighted by `ImpressionBatch.weight`, computed from the logits in
    float32. `forward` takes an `ImpressionBatch` of B impressions and returns the loss, float32
    (), and a `TrainOutput` whose logits and labels are float32 (B,): what TorchRec's pipelines
    expect of a model.

    Args:
        model: as in `TrainTask`; gives a click and a conversion logit.
        click_loss_weight: w₁.
        ctcvr_loss_weight: w₂.
        detach_click: keeps the second term from training the click tower.

    Example::

        task = EsmmTrainTask(ESMM(*embedding_bag_collections(schema, 16)))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        click_loss_weight: float = 1.0,
        ctcvr_loss_weight: float = 1.0,
        detach_click: bool = False,
    ) -> None:
        super().__init__(model, EsmmObjective(click_loss_weight, ctcvr_loss_weight, detach_click))
