"""First-order term added to each logit: a weight for each id and each dense feature.

Rare ids have few rows, from which a tower learns less than a linear model does. The term is the
linear part of Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016, without
crossed features, and of DeepFM (Guo et al., IJCAI 2017, equation 2). The weights of an id are the
first columns of its embedding, one per logit, so that no further tables are needed.

Shapes: B impressions, F pooled features, H logits.
"""

from __future__ import annotations

import torch
from torch import nn

from esmm_torchrec.models.towers import Logits


class FirstOrder(nn.Module):
    """Adds the term to the output of towers: `Logits`, in their order, or one logit (B,).

    Args:
        towers: maps pooled features (B, F) to logits.
        num_embeddings: number of embeddings, one per id feature; they come first among the F.
        embedding_dim: dim of each embedding, at least H.
        num_logits: H.
        dense_in_features: number of dense features, which are the last of the F.
    """

    def __init__(
        self,
        towers: nn.Module,
        *,
        num_embeddings: int,
        embedding_dim: int,
        num_logits: int,
        dense_in_features: int,
    ) -> None:
        super().__init__()
        self.towers = towers
        self._shape = (num_embeddings, embedding_dim)
        self._num_logits = num_logits
        self.dense = (
            nn.Linear(dense_in_features, num_logits, bias=False) if dense_in_features else None
        )
        if self.dense is not None:
            nn.init.zeros_(self.dense.weight)

    def forward(self, features: torch.Tensor) -> Logits | torch.Tensor:
        """Maps pooled features (B, F) to logits, float32 (B,)."""
        count, dim = self._shape
        embeddings = features[:, : count * dim].unflatten(1, (count, dim))
        terms = embeddings[:, :, : self._num_logits].sum(dim=1)
        if self.dense is not None:
            terms = terms + self.dense(features[:, count * dim :])
        logits = self.towers(features)
        if isinstance(logits, Logits):
            named = enumerate(logits.items())
            return Logits({name: logit + terms[:, place] for place, (name, logit) in named})
        return logits + terms[:, 0]
