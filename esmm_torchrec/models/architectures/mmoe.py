"""MMoE: multi-gate mixture of experts."""

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
    """Experts shared by all logits, a gate over them for each logit, and a tower over each mix.

    Args:
        experts: layers in order, each for all experts.
        gates: a linear layer per logit, with one output per expert.
        towers: towers in the order of the gates.
    """

    def __init__(
        self, experts: Sequence[BatchedLinear], gates: BatchedLinear, towers: Towers
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gates = gates
        self.towers = towers

    def forward(self, features: torch.Tensor) -> Logits:
        """Maps features (B, F) to logits, float32 (B,) by name."""
        hidden = features
        for layer in self.experts:
            hidden = layer(hidden).relu_()
        return self.towers.of_each(mixed(self.gates(features), hidden))


@dataclass(frozen=True)
class Mmoe(Architecture):
    """MMoE over shared embeddings (Ma et al., "Modeling Task Relationships in Multi-task Learning
    with Multi-gate Mixture-of-Experts", KDD 2018).

    The experts use the first widths of the towers, so that the number of layers between embeddings
    and logits is the same as in the other architectures.
    """

    num_experts: Positive = 4
    """Number of experts, shared by all logits."""
    expert_layers: Positive = 1
    """Number of hidden layers that belong to the experts; the others belong to the towers."""

    def build(self, heads: Sequence[Head], builder: Builder) -> ESMM:
        """Builds the model; layers of equal shape start as in the other architectures' towers.

        Raises:
            OptionError: there are fewer hidden layers than `expert_layers`.
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
    """Splits widths into those of the experts' layers and those of the towers.

    Raises:
        OptionError: there are fewer widths than `expert_layers`.
    """
    if expert_layers > len(layer_sizes):
        raise OptionError(
            f"`{option}` {expert_layers} is more than the {len(layer_sizes)} widths of `tower`; "
            "give a width for each layer of the experts"
        )
    return tuple(layer_sizes[:expert_layers]), tuple(layer_sizes[expert_layers:])
