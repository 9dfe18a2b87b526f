"""Ranks whose batches hold unequal numbers of shared rows train the same under every sharding."""

from __future__ import annotations

from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models.esmm import ESMM, EsmmTrainTask
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.planner import ShardingOption, Workload, make_plan
from esmm_torchrec.sharding.process_group import Ranks, process_group
from tests.ranks import run_on_ranks

SHARDINGS: tuple[ShardingOption, ...] = ("table_wise", "row_wise", "table_row_wise")
SHARED_ROWS = [[2, 3, 1, 3], [2, 1, 4, 3]]
"""By rank and step."""


def _collection(name: str, rows: int) -> EmbeddingBagCollection:
    config = EmbeddingBagConfig(
        name=f"t_{name}", num_embeddings=rows, embedding_dim=8, feature_names=[name]
    )
    return EmbeddingBagCollection(tables=[config], device=torch.device("meta"))


def _bags(name: str, size: int, first: int) -> KeyedJaggedTensor:
    ids = torch.arange(2 * size) + first
    return KeyedJaggedTensor(keys=[name], values=ids, lengths=torch.full((size,), 2))


def _losses(ranks: Ranks, sharding: ShardingOption) -> list[float]:
    torch.manual_seed(0)
    esmm = ESMM(_collection("item", 20), shared_embedding_bag_collection=_collection("user", 20))
    task = EsmmTrainTask(esmm)
    plan = make_plan(task, ranks=ranks, sharding=sharding, kernel="dense", workload=Workload(4))
    model = shard(task, plan=plan, ranks=ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step, size in enumerate(SHARED_ROWS[ranks.rank]):
        batch = ImpressionBatch(
            sparse_features=_bags("item", 4, step),
            shared_sparse_features=_bags("user", size, ranks.rank),
            shared_index=torch.arange(4) % size,
            click=torch.tensor([1.0, 0.0, 1.0, 0.0]),
            conversion=torch.tensor([1.0, 0.0, 0.0, 0.0]),
        )
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _train() -> dict[str, list[float]]:
    with process_group("cpu") as ranks:
        return {sharding: _losses(ranks, sharding) for sharding in SHARDINGS}


def test_shared_rows_need_not_be_equal_on_all_ranks() -> None:
    results: list[dict[str, Any]] = run_on_ranks(2, _train)
    for losses in results:
        assert losses["table_wise"][-1] < losses["table_wise"][0]
        for sharding in SHARDINGS[1:]:
            torch.testing.assert_close(
                torch.tensor(losses[sharding]), torch.tensor(losses["table_wise"])
            )
