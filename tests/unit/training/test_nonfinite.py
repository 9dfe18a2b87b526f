"""A loss that is not finite stops the run or is skipped, and never reaches a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from esmm_torchrec.checkpoints.files import checkpoint_folders
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import RunError
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.fit import build_loop, training_part
from esmm_torchrec.training.nonfinite import MAX_SKIPPED_STEPS, WatchLoss, check_weights
from esmm_torchrec.training.options import TrainOptions
from tests.prepared_data import write_data_set
from tests.ranks import train_here

OPTIONS = TrainOptions(
    batch_size=20, embedding_dim=8, tower=(8,), epochs=1, dense_lr=0.01, shuffle_chunk=1
)
DIVERGING = replace(OPTIONS, dense_lr=1e30, sparse_lr=1e30, checkpoint_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=300, test=60)
    return path


def _broken_row(data: Path, *, row: int) -> MappedSplit:
    """The training split with one row that is not finite."""
    split = MappedSplit.open(PreparedDataSet.open(data), "train")
    dense = np.array(split.dense)
    dense[row] = np.nan
    return replace(split, dense=dense)


def _run(data: Path, folder: Path, options: TrainOptions) -> dict[str, torch.Tensor]:
    """Weights after training on data with a broken row."""
    split = _broken_row(data, row=123)
    with process_group("cpu") as ranks:
        loop = build_loop(
            split,
            options,
            ranks,
            part=training_part(split, options),
            callbacks=(WatchLoss(folder, options.on_nonfinite),),
        )
        loop.run()
        check_weights(loop)
        state = loop.trainer.model.state_dict()
        weights = {key: state[key].detach().clone() for key in state if ".towers." in key}
    return weights


def test_a_diverging_run_stops_before_the_checkpoint(data: Path, tmp_path: Path) -> None:
    def failing() -> None:
        with pytest.raises(RunError, match=r"(is|are) not finite"):
            train_here(data, tmp_path / "run", DIVERGING)

    failing()
    assert max(checkpoint_folders(tmp_path / "run" / "checkpoints"), default=1) == 1
    for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_the_batch_of_the_step_is_saved_for_replay(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss of step \d+ is not finite and its batch is "):
        _run(data, tmp_path, OPTIONS)
    (path,) = tmp_path.iterdir()
    saved = torch.load(path, weights_only=False)
    assert path.name == f"step-{saved['step']:08d}-rank-0.pt"
    assert saved["reader"] == {"epoch": 0, "row": 20 * (saved["step"] - 1)}
    assert saved["batch"].features.dense_features.isnan().any()


def test_a_skipped_step_changes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _run(data, tmp_path, replace(OPTIONS, on_nonfinite="skip"))
    assert capsys.readouterr().out.count("is skipped because its loss is not finite") == 1
    assert all(value.isfinite().all() for value in weights.values())
    assert not list(tmp_path.iterdir())


def test_a_run_that_only_skips_stops(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(DIVERGING, on_nonfinite="skip", checkpoint_every=0)

    def failing() -> None:
        with pytest.raises(RunError, match=f"step {2 + MAX_SKIPPED_STEPS} is not finite"):
            train_here(data, tmp_path / "run", options)

    failing()
    assert capsys.readouterr().out.count("is skipped") == MAX_SKIPPED_STEPS
