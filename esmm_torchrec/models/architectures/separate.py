"""A separate network per logit, without shared parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures
from esmm_torchrec.models.embeddings import PooledFeatures
from esmm_torchrec.models.parts import Architecture, Builder, Head
from esmm_torchrec.models.towers import ByLogit


class Network(nn.Module):
    """Embeddings and a tower for one logit, float32 (B,)."""

    def __init__(self, features: PooledFeatures, tower: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.tower = tower

    def forward(self, features: BatchFeatures | KeyedJaggedTensor) -> torch.Tensor:
        """Computes the logit of B impressions, float32 (B,)."""
        return self.tower(self.features(features))


class SeparateNetworks(ByLogit):
    """One network for each logit, without shared parameters."""


@dataclass(frozen=True)
class Separate(Architecture):
    """A separate network for each logit, with its own embeddings."""

    def build(self, heads: Sequence[Head], builder: Builder) -> SeparateNetworks:
        """Builds the networks; the last head's tables keep their names, others have the prefix of
        their head."""
        networks: dict[str, Network] = {}
        for head in heads:
            prefix = "" if head is heads[-1] else head.name
            name = head.starts_as or head.name
            features = builder.features(name, num_logits=1, prefix=prefix)
            tower = builder.over(features, name, partial(builder.tower, head), num_logits=1)
            networks[head.name] = Network(features, tower)
        return SeparateNetworks(networks)
