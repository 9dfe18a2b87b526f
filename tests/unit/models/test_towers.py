"""Towers against torch's own layers, composed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.towers import EsmmTowers, Tower, Towers

BATCH, WIDTH, LAYERS = 257, 24, (36, 20, 8)


def _sequential(tower: Tower) -> nn.Sequential:
    """The same layers as a module of torch's, in float64."""
    layers: list[nn.Module] = []
    for layer in tower.hidden:
        layers += [copy.deepcopy(layer), nn.ReLU()]
    return nn.Sequential(*layers, copy.deepcopy(tower.logit)).double()


def _features(seed: int = 0) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-1)], ids=str
)
def test_a_tower_is_its_layers_in_turn(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    tower = Tower(WIDTH, LAYERS, dtype=dtype)
    expected = _sequential(tower)
    given, wanted = _features().requires_grad_(), _features().double().requires_grad_()

    logits, reference = tower(given), expected(wanted).squeeze(1)
    upstream = torch.randn(BATCH, generator=torch.Generator().manual_seed(2))
    (logits * upstream).sum().backward()
    (reference * upstream).sum().backward()

    assert logits.dtype == torch.float32
    pairs = [(logits, reference), (given.grad, wanted.grad)]
    for own, other in zip(tower.parameters(), expected.parameters(), strict=True):
        assert own.dtype == torch.float32
        pairs.append((own.grad, other.grad))
    for value, exact in pairs:
        assert value is not None
        assert exact is not None
        error = (value.double() - exact).norm() / exact.norm()
        assert error < tolerance


def test_bfloat16_logits_hardly_tie() -> None:
    tower = Tower(WIDTH, LAYERS, dtype=torch.bfloat16)
    assert len(tower(_features()).unique()) > 0.95 * BATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_stay_float32_inside_autocast(dtype: torch.dtype) -> None:
    tower = Tower(WIDTH, LAYERS, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits = tower(_features())
    assert logits.dtype == torch.float32
    assert len(logits.unique()) > 0.95 * BATCH


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1])
def test_a_prior_without_a_logit_is_refused(prior: float) -> None:
    with pytest.raises(OptionError, match=r"prior .* is not between 0 and 1"):
        Tower(WIDTH, LAYERS, prior=prior)


def test_a_task_called_as_an_attribute_of_torch_modules_has_a_tower() -> None:
    towers = Towers({"keys": Tower(WIDTH, LAYERS)})
    assert dict(towers.named_children()).keys() == {"keys_"}
    assert list(towers(_features())) == ["keys"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_towers_are_each_of_them(dtype: torch.dtype) -> None:
    towers = EsmmTowers(WIDTH, LAYERS, dtype=dtype)
    features = _features()
    logits = towers(features)
    torch.testing.assert_close(logits.click, towers.click(features), atol=0, rtol=0)
    torch.testing.assert_close(logits.conversion, towers.conversion(features), atol=0, rtol=0)
    assert list(logits) == ["click", "conversion"]


def test_the_gradients_of_two_towers_add_up() -> None:
    towers = EsmmTowers(WIDTH, LAYERS)
    together = _features().requires_grad_()
    logits = towers(together)
    (logits.click.sum() + 2 * logits.conversion.sum()).backward()
    apart = _features().requires_grad_()
    (towers.click(apart).sum() + 2 * towers.conversion(apart).sum()).backward()
    torch.testing.assert_close(together.grad, apart.grad)


def test_a_prior_is_where_training_starts() -> None:
    tower = Tower(WIDTH, LAYERS, prior=0.04)
    with torch.no_grad():
        tower.logit.weight.zero_()
        torch.testing.assert_close(tower(_features()).sigmoid(), torch.full((BATCH,), 0.04))
