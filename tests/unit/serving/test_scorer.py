"""Scoring with a sharded model: padding, a second stream, and errors within a step."""

from __future__ import annotations

import numpy as np
import pytest
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.serving.scorer import score_split, score_stream
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.trainer import Trainer
from tests.prepared_data import write_data_set


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> MappedSplit:
    data = write_data_set(tmp_path_factory.mktemp("data") / "prepared", train=40, test=37)
    return MappedSplit.open(data, "test")


def _trainer(ranks: Ranks, split: MappedSplit) -> Trainer:
    options = TrainOptions(embedding_dim=4, tower=(4,), batch_size=8, device="cpu")
    task = build_train_task(split.schema, options.model)
    return Trainer(task, options=options, ranks=ranks, workload=Workload(8))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_within_a_step_stays_what_it_is(
    error: type[BaseException], split: MappedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchRec's pipeline cannot be detached while ids are on their way to the ranks."""

    def fail(*_: object) -> None:
        raise error

    with process_group("cpu") as ranks:
        model = _trainer(ranks, split).model
        reader = ImpressionReader(split, batch_size=8, shuffle=False)
        assert len(list(score_stream(model, reader, ranks))) == 5
        model.train()
        monkeypatch.setattr(EvalPipelineSparseDist, "start_sparse_data_dist", fail)
        with pytest.raises(error):
            next(score_stream(model, reader, ranks))
        assert model.training


def test_scores_have_no_padding_and_do_not_depend_on_the_batch(split: MappedSplit) -> None:
    with process_group("cpu") as ranks:
        model = _trainer(ranks, split).model
        reader = ImpressionReader(split, batch_size=8, shuffle=False)
        for _ in range(2):  # a model can score again after a complete stream
            steps = list(score_stream(model, reader, ranks))
            sizes = [[len(score.values) for score in step.values()] for step in steps if step]
            assert sizes == [[8] * 3] * 4 + [[5] * 3]
        whole = score_split(model, split, ranks, progress=False)
        rows = np.array([36, 3, 3, 20])
        some = score_split(model, split, ranks, rows=rows, batch_size=3, progress=False)
        assert whole is not None
        assert some is not None
        assert list(whole.scores) == ["ctr", "cvr", "ctcvr"]
        for name, score in whole.scores.items():
            streamed = np.concatenate([step[name].values for step in steps if step])
            np.testing.assert_allclose(score.values, streamed, atol=1e-6)
            np.testing.assert_allclose(some.scores[name].values, score.values[rows], atol=1e-6)
        np.testing.assert_array_equal(some.labels["click"], whole.labels["click"][rows])
