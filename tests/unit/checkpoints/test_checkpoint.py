"""Checkpoints: training goes on from one as if it had not stopped, on other ranks, with another
placement and other kernels too; what cannot be written or loaded is said."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from msgspec import structs
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.checkpoints.files import checkpoint_folders, remove_later, step_of
from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.errors import RunError
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.sharding.plan_json import write_plan
from esmm_torchrec.sharding.planner import ShardingOption, SparseOptimizerOption, Workload
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.trainer import Trainer
from tests.ranks import run_on_ranks

# Rows that two ranks do not divide evenly, and two tables, so that table_wise gives each rank one.
SCHEMA = Schema(
    (Table("item", 7), Table("user", 9)), (IdFeature("item", "item"), IdFeature("user", "user"))
)
GLOBAL_BATCH = 12
BEFORE, AFTER = 4, 2
"""Steps up to the checkpoint, and from there on."""


@dataclass(frozen=True)
class Placement:
    """How both tables are placed."""

    sharding: ShardingOption
    optimizer: SparseOptimizerOption
    kernel: str

    @property
    def name(self) -> str:
        return f"{self.sharding}-{self.optimizer}-{self.kernel}"


ADAM = [
    Placement(sharding, "adam", "dense")
    for sharding in ("table_wise", "row_wise", "column_wise", "table_row_wise")
]
ADAGRAD = [
    Placement("table_wise", "adagrad", "dense"),
    Placement("row_wise", "adagrad", "fused"),
    Placement("column_wise", "adagrad", "dense"),
    Placement("table_wise", "adagrad", "fused"),
    Placement("data_parallel", "adagrad", "dense"),
    Placement("column_wise", "adagrad", "fused"),
    Placement("row_wise", "adagrad", "dense"),
]
OTHERS = [
    Placement("row_wise", "rowwise_adagrad", "fused"),
    Placement("table_wise", "rowwise_adagrad", "fused"),
    Placement("row_wise", "sgd", "fused"),
    Placement("table_wise", "sgd", "dense"),
]
FAMILIES = {"adam": ADAM, "adagrad": ADAGRAD, "rowwise_adagrad": OTHERS[:2], "sgd": OTHERS[2:]}


def _trainer(
    placement: Placement, folder: Path, ranks: Ranks, *, schema: Schema = SCHEMA
) -> Trainer:
    options = TrainOptions(
        embedding_dim=8,
        tower=(6,),
        batch_size=GLOBAL_BATCH // ranks.world_size,
        sharding=placement.sharding,
        sparse_optimizer=placement.optimizer,
        sparse_lr=0.1,
        device="cpu",
    )

    def build(options: TrainOptions) -> Trainer:
        task = build_train_task(schema, options.model, seed=1)
        return Trainer(task, options=options, ranks=ranks, workload=Workload(options.batch_size))

    trainer = build(options)
    kernels = {table.compute_kernel for table in trainer.plan.tables.values()}
    if kernels == {placement.kernel}:
        return trainer
    tables = {
        name: structs.replace(table, compute_kernel=placement.kernel)
        for name, table in trainer.plan.tables.items()
    }
    plan = folder / f"{placement.name}-{ranks.world_size}.json"
    ranks.from_first(lambda: write_plan(replace(trainer.plan, tables=tables), plan))
    return build(replace(options, plan=plan))


def _step(trainer: Trainer, step: int, ranks: Ranks) -> None:
    """One step over the same impressions, whatever the number of ranks."""
    rng = torch.Generator().manual_seed(step)
    ids = torch.stack([torch.randint(0, t.num_embeddings, (GLOBAL_BATCH,), generator=rng)
                       for t in SCHEMA.tables])  # fmt: skip
    click = torch.randint(0, 2, (GLOBAL_BATCH,), generator=rng).float()
    size = GLOBAL_BATCH // ranks.world_size
    own = slice(ranks.rank * size, (ranks.rank + 1) * size)
    batch = ImpressionBatch(
        click=click[own],
        conversion=click[own] * (torch.arange(GLOBAL_BATCH)[own] % 2),
        sparse_features=KeyedJaggedTensor.from_lengths_sync(
            keys=["item", "user"],
            values=ids[:, own].reshape(-1),
            lengths=torch.ones(2 * size, dtype=torch.int32),
        ),
    )
    trainer.optimizer.zero_grad()
    loss, _ = trainer.model(batch)
    loss.backward()
    trainer.optimizer.step()


def _weights(trainer: Trainer) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """This rank's part of each weight: where it begins, and what it is."""
    return _parts(trainer.model.state_dict())


def _parts(state: dict[str, torch.Tensor]) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    parts = {}
    for key, value in state.items():
        if isinstance(value, ShardedTensor):
            parts[key] = [
                (tuple(shard.metadata.shard_offsets), shard.tensor.clone())
                for shard in value.local_shards()
            ]
        else:
            parts[key] = [((0,) * value.dim(), value.detach().clone())]
    return parts


def _whole(of_ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The weights of all ranks put together."""
    weights = {}
    for key in {key for of_rank in of_ranks for key in of_rank}:
        parts = [part for of_rank in of_ranks for part in of_rank.get(key, ())]
        ends = [
            tuple(a + b for a, b in zip(offset, part.shape, strict=True)) for offset, part in parts
        ]
        whole = torch.full(tuple(map(max, zip(*ends, strict=True))), float("nan"))
        for (offset, part), end in zip(parts, ends, strict=True):
            whole[tuple(map(slice, offset, end))] = part
        weights[key] = whole
    return weights


def _write_all(folder: Path, go_on: bool) -> dict[str, Any]:
    """Trains every placement to its checkpoint; with `go_on` beyond it, and gives the weights."""
    weights = {}

    def one(placement: Placement, ranks: Ranks) -> None:
        trainer = _trainer(placement, folder, ranks)
        for step in range(BEFORE):
            _step(trainer, step, ranks)
        with CheckpointManager(
            folder / placement.name / str(ranks.world_size), ranks=ranks
        ) as checkpoints:
            checkpoints.save(
                step=BEFORE, model=trainer.model, optimizer=trainer.optimizer, progress={"row": 7}
            )
            # Training goes on while a thread writes.
            if go_on:
                for step in range(BEFORE, BEFORE + AFTER):
                    _step(trainer, step, ranks)
                weights[placement.name] = _weights(trainer)

    with process_group("cpu") as ranks:
        for placement in (*ADAM, *ADAGRAD, *OTHERS):
            one(placement, ranks)
    return weights


def _go_on_all(folder: Path, written_on: int) -> dict[str, Any]:
    """Goes on from each checkpoint, with its own placement and with the next of its family."""
    weights = {}

    def one(written: Placement, placement: Placement, ranks: Ranks) -> None:
        trainer = _trainer(placement, folder, ranks)
        loaded = CheckpointManager(folder, ranks=ranks).load(
            folder / written.name / str(written_on) / f"step-{BEFORE:08d}",
            model=trainer.model,
            optimizer=trainer.optimizer,
        )
        assert (loaded.step, loaded.progress) == (BEFORE, {"row": 7})
        assert loaded.num_ranks == written_on
        for count in _fused_counts(trainer):
            assert count == BEFORE
        for step in range(BEFORE, BEFORE + AFTER):
            _step(trainer, step, ranks)
        weights[f"{written.name} -> {placement.name}"] = _weights(trainer)

    with process_group("cpu") as ranks:
        for family in FAMILIES.values():
            for index, written in enumerate(family):
                for placement in (written, family[(index + 1) % len(family)]):
                    one(written, placement, ranks)
    return weights


def _fused_counts(trainer: Trainer) -> list[int]:
    """The steps that fbgemm's kernels count, by which its Adam corrects the bias."""
    collections = [
        m for m in trainer.model.modules() if isinstance(m, ShardedEmbeddingBagCollection)
    ]
    return [
        int(module.get_buffer("iter"))
        for collection in collections
        for lookup in collection._lookups
        for module in lookup.modules()
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Placement → weights of one rank that never stopped; the checkpoints are there, too."""
    (by_placement,) = run_on_ranks(1, _write_all, folder, True)
    run_on_ranks(2, _write_all, folder, False)
    return {name: _whole([parts]) for name, parts in by_placement.items()}


@pytest.mark.parametrize(("written_on", "read_on"), [(2, 2), (2, 1), (1, 2)])
def test_training_goes_on_as_if_it_had_not_stopped(
    written_on: int,
    read_on: int,
    folder: Path,
    uninterrupted: dict[str, dict[str, torch.Tensor]],
) -> None:
    of_ranks = run_on_ranks(read_on, _go_on_all, folder, written_on)
    assert len(of_ranks[0]) == 2 * (len(ADAM) + len(ADAGRAD) + len(OTHERS))
    for name in of_ranks[0]:
        expected = uninterrupted[name.partition(" -> ")[0]]
        weights = _whole([of_rank[name] for of_rank in of_ranks])
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                weights[key],
                value,
                atol=2e-5,
                rtol=1e-4,
                msg=lambda m, n=name, k=key: f"{n} {k} {m}",
            )


def _save_column_wise(folder: Path) -> None:
    placement = Placement("column_wise", "rowwise_adagrad", "fused")

    def one(ranks: Ranks) -> None:
        trainer = _trainer(placement, folder, ranks)
        tables = {
            name: structs.replace(table, ranks=(0, 1), shards=_halves(table))
            for name, table in trainer.plan.tables.items()
        }
        plan = folder / "halves.json"
        ranks.from_first(lambda: write_plan(replace(trainer.plan, tables=tables), plan))
        options = TrainOptions(
            embedding_dim=8, tower=(6,), batch_size=6, sparse_lr=0.1, device="cpu", plan=plan
        )
        trainer = Trainer(
            build_train_task(SCHEMA, options.model, seed=1),
            options=options,
            ranks=ranks,
            workload=Workload(6),
        )
        _save(trainer, folder, 1, ranks)

    with process_group("cpu") as ranks:
        one(ranks)


def _halves(table: Any) -> tuple[Any, ...]:
    shard = type(table.shards[0])
    size = (table.num_embeddings, table.embedding_dim // 2)
    return tuple(shard(rank, (0, rank * size[1]), size) for rank in (0, 1))


def _refused_on_one(folder: Path) -> str:
    def one(ranks: Ranks) -> str:
        trainer = _trainer(Placement("table_wise", "rowwise_adagrad", "fused"), folder, ranks)
        with pytest.raises(RunError) as refusal:
            CheckpointManager(folder, ranks=ranks).load(
                folder / "step-00000001", model=trainer.model, optimizer=trainer.optimizer
            )
        return str(refusal.value)

    with process_group("cpu") as ranks:
        return one(ranks)


def test_state_that_goes_with_another_placement_is_refused_by_the_table(tmp_path: Path) -> None:
    run_on_ranks(2, _save_column_wise, tmp_path)
    (refusal,) = run_on_ranks(1, _refused_on_one, tmp_path)
    assert refusal == (
        f"checkpoint {tmp_path / 'step-00000001'} keeps the optimiser's state 'sum' of table "
        "'item' as 14 values, and this placement has 7: row-wise Adagrad keeps one for each row "
        "and column shard; resume with as many column shards, for example with the run's plan.json "
        "as `plan`"
    )


GROWN = Schema((Table("item", 11), Table("user", 9)), SCHEMA.id_features)
PLACEMENTS = (
    Placement("row_wise", "rowwise_adagrad", "fused"),
    Placement("table_wise", "adagrad", "fused"),
    Placement("row_wise", "adam", "dense"),
    Placement("data_parallel", "adagrad", "dense"),
)


def _save_small(folder: Path) -> dict[str, Any]:
    """Trains and saves a model of each placement; its weights and optimiser state."""
    saved = {}

    def one(placement: Placement, ranks: Ranks) -> None:
        trainer = _trainer(placement, folder, ranks)
        for step in range(BEFORE):
            _step(trainer, step, ranks)
        with CheckpointManager(folder / placement.name, ranks=ranks) as checkpoints:
            checkpoints.save(
                step=BEFORE, model=trainer.model, optimizer=trainer.optimizer, progress={}
            )
        saved[placement.name] = _weights(trainer), _optimizer_state(trainer)

    with process_group("cpu") as ranks:
        for placement in PLACEMENTS:
            one(placement, ranks)
    return saved


def _start_grown(folder: Path) -> dict[str, Any]:
    """Starts a model with a longer table from each of them, and saves and loads that one."""
    started = {}

    def one(placement: Placement, ranks: Ranks) -> None:
        trainer = _trainer(placement, folder, ranks, schema=GROWN)
        drawn = _weights(trainer)
        manager = CheckpointManager(folder / f"{placement.name}-grown", ranks=ranks)
        source = folder / placement.name / f"step-{BEFORE:08d}"
        with pytest.raises(RunError, match="belongs to another model"):
            manager.load(source, model=trainer.model, optimizer=trainer.optimizer)
        manager.start_from(source, model=trainer.model, optimizer=trainer.optimizer)
        assert set(_fused_counts(trainer)) <= {BEFORE}
        started[placement.name] = drawn, _weights(trainer), _optimizer_state(trainer)
        _step(trainer, 0, ranks)
        manager.save(step=1, model=trainer.model, optimizer=trainer.optimizer, progress={})
        manager.wait()
        again = manager.find()
        assert again is not None
        fresh = _trainer(placement, folder, ranks, schema=GROWN)
        assert manager.load(again, model=fresh.model, optimizer=fresh.optimizer).step == 1
        assert set(_fused_counts(fresh)) <= {BEFORE + 1}

    with process_group("cpu") as ranks:
        for placement in PLACEMENTS:
            one(placement, ranks)
    return started


def _optimizer_state(trainer: Trainer) -> dict[str, Any]:
    state = trainer.optimizer.state_dict()["state"]
    return _parts({f"{key} {name}": v for key, own in state.items() for name, v in own.items()})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_starts_from_another_with_shorter_tables(ranks: int, tmp_path: Path) -> None:
    (saved,) = run_on_ranks(1, _save_small, tmp_path)
    of_ranks = run_on_ranks(ranks, _start_grown, tmp_path)
    for name, (weights, state) in saved.items():
        drawn, started, started_state = (
            _whole([of_rank[name][part] for of_rank in of_ranks]) for part in range(3)
        )
        for before, after, rest in (
            (_whole([weights]), started, drawn),
            (_whole([state]), started_state, None),
        ):
            assert before.keys() == after.keys()
            for key, value in before.items():
                known = slice(len(value)) if value.dim() else ...
                torch.testing.assert_close(after[key][known], value, rtol=0, atol=0)
                if value.dim() and ".item." in key:
                    assert len(after[key]) == 11
                    new = torch.zeros_like(after[key]) if rest is None else rest[key]
                    torch.testing.assert_close(after[key][7:], new[7:], rtol=0, atol=0)
        (key,) = (key for key in started if ".item." in key)
        assert started[key][7:].abs().sum() > 0


def _small(folder: Path, ranks: Ranks) -> Trainer:
    return _trainer(Placement("table_wise", "rowwise_adagrad", "fused"), folder, ranks)


def _save(trainer: Trainer, folder: Path, step: int, ranks: Ranks) -> None:
    with CheckpointManager(folder, ranks=ranks) as checkpoints:
        checkpoints.save(step=step, model=trainer.model, optimizer=trainer.optimizer, progress={})


def test_a_checkpoint_that_cannot_be_replaced_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while the files of dcp are written, or when checkpoint.json is."""
    folder = tmp_path / "checkpoints"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work() -> None:
        with process_group("cpu") as ranks:
            trainer = _small(tmp_path, ranks)
            _save(trainer, folder, 3, ranks)
            before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for name in (
                "torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data",
                "esmm_torchrec.checkpoints.files.write_durably",
            ):
                with monkeypatch.context() as patch:
                    patch.setattr(name, full)
                    with pytest.raises(RunError) as refusal:
                        _save(trainer, folder, 3, ranks)
                assert str(refusal.value).startswith(
                    f"checkpoint {folder / 'step-00000003'} cannot be written (no space left on "
                    "device; "
                )
                assert {
                    path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()
                } == before
                assert [path.name for path in folder.iterdir()] == ["step-00000003"]

    work()


def test_where_no_folder_can_be_made_the_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "checkpoints"

    def work() -> None:
        with process_group("cpu") as ranks, pytest.raises(RunError) as refusal:
            _save(_small(tmp_path, ranks), folder, 1, ranks)
        assert str(refusal.value).startswith(f"checkpoint {folder / 'step-00000001'} cannot be ")

    work()


def test_later_checkpoints_go_and_nothing_of_them_is_taken_for_one(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "checkpoint.json").write_text(json.dumps({"step": step}))
    remove_later(tmp_path, 5)
    assert {step_of(path): step for step, path in checkpoint_folders(tmp_path).items()} == {5: 5}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
