"""Learning rates over the steps, and clipped gradients, beside what the formulas say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.fit import build_loop, training_part
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import ScheduleOption, TrainOptions
from esmm_torchrec.training.schedule import ScheduleLearningRates
from tests.prepared_data import write_data_set

OPTIONS = TrainOptions(
    batch_size=20, embedding_dim=4, tower=(8,), epochs=2, sparse_lr=0.5, dense_lr=0.1, device="cpu"
)
STEPS = 12


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> MappedSplit:
    path = tmp_path_factory.mktemp("data") / "prepared"
    return MappedSplit.open(write_data_set(path, train=120, test=20), "train")


class _Rates(Callback):
    """The learning rates that each step was made with."""

    def __init__(self) -> None:
        self.next: list[float] = []
        self.used: list[list[float]] = []

    def on_start(self, loop: TrainingLoop) -> None:
        self.next = self._rates(loop)

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        self.used.append(self.next)
        self.next = self._rates(loop)

    @staticmethod
    def _rates(loop: TrainingLoop) -> list[float]:
        return [group["lr"] for group in loop.trainer.optimizer.param_groups]


def _run(split: MappedSplit, options: TrainOptions, *, stop: int | None = None) -> tuple:
    rates = _Rates()
    schedule = ScheduleLearningRates(options.lr_schedule, warmup_steps=options.warmup_steps)
    with process_group("cpu") as ranks:
        loop = build_loop(
            split,
            replace(options, max_steps=stop),
            ranks,
            part=training_part(split, options),
            callbacks=(schedule, rates),
        )
        before = _weights(loop)
        loop.run()
        return rates.used, before, _weights(loop)


def _weights(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    state = loop.trainer.model.state_dict()
    return {
        key: (value.local_shards()[0].tensor if hasattr(value, "local_shards") else value).clone()
        for key, value in state.items()
    }


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_rates_follow_the_formula(
    schedule: ScheduleOption, warmup: int, split: MappedSplit
) -> None:
    used, _, _ = _run(split, replace(OPTIONS, lr_schedule=schedule, warmup_steps=warmup))
    assert len(used) == STEPS
    falls = {
        "constant": lambda _: 1.0,
        "linear": lambda step: 1 - step / STEPS,
        "cosine": lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2,
    }
    for step, rates in enumerate(used):
        factor = (step + 1) / warmup if step < warmup else falls[schedule](step)
        expected = [0.5 * factor] * (len(rates) - 1) + [0.1 * factor]
        assert rates == pytest.approx(expected), step


def test_a_skipped_step_does_not_delay_the_schedule(split: MappedSplit) -> None:
    assert split.dense is not None
    dense = np.array(split.dense)
    dense[70] = np.nan
    options = replace(OPTIONS, lr_schedule="linear", on_nonfinite="skip")
    used, _, _ = _run(replace(split, dense=dense), options)
    assert [rates[-1] for rates in used] == pytest.approx(
        [0.1 * (1 - step / STEPS) for step in range(STEPS)]
    )


def test_the_fused_tables_are_updated_at_the_scheduled_rate(split: MappedSplit) -> None:
    options = replace(OPTIONS, sparse_optimizer="sgd")
    _, before, full = _run(split, options, stop=1)
    _, _, half = _run(split, replace(options, warmup_steps=2), stop=1)
    tables = [key for key in before if ".embedding_bags." in key]
    moved = 0
    for key in tables:
        step = full[key] - before[key]
        torch.testing.assert_close(half[key] - before[key], step / 2, rtol=1e-4, atol=1e-7)
        moved += int(step.abs().sum() > 0)
    assert moved


def test_the_gradient_of_the_towers_is_clipped(split: MappedSplit) -> None:
    def gradients(limit: float | None) -> torch.Tensor:
        options = replace(OPTIONS, clip_gradients=limit)
        with process_group("cpu") as ranks:
            part = training_part(split, options)
            loop = build_loop(split, options, ranks, part=part)
            trainer = loop.trainer
            loss, _ = trainer.model(next(iter(loop.reader)))
            loss.backward()
            trainer.optimizer.step()
            named = trainer.model.named_parameters()
            towers = [value for name, value in named if ".towers." in name]
            return torch.cat([value.grad.flatten() for value in towers if value.grad is not None])

    whole = gradients(None)
    norm = float(whole.norm())
    torch.testing.assert_close(gradients(norm / 2), whole / 2, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(gradients(norm * 2), whole)


def test_a_falling_rate_needs_a_number_of_passes() -> None:
    with pytest.raises(OptionError, match="`lr_schedule` cosine depends on the last step"):
        TrainOptions(lr_schedule="cosine")


def test_a_resumed_schedule_continues(split: MappedSplit) -> None:
    """A schedule starts at the step of a checkpoint."""
    options = replace(OPTIONS, lr_schedule="linear", warmup_steps=3)
    used, _, _ = _run(split, options)
    rates = _Rates()
    with process_group("cpu") as ranks:
        part = training_part(split, options)
        callbacks = (ScheduleLearningRates("linear", warmup_steps=3), rates)
        loop = build_loop(split, options, ranks, part=part, callbacks=callbacks)
        loop.load_state_dict({"step": 7, "seconds": 0.0, "reader": {"epoch": 1, "row": 20}})
        loop.run()
    assert rates.used == [pytest.approx(step) for step in used[7:]]
