"""Weight decay reaches the towers and leaves the tables alone."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.trainer import Trainer
from tests.ranks import run_on_ranks

SCHEMA = Schema((Table("item", 6),), (IdFeature("item", "item"),))


def _after_one_step(weight_decay: float) -> dict[str, torch.Tensor]:
    with process_group("cpu") as ranks:
        options = TrainOptions(
            method="base",
            embedding_dim=4,
            tower=(8,),
            batch_size=4,
            dense_lr=0.1,
            weight_decay=weight_decay,
            device="cpu",
        )
        trainer = Trainer(
            build_train_task(SCHEMA, options.model, seed=1),
            options=options,
            ranks=ranks,
            workload=Workload(4),
        )
        batch = ImpressionBatch(
            click=torch.ones(4),
            conversion=torch.tensor([1.0, 0.0, 1.0, 0.0]),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=["item"],
                values=torch.tensor([1, 2, 3, 3]),
                lengths=torch.ones(4, dtype=torch.int32),
            ),
        )
        trainer.optimizer.zero_grad()
        loss, _ = trainer.model(batch)
        loss.backward()
        trainer.optimizer.step()
        return {
            key: (value.local_shards()[0].tensor if hasattr(value, "local_shards") else value)
            .detach()
            .clone()
            for key, value in trainer.model.state_dict().items()
        }


def _both() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return _after_one_step(0.0), _after_one_step(10.0)


def test_weight_decay_is_of_the_towers() -> None:
    ((plain, decayed),) = run_on_ranks(1, _both)
    for key, value in plain.items():
        assert torch.equal(value, decayed[key]) == (".embedding_bags." in key), key
