"""Multi-layer perceptrons that map features to logits, one per task.

Shapes: B impressions, F pooled features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from esmm_torchrec.batch import NamedTensors
from esmm_torchrec.errors import OptionError


class Logits(NamedTensors):
    """Logits of B impressions by task name, each float32 (B,).

    `logits.click` (or `logits["click"]`) is the logit of pCTR, `logits.conversion` that of pCVR,
    the probability of a conversion given a click. A model may return further logits.
    """


@torch.fx.wrap
def _float32_linear(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Applies a linear layer in float32, even inside an autocast context."""
    if features.is_meta:  # autocast does not support the meta device
        return F.linear(features.float(), weight, bias)
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.float(), weight, bias)


class Tower(nn.Module):
    """ReLU layers and a last linear layer with one output.

    The hidden layers may compute in bfloat16. Their weights, the last layer and the logit stay
    float32, because bfloat16 logits have thousands of ties, which degrade every ranking.

    Args:
        in_features: F.
        layer_sizes: widths of the hidden layers; 360, 200, 80 in the paper. Without any, the tower
            is a linear layer.
        prior: share of positives among the examples, in (0, 1). The last bias starts at its
            logit, so that training does not begin by learning the base rate. None keeps torch's
            initialisation.
        dtype: dtype in which the hidden layers compute, torch.float32 or torch.bfloat16.
        device: device of the parameters.
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
        self.logit = nn.Linear((in_features, *layer_sizes)[-1], 1, device=device)
        self.dtype = dtype
        if prior is not None:
            if not 0 < prior < 1:
                raise OptionError(f"prior {prior:g} is not between 0 and 1")
            with torch.no_grad():
                self.logit.bias.fill_(math.log(prior) - math.log1p(-prior))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps features (B, F) to logits, float32 (B,)."""
        return self.read_out(self.last_hidden(features))

    def last_hidden(self, features: torch.Tensor) -> torch.Tensor:
        """Maps features (B, F) to the input of the last linear layer, (B, last hidden width)."""
        hidden = features.to(self.dtype)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            weight, bias = layer.weight.to(self.dtype), layer.bias.to(self.dtype)
            hidden = F.linear(hidden, weight, bias).relu_()
        return hidden

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the last linear layer and returns logits, float32 (B,)."""
        return _float32_linear(hidden, self.logit.weight, self.logit.bias).squeeze(-1)


def module_key(logit: str) -> str:
    """Returns the module name of a logit: its own name, changed if nn.ModuleDict reserves it."""
    return f"{logit}_" if hasattr(nn.ModuleDict, logit) else logit


class ByLogit(nn.ModuleDict):
    """A module for each logit, float32 (B,), over the same inputs.

    Args:
        modules: name of the logit → its module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__({module_key(name): module for name, module in modules.items()})
        self._logits = {module_key(name): name for name in modules}

    def forward(self, features: Any) -> Logits:
        """Computes the logits of B impressions, by the names of the modules."""
        return Logits({name: module(features) for name, module in self.by_logit()})

    def by_logit(self) -> Iterator[tuple[str, Any]]:
        """Yields the name of each logit and its module."""
        for key, module in self.items():
            yield self._logits[key], module


class Towers(ByLogit):
    """One tower per logit over the same features, independent of how the features were pooled.

    Args:
        towers: name of the logit → its tower; all have the same dtype.
    """

    def __init__(self, towers: Mapping[str, Tower]) -> None:
        super().__init__(towers)
        self.dtype = next(iter(towers.values())).dtype

    def forward(self, features: torch.Tensor) -> Logits:
        """Maps features (B, F), such as those of `PooledFeatures`, to logits, float32 (B,)."""
        return super().forward(features.to(self.dtype))  # cast once for all towers

    def of_each(self, features: torch.Tensor) -> Logits:
        """Maps the features of each of T towers, (T, B, F) in their order, to logits (B,)."""
        towers = enumerate(self.by_logit())
        return Logits({name: tower(features[place]) for place, (name, tower) in towers})


class EsmmTowers(Towers):
    """The click and the conversion tower of ESMM.

    Args:
        in_features: F.
        layer_sizes: widths of the hidden layers of each tower.
        click_prior: share of clicks among impressions, see `Tower`.
        conversion_prior: share of conversions among clicks.
        dtype: dtype in which the hidden layers compute.
        device: device of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int] = (360, 200, 80),
        *,
        click_prior: float | None = None,
        conversion_prior: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        priors = {"click": click_prior, "conversion": conversion_prior}
        super().__init__(
            {
                name: Tower(in_features, layer_sizes, prior=prior, dtype=dtype, device=device)
                for name, prior in priors.items()
            }
        )
