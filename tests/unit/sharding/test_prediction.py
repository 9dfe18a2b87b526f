"""Predicting with a sharded model: what goes wrong within a step is said as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.prediction import predict
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.trainer import Trainer

SCHEMA = Schema((Table("item", 6),), (IdFeature("item", "item"),))


def _batches(count: int) -> Iterator[ImpressionBatch]:
    for _ in range(count):
        yield ImpressionBatch(
            click=torch.ones(4),
            conversion=torch.zeros(4),
            sparse_features=KeyedJaggedTensor.from_lengths_sync(
                keys=["item"],
                values=torch.tensor([1, 2, 3, 3]),
                lengths=torch.ones(4, dtype=torch.int32),
            ),
        )


def _trainer(ranks: Ranks) -> Trainer:
    options = TrainOptions(embedding_dim=4, tower=(4,), batch_size=4, device="cpu")
    task = build_train_task(SCHEMA, options.model)
    return Trainer(task, options=options, ranks=ranks, workload=Workload(4))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_within_a_step_stays_what_it_is(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids on their way to the ranks are where TorchRec's pipeline cannot be taken down."""

    def fail(*_: object) -> None:
        raise error

    def work() -> None:
        with process_group("cpu") as ranks:
            model = _trainer(ranks).model
            assert len(list(predict(model, _batches(5), ranks))) == 5
            model.train()
            monkeypatch.setattr(EvalPipelineSparseDist, "start_sparse_data_dist", fail)
            with pytest.raises(error):
                next(predict(model, _batches(5), ranks))
            assert model.training

    work()


def test_a_model_predicts_again_after_a_whole_stream() -> None:
    def work() -> None:
        with process_group("cpu") as ranks:
            model = _trainer(ranks).model
            first, second = (list(predict(model, _batches(5), ranks)) for _ in range(2))
            assert len(first) == 5
            for one, other in zip(first, second, strict=True):
                assert one is not None
                assert other is not None
                torch.testing.assert_close(one.click, other.click, rtol=0, atol=0)

    work()
