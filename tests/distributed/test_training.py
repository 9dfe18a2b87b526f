"""Training on ranks against plain PyTorch, for every sharding type and optimiser."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.checkpoints.state import load_model
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.models.parts import BaseRates
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.trainer import Trainer
from tests.plain_esmm import PlainEsmm, TableUpdate, read_frame
from tests.prepared_data import write_data_set
from tests.ranks import run_on_ranks

GLOBAL_BATCH = 60
EPOCHS = 2
BASE = TrainOptions(
    embedding_dim=8,
    tower=(12, 6),
    first_order=False,
    sparse_lr=0.05,
    dense_lr=0.002,
    epochs=EPOCHS,
    seed=3,
    shuffle_chunk=4,
)


@dataclass(frozen=True)
class Case:
    """Number of ranks and options with which the same model is trained."""

    ranks: int
    options: TrainOptions

    @property
    def name(self) -> str:
        options = self.options
        return (
            f"{self.ranks}-{options.sharding}-{options.sparse_optimizer}-{options.shared_features}"
        )


def cases() -> list[Case]:
    """Returns every sharding type and optimiser, pooled and expanded shared features, one and two
    ranks."""
    two = [
        replace(BASE, sharding="auto"),
        replace(BASE, sharding="table_wise"),
        replace(BASE, sharding="row_wise"),
        replace(BASE, sharding="table_row_wise"),
        replace(BASE, sharding="column_wise", sparse_optimizer="adagrad"),
        replace(BASE, sharding="column_wise", sparse_optimizer="sgd"),
        replace(BASE, sharding="row_wise", sparse_optimizer="sgd"),
        replace(BASE, sharding="table_wise", sparse_optimizer="adagrad"),
        replace(BASE, sharding="data_parallel", sparse_optimizer="adagrad"),
        replace(BASE, sharding="row_wise", sparse_optimizer="adam"),
        replace(BASE, sharding="row_wise", shared_features="expanded"),
    ]
    one = [
        replace(BASE, sharding="auto"),
        replace(BASE, sharding="row_wise", sparse_optimizer="adam"),
        replace(BASE, sharding="table_wise", shared_features="expanded"),
    ]
    return [Case(2, options) for options in two] + [Case(1, options) for options in one]


def _train(case: Case, data: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    dataset = PreparedDataSet.open(data)
    options = replace(case.options, batch_size=GLOBAL_BATCH // ranks.world_size)
    trainer = Trainer(
        build_train_task(
            dataset.schema,
            options.model,
            seed=options.seed,
            base_rates=BaseRates(10, {"click": 5, "conversion": 2}),
        ),
        options=options,
        ranks=ranks,
        workload=Workload(options.batch_size),
    )

    def save(step: int) -> None:
        with CheckpointManager(out / case.name, ranks=ranks) as checkpoints:
            checkpoints.save(
                step=step, model=trainer.model, optimizer=trainer.optimizer, progress={}
            )

    save(0)
    reader = ImpressionReader(
        MappedSplit.open(dataset, "train"),
        batch_size=options.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=options.seed,
        shuffle_chunk=options.shuffle_chunk,
        shared_features=options.shared_features,
    )
    samples: list[list[int]] = []
    losses: list[float] = []
    for _ in range(EPOCHS):
        rows = reader.rows_left()
        for start in range(0, len(rows), reader.global_batch_size):
            first = start + ranks.rank * reader.batch_size
            own = rows[first : start + (ranks.rank + 1) * reader.batch_size]
            samples.append(reader.split.scalars["sample_id"][own].tolist())
        losses += [float(output.loss) for output in trainer.steps(reader, reader.steps_left)]
    save(1)
    scored = score_split(
        trainer.model,
        MappedSplit.open(dataset, "test"),
        ranks,
        batch_size=50,
        shared_features=options.shared_features,
    )
    return {
        "samples": samples,
        "losses": losses,
        **{
            f"p{name}": None
            if scored is None
            else torch.tensor(scored.scores[name].values).sigmoid()
            for name in ("ctr", "cvr")
        },
    }


def _train_all(num_ranks: int, data: Path, out: Path) -> dict[str, dict[str, Any]]:
    def on_rank(ranks: Ranks) -> dict[str, dict[str, Any]]:
        chosen = [case for case in cases() if case.ranks == num_ranks]
        return {case.name: _train(case, data, out, ranks) for case in chosen}

    with process_group("cpu") as ranks:
        result = on_rank(ranks)
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=401, test=133)
    return path


@pytest.fixture(scope="module")
def trained(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of the case → result of each rank."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for num_ranks in (1, 2):
        results = run_on_ranks(num_ranks, _train_all, num_ranks, data, data.parent)
        for name in results[0]:
            by_case[name] = [result[name] for result in results]
    return by_case


def _weights(case: Case, data: Path, step: int) -> dict[str, torch.Tensor]:
    """Returns the unsharded weights of a checkpoint."""
    schema = PreparedDataSet.open(data).schema
    task = build_train_task(schema, case.options.model, embedding_device="cpu")
    load_model(data.parent / case.name / f"step-{step:08d}", task)
    return {key: value.clone() for key, value in task.state_dict().items()}


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_training_equals_plain_pytorch(
    case: Case, data: Path, trained: dict[str, list[dict[str, Any]]]
) -> None:
    by_rank = trained[case.name]
    dataset = PreparedDataSet.open(data)
    frame = read_frame(dataset, "train")
    plain = PlainEsmm(dataset, _weights(case, data, 0))
    towers = [tensor for layers in plain.towers.values() for pair in layers for tensor in pair]
    adam = torch.optim.Adam(towers, lr=case.options.dense_lr, eps=1e-8)
    if case.options.sparse_optimizer == "adam":
        tables = torch.optim.Adam(list(plain.tables.values()), lr=case.options.sparse_lr, eps=1e-8)
    else:
        tables = TableUpdate(case.options.sparse_optimizer, case.options.sparse_lr)

    steps = len(by_rank[0]["samples"])
    assert steps == EPOCHS * -(-401 // GLOBAL_BATCH)
    for step in range(steps):
        rows = frame.loc[[sample for rank in by_rank for sample in rank["samples"][step]]]
        loss = plain.loss(rows)
        loss.backward()
        assert sum(rank["losses"][step] for rank in by_rank) / case.ranks == pytest.approx(
            loss.item(), rel=1e-4
        )
        adam.step()
        adam.zero_grad()
        if isinstance(tables, TableUpdate):
            tables.step(plain.tables)
        else:
            tables.step()
            tables.zero_grad()

    after = _weights(case, data, 1)
    for key, value in after.items():
        if ".embedding_bags." in key:
            torch.testing.assert_close(
                value.double(), plain.tables[key.split(".")[-2]], atol=2e-4, rtol=1e-3
            )
    with torch.no_grad():
        pctr, pcvr = plain.probabilities(read_frame(dataset, "test"))
    torch.testing.assert_close(by_rank[0]["pctr"].double(), pctr, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(by_rank[0]["pcvr"].double(), pcvr, atol=1e-4, rtol=1e-3)


def test_every_row_is_read_once_an_epoch(trained: dict[str, list[dict[str, Any]]]) -> None:
    for by_rank in trained.values():
        steps = len(by_rank[0]["samples"]) // EPOCHS
        for epoch in range(EPOCHS):
            seen = [
                sample
                for rank in by_rank
                for step in rank["samples"][epoch * steps : (epoch + 1) * steps]
                for sample in step
            ]
            assert sorted(seen) == list(range(1, 402))


def test_the_start_depends_on_the_seed_alone(
    data: Path, trained: dict[str, list[dict[str, Any]]]
) -> None:
    assert trained
    first, *others = [_weights(case, data, 0) for case in cases()]
    for other in others:
        for key, value in first.items():
            torch.testing.assert_close(other[key], value, atol=0, rtol=0)
