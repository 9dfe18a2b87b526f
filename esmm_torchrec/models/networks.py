"""Models whose scores come from networks of their own, where ESMM shares one set of embeddings."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.models.embeddings import PooledFeatures
from esmm_torchrec.models.esmm import Logits
from esmm_torchrec.models.towers import Tower


class Network(nn.Module):
    """Embeddings and a tower of its own: one logit, float32 (B,)."""

    def __init__(self, features: PooledFeatures, tower: Tower) -> None:
        super().__init__()
        self.features = features
        self.tower = tower

    def forward(
        self,
        sparse_features: KeyedJaggedTensor | None = None,
        weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_sparse_features: KeyedJaggedTensor | None = None,
        shared_weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_index: torch.Tensor | None = None,
        dense_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logit of B impressions; see `ImpressionBatch` for the arguments."""
        return self.tower(
            self.features(
                sparse_features,
                weighted_sparse_features,
                shared_sparse_features,
                shared_weighted_sparse_features,
                shared_index,
                dense_features,
            )
        )


class SeparateNetworks(nn.Module):
    """One network for each score, with no parameter in common."""

    def __init__(
        self,
        *,
        click: Network | None = None,
        conversion: Network | None = None,
        ctcvr: Network | None = None,
    ) -> None:
        super().__init__()
        self.click = click
        self.conversion = conversion
        self.ctcvr = ctcvr

    def forward(
        self,
        sparse_features: KeyedJaggedTensor | None = None,
        weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_sparse_features: KeyedJaggedTensor | None = None,
        shared_weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_index: torch.Tensor | None = None,
        dense_features: torch.Tensor | None = None,
    ) -> Logits:
        """Logits of the networks there are; see `ImpressionBatch` for the arguments."""
        features = (
            sparse_features,
            weighted_sparse_features,
            shared_sparse_features,
            shared_weighted_sparse_features,
            shared_index,
            dense_features,
        )
        return Logits(
            click=None if self.click is None else self.click(*features),
            conversion=None if self.conversion is None else self.conversion(*features),
            ctcvr=None if self.ctcvr is None else self.ctcvr(*features),
        )
