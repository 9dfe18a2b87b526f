"""DeepFM: a factorisation machine, concatenated with the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torchrec.modules.deepfm import DeepFM, FactorizationMachine

from esmm_torchrec.choices import Positive
from esmm_torchrec.models.parts import Interaction, InteractionModule


class FactorizedFeatures(InteractionModule):
    """Concatenation of features, a deep layer over them and their second-order interactions.

    Args:
        in_features: F.
        num_embeddings: N; the first features are N embeddings of the same dim.
        embedding_dim: dim of each embedding.
        width: width of the deep layer.
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
        """Maps features (B, F) to (B, F + width + 1)."""
        count, dim = self._shape
        embeddings = features[:, : count * dim].unflatten(1, (count, dim))
        # TorchRec's module multiplies every value of a row by every other. With one row per
        # position of the embeddings, it is the machine of the paper, a sum of inner products.
        places = embeddings.transpose(1, 2).flatten(0, 1)
        pairs = self.machine([places]).unflatten(0, (-1, dim)).sum(dim=1)
        return torch.cat([features, self.deep([features]), pairs], dim=1)


@dataclass(frozen=True)
class DeepFm(Interaction):
    """DeepFM's factorisation machine over the embeddings (Guo et al., "DeepFM", IJCAI 2017,
    equation 2, without the first-order terms) and a deep layer, in float32, concatenated with the
    features as in TorchRec's `FMInteractionArch`; all of it is the input of the towers.
    """

    width: Positive = 32
    """Width of the deep layer."""

    def build(
        self, in_features: int, num_embeddings: int, embedding_dim: int
    ) -> FactorizedFeatures:
        """Builds the factorisation machine and the deep layer."""
        return FactorizedFeatures(
            in_features,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            width=self.width,
        )
