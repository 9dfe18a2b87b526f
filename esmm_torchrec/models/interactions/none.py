"""No interaction: features are unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from esmm_torchrec.models.parts import Interaction


@dataclass(frozen=True)
class NoInteraction(Interaction):
    """No interaction: the pooled features are the input of the towers."""

    def build(self, in_features: int, num_embeddings: int, embedding_dim: int) -> None:  # noqa: ARG002
        """Returns None: the features stay unchanged."""
        return
