"""Groups of tables updated on threads: the same tables as one kernel on one thread gives."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training import table_kernels, trainer
from esmm_torchrec.training.fit import build_loop, training_part
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.table_kernels import group_tables
from tests.prepared_data import write_data_set

OPTIONS = TrainOptions(batch_size=20, embedding_dim=8, tower=(8,), epochs=2)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _train(data: Path, num_threads: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Kernels of all collections; weights and optimiser state after training."""
    with process_group("cpu") as ranks:
        torch.set_num_threads(num_threads)
        split = MappedSplit.open(PreparedDataSet.open(data), "train")
        loop = build_loop(split, OPTIONS, ranks, part=training_part(split, OPTIONS))
        loop.run()
        assert torch.get_num_threads() == num_threads
        trained = loop.trainer
        kernels = {
            id(module)
            for collection in trained.model.modules()
            for lookup in getattr(collection, "_lookups", ())
            for module in lookup.modules()
            if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)
        }
        state: dict[str, Any] = dict(trained.model.state_dict())
        for key, named in trained.optimizer.state_dict()["state"].items():
            state |= {f"{key}.{name}": value for name, value in named.items()}
        values = {
            key: (
                value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
            ).clone()
            for key, value in state.items()
        }
        del loop, trained, state
        return len(kernels), values


@pytest.mark.usefixtures("threads")
def test_updates_on_threads_change_nothing(tmp_path: Path) -> None:
    data = tmp_path / "prepared"
    write_data_set(data, train=115, test=20)
    kernels, one_thread = _train(data, 1)
    more_kernels, state = _train(data, 2)
    assert kernels == 4  # one for each collection, of which two have one table only
    assert more_kernels == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "UpdatesOnThreads", lambda *_: None)
        _, one_after_the_other = _train(data, 2)
    for expected, tolerance in ((one_after_the_other, 0.0), (one_thread, 1e-6)):
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=tolerance, msg=key)


def test_weights_of_bags_are_not_differentiated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fbgemm's argument still reaches its kernels, through the look-ups that TorchRec hides."""
    forward, flags = SplitTableBatchedEmbeddingBagsCodegen.forward, []

    def record(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        if keywords.get("per_sample_weights") is not None:
            flags.append(keywords["feature_requires_grad"])
        return forward(kernel, *arguments, **keywords)

    monkeypatch.setattr(SplitTableBatchedEmbeddingBagsCodegen, "forward", record)
    write_data_set(tmp_path / "prepared", train=40, test=20)
    _train(tmp_path / "prepared", 1)
    assert flags
    assert not any(of.any() for of in flags)


def test_hooks_that_stop_working_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a release of TorchRec that renames the attribute."""
    monkeypatch.setattr(table_kernels, "_fused_kernels", lambda _model: ())
    write_data_set(tmp_path / "prepared", train=40, test=20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _train(tmp_path / "prepared", 1)
    assert any("differentiates the weights of bags" in str(one.message) for one in caught)


def test_updates_run_on_threads_of_their_own() -> None:
    updates = table_kernels.UpdatesOnThreads(torch.nn.Module(), 2)
    table = torch.zeros(3, requires_grad=True)
    ran_on = []
    pooled = table * 1
    pooled.register_hook(lambda _: ran_on.append(threading.current_thread().name))
    output = updates._cut(torch.nn.Module(), (), pooled)
    output.sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [1, 1, 1]
    assert ran_on[0].startswith("update")


def test_a_failed_update_ends_the_backward_pass_and_not_the_next_one() -> None:
    updates = table_kernels.UpdatesOnThreads(torch.nn.Module(), 2)
    table = torch.zeros(3, requires_grad=True)

    def fail(_: torch.Tensor) -> None:
        raise ValueError("this one fails")

    pooled = table * 1
    pooled.register_hook(fail)
    output = updates._cut(torch.nn.Module(), (), pooled)
    with pytest.raises(ValueError, match="this one fails"):
        output.sum().backward()
    updates._cut(torch.nn.Module(), (), table * 2).sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [2, 2, 2]


def test_groups_are_neighbours_of_equal_work() -> None:
    rows = {"huge": 10**6, "large": 10**5, "small": 10, "tiny": 2, "big": 10**5}
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name, embedding_dim=4, num_embeddings=number, feature_names=[f"f_{name}"]
            )
            for name, number in rows.items()
        ],
        device=torch.device("meta"),
    )
    weights = dict(collection.named_parameters())
    for weight in weights.values():
        apply_optimizer_in_backward(torch.optim.SGD, [weight], {"lr": 0.1})
    workload = Workload(100, mean_ids_per_bag={"f_huge": 0.5, "f_large": 0.5})
    group_tables(torch.nn.ModuleList([collection]), 2, workload=workload)
    groups = [weight._optimizer_kwargs[0]["_batch_key"] for weight in weights.values()]  # pyright: ignore[reportAttributeAccessIssue]
    assert groups == ["0", "0", "0", "1", "1"]
