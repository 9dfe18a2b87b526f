"""The training loop on one rank: when callbacks are called, and that they change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.fit import build_loop, training_part
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import TrainOptions
from tests.prepared_data import write_data_set

OPTIONS = TrainOptions(batch_size=20, embedding_dim=8, tower=(8,), epochs=2, dense_lr=0.01)
STEPS_PER_PASS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=115, test=20)
    return path


class _Record(Callback):
    """Notes every call; pauses, stops or fails after given steps, and scores at each pause."""

    def __init__(
        self,
        split: MappedSplit | None = None,
        *,
        pause: int | None = None,
        stop: int | None = None,
        fail: int | None = None,
    ) -> None:
        self.calls: list[tuple[str, int]] = []
        self.losses: list[float] = []
        self._split = split
        self._pause, self._stop, self._fail = pause, stop, fail
        self._step = 0

    def on_start(self, loop: TrainingLoop) -> None:
        self.calls.append(("start", loop.step))

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:
        self._step = loop.step
        self.losses.append(float(output.loss))
        if loop.step == self._pause:
            loop.pause()
        if loop.step == self._stop:
            loop.stop()
        if loop.step == self._fail:
            raise RuntimeError("failed on purpose")

    def on_pause(self, loop: TrainingLoop) -> None:
        self.calls.append(("pause", loop.step))
        if self._split is not None:
            score_split(loop.trainer.model, self._split, loop.ranks, batch_size=7, progress=False)

    def on_end(self, loop: TrainingLoop) -> None:
        self.calls.append(("end", loop.step))

    def close(self) -> None:
        self.calls.append(("close", self._step))


def _run(data: Path, record: _Record, *, max_steps: int | None = None) -> dict[str, torch.Tensor]:
    """Weights of the towers after training."""
    train = MappedSplit.open(PreparedDataSet.open(data), "train")
    with process_group("cpu") as ranks:
        loop = build_loop(
            train,
            OPTIONS,
            ranks,
            part=training_part(train, OPTIONS),
            callbacks=(record,),
        )
        loop.max_steps = max_steps
        loop.run()
        state = loop.trainer.model.state_dict()
        weights = {key: state[key].detach().clone() for key in state if ".towers." in key}
    return weights


@pytest.fixture(scope="module")
def plain(data: Path) -> tuple[_Record, dict[str, torch.Tensor]]:
    record = _Record()
    return record, _run(data, record)


def test_callbacks_are_called_in_order(plain: tuple[_Record, dict[str, torch.Tensor]]) -> None:
    record, _ = plain
    assert len(record.losses) == 2 * STEPS_PER_PASS
    assert record.calls == [("start", 0), ("pause", 6), ("pause", 12), ("end", 12), ("close", 12)]


def test_scoring_in_the_middle_of_a_pass_changes_nothing(
    data: Path, plain: tuple[_Record, dict[str, torch.Tensor]]
) -> None:
    split = MappedSplit.open(PreparedDataSet.open(data), "test")
    record = _Record(split, pause=3)
    weights = _run(data, record)
    assert [call for call in record.calls if call[0] == "pause"] == [
        ("pause", 3), ("pause", 6), ("pause", 12),
    ]  # fmt: skip
    assert record.losses == plain[0].losses
    for key, value in plain[1].items():
        torch.testing.assert_close(weights[key], value, atol=0, rtol=0)


@pytest.mark.parametrize(("stop", "max_steps"), [(4, None), (None, 4)])
def test_a_stopped_loop_has_trained_the_steps_before_it_alone(
    stop: int | None,
    max_steps: int | None,
    data: Path,
    plain: tuple[_Record, dict[str, torch.Tensor]],
) -> None:
    record = _Record(stop=stop)
    _run(data, record, max_steps=max_steps)
    assert record.losses == plain[0].losses[:4]
    assert record.calls == [("start", 0), ("end", 4), ("close", 4)]


def test_callbacks_are_closed_after_an_error(data: Path) -> None:
    record = _Record(fail=2)

    def failing() -> None:
        with pytest.raises(RuntimeError, match="on purpose"):
            _run(data, record)

    failing()
    assert record.calls == [("start", 0), ("close", 2)]
