"""Layers of many experts, computed as one batched product.

Shapes: B impressions, E experts, F inputs and H outputs of a layer.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class BatchedLinear(nn.Module):
    """E linear layers of the same shape, each initialised like `nn.Linear`.

    Weights are float32 and cast to `dtype` for the product, as in `Tower`.

    Args:
        layers: E.
        in_features: F.
        out_features: H.
        dtype: dtype of the product.
    """

    def __init__(
        self, layers: int, in_features: int, out_features: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(
            torch.empty(layers, in_features, out_features).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.empty(layers, 1, out_features).uniform_(-bound, bound))
        self.dtype = dtype

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps (E, B, F), or (B, F) for the same inputs to all layers, to (E, B, H)."""
        inputs = features.to(self.dtype).expand(self.weight.shape[0], -1, -1)
        return torch.baddbmm(self.bias.to(self.dtype), inputs, self.weight.to(self.dtype))


def mixed(gate_logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Mixes the outputs of experts by gates.

    Args:
        gate_logits: (G, B, E); the softmax over the experts is computed in float32.
        experts: (E, B, H).

    Returns:
        (G, B, H), in the dtype of the experts.
    """
    shares = torch.softmax(gate_logits.float(), dim=-1).to(experts.dtype)
    # Impression by impression, (G, E) · (E, H).
    return torch.bmm(shares.transpose(0, 1), experts.transpose(0, 1)).transpose(0, 1)
