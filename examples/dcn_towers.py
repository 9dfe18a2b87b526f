"""ESMM's towers and loss behind a deep & cross network: they do not care what pooled the features.

python examples/dcn_towers.py

The model is TorchRec's LowRankCrossNet between pooled embeddings and the two towers. One table
serves two features, and a batch may have its keys in any order. With `managed=True` raw 64-bit ids
go in, and TorchRec's managed collision finds each a row of the table as it comes.

Shapes: B impressions, F pooled features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from esmm_torchrec import EsmmTowers, EsmmTrainTask, ImpressionBatch, PooledFeatures, auc
from esmm_torchrec.models.esmm import Logits

USERS, ITEMS, SEEN = 60, 40, 4
EMBEDDING_DIM = 8
KEYS = ["user", "item", "seen"]
RAW_ID = 1_000_003
"""Factor that makes raw ids of row numbers, for `managed`."""

BATCH_SIZE, STEPS = 1024, 150
TEST_ROWS = 20_000


class ManagedFeatures(nn.Module):
    """Pooled embeddings of raw ids, float32 (B, F): what PooledFeatures is for rows of tables."""

    def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        modules = {
            table.name: MCHManagedCollisionModule(
                zch_size=table.num_embeddings,
                device=torch.device("cpu"),
                eviction_policy=DistanceLFU_EvictionPolicy(),
                eviction_interval=2,
            )
            for table in tables
        }
        self.collection = ManagedCollisionEmbeddingBagCollection(
            EmbeddingBagCollection(tables=tables),
            ManagedCollisionCollection(modules, tables),  # pyright: ignore[reportArgumentType]
        )

    def forward(self, sparse_features: KeyedJaggedTensor, **_: Any) -> torch.Tensor:
        """Rows are given to ids in training only."""
        pooled, _remapped = self.collection(sparse_features)
        return KeyedTensor.regroup([pooled], [KEYS])[0]


class CrossedEsmm(nn.Module):
    """Any pooled features, crossed, before ESMM's towers.

    Args:
        features: maps the features of an `ImpressionBatch`, given by name, to float32 (B, F).
        in_features: F.
    """

    def __init__(self, features: nn.Module, in_features: int) -> None:
        super().__init__()
        self.features = features
        self.cross = LowRankCrossNet(in_features, num_layers=2, low_rank=8)
        self.towers = EsmmTowers(in_features, layer_sizes=(32, 16))

    def forward(self, **inputs: Any) -> Logits:
        """Logits of B impressions; see `ImpressionBatch` for the names."""
        return self.towers(self.cross(self.features(**inputs)))


def crossed_esmm(*, managed: bool = False) -> CrossedEsmm:
    """The model over two tables, of which one serves two features."""
    tables = [
        EmbeddingBagConfig(
            name="t_item",
            num_embeddings=ITEMS + 1,  # managed ids without a row yet share the last one
            embedding_dim=EMBEDDING_DIM,
            feature_names=["item", "seen"],
        ),
        EmbeddingBagConfig(
            name="t_user",
            num_embeddings=USERS + 1,
            embedding_dim=EMBEDDING_DIM,
            feature_names=["user"],
        ),
    ]
    if managed:
        features = ManagedFeatures(tables)
    else:
        features = PooledFeatures(EmbeddingBagCollection(tables=tables))
    return CrossedEsmm(features, len(KEYS) * EMBEDDING_DIM)


def made_up_batch(seed: int, rows: int = BATCH_SIZE, *, raw_ids: bool = False) -> ImpressionBatch:
    """A click needs an item that goes with the user; a conversion, one that was seen before."""
    random = torch.Generator().manual_seed(seed)
    user = torch.randint(USERS, (rows,), generator=random)
    item = torch.randint(ITEMS, (rows,), generator=random)
    lengths = torch.randint(SEEN + 1, (rows,), generator=random)
    seen = torch.randint(ITEMS, (rows, SEEN), generator=random)
    had = torch.arange(SEEN) < lengths[:, None]
    alike = ((seen % 4 == item[:, None] % 4) & had).sum(1)
    chance = torch.rand(2, rows, generator=random)
    click = chance[0] < torch.where(user % 2 == item % 2, 0.6, 0.2)
    conversion = click & (chance[1] < torch.where(alike > 0, 0.7, 0.2))
    one = torch.ones(rows, dtype=torch.long)
    values = torch.cat([user, item, seen[had]])
    return ImpressionBatch(
        sparse_features=KeyedJaggedTensor(
            keys=KEYS,
            values=values * RAW_ID if raw_ids else values,
            lengths=torch.cat([one, one, lengths]),
        ),
        click=click.float(),
        conversion=conversion.float(),
    )


def train(model: CrossedEsmm, *, raw_ids: bool = False) -> dict[str, float | None]:
    """Trains, and gives the AUCs of rows it has not seen."""
    task = EsmmTrainTask(model)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.01)
    for step in range(STEPS):
        loss, _ = task(made_up_batch(step, raw_ids=raw_ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    task.eval()
    batch = made_up_batch(STEPS, TEST_ROWS, raw_ids=raw_ids)
    with torch.no_grad():
        _, output = task(batch)
    clicked = batch.click == 1
    assert output.logits.click is not None
    assert output.logits.conversion is not None
    return {
        "ctr_auc": auc(output.logits.click.numpy(), batch.click.numpy()),
        "cvr_auc": auc(
            output.logits.conversion[clicked].numpy(), batch.conversion[clicked].numpy()
        ),
    }


if __name__ == "__main__":
    print("rows of tables:", train(crossed_esmm()))
    print("raw ids:", train(crossed_esmm(managed=True), raw_ids=True))
