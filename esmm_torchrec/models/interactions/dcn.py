"""DCN V2: a cross network of the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchrec.modules.crossnet import LowRankCrossNet

from esmm_torchrec.choices import Positive
from esmm_torchrec.models.parts import Interaction, InteractionModule


class CrossedFeatures(InteractionModule):
    """TorchRec's `LowRankCrossNet`, (B, F) → (B, F)."""

    def __init__(self, in_features: int, *, num_layers: int, low_rank: int) -> None:
        super().__init__()
        self.out_features = in_features
        self.cross = LowRankCrossNet(in_features, num_layers=num_layers, low_rank=low_rank)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the crossed features, (B, F)."""
        return self.cross(features)


@dataclass(frozen=True)
class Dcn(Interaction):
    """DCN V2's low-rank cross layers, in float32 (Wang et al., "DCN V2", WWW 2021, equation 2);
    the towers are the deep part, stacked on them.
    """

    num_layers: Positive = 2
    """Number of cross layers."""
    low_rank: Positive = 32
    """Rank of each layer's matrix, at most the number of features."""

    def build(
        self,
        in_features: int,
        num_embeddings: int,  # noqa: ARG002
        embedding_dim: int,  # noqa: ARG002
    ) -> CrossedFeatures:
        """Builds the cross network of all features."""
        rank = min(self.low_rank, in_features)
        return CrossedFeatures(in_features, num_layers=self.num_layers, low_rank=rank)
