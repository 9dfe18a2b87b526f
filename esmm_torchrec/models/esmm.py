"""The Entire Space Multi-Task Model and its train task.

ESMM (Ma et al., "Entire Space Multi-Task Model", SIGIR 2018, arXiv 1804.07931) trains two towers
over shared embeddings on all impressions. The click tower predicts pCTR. The conversion tower
predicts pCVR and is trained only through pCTCVR = pCTR · pCVR, whose label is known for every
impression. pCVR is the output of its own tower, not a ratio.

Shapes: B impressions, D dense features, F pooled features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures, ImpressionBatch, NamedTensors
from esmm_torchrec.models.embeddings import PooledFeatures
from esmm_torchrec.models.objectives.esmm import EsmmObjective
from esmm_torchrec.models.towers import EsmmTowers, Logits
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


class TrainOutput(NamedTuple):
    """Output of a train task in addition to the loss that is differentiated."""

    loss: torch.Tensor
    """The same loss, detached."""
    logits: Logits
    """Detached logits, float32 (B,) by name."""
    labels: NamedTensors
    """Labels, float32 (B,) by name, and "weight" if the batch has weights."""


class ESMM(nn.Module):
    """Shared embeddings with a tower per task: click and conversion (Ma et al., SIGIR 2018,
    figure 2).

    Maps the features of B impressions to `Logits`, each float32 (B,). At least one collection is
    required.

    Args:
        embedding_bag_collection: unweighted id features, as in `torchrec.models.dlrm.DLRM`.
        weighted_embedding_bag_collection: weighted id features, or None.
        shared_embedding_bag_collection: unweighted features that impressions share, or None.
        shared_weighted_embedding_bag_collection: weighted features that impressions share.
        dense_in_features: D, number of dense features.
        towers: maps float32 (B, `PooledFeatures.out_features`) to `Logits`; None builds the paper's
            `EsmmTowers`.

    Raises:
        OptionError: there is no collection, a collection is weighted but must not be (or vice
            versa), or two collections have a feature of the same name.

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
        towers: nn.Module | None = None,
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

    def forward(self, features: BatchFeatures | KeyedJaggedTensor) -> Logits:
        """Computes the logits of B impressions, each float32 (B,).

        Args:
            features: features of a batch; a KeyedJaggedTensor means `sparse_features` only.
        """
        return self.towers(self.features(features))


LossFunction = Callable[[Logits, ImpressionBatch], torch.Tensor]
"""Function that maps float32 logits and a batch to a loss, float32 (). With several ranks, it is
each rank's share of the global mean, see `losses.weighted_mean`. TorchRec's pipelines trace it."""


class TrainTask(nn.Module):
    """A model and its objective, with the interface that TorchRec's pipelines expect of a model.

    Args:
        model: maps `BatchFeatures` to `Logits`.
        objective: loss of the logits.
    """

    def __init__(self, model: nn.Module, objective: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: ImpressionBatch) -> tuple[torch.Tensor, TrainOutput]:
        """Returns the loss of a batch, float32 (), and the outputs to log."""
        logits = self.model(batch.features)
        loss = self.objective(logits, batch)
        return loss, TrainOutput(
            loss=loss.detach(), logits=_detached(logits), labels=_labels(batch)
        )


@torch.fx.wrap
def _detached(logits: Logits) -> Logits:
    return Logits({name: logit.detach() for name, logit in logits.items()})


@torch.fx.wrap
def _labels(batch: ImpressionBatch) -> NamedTensors:
    weight = {} if batch.weight is None else {"weight": batch.weight}
    return NamedTensors({**batch.labels, **weight})


class EsmmTrainTask(TrainTask):
    """A model with ESMM's loss (Ma et al., SIGIR 2018, equation 2, as a mean):

        w₁ · mean BCE(y, pCTR) + w₂ · mean BCE(y·z, pCTR · pCVR)        y click, z conversion

    both over all impressions, weighted by the batch's `weight`, computed from the logits in
    float32. A longer chain of tasks has one further term per task. `forward` takes an
    `ImpressionBatch` of B impressions and returns the loss, float32 (), and a `TrainOutput` whose
    logits and labels are float32 (B,), as TorchRec's pipelines expect.

    Args:
        model: maps `BatchFeatures` to a logit for every task.
        click_loss_weight: w₁.
        ctcvr_loss_weight: w₂, also used for the terms of further tasks.
        detach_click: whether product terms do not train the towers of the tasks before.
        tasks: the chain.

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
        tasks: TaskChain = DEFAULT_TASKS,
    ) -> None:
        objective = EsmmObjective(click_loss_weight, ctcvr_loss_weight, detach_click)
        super().__init__(model, objective.bind(tasks))
