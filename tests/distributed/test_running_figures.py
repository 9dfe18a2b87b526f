"""Running figures are the same on any number of ranks, also after the number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from esmm_torchrec.batch import NamedTensors
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.tasks import DEFAULT_TASKS
from esmm_torchrec.training.running_figures import RunningFigures
from tests.ranks import run_on_ranks

ROWS, STEPS, WINDOW_STEPS = 60, 9, 5


def _steps() -> list[TrainOutput]:
    """Makes the outputs of steps over all ranks; the loss of a step is its number."""
    rng = torch.Generator().manual_seed(4)
    steps = []
    for step in range(STEPS):
        click = (torch.rand(ROWS, generator=rng) < 0.4).float()
        conversion = click * (torch.rand(ROWS, generator=rng) < 0.5)
        logits = {name: torch.randn(ROWS, generator=rng) for name in ("click", "conversion")}
        labels = {"click": click, "conversion": conversion}
        labels["weight"] = torch.rand(ROWS, generator=rng)
        steps.append(_output(float(step), logits, labels))
    return steps


def _slice(step: TrainOutput, rank: int, world_size: int) -> TrainOutput:
    own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    return _output(
        float(step.loss),
        {name: value[own] for name, value in step.logits.items()},
        {name: value[own] for name, value in step.labels.items()},
    )


def _output(
    loss: float, logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]
) -> TrainOutput:
    return TrainOutput(torch.tensor(loss), Logits(logits), NamedTensors(labels))


def _compute(first: int, last: int, states: list[dict[str, Any]]) -> Any:
    with process_group("cpu") as ranks:
        figures = RunningFigures(ranks, DEFAULT_TASKS, window_size=WINDOW_STEPS * ROWS)
        if states:
            figures.load_state_dicts(states)
        for step in _steps()[first:last]:
            figures.add(_slice(step, ranks.rank, ranks.world_size))
        return figures.state_dict(), figures.compute()


@pytest.fixture(scope="module")
def whole() -> dict[str, float]:
    ((_, figures),) = run_on_ranks(1, _compute, 0, STEPS, [])
    return figures


def test_the_figures_are_scikit_learns_over_the_window(whole: dict[str, float]) -> None:
    steps = _steps()
    assert whole["loss"] == sum(range(STEPS)) / STEPS
    outputs = steps[-WINDOW_STEPS:]
    click = torch.cat([step.labels.click for step in outputs])
    weight = torch.cat([step.labels.weight for step in outputs])
    pctr = torch.cat([step.logits.click for step in outputs]).sigmoid()
    assert whole["ctr_auc"] == pytest.approx(
        roc_auc_score(click, pctr, sample_weight=weight), abs=1e-5
    )
    base_rate = float((click * weight).sum() / weight.sum())
    base = log_loss(click, torch.full_like(click, base_rate), sample_weight=weight)
    assert whole["ctr_ne"] == pytest.approx(
        log_loss(click, pctr, sample_weight=weight) / base, rel=1e-4
    )


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_the_figures_survive_a_checkpoint(before: int, after: int, whole: dict[str, float]) -> None:
    states = [state for state, _ in run_on_ranks(before, _compute, 0, 6, [])]
    (_, figures), *others = run_on_ranks(after, _compute, 6, STEPS, states)
    assert all(other == {} for _, other in others)
    assert figures == pytest.approx(whole, abs=1e-6)
