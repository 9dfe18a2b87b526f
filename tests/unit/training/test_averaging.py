"""The averaged weights beside the formula, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.sharding.apply import local_shards
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.averaging import DECAY, STEPS_BETWEEN, AverageWeights
from esmm_torchrec.training.fit import build_loop, training_part
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train
from tests.prepared_data import write_data_set
from tests.ranks import run_on_ranks

OPTIONS = TrainOptions(
    batch_size=20, embedding_dim=4, tower=(8,), epochs=3, sparse_lr=0.5, dense_lr=0.1, device="cpu"
)
STEPS = 18
"""Not a multiple of STEPS_BETWEEN."""


def _weights(loop: TrainingLoop) -> np.ndarray:
    values = loop.trainer.model.state_dict().values()
    parts = [part for value in values for part, _ in local_shards(value)]
    return np.concatenate([part.detach().numpy().ravel().astype(np.float64) for part in parts])


class _Record(Callback):
    """The weights before the first step and after each; raw, if it comes before the average."""

    def __init__(self) -> None:
        self.weights: list[np.ndarray] = []

    def on_start(self, loop: TrainingLoop) -> None:
        self.weights = [_weights(loop)]

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        self.weights.append(_weights(loop))


class _Look(Callback):
    """What `in_model` shows after a pass, and what the model holds afterwards."""

    def __init__(self, average: AverageWeights) -> None:
        self.average = average
        self.seen: list[np.ndarray] = []

    def on_pause(self, loop: TrainingLoop) -> None:
        with self.average.in_model():
            self.seen.append(_weights(loop))
        self.seen.append(_weights(loop))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> MappedSplit:
    path = tmp_path_factory.mktemp("data") / "prepared"
    return MappedSplit.open(write_data_set(path, train=120, test=20), "train")


def _expected(raw: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    average, last, found = raw[0], 0, {}
    for step in (*range(STEPS_BETWEEN, STEPS, STEPS_BETWEEN), STEPS):
        decay = min(DECAY, (1 + step) / (10 + step)) ** (step - last)
        average, last = decay * average + (1 - decay) * raw[step], step
        found[step] = average
    return found


def test_the_model_ends_with_the_average(split: MappedSplit) -> None:
    record, average = _Record(), AverageWeights()
    look = _Look(average)
    with process_group("cpu") as ranks:
        loop = build_loop(
            split,
            OPTIONS,
            ranks,
            part=training_part(split, OPTIONS),
            callbacks=(record, average, look),
        )
        loop.run()
        assert loop.step == STEPS
        expected = _expected(record.weights)
        np.testing.assert_allclose(_weights(loop), expected[STEPS], rtol=1e-5, atol=1e-6)
    assert np.abs(expected[STEPS] - record.weights[STEPS]).max() > 0.01
    # After the first pass of 6 steps, the average is that of step 4, and training goes on with its
    # own weights.
    np.testing.assert_allclose(look.seen[0], expected[4], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(look.seen[1], record.weights[6])


def test_a_resumed_run_ends_with_the_same_average(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data", train=120, test=40)
    options = replace(OPTIONS, average_weights="on", checkpoint_every=7)
    with process_group("cpu") as ranks:
        whole = train(tmp_path / "data", tmp_path / "run", options, ranks)
        resumed = replace(options, resume="7")
        assert train(tmp_path / "data", tmp_path / "run", resumed, ranks)["test"] == whole["test"]


def _resumed(data: Path, out: Path, options: TrainOptions) -> dict[str, Any]:
    with process_group("cpu") as ranks:
        return train(data, out, options, ranks)["test"]


def test_an_average_goes_to_other_ranks_and_placements(tmp_path: Path) -> None:
    """Two ranks with whole tables, then one rank, then two with halves of tables: each table keeps
    its own average."""
    write_data_set(tmp_path / "data", train=120, test=40)
    options = replace(OPTIONS, average_weights="on", sharding="table_wise", checkpoint_every=7)
    whole, *_ = run_on_ranks(2, _resumed, tmp_path / "data", tmp_path / "run", options)
    for ranks, sharding in ((1, "table_wise"), (2, "row_wise")):
        resumed = replace(options, sharding=sharding, resume="7")
        test, *_ = run_on_ranks(ranks, _resumed, tmp_path / "data", tmp_path / "run", resumed)
        for name in ("ctr_log_loss", "cvr_log_loss", "ctcvr_log_loss"):
            assert test[name] == pytest.approx(whole[name], rel=1e-4), (ranks, sharding, name)


def test_a_run_without_a_step_left_has_the_average(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data", train=120, test=40)
    options = replace(OPTIONS, average_weights="on", checkpoint_every=6)
    _resumed(tmp_path / "data", tmp_path / "run", options)
    ended = replace(options, epochs=1, resume="6")
    test = _resumed(tmp_path / "data", tmp_path / "run", ended)
    expected = _resumed(tmp_path / "data", tmp_path / "short", replace(options, epochs=1))
    raw = replace(options, epochs=1, average_weights="off")
    assert test["ctr_log_loss"] != pytest.approx(
        _resumed(tmp_path / "data", tmp_path / "raw", raw)["ctr_log_loss"], rel=1e-3
    )
    # The shorter run adds its last step, which is not a multiple of STEPS_BETWEEN, to the average.
    assert test["ctr_log_loss"] == pytest.approx(expected["ctr_log_loss"], rel=2e-2)


def test_early_stopping_does_not_average() -> None:
    with pytest.raises(
        OptionError, match="`average_weights` on cannot be combined with early stopping"
    ):
        TrainOptions(average_weights="on", validation_share=0.2)
