"""ESMM's towers and loss behind a deep & cross network: any pooled features will do.

python examples/dcn_towers.py
torchrun --nproc-per-node 8 examples/dcn_towers.py        # raw ids over eight GPUs

The model has TorchRec's LowRankCrossNet between pooled embeddings and the two towers. One table
serves two features, and a batch may have its keys in any order. With `managed=True` the inputs are
raw 64-bit ids, and TorchRec's managed collision assigns each a table row on arrival. Over several
ranks, TorchRec shards such tables on GPUs only, by rows, with a hand-made plan and its own sharder.

Shapes: B impressions, F pooled features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from esmm_torchrec import (
    BatchFeatures,
    EsmmTowers,
    EsmmTrainTask,
    ImpressionBatch,
    Logits,
    PooledFeatures,
    auc,
    process_group,
)
from esmm_torchrec.errors import OptionError
from esmm_torchrec.sharding.process_group import Ranks

CPU = torch.device("cpu")
MANAGED_SHARDER = cast(ModuleSharder[nn.Module], ManagedCollisionEmbeddingBagCollectionSharder())

USERS, ITEMS, SEEN = 60, 40, 4
EMBEDDING_DIM = 8
KEYS = ["user", "item", "seen"]
RAW_ID = 1_000_003
"""Factor that turns row numbers into raw ids, for `managed`."""

BATCH_SIZE, STEPS = 1024, 150
TEST_ROWS = 20_000


class ManagedFeatures(nn.Module):
    """Pooled embeddings of raw ids, float32 (B, F); PooledFeatures does this for table rows."""

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        *,
        device: torch.device,
        table_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        modules = {
            table.name: MCHManagedCollisionModule(
                zch_size=table.num_embeddings,
                device=device,
                eviction_policy=DistanceLFU_EvictionPolicy(),
                eviction_interval=2,
            )
            for table in tables
        }
        self.collection = ManagedCollisionEmbeddingBagCollection(
            EmbeddingBagCollection(tables=tables, device=table_device or device),
            ManagedCollisionCollection(modules, tables),  # pyright: ignore[reportArgumentType]
        )

    def forward(self, features: BatchFeatures) -> torch.Tensor:
        """Pools the features; ids are assigned to rows in training only."""
        pooled, _remapped = self.collection(features.sparse_features)
        return KeyedTensor.regroup([pooled], [KEYS])[0]


class CrossedEsmm(nn.Module):
    """ESMM's towers on the crossed output of any module that pools features.

    Args:
        features: maps the `BatchFeatures` of B impressions to float32 (B, F).
        in_features: F.
    """

    def __init__(self, features: nn.Module, in_features: int) -> None:
        super().__init__()
        self.features = features
        self.cross = LowRankCrossNet(in_features, num_layers=2, low_rank=8)
        self.towers = EsmmTowers(in_features, layer_sizes=(32, 16))

    def forward(self, features: BatchFeatures) -> Logits:
        """Returns the logits of B impressions."""
        return self.towers(self.cross(self.features(features)))


def crossed_esmm(
    *,
    managed: bool = False,
    device: torch.device = CPU,
    table_device: torch.device | None = None,
) -> CrossedEsmm:
    """Returns the model over two tables, one of which serves two features.

    Args:
        managed: whether ids are raw.
        device: device of the model.
        table_device: device of the tables if different: "meta" before they are sharded.
    """
    tables = [
        EmbeddingBagConfig(
            name="t_item",
            num_embeddings=ITEMS + 1,  # managed ids without a row share the last one
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
        features = ManagedFeatures(tables, device=device, table_device=table_device)
    else:
        features = PooledFeatures(
            EmbeddingBagCollection(tables=tables, device=table_device or device)
        )
    model = CrossedEsmm(features, len(KEYS) * EMBEDDING_DIM)
    model.cross.to(device)
    model.towers.to(device)
    return model


def managed_plan(
    module: nn.Module, *, world_size: int, local_world_size: int, device_type: str
) -> ShardingPlan:
    """Returns a plan that shards tables of raw ids by rows over all ranks, the only way that
    TorchRec supports: a rank assigns rows to the ids that hash to its part. TorchRec's planner
    ignores such tables."""
    return ShardingPlan(
        {
            path: construct_module_sharding_plan(
                child,
                {
                    table.name: row_wise(compute_kernel="fused")
                    for tables in child.modules()
                    if isinstance(tables, EmbeddingBagCollection)
                    for table in tables.embedding_bag_configs()
                },
                sharder=MANAGED_SHARDER,
                local_size=local_world_size,
                world_size=world_size,
                device_type=device_type,
            )
            for path, child in module.named_modules()
            if isinstance(child, ManagedCollisionEmbeddingBagCollection)
        }
    )


def sharded_on_raw_ids(ranks: Ranks) -> DistributedModelParallel:
    """Returns the train task over raw ids, with tables sharded over GPUs and updated by row-wise
    Adagrad in their backward pass.

    Raises:
        OptionError: the ranks are on a CPU, for which TorchRec has no sharded managed collision.
    """
    if ranks.device.type != "cuda":
        raise OptionError(
            "TorchRec shards raw ids on GPUs only; on CPU ranks, map ids to table rows before "
            "the batch, as esmm-torchrec prepare does"
        )
    meta = torch.device("meta")
    task = EsmmTrainTask(crossed_esmm(managed=True, device=ranks.device, table_device=meta))
    tables = [value for name, value in task.named_parameters() if ".embedding_bags." in name]
    for table in tables:
        apply_optimizer_in_backward(RowWiseAdagrad, [table], {"lr": 0.1})
    plan = managed_plan(
        task,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        device_type=ranks.device.type,
    )
    return DistributedModelParallel(
        task,
        device=ranks.device,
        plan=plan,
        sharders=[MANAGED_SHARDER],
    )


def train_sharded(ranks: Ranks) -> float:
    """Trains on raw ids, every rank on its own batches, and returns the last loss."""
    model = sharded_on_raw_ids(ranks)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = torch.optim.Adam(dense.values(), lr=0.01)
    loss = torch.zeros(())
    for step in range(STEPS):
        batch = made_up_batch(step * ranks.world_size + ranks.rank, raw_ids=True)
        optimizer.zero_grad()
        loss, _ = model(batch.to(ranks.device))
        loss.backward()
        optimizer.step()
    return loss.item()


def made_up_batch(seed: int, rows: int = BATCH_SIZE, *, raw_ids: bool = False) -> ImpressionBatch:
    """Draws impressions: clicks depend on the match of user and item, conversions on items seen."""
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


def train(
    model: CrossedEsmm, *, raw_ids: bool = False, device: torch.device = CPU
) -> dict[str, float | None]:
    """Trains, and returns the AUCs of held-out rows."""
    task = EsmmTrainTask(model)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.01)
    for step in range(STEPS):
        loss, _ = task(made_up_batch(step, raw_ids=raw_ids).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    task.eval()
    batch = made_up_batch(STEPS, TEST_ROWS, raw_ids=raw_ids)
    with torch.no_grad():
        _, output = task(batch.to(device))
    clicked = batch.click == 1
    return {
        "ctr_auc": auc(output.logits.click.cpu().numpy(), batch.click.numpy()),
        "cvr_auc": auc(
            output.logits.conversion.cpu()[clicked].numpy(), batch.conversion[clicked].numpy()
        ),
    }


def main() -> None:
    """Trains with both kinds of ids on one rank; under torchrun, with raw ids over all ranks."""
    with process_group("auto") as ranks:
        if ranks.world_size > 1:
            print(f"rank {ranks.rank}, raw ids: loss {train_sharded(ranks):.4f}")
            return
        for managed in (False, True):
            model = crossed_esmm(managed=managed, device=ranks.device)
            aucs = train(model, raw_ids=managed, device=ranks.device)
            print("raw ids:" if managed else "rows of tables:", aucs)


if __name__ == "__main__":
    main()
