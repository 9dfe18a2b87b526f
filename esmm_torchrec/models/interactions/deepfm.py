"""A factorisation machine beside the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torchrec.modules.deepfm import DeepFM, FactorizationMachine

from esmm_torchrec.choices import Positive
from esmm_torchrec.models.parts import Interaction, InteractionModule


class FactorizedFeatures(InteractionModule):
    """Features, a deep layer over them and their second-order interactions, side by side.

    Args:
        in_features: F.
        num_embeddings: N, the first features are N embeddings of the same dim.
        embedding_dim: of each.
        width: of the deep layer.
    """

    def __init__(
        self, in_features: int, *, num_embeddings: int, embedding_dim: int, width: int
    ) -> None:
        super().__init__()
        self.out_features = in_features + width + 1
        self._shape = (num_embeddings, embedding_dim)
        self.deep = DeepFM(nn.Sequential(nn.Linear(in_features, width), nn.ReLU()))
        self.machine = FactorizationMachine()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) → (B, F + width + 1)."""
        count, dim = self._shape
        embeddings = features[:, : count * dim].unflatten(1, (count, dim))
        # TorchRec's module multiplies every value of a row with every other. One row for each place
        # of the embeddings gives the machine of the paper, a sum of inner products.
        places = embeddings.transpose(1, 2).flatten(0, 1)
        pairs = self.machine([places]).unflatten(0, (-1, dim)).sum(dim=1)
        return torch.cat([features, self.deep([features]), pairs], dim=1)


@dataclass(frozen=True)
class DeepFm(Interaction):
    """DeepFM's factorisation machine over the embeddings (Guo et al., "DeepFM", IJCAI 2017,
    equation 2, without the terms of first order), with a deep layer, in float32, as TorchRec's
    `FMInteractionArch` lays them beside the features; the towers read all of it.
    """

    width: Positive = 32
    """Of the deep layer."""

    def build(
        self, in_features: int, num_embeddings: int, embedding_dim: int
    ) -> FactorizedFeatures:
        """The machine of the embeddings, beside all features."""
        return FactorizedFeatures(
            in_features,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            width=self.width,
        )
