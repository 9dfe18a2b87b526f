"""An id that is not a row of its table is an error, and not another row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.esmm import ESMM, EsmmTrainTask
from esmm_torchrec.models.id_range import check_ids, looked_up
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.planner import Workload, make_plan
from esmm_torchrec.sharding.process_group import Ranks, process_group
from tests.ranks import run_on_ranks

CONFIGS = [
    EmbeddingBagConfig(name=f"t_{name}", num_embeddings=rows, embedding_dim=8, feature_names=[name])
    for name, rows in (("item", 10), ("shop", 4))
]
WRONG = {"item": [(10, "10"), (-1, "-1")], "shop": [(4, "4"), (9, "9"), (1 << 30, "1073741824")]}


def _features(
    item: list[int], shop: list[int], dtype: torch.dtype = torch.int64, **form: Any
) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["shop", "unused", "item"],
        values=torch.tensor([*shop, -999, *item], dtype=dtype),
        lengths=torch.tensor([2, 0, 1, 0, 1, 1], dtype=torch.int32),
        **form,
    )


def _batch(item: int, shop: int) -> ImpressionBatch:
    return ImpressionBatch(
        sparse_features=_features([item, 0], [shop, 0]),
        click=torch.tensor([1.0, 0.0]),
        conversion=torch.tensor([1.0, 0.0]),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("stride", [{}, {"stride_per_key_per_rank": [[2], [2], [2]]}])
def test_ids_are_checked_against_their_own_table(dtype: torch.dtype, stride: dict) -> None:
    tables = looked_up(CONFIGS)
    check_ids(_features([9, 0], [3, 0], dtype, **stride), tables)
    check_ids(None, tables)
    check_ids(KeyedJaggedTensor.empty(), tables)
    for feature, wrong in WRONG.items():
        for given, said in wrong:
            ids = {"item": [0, 0], "shop": [0, 0], feature: [0, given]}
            rows = {"item": 10, "shop": 4}[feature]
            with pytest.raises(OptionError) as told:
                check_ids(_features(**ids, dtype=dtype, **stride), tables)  # type: ignore[arg-type]
            assert str(told.value) == (
                f"feature {feature!r} has the id {said}, and its table 't_{feature}' has rows 0 to "
                f"{rows - 1}; map ids to rows first, unknown ones to a row of their own"
            )


class Pooling(nn.Module):
    """A module of somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.collection = EmbeddingBagCollection(tables=CONFIGS)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.collection(features)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group("cpu") as ranks:
        yield ranks


def test_a_model_refuses_wrong_ids_sharded_or_not(ranks: Ranks) -> None:
    task = EsmmTrainTask(ESMM(EmbeddingBagCollection(tables=CONFIGS)))
    for sharded in (False, True):
        if sharded:
            plan = make_plan(
                task, ranks=ranks, sharding="table_wise", kernel="fused", workload=Workload(2)
            )
            task = shard(task, plan=plan, ranks=ranks)
        task(_batch(9, 3))
        with pytest.raises(OptionError, match="feature 'item' has the id 10"):
            task(_batch(10, 3))


def test_a_pipeline_refuses_wrong_ids_and_trains_no_other_row(ranks: Ranks) -> None:
    task = EsmmTrainTask(ESMM(EmbeddingBagCollection(tables=CONFIGS)))
    plan = make_plan(task, ranks=ranks, sharding="table_wise", kernel="fused", workload=Workload(2))
    model = shard(task, plan=plan, ranks=ranks)
    optimizer = torch.optim.SGD(task.model.towers.parameters(), lr=0.1)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    batches = iter([_batch(9, 3), _batch(1, 2), _batch(10, 3), _batch(2, 2), _batch(3, 3)])
    pipeline.progress(batches)
    pipeline.progress(batches)
    with pytest.raises(OptionError, match="feature 'item' has the id 10"):
        pipeline.progress(batches)


def _wrong_on_one_rank(sharding: Any) -> str:
    with process_group("cpu") as ranks:
        module = Pooling()
        plan = make_plan(
            module, ranks=ranks, sharding=sharding, kernel="fused", workload=Workload(2)
        )
        sharded = shard(module, plan=plan, ranks=ranks)
        sharded(_features([9, 0], [3, 0]))
        try:
            sharded(_features([-1, 0], [3, 0]))
        except OptionError as error:
            said = str(error)
        del sharded
        return said


def test_somebody_elses_sharded_module_refuses_wrong_ids() -> None:
    """By rows, which would take the last row of the other rank for -1."""
    for said in run_on_ranks(2, _wrong_on_one_rank, "row_wise"):
        assert said.startswith("feature 'item' has the id -1")
