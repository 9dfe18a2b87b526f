"""ESMM's architecture: a tower per logit over shared embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from esmm_torchrec.models.esmm import ESMM
from esmm_torchrec.models.parts import Architecture, Builder, Head


def over_shared_embeddings(
    heads: Sequence[Head], builder: Builder, towers: Callable[[int], nn.Module]
) -> ESMM:
    """Builds towers over shared embeddings, which start with the weights of the last head's.

    Args:
        heads: the logits.
        builder: builder of the embeddings.
        towers: builds a module that maps a number of features to `Logits`.
    """
    name = heads[-1].starts_as or heads[-1].name
    features = builder.features(name, num_logits=len(heads))
    return ESMM(
        features.embedding_bag_collection,
        features.weighted_embedding_bag_collection,
        features.shared_embedding_bag_collection,
        features.shared_weighted_embedding_bag_collection,
        dense_in_features=features.dense_in_features,
        towers=builder.over(features, name, towers, num_logits=len(heads)),
    )


@dataclass(frozen=True)
class SharedBottom(Architecture):
    """A tower for each logit over shared embeddings (Ma et al., SIGIR 2018, figure 2)."""

    def build(self, heads: Sequence[Head], builder: Builder) -> ESMM:
        """Builds the model; towers start with the weights of separate networks' towers."""
        return over_shared_embeddings(
            heads, builder, lambda in_features: builder.towers(heads, in_features)
        )
