"""CheckpointManager: what it saves, keeps, prunes and gives back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from esmm_torchrec.checkpoints.files import (
    check_files,
    checkpoint_folders,
    find_best,
    model_checkpoint,
    read_description,
    remove_leftovers,
)
from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.errors import RunError
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


def _load_where_one_rank_sees_damage(folder: Path) -> str:
    def work(ranks: Ranks) -> str:
        trainer = _trainer(ranks)
        latest = CheckpointManager(folder, ranks=ranks).find()
        assert latest is not None
        if ranks.rank == 1:
            latest = latest.with_name(f"{latest.name}-seen-by-rank-1")
        with pytest.raises(RunError) as refusal:
            CheckpointManager(folder, ranks=ranks).load(
                latest, model=trainer.model, optimizer=trainer.optimizer
            )
        return str(refusal.value)

    with process_group("cpu") as ranks:
        return work(ranks)


@pytest.mark.parametrize("file", [".metadata", "checkpoint.json", "__0_0.distcp"])
def test_what_one_rank_cannot_read_is_refused_by_all(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run_on_ranks(2, _save_five, folder)
    seen = shutil.copytree(folder / "step-00000005", folder / "step-00000005-seen-by-rank-1")
    with (seen / file).open("r+b") as damaged:
        damaged.seek(40)
        byte = damaged.read(1)
        damaged.seek(40)
        damaged.write(bytes([byte[0] ^ 1]))
    first, second = run_on_ranks(2, _load_where_one_rank_sees_damage, folder)
    assert first == second
    assert first.startswith(f"checkpoint {seen} is damaged or belongs to another model ({file}")


def test_each_changed_byte_is_found(tmp_path: Path) -> None:
    run_on_ranks(1, _save_five, tmp_path)
    latest = tmp_path / "step-00000005"
    files = read_description(latest)["files"]
    assert files.keys() == {".metadata", "__0_0.distcp", "rank-00000.pt"}
    check_files(latest, files, rank=0, num_ranks=1)
    for name in files:
        content = (latest / name).read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 8
            (latest / name).write_bytes(changed)
            with pytest.raises(RunError, match=f"{name} does not match its checksum"):
                check_files(latest, files, rank=0, num_ranks=1)
        (latest / name).write_bytes(content[:-1])
        with pytest.raises(RunError, match=f"{name} has .* bytes instead of"):
            check_files(latest, files, rank=0, num_ranks=1)
        (latest / name).write_bytes(content)
    text = (latest / "checkpoint.json").read_text()
    (latest / "checkpoint.json").write_text(text.replace('"row": 50', '"row": 51'))
    with pytest.raises(RunError, match="its content does not match its checksum"):
        read_description(latest)


def test_a_step_that_is_saved_again_is_there_at_every_moment(tmp_path: Path) -> None:
    run_on_ranks(1, _save_five, tmp_path)
    step = tmp_path / "step-00000005"
    # Killed between the two renames, and while the old one was being deleted.
    step.rename(tmp_path / "step-00000005.replaced")
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000004.replaced")
    remove_leftovers(tmp_path)
    assert list(checkpoint_folders(tmp_path)) == [2, 4, 5]
    assert not list(tmp_path.glob("*.replaced"))
    (loaded,) = run_on_ranks(1, _load, tmp_path)
    assert loaded[0] == 5


def test_a_damaged_mark_of_the_best_is_no_other_mark(tmp_path: Path) -> None:
    run_on_ranks(1, _save_five, tmp_path)
    assert find_best(tmp_path) == 2
    mark = tmp_path / "best.json"
    mark.write_text(mark.read_text().replace("2", "4", 1))
    with pytest.raises(RunError, match="which names the best checkpoint, is damaged; delete it"):
        model_checkpoint(tmp_path)
    mark.unlink()
    assert model_checkpoint(tmp_path) == tmp_path / "step-00000005"
