"""A tower per logit over one set of embeddings: ESMM's architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esmm_torchrec.models.esmm import ESMM
from esmm_torchrec.models.parts import Architecture, Builder, Head


@dataclass(frozen=True)
class SharedBottom(Architecture):
    """A tower for each logit over shared embeddings (Ma et al., SIGIR 2018, figure 2)."""

    def build(self, heads: Sequence[Head], builder: Builder) -> ESMM:
        """Towers start as those of separate networks, embeddings as those of the last one."""
        features = builder.features(heads[-1].starts_as or heads[-1].name)
        towers = builder.towers(heads, features.out_features)
        return ESMM(
            features.embedding_bag_collection,
            features.weighted_embedding_bag_collection,
            features.shared_embedding_bag_collection,
            features.shared_weighted_embedding_bag_collection,
            dense_in_features=features.dense_in_features,
            towers=towers,
        )
