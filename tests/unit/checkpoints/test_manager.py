"""CheckpointManager: what it saves, keeps, prunes and gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from esmm_torchrec.checkpoints.files import checkpoint_folders
from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.trainer import Trainer
from tests.ranks import run_on_ranks

SCHEMA = Schema((Table("item", 7),), (IdFeature("item", "item"),))


def _trainer(ranks: Ranks) -> Trainer:
    options = TrainOptions(
        embedding_dim=8, tower=(6,), batch_size=4, sharding="row_wise", device="cpu"
    )
    task = build_train_task(SCHEMA, options.model, seed=1)
    return Trainer(task, options=options, ranks=ranks, workload=Workload(options.batch_size))


def _save_five(folder: Path) -> list[int]:
    def work(ranks: Ranks) -> list[int]:
        trainer = _trainer(ranks)
        trainer.optimizer.init_state()  # as a first step would
        with CheckpointManager(folder, ranks=ranks, keep_last=2) as checkpoints:
            assert checkpoints.find() is None
            for step in (1, 2, 3, 4, 5):
                checkpoints.save(
                    step=step,
                    model=trainer.model,
                    optimizer=trainer.optimizer,
                    progress={"reader": {"row": 10 * step}, "loss": 0.1},
                    rank_state={"window": torch.arange(3.0) + ranks.rank},
                    best=step in (1, 2),
                )
        return list(checkpoint_folders(folder))

    with process_group("cpu") as ranks:
        return work(ranks)


def _load(folder: Path) -> tuple[int, dict[str, Any], list[list[float]]]:
    def work(ranks: Ranks) -> tuple[int, dict[str, Any], list[list[float]]]:
        trainer = _trainer(ranks)
        checkpoints = CheckpointManager(folder, ranks=ranks)
        latest = checkpoints.find()
        assert latest is not None
        loaded = checkpoints.load(latest, model=trainer.model, optimizer=trainer.optimizer)
        windows = []
        for rank in range(loaded.num_ranks):
            state = loaded.rank_state(rank)
            assert state is not None
            windows.append(state["window"].tolist())
        return loaded.step, dict(loaded.progress), windows

    with process_group("cpu") as ranks:
        return work(ranks)


def test_the_last_and_the_best_are_kept_with_the_state_of_each_rank(tmp_path: Path) -> None:
    assert run_on_ranks(2, _save_five, tmp_path) == [[2, 4, 5], [2, 4, 5]]
    (loaded,) = run_on_ranks(1, _load, tmp_path)
    progress = {"reader": {"row": 50}, "loss": 0.1}
    assert loaded == (5, progress, [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
