"""The first-order term beside the towers, against a loop over features in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.architectures.mmoe import Mmoe
from esmm_torchrec.models.architectures.separate import Separate, SeparateNetworks
from esmm_torchrec.models.architectures.shared_bottom import SharedBottom
from esmm_torchrec.models.first_order import FirstOrder
from esmm_torchrec.models.interactions.dcn import Dcn
from esmm_torchrec.models.methods import ModelOptions, build_train_task
from esmm_torchrec.models.parts import Architecture, Interaction
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.tasks import Task, TaskChain

SCHEMA = Schema(
    tables=(Table("item", 30), Table("user", 20)),
    id_features=(IdFeature("item", "item"), IdFeature("user", "user")),
    dense_features=("price", "age"),
)
DIM, ROWS = 4, 7
OPTIONS = ModelOptions(embedding_dim=DIM, tower=(6,), first_order=True)


def _features() -> BatchFeatures:
    generator = torch.Generator().manual_seed(0)
    return BatchFeatures(
        KeyedJaggedTensor(
            ["item", "user"],
            torch.randint(0, 20, (2 * ROWS,), generator=generator),
            lengths=torch.ones(2 * ROWS, dtype=torch.int64),
        ),
        dense_features=torch.randn(ROWS, 2, generator=generator),
    )


@pytest.mark.parametrize("interaction", [None, Dcn()], ids=["none", "dcn"])
@pytest.mark.parametrize("architecture", [SharedBottom(), Mmoe(), Separate()], ids=str)
def test_each_logit_gains_a_weight_of_each_id_and_dense_feature(
    architecture: Architecture, interaction: Interaction | None
) -> None:
    options = replace(OPTIONS, architecture=architecture, interaction=interaction)
    model = build_train_task(SCHEMA, options, seed=1, embedding_device="cpu").model
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    features = _features()
    logits = model(features)
    for place, name in enumerate(("click", "conversion")):
        network = model[name] if isinstance(model, SeparateNetworks) else model
        term = network.tower if isinstance(model, SeparateNetworks) else network.towers
        column = 0 if isinstance(model, SeparateNetworks) else place
        assert isinstance(term, FirstOrder)
        pooled = network.features(features).double()
        of_towers = term.towers(pooled.float())
        expected = (of_towers if torch.is_tensor(of_towers) else of_towers[name]).double()
        assert term.dense is not None
        for row in range(ROWS):
            for feature in range(2):
                expected[row] += pooled[row, feature * DIM + column]
                expected[row] += (
                    term.dense.weight[column, feature].double() * pooled[row, 2 * DIM + feature]
                )
        torch.testing.assert_close(logits[name].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_weights_start_at_zero() -> None:
    task = build_train_task(SCHEMA, OPTIONS, seed=1, embedding_device="cpu")
    tables = [value for key, value in task.state_dict().items() if ".embedding_bags." in key]
    assert len(tables) == 2
    for table in tables:
        assert not table[:, :2].any()
        assert table[:, 2:].any()
    assert not task.model.towers.dense.weight.any()  # pyright: ignore


def test_torchrec_can_trace_it() -> None:
    task = build_train_task(SCHEMA, OPTIONS, seed=1, embedding_device="cpu")
    Tracer(leaf_modules=["model.features"]).trace(task)


def test_an_embedding_needs_a_column_for_each_logit() -> None:
    five = replace(OPTIONS, architecture=Mmoe())
    builder_error = "`embedding_dim` 4 is below 5, the number of first-order terms; use a larger"
    chain = SCHEMA.tasks
    tasks = [chain[0]]
    for number in range(4):
        tasks.append(Task(f"step{number}", f"label{number}", given=tasks[-1].name))
    with pytest.raises(OptionError, match=builder_error):
        build_train_task(replace(SCHEMA, tasks=TaskChain(tuple(tasks))), five, seed=1)
