"""Multi-gate mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from esmm_torchrec.choices import Positive
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.architectures.experts import BatchedLinear, mixed
from esmm_torchrec.models.architectures.shared_bottom import over_shared_embeddings
from esmm_torchrec.models.esmm import ESMM
from esmm_torchrec.models.parts import Architecture, Builder, Head, drawn_from
from esmm_torchrec.models.towers import Logits, Towers


class MixtureTowers(nn.Module):
    """Experts that all logits share, a gate over them for each logit, and a tower over its mix.

    Args:
        experts: their layers in turn, each of all experts.
        gates: a linear layer per logit, over the experts.
        towers: in the order of the gates.
    """

    def __init__(
        self, experts: Sequence[BatchedLinear], gates: BatchedLinear, towers: Towers
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gates = gates
        self.towers = towers

    def forward(self, features: torch.Tensor) -> Logits:
        """(B, F) → logits, float32 (B,) by name."""
        hidden = features
        for layer in self.experts:
            hidden = layer(hidden).relu_()
        return self.towers.of_each(mixed(self.gates(features), hidden))


@dataclass(frozen=True)
class Mmoe(Architecture):
    """MMoE over shared embeddings (Ma et al., "Modeling Task Relationships in Multi-task Learning
    with Multi-gate Mixture-of-Experts", KDD 2018).

    The experts take the first widths of the towers, so that as many layers lie between embeddings
    and logits as in the other architectures.
    """

    num_experts: Positive = 4
    """Experts, which all logits share."""
    expert_layers: Positive = 1
    """How many of the hidden layers are the experts'; the others are the towers'."""

    def build(self, heads: Sequence[Head], builder: Builder) -> ESMM:
        """Towers start as those of the other architectures as far as their shapes are the same.

        Raises:
            OptionError: there are fewer hidden layers than the experts are to have.
        """
        expert_widths, widths = split_widths(
            builder.layer_sizes, self.expert_layers, "architecture.expert_layers"
        )

        def towers(in_features: int) -> MixtureTowers:
            with drawn_from(builder.seed, "experts"):
                experts = [
                    BatchedLinear(self.num_experts, width_in, width, dtype=builder.dtype)
                    for width_in, width in pairwise((in_features, *expert_widths))
                ]
                gates = BatchedLinear(
                    len(heads), in_features, self.num_experts, dtype=builder.dtype
                )
            own = builder.towers(heads, expert_widths[-1], layer_sizes=widths)
            return MixtureTowers(experts, gates, own)

        return over_shared_embeddings(heads, builder, towers)


def split_widths(
    layer_sizes: Sequence[int], expert_layers: int, option: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths of the experts' layers and of those left to the towers.

    Raises:
        OptionError: there are not as many.
    """
    if expert_layers > len(layer_sizes):
        raise OptionError(
            f"`{option}` {expert_layers} is more than the {len(layer_sizes)} widths of `tower`; "
            "give a width for each layer of the experts"
        )
    return tuple(layer_sizes[:expert_layers]), tuple(layer_sizes[expert_layers:])
