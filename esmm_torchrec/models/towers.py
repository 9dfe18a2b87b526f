"""The multi-layer perceptron that turns features into one logit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class Tower(nn.Module):
    """ReLU layers and a last linear layer with one output.

    The hidden layers may compute in bfloat16; their weights, the last layer and the logit stay
    float32, because bfloat16 logits tie by the thousand and ties blur every ranking.

    Args:
        in_features: F.
        layer_sizes: widths of the hidden layers; the paper's are 360, 200, 80.
        prior: share of positives among the examples. The last bias starts at its logit, so that
            training does not begin by learning the base rate. None leaves torch's own start.
        dtype: what the hidden layers compute in, torch.float32 or torch.bfloat16.
        device: where the parameters are.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        *,
        prior: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(
            nn.Linear(width_in, width_out, device=device)
            for width_in, width_out in pairwise((in_features, *layer_sizes))
        )
        self.logit = nn.Linear(layer_sizes[-1], 1, device=device)
        self.dtype = dtype
        if prior is not None:
            with torch.no_grad():
                self.logit.bias.fill_(math.log(prior) - math.log1p(-prior))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) → float32 logits (B,). Features of several towers are better given in their
        dtype, once for all, than cast by each."""
        hidden = features.to(self.dtype)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            weight, bias = layer.weight.to(self.dtype), layer.bias.to(self.dtype)
            hidden = F.linear(hidden, weight, bias).relu_()
        return self.logit(hidden.float()).squeeze(-1)
