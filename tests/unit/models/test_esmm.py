"""ESMM on tensors small enough to write out, and its train task, against plain PyTorch."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures, ImpressionBatch
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.esmm import ESMM, EsmmTrainTask
from esmm_torchrec.models.towers import EsmmTowers

DIM = 4


def _collection(table: str, *features: str, rows: int = 3, weighted: bool = False):
    """One table whose row r is filled with 10^r."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table, num_embeddings=rows, embedding_dim=DIM, feature_names=list(features)
            )
        ],
        is_weighted=weighted,
    )
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter.copy_((10.0 ** torch.arange(rows))[:, None].expand(rows, DIM))
    return collection


def _bags(bags: dict[str, list[list[int]]], weights: list[float] | None = None):
    """Key → the ids of each bag."""
    ids = [row for of_key in bags.values() for bag in of_key for row in bag]
    lengths = [len(bag) for of_key in bags.values() for bag in of_key]
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(bags),
        values=torch.tensor(ids),
        lengths=torch.tensor(lengths),
        weights=None if weights is None else torch.tensor(weights),
    )


def _model() -> ESMM:
    """One table that serves two features, weighted and shared ones beside it, two dense ones."""
    return ESMM(
        _collection("item", "item", "seen"),
        _collection("cross", "cross", weighted=True),
        _collection("age", "age"),
        _collection("history", "history", weighted=True),
        dense_in_features=2,
        towers=EsmmTowers(5 * DIM + 2, (8, 4)),
    )


def _features() -> dict[str, KeyedJaggedTensor | torch.Tensor]:
    """Three impressions of two users."""
    return {
        "sparse_features": _bags({"item": [[0], [1], []], "seen": [[1, 2], [], [0, 0, 0]]}),
        "weighted_sparse_features": _bags({"cross": [[1], [], [2]]}, [0.5, 2.0]),
        "shared_sparse_features": _bags({"age": [[2], [1]]}),
        "shared_weighted_sparse_features": _bags({"history": [[0, 1], [2]]}, [0.25, 0.75, -1.0]),
        "shared_index": torch.tensor([1, 0, 1]),
        "dense_features": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
    }


POOLED = torch.tensor(
    # item, seen, cross, then by user: age, history; dense at the end
    [
        [1.0, 110.0, 5.0, 10.0, -100.0, 0.1, 0.2],
        [10.0, 0.0, 0.0, 100.0, 7.75, 0.3, 0.4],
        [0.0, 3.0, 200.0, 10.0, -100.0, 0.5, 0.6],
    ]
)


def test_pooled_features_are_these() -> None:
    model = _model()
    pooled = model.features(BatchFeatures(**_features()))
    wide = [column.repeat(1, DIM) for column in POOLED[:, :5, None].unbind(1)]
    torch.testing.assert_close(pooled, torch.cat([*wide, POOLED[:, 5:]], dim=1), atol=0, rtol=0)
    assert model.features.out_features == pooled.shape[1]


def test_logits_are_two_perceptrons_on_the_same_features() -> None:
    torch.manual_seed(0)
    model = _model()
    features = model.features(BatchFeatures(**_features()))
    logits = model(BatchFeatures(**_features()))
    for name in ("click", "conversion"):
        hidden = features.double()
        layers = [*getattr(model.towers, name).hidden, getattr(model.towers, name).logit]
        for layer in layers[:-1]:
            hidden = F.relu(hidden @ layer.weight.T.double() + layer.bias.double())
        last = hidden @ layers[-1].weight.T.double() + layers[-1].bias.double()
        torch.testing.assert_close(getattr(logits, name).double(), last[:, 0], rtol=1e-5, atol=1e-5)
    assert list(logits) == ["click", "conversion"]
    assert not torch.equal(logits.click, logits.conversion)


def test_without_an_index_each_impression_has_its_own_shared_bag() -> None:
    model = _model()
    once = _features()
    written_out = once | {
        "shared_sparse_features": _bags({"age": [[1], [2], [1]]}),
        "shared_weighted_sparse_features": _bags(
            {"history": [[2], [0, 1], [2]]}, [-1.0, 0.25, 0.75, -1.0]
        ),
        "shared_index": None,
    }
    logits, wanted = model(BatchFeatures(**once)), model(BatchFeatures(**written_out))
    torch.testing.assert_close(dict(logits), dict(wanted), atol=0, rtol=0)


def test_a_table_that_serves_two_features_learns_from_both() -> None:
    model = ESMM(_collection("item", "item", "seen"), towers=EsmmTowers(2 * DIM, (4,)))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.shape == (3, DIM))
    model(_bags({"item": [[0], []], "seen": [[], [2]]})).click.sum().backward()
    (gradient,) = (table.grad for table in model.parameters() if table.requires_grad)
    assert gradient is not None
    assert gradient.abs().sum(dim=1).bool().tolist() == [True, False, True]


def _batch(features: dict, click: list[int], conversion: list[int], **more) -> ImpressionBatch:
    return ImpressionBatch(
        click=torch.tensor(click).float(),
        conversion=torch.tensor(conversion).float(),
        **features,
        **more,
    )


@pytest.mark.parametrize(("click_weight", "ctcvr_weight"), [(1.0, 1.0), (0.5, 3.0)])
def test_the_loss_is_equation_2_of_the_paper(click_weight: float, ctcvr_weight: float) -> None:
    torch.manual_seed(1)
    task = EsmmTrainTask(_small(), click_loss_weight=click_weight, ctcvr_loss_weight=ctcvr_weight)
    features = _small_features()
    loss, output = task(_batch(features, [1, 1, 0], [1, 0, 0]))
    pctr, pcvr = (
        logit.double().sigmoid() for logit in task.model(BatchFeatures(**features)).values()
    )
    click = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    both = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    expected = click_weight * F.binary_cross_entropy(pctr, click)
    expected += ctcvr_weight * F.binary_cross_entropy(pctr * pcvr, both)
    torch.testing.assert_close(loss.double(), expected)

    loss.backward()
    assert output.loss.item() == loss.item()
    for tensor in (output.loss, *output.logits.values(), *output.labels.values()):
        assert not tensor.requires_grad
    torch.testing.assert_close(output.logits.click.double().sigmoid(), pctr)
    assert output.labels.click.tolist() == [1, 1, 0]
    assert output.labels.conversion.tolist() == [1, 0, 0]


def test_an_unclicked_conversion_is_no_conversion() -> None:
    torch.manual_seed(1)
    task, features = EsmmTrainTask(_small()), _small_features()
    kept, _ = task(_batch(features, [1, 0, 0], [1, 1, 0]))
    dropped, _ = task(_batch(features, [1, 0, 0], [1, 0, 0]))
    assert kept.item() == dropped.item()


def test_rows_without_weight_change_nothing() -> None:
    torch.manual_seed(1)
    task = EsmmTrainTask(_small())
    loss, _ = task(_batch(_small_features(), [1, 1, 0], [1, 0, 0]))
    loss.backward()
    expected = [parameter.grad.clone() for parameter in task.parameters()]
    task.zero_grad()
    padded = {
        "sparse_features": _bags({"item": [[0], [1], [2], [], []]}),
        "dense_features": torch.tensor([[0.1], [0.3], [0.5], [0.0], [0.0]]),
    }
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    with_padding, _ = task(_batch(padded, [1, 1, 0, 1, 0], [1, 0, 0, 1, 0], weight=weight))
    with_padding.backward()
    torch.testing.assert_close(with_padding, loss)
    for parameter, gradient in zip(task.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("detach_click", [False, True])
def test_the_conversion_term_trains_the_click_tower_unless_detached(detach_click: bool) -> None:
    torch.manual_seed(1)
    task = EsmmTrainTask(_small(), click_loss_weight=0.0, detach_click=detach_click)
    loss, _ = task(_batch(_small_features(), [1, 1, 0], [1, 0, 0]))
    loss.backward()
    towers = task.model.get_submodule("towers")
    moved = {
        name: any(p.grad is not None and bool(p.grad.any()) for p in tower.parameters())
        for name, tower in towers.named_children()
    }
    assert moved == {"click": not detach_click, "conversion": True}


def _small() -> ESMM:
    collection = _collection("item", "item")
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter.div_(100)
    return ESMM(collection, dense_in_features=1, towers=EsmmTowers(DIM + 1, (4,)))


def _small_features() -> dict[str, KeyedJaggedTensor | torch.Tensor]:
    return {
        "sparse_features": _bags({"item": [[0], [1], [2]]}),
        "dense_features": torch.tensor([[0.1], [0.3], [0.5]]),
    }


def test_wrong_collections_are_refused_by_name() -> None:
    plain, weighted = _collection("item", "item"), _collection("cross", "cross", weighted=True)
    for collections, sentence in (
        ((), "a model needs at least one EmbeddingBagCollection"),
        ((weighted, None), "embedding_bag_collection must not be weighted; exchange the weighted"),
        ((None, plain), "weighted_embedding_bag_collection must be weighted"),
        ((plain, None, weighted), "shared_embedding_bag_collection must not be weighted"),
        (
            (plain, None, None, _collection("o", "o")),
            "shared_weighted_embedding_bag_collection must be weighted",
        ),
        ((plain, None, _collection("other", "item")), "every feature name may occur once"),
    ):
        with pytest.raises(OptionError, match=re.escape(sentence)):
            ESMM(*collections)
