"""Features as they are."""

from __future__ import annotations

from dataclasses import dataclass

from esmm_torchrec.models.parts import Interaction


@dataclass(frozen=True)
class NoInteraction(Interaction):
    """The towers see the pooled features."""

    def build(self, in_features: int, num_embeddings: int, embedding_dim: int) -> None:  # noqa: ARG002
        """Nothing."""
        return
