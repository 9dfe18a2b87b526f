"""ESMM's towers behind another sparse architecture: it learns, it shards, keys go by name."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.types import EmbeddingModuleShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec import (
    BatchFeatures,
    EsmmTrainTask,
    ImpressionBatch,
    make_plan,
    process_group,
    shard,
)
from esmm_torchrec.errors import OptionError
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.training.optimizers import build_optimizer, fuse_optimizer
from examples.dcn_towers import (
    BATCH_SIZE,
    EMBEDDING_DIM,
    ITEMS,
    KEYS,
    RAW_ID,
    SEEN,
    STEPS,
    TEST_ROWS,
    USERS,
    crossed_esmm,
    made_up_batch,
    managed_plan,
    sharded_on_raw_ids,
    train,
)


def best_aucs() -> dict[str, float]:
    """AUCs, on the rows that are measured, of the probabilities its labels are drawn from."""
    batch = made_up_batch(STEPS, TEST_ROWS)
    assert batch.features.sparse_features is not None
    parts = batch.features.sparse_features.to_dict()
    user, item = parts["user"].values(), parts["item"].values()
    seen = parts["seen"].to_padded_dense(SEEN, padding_value=-1).long()
    alike = ((seen % 4 == item[:, None] % 4) & (seen >= 0)).any(1)
    clicked = batch.click == 1
    return {
        "ctr_auc": float(roc_auc_score(batch.click, (user % 2 == item % 2).float())),
        "cvr_auc": float(roc_auc_score(batch.conversion[clicked], alike[clicked].float())),
    }


@pytest.mark.parametrize("managed", [False, True])
def test_it_learns_what_a_product_of_embeddings_says(managed: bool) -> None:
    torch.manual_seed(0)
    model = crossed_esmm(managed=managed)
    aucs = train(model, raw_ids=managed)
    best = best_aucs()
    assert min(best.values()) > 0.65
    for name, value in aucs.items():
        assert value is not None
        assert 0.5 + 0.7 * (best[name] - 0.5) < value < best[name] + 0.01, name

    if managed:
        # Every raw id that training showed has a row of its own.
        users = torch.arange(USERS) * RAW_ID
        none = torch.zeros(2 * USERS, dtype=torch.long)
        kjt = KeyedJaggedTensor(KEYS, users, lengths=torch.cat([torch.ones_like(users), none]))
        pooled = model.features(BatchFeatures(kjt))
        assert pooled.shape == (USERS, len(KEYS) * EMBEDDING_DIM)
        assert len(pooled[:, :EMBEDDING_DIM].unique(dim=0)) == USERS


def test_raw_ids_are_planned_for_gpus_by_rows() -> None:
    """As far as sharded managed collision goes without one: on the meta device, planned."""
    meta = torch.device("meta")
    task = EsmmTrainTask(crossed_esmm(managed=True, device=meta))
    assert {value.device for value in task.parameters()} == {meta}
    plan = managed_plan(task, world_size=8, local_world_size=8, device_type="cuda")
    (tables,) = plan.plan.values()
    assert isinstance(tables, EmbeddingModuleShardingPlan)
    assert sorted(tables) == ["t_item", "t_user"]
    for name, rows in (("t_item", ITEMS + 1), ("t_user", USERS + 1)):
        table = tables[name]
        assert (table.sharding_type, table.compute_kernel) == ("row_wise", "fused")
        shards = table.sharding_spec.shards  # pyright: ignore
        assert sum(shard.shard_sizes[0] for shard in shards) == rows
        assert [str(shard.placement) for shard in shards] == [
            f"rank:{rank}/cuda:{rank}" for rank in range(8)
        ]
    # And what shards it offers the kernel on a GPU only.
    sharder = ManagedCollisionEmbeddingBagCollectionSharder()
    assert sharder.sharding_types("cuda") == ["row_wise"]
    with process_group("cpu") as ranks, pytest.raises(OptionError, match="raw ids on GPUs only"):
        sharded_on_raw_ids(ranks)


def test_keys_in_any_order_and_one_table_for_two_features() -> None:
    torch.manual_seed(1)
    model = crossed_esmm()
    batch = made_up_batch(0)
    kjt = batch.features.sparse_features
    assert kjt is not None
    logits = model(BatchFeatures(kjt))
    for order in ([2, 0, 1], [1, 2, 0]):
        permuted = kjt.permute(order)
        assert permuted.keys() != kjt.keys()
        torch.testing.assert_close(
            dict(model(BatchFeatures(permuted))), dict(logits), rtol=0, atol=0
        )

    ids = torch.tensor([5, 7, 5, 7, 0, 1])
    pooled = model.features(
        KeyedJaggedTensor(["seen", "item", "user"], ids, lengths=torch.ones(6).int())
    )
    item, seen, user = pooled.split(EMBEDDING_DIM, dim=1)
    torch.testing.assert_close(item, seen, rtol=0, atol=0)
    assert not torch.equal(item, user)


def test_sharded_in_torchrecs_pipeline_it_trains_as_it_does_alone() -> None:
    torch.manual_seed(2)
    task = EsmmTrainTask(crossed_esmm())
    plain = copy.deepcopy(task)
    rate = 0.1
    losses = []
    optimizer = torch.optim.SGD(
        [
            {"params": [value for name, value in plain.named_parameters() if _is_table(name)]},
            {
                "params": [v for name, v in plain.named_parameters() if not _is_table(name)],
                "lr": 0.0,
            },
        ],
        lr=rate,
    )
    for step in range(4):
        loss, _ = plain(made_up_batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] != pytest.approx(losses[-1], abs=1e-4)
    assert _sharded_losses(task, 4, rate) == pytest.approx(losses, abs=1e-6)


def _is_table(name: str) -> bool:
    return ".embedding_bags." in name


def _sharded_losses(task: nn.Module, steps: int, rate: float) -> list[float]:
    with process_group("cpu") as ranks:

        def on_rank() -> list[float]:
            kernels = {"t_item": "fused", "t_user": "fused"}
            fuse_optimizer(task, "sgd", lr=rate, kernels=kernels, device=ranks.device)
            plan = make_plan(
                task,
                ranks=ranks,
                sharding="table_wise",
                kernel="fused",
                workload=Workload(BATCH_SIZE),
            )
            model = shard(task, plan=plan, ranks=ranks)
            optimizer = build_optimizer(model, "sgd", sparse_lr=rate, dense_lr=0.0)
            pipeline = TrainPipelineSparseDist(model, optimizer, ranks.device)
            batches = iter([_permuted(step) for step in range(steps)])
            losses = [pipeline.progress(batches).loss.item() for _ in range(steps)]
            pipeline.detach()
            return losses

        return on_rank()


def _permuted(step: int):
    batch = made_up_batch(step)
    assert batch.features.sparse_features is not None
    permuted = batch.features.sparse_features.permute([2, 0, 1])
    return ImpressionBatch(sparse_features=permuted, labels=batch.labels)
