"""AITM: adaptive information transfer from the tower of a task to the tower of the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.architectures.shared_bottom import over_shared_embeddings
from esmm_torchrec.models.esmm import ESMM
from esmm_torchrec.models.parts import Architecture, Builder, Head, drawn_from
from esmm_torchrec.models.towers import Logits, Towers, module_key


class Transfer(nn.Module):
    """Attention of a tower over its own last hidden layer and the transfer from the previous task.

    Args:
        before: width of the last hidden layer of the previous task.
        width: width of the tower's own last hidden layer, and of the result.
        dtype: dtype of the products; the softmax is computed in float32.
    """

    def __init__(self, before: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.passed_on = nn.Linear(before, width)
        self.value = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.dtype = dtype

    def forward(self, before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Maps the last hidden layers, (B, before) and (B, width), to (B, width)."""
        inputs = torch.stack([self._linear(self.passed_on, before).relu_(), own], dim=1)
        value, key, query = (
            self._linear(layer, inputs) for layer in (self.value, self.key, self.query)
        )
        scores = (key.float() * query.float()).sum(dim=-1) / math.sqrt(own.shape[-1])
        shares = torch.softmax(scores, dim=1).to(self.dtype)
        return (shares.unsqueeze(-1) * value).sum(dim=1)

    def _linear(self, layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, layer.weight.to(self.dtype), layer.bias.to(self.dtype))


class TransferTowers(nn.Module):
    """Towers, some of which attend to the tower of the previous task.

    Args:
        towers: a tower for each logit.
        before: name of a logit → name of the previous logit.
        transfers: name of a logit → its attention, for each of `before`.
    """

    def __init__(
        self, towers: Towers, before: Mapping[str, str], transfers: Mapping[str, Transfer]
    ) -> None:
        super().__init__()
        self.towers = towers
        self.transfers = nn.ModuleDict({module_key(name): each for name, each in transfers.items()})
        self._before = dict(before)

    def forward(self, features: torch.Tensor) -> Logits:
        """Maps features (B, F) to logits, float32 (B,) by name."""
        features = features.to(self.towers.dtype)
        hidden: dict[str, torch.Tensor] = {}
        logits: dict[str, torch.Tensor] = {}
        for name, tower in self.towers.by_logit():
            own = tower.last_hidden(features)
            if name in self._before:
                own = self.transfers[module_key(name)](hidden[self._before[name]], own)
            hidden[name] = own
            logits[name] = tower.read_out(own)
        return Logits(logits)


@dataclass(frozen=True)
class Aitm(Architecture):
    """AITM over shared embeddings (Xi et al., "Modeling the Sequential Dependence among Audience
    Multi-step Conversions with Multi-task Learning", KDD 2021).

    In the paper, the outputs are P(click) and P(click and conversion), with a penalty if the
    second exceeds the first. Here the tower of a head that is `given` a label attends to the tower
    of the head with that label, and the objective defines each logit: with ESMM's, that of a
    conversion given a click, so that the product needs no penalty.
    """

    def build(self, heads: Sequence[Head], builder: Builder) -> ESMM:
        """Builds the model; towers start with the weights of the other architectures' towers.

        Raises:
            OptionError: no head is conditional on another.
        """
        by_label: dict[str, Head] = {}
        before: dict[str, str] = {}
        for head in heads:
            if head.given in by_label:
                before[head.name] = by_label[head.given].name
            if head.label is not None:
                by_label.setdefault(head.label, head)
        if not before:
            raise OptionError(
                "the aitm architecture passes from one task to the next, and no logit of this "
                "objective is that of a task given another; use it with esmm or click-space"
            )

        def towers(in_features: int) -> TransferTowers:
            width = builder.layer_sizes[-1]
            transfers = {}
            for name in before:
                with drawn_from(builder.seed, f"{name} transfer"):
                    transfers[name] = Transfer(width, width, dtype=builder.dtype)
            return TransferTowers(builder.towers(heads, in_features), before, transfers)

        return over_shared_embeddings(heads, builder, towers)
