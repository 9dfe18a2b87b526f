"""The search for a plan: what it counts, beside what fbgemm allocates and what a shuffle shows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import optim as torchrec_optim
from torchrec.distributed.planner.planners import to_sharding_plan
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.planner import sharding_types
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.sharding.search import (
    NoPlanError,
    TableOptions,
    Workload,
    distinct_shared_rows,
    search,
)

ROWS, DIM = 1000, 32


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group("cpu") as ranks:
        yield ranks


def tables(
    optimizer: type[torch.optim.Optimizer] = torchrec_optim.SGD, **rows: int
) -> EmbeddingBagCollection:
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, num_embeddings=number, embedding_dim=DIM, feature_names=[name]
            )
            for name, number in rows.items()
        ],
        device=torch.device("meta"),
    )
    for parameter in collection.parameters():
        apply_optimizer_in_backward(optimizer, [parameter], {"lr": 0.1})
    return collection


def topology(world_size: int, *, memory: int = 2**33) -> Topology:
    """Ranks on CPUs."""
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=world_size, local_world_size=min(world_size, 8)),
        hardware_config=HardwareConfig(ddr_cap_bytes=memory),
        kernel_config=KernelConfig(compute_device="cpu"),
    )


def options(*types: str) -> TableOptions:
    return TableOptions(types, ("fused",), min_shard_width=4)


def planned_bytes(selected: list[ShardingOption]) -> int:
    return sum(shard.storage.ddr for option in selected for shard in option.shards if shard.storage)


def test_the_momenta_that_are_counted_are_those_that_fbgemm_allocates(ranks: Ranks) -> None:
    """Of row-wise Adagrad in eight strips; TorchRec's own estimate has an eighth of them."""
    module = nn.ModuleDict({"tables": tables(torchrec_optim.RowWiseAdagrad, item=ROWS)})
    plain = nn.ModuleDict({"tables": tables(item=ROWS)})
    with_momenta, without = (
        search(m, {"item": options("column_wise")}, topology=topology(8), workload=Workload(64))
        for m in (module, plain)
    )
    counted = planned_bytes(with_momenta) - planned_bytes(without)
    for strip in with_momenta[0].shards:
        strip.rank = 0
    sharded = shard(module, plan=to_sharding_plan(with_momenta, topology(1)), ranks=ranks)
    momenta = [
        local.tensor.numel()
        for state in sharded.fused_optimizer.state_dict()["state"].values()
        for value in state.values()
        for local in value.local_shards()
    ]
    assert sum(momenta) == 8 * ROWS
    assert counted == 4 * sum(momenta)


def test_a_shared_feature_is_pooled_once_per_distinct_row() -> None:
    features = {"history": 100.0}
    whole, shared = (
        search(
            tables(history=ROWS),
            {"history": options("table_wise")},
            topology=topology(2),
            workload=Workload(512, features, bags),
        )
        for bags in ({}, {"history": 64})
    )
    weights = ROWS * DIM * 4
    assert planned_bytes(whole) - weights == 8 * (planned_bytes(shared) - weights)
    perf = [selected[0].shards[0].perf for selected in (whole, shared)]
    assert perf[0] is not None
    assert perf[1] is not None
    assert perf[0].total == pytest.approx(8 * perf[1].total)


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_distinct_shared_rows_are_those_of_a_shuffled_order(chunk: int) -> None:
    impressions, shared_rows, batch = 60_000, 2_000, 512
    of_row = np.repeat(np.arange(shared_rows), impressions // shared_rows)
    kept_together = min(chunk, impressions // shared_rows)
    chunks = of_row.reshape(shared_rows, -1)[:, : 30 - 30 % kept_together]
    order = chunks.reshape(-1, kept_together)
    np.random.default_rng(0).shuffle(order)
    batches = order.reshape(-1)[: len(order.reshape(-1)) // batch * batch].reshape(-1, batch)
    seen = np.mean([len(np.unique(rows)) for rows in batches])
    expected = distinct_shared_rows(
        batch, impressions=impressions, shared_rows=shared_rows, shuffle_chunk=chunk
    )
    # A batch's edges cut two chunks, which are counted as whole here.
    assert expected == pytest.approx(seen, rel=0.08)


def test_auto_is_the_same_for_training_and_for_estimates() -> None:
    def kinds(**where: int) -> tuple[str, ...]:
        return sharding_types("auto", rows=1000, device="cuda", **where)

    assert kinds(world_size=1, local_world_size=1) == ("table_wise",)
    assert kinds(world_size=8, local_world_size=8) == ("table_wise", "row_wise")
    assert kinds(world_size=16, local_world_size=8) == ("table_wise", "row_wise", "table_row_wise")
    assert kinds(world_size=4, local_world_size=1) == ("table_wise", "row_wise")


def test_a_table_that_cannot_have_a_type_does_not_keep_the_others_from_it() -> None:
    """TorchRec's uniform search gives the type up."""
    found = search(
        tables(item=1_000_000, shop=900_000, tiny=3),
        {"item": options("row_wise"), "shop": options("row_wise"), "tiny": options("table_wise")},
        topology=topology(1024, memory=300_000_000),
        workload=Workload(64),
    )
    assert {o.name: o.sharding_type for o in found} == {
        "item": "row_wise", "shop": "row_wise", "tiny": "table_wise"
    }  # fmt: skip


def test_what_does_not_fit_is_named() -> None:
    def reason(memory: int, **rows: int) -> NoPlanError:
        with pytest.raises(NoPlanError) as error:
            search(
                tables(**rows),
                dict.fromkeys(rows, options("table_wise")),
                topology=topology(2, memory=memory),
                workload=Workload(1),
            )
        return error.value

    alone = reason(100_000, item=1000, shop=10)
    assert str(alone).startswith("table 'item' does not fit: table_wise puts")
    assert (alone.tables, alone.alone) == (("item",), True)
    together = reason(130_000, a=1000, b=1000, c=1000)
    assert str(together).startswith("all tables together need")
    assert (together.tables, together.alone) == (("a", "b", "c"), False)
    # 3 of 128 kB and 2 places of 200.
    divided = reason(200_000, a=1000, b=1000, c=1000)
    assert "TorchRec's planner cannot place every table" in str(divided)
