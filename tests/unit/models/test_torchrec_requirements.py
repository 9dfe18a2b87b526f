"""What TorchRec asks of a module it shards and pipelines, asked of this library's models.

Shapes: B impressions, U distinct shared rows.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torchrec.distributed.train_pipeline.tracing import Tracer
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models.architectures.separate import Network, SeparateNetworks
from esmm_torchrec.models.embeddings import PooledFeatures, embedding_bag_collections
from esmm_torchrec.models.esmm import ESMM, EsmmTrainTask, TrainTask
from esmm_torchrec.models.towers import EsmmTowers, Tower
from esmm_torchrec.schema import IdFeature, Schema, Table

MODULES = (ESMM, EsmmTowers, EsmmTrainTask, TrainTask, PooledFeatures, Tower, Network)
MOST_ARGUMENTS = 6
DENSE = 3

SCHEMA = Schema(
    tuple(Table(name, 20) for name in ("item", "cross", "age", "history")),
    (
        IdFeature("item", "item"),
        IdFeature("seen", "item", multi_valued=True),
        IdFeature("cross", "cross", weighted=True),
        IdFeature("age", "age", shared=True),
        IdFeature("history", "history", multi_valued=True, weighted=True, shared=True),
    ),
    tuple(f"dense_{number}" for number in range(DENSE)),
)
KINDS = ("embedding_bag_collection", "weighted_embedding_bag_collection",
         "shared_embedding_bag_collection", "shared_weighted_embedding_bag_collection")  # fmt: skip


def esmm(device: str = "cpu") -> ESMM:
    """With every kind of collection."""
    collections = embedding_bag_collections(SCHEMA, 8, device=device)
    towers = EsmmTowers(5 * 8 + DENSE, (16, 8), device=torch.device(device))
    return ESMM(*collections, dense_in_features=DENSE, towers=towers)


def _bags(keys: list[str], bags: int, seed: int, *, weighted: bool) -> KeyedJaggedTensor:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, (len(keys) * bags,), generator=random)
    total = int(lengths.sum())
    weights = torch.rand(total, generator=random) if weighted else None
    ids = torch.randint(20, (total,), generator=random)
    return KeyedJaggedTensor(keys, ids, weights=weights, lengths=lengths)


def impressions(rows: int = 12, seed: int = 0) -> ImpressionBatch:
    """B = `rows`, U = B / 3."""
    random = torch.Generator().manual_seed(seed)
    click = torch.randint(2, (rows,), generator=random).float()
    return ImpressionBatch(
        sparse_features=_bags(["item", "seen"], rows, seed, weighted=False),
        weighted_sparse_features=_bags(["cross"], rows, seed + 1, weighted=True),
        shared_sparse_features=_bags(["age"], rows // 3, seed + 2, weighted=False),
        shared_weighted_sparse_features=_bags(["history"], rows // 3, seed + 3, weighted=True),
        shared_index=torch.arange(rows) % (rows // 3),
        dense_features=torch.randn(rows, DENSE, generator=random),
        click=click,
        conversion=click * torch.randint(2, (rows,), generator=random),
    )


def test_pipelines_trace_it_for_batches_of_any_size() -> None:
    """TrainPipelineSparseDist traces the train task down to the sharded collections, once, and
    starts each one's input exchange for the batches to come."""
    task = EsmmTrainTask(esmm())
    collections = [f"model.features.{kind}" for kind in KINDS]
    graph = Tracer(leaf_modules=collections).trace(task)
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert [name for name in called if name in collections] == collections
    traced = torch.fx.GraphModule(task, graph)
    for rows, seed in ((12, 0), (30, 5), (3, 9)):
        batch = impressions(rows, seed)
        assert torch.equal(traced(batch)[0], task(batch)[0])


def test_embeddings_are_in_the_collections_and_nowhere_else() -> None:
    model = EsmmTrainTask(esmm())
    inside = {
        f"model.features.{kind}.embedding_bags.{table}.weight"
        for kind, table in zip(KINDS, ("item", "cross", "age", "history"), strict=True)
    }
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if "embedding" in name} == inside
    assert {name for name in names if not name.startswith("model.towers.")} == inside
    assert not list(model.buffers())
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    assert len(tables) == len(inside)


def test_on_the_meta_device_nothing_is_allocated() -> None:
    model = EsmmTrainTask(esmm("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert set(model.state_dict()) == set(EsmmTrainTask(esmm()).state_dict())
    tower = model.get_submodule("model.towers")
    logits = tower(torch.empty(7, 5 * 8 + DENSE, device="meta"))
    assert [(logit.shape, logit.is_meta) for logit in logits.values()] == [((7,), True)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers_compile_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    towers = EsmmTowers(24, (16, 8), dtype=dtype)
    compiled = torch.compile(towers, backend="aot_eager", fullgraph=True)
    features = torch.randn(9, 24)
    gradients = []
    for module in (towers, compiled):
        click, conversion = module(features).values()
        towers.zero_grad()
        (click.square().sum() + conversion.exp().sum()).backward()
        gradients.append([value.grad for value in towers.parameters()])
        assert click.dtype == conversion.dtype == torch.float32
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(dict(compiled(features)), dict(towers(features)))


class _OtherOrder(EmbeddingBagCollection):
    """Gives its keys in another order than it declares them, as sharded collections do."""

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = super().forward(features)
        keys = pooled.keys()[::-1]
        values = torch.cat([pooled[key] for key in keys], dim=1)
        return KeyedTensor(keys, [pooled[key].shape[1] for key in keys], values)


def test_features_go_by_key() -> None:
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=20, embedding_dim=dim,
                           feature_names=[name]) for name, dim in (("a", 4), ("b", 8), ("c", 4))
    ]  # fmt: skip
    model = ESMM(EmbeddingBagCollection(tables=tables))
    other = ESMM(_OtherOrder(tables=tables))
    other.load_state_dict(model.state_dict())
    features = _bags(["a", "b", "c"], 10, 4, weighted=False)
    expected = model(features)
    for order in ([0, 1, 2], [2, 0, 1]):
        for each in (model, other):
            logits = each(features.permute(order))
            assert torch.equal(logits.click, expected.click)
            assert torch.equal(logits.conversion, expected.conversion)


@pytest.mark.parametrize("module", [*MODULES, SeparateNetworks])
def test_constructors_take_few_arguments(module: type[nn.Module]) -> None:
    parameters = list(inspect.signature(module.__init__).parameters.values())[1:]
    assert len(parameters) <= MOST_ARGUMENTS
    # The order of more than a few is nobody's to remember.
    assert sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) <= 5
    assert all(p.annotation is not p.empty for p in parameters)
