"""PLE, progressive layered extraction: experts of each task, and shared experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from esmm_torchrec.choices import Positive
from esmm_torchrec.models.architectures.experts import BatchedLinear, mixed
from esmm_torchrec.models.architectures.mmoe import split_widths
from esmm_torchrec.models.architectures.shared_bottom import over_shared_embeddings
from esmm_torchrec.models.esmm import ESMM
from esmm_torchrec.models.parts import Architecture, Builder, Head, drawn_from
from esmm_torchrec.models.towers import Logits, Towers


class ExtractionLevel(nn.Module):
    """One level of customised gate control (CGC).

    There are G groups of n experts each: a group per task (T of them) and, last, the shared group.
    The gate of a task mixes its own experts and the shared ones; the gate of the shared group mixes
    all experts.

    Args:
        groups: G = T + 1.
        experts: n.
        in_features: F.
        out_features: H.
        last: whether it is the last level, which has no gate for the shared group.
        dtype: dtype of the products.
    """

    def __init__(
        self,
        groups: int,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        last: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._num_tasks, self._num_experts = groups - 1, experts
        self.experts = BatchedLinear(groups, in_features, experts * out_features, dtype=dtype)
        self.gates = BatchedLinear(groups - 1, in_features, 2 * experts, dtype=dtype)
        self.shared_gate = (
            None if last else BatchedLinear(1, in_features, groups * experts, dtype=dtype)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps (G, B, F) to (G, B, H), or to (T, B, H), without the shared group, if `last`."""
        tasks = self._num_tasks
        # (n, G, B, H), as `mixed` takes the experts of a row.
        hidden = self.experts(features).relu_().unflatten(2, (self._num_experts, -1))
        hidden = hidden.permute(2, 0, 1, 3)
        own, shared = hidden[:, :tasks], hidden[:, tasks:].expand(-1, tasks, -1, -1)
        # Each impression of each task is a row here, with 2n experts to choose from.
        choices = torch.cat([own, shared]).flatten(1, 2)
        chosen = self.gates(features[:tasks]).flatten(0, 1).unsqueeze(0)
        mixes = mixed(chosen, choices).squeeze(0).unflatten(0, (tasks, -1))
        if self.shared_gate is None:
            return mixes
        every = hidden.transpose(0, 1).flatten(0, 1)
        return torch.cat([mixes, mixed(self.shared_gate(features[tasks:]), every)])


class ExtractionTowers(nn.Module):
    """Levels of extraction, and a tower for each logit over its output of the last level.

    Args:
        levels: levels in order; the last has one output per tower.
        towers: a tower for each logit.
    """

    def __init__(self, levels: Sequence[ExtractionLevel], towers: Towers) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.towers = towers

    def forward(self, features: torch.Tensor) -> Logits:
        """Maps features (B, F) to logits, float32 (B,) by name."""
        hidden = features.expand(len(self.towers) + 1, -1, -1)
        for level in self.levels:
            hidden = level(hidden)
        return self.towers.of_each(hidden)


@dataclass(frozen=True)
class Ple(Architecture):
    """PLE over shared embeddings (Tang et al., "Progressive Layered Extraction", RecSys 2020);
    with one level it is CGC. An expert is one layer.

    The levels use the first widths of the towers, so that the number of layers between embeddings
    and logits is the same as in the other architectures.
    """

    num_experts: Positive = 2
    """Number of experts of each logit, and of shared experts."""
    levels: Positive = 2
    """Number of hidden layers that are levels of extraction; the others belong to the towers."""

    def build(self, heads: Sequence[Head], builder: Builder) -> ESMM:
        """Builds the model; layers of equal shape start as in the other architectures' towers.

        Raises:
            OptionError: there are fewer hidden layers than levels.
        """
        level_widths, widths = split_widths(builder.layer_sizes, self.levels, "architecture.levels")

        def towers(in_features: int) -> ExtractionTowers:
            with drawn_from(builder.seed, "experts"):
                levels = [
                    ExtractionLevel(
                        len(heads) + 1,
                        self.num_experts,
                        width_in,
                        width,
                        last=place == self.levels,
                        dtype=builder.dtype,
                    )
                    for place, (width_in, width) in enumerate(
                        pairwise((in_features, *level_widths)), 1
                    )
                ]
            own = builder.towers(heads, level_widths[-1], layer_sizes=widths)
            return ExtractionTowers(levels, own)

        return over_shared_embeddings(heads, builder, towers)
