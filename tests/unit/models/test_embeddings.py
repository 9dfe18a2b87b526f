"""From a schema to collections, whatever its columns are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.embeddings import PooledFeatures, embedding_bag_collections, module_names
from esmm_torchrec.schema import IdFeature, Schema, Table

AWKWARD = ("items", "items_table", "a.b", "a_b", "a:b", "205", "type", "training", "forward",
           "keys", "weight", "")  # fmt: skip


def test_tables_may_be_called_as_anything() -> None:
    schema = Schema(
        tuple(Table(name, 5) for name in AWKWARD),
        tuple(IdFeature(name, name) for name in AWKWARD),
    )
    collections = embedding_bag_collections(schema, 4, device="cpu")
    features = PooledFeatures(*collections)
    ids = torch.arange(2 * len(AWKWARD)) % 5
    pooled = features(KeyedJaggedTensor(list(AWKWARD), ids, lengths=torch.ones(len(ids)).int()))
    assert collections.sparse_features is not None
    names = module_names(AWKWARD)
    assert len(set(names.values())) == len(AWKWARD)
    for place, name in enumerate(AWKWARD):
        table = collections.sparse_features.embedding_bags.get_submodule(names[name])
        assert isinstance(table, nn.EmbeddingBag)
        torch.testing.assert_close(
            pooled[:, 4 * place : 4 * place + 4], table.weight[ids[2 * place : 2 * place + 2]]
        )


def test_collections_follow_weights_and_sharing() -> None:
    schema = Schema(
        tuple(Table(name, 9) for name in ("item", "seen", "cross", "age")),
        (
            IdFeature("age", "age", shared=True),
            IdFeature("item", "item"),
            # Its table also serves a feature that is not shared: written out per impression.
            IdFeature("last_item", "item", shared=True),
            IdFeature("seen", "seen", multi_valued=True, weighted=True, shared=True),
            IdFeature("cross", "cross", weighted=True),
            # Its table has a weighted feature, and a table is in one collection only.
            IdFeature("plain_cross", "cross"),
        ),
    )
    names = {
        collection: [feature.name for feature in features]
        for collection, features in schema.collections.items()
    }
    assert names == {
        "sparse_features": ["item", "last_item"],
        "weighted_sparse_features": ["cross", "plain_cross"],
        "shared_sparse_features": ["age"],
        "shared_weighted_sparse_features": ["seen"],
    }
    collections = embedding_bag_collections(schema, 8)
    for name, collection in collections._asdict().items():
        assert isinstance(collection, EmbeddingBagCollection)
        assert collection.is_weighted() == ("weighted" in name)
        assert all(parameter.is_meta for parameter in collection.parameters())
    assert PooledFeatures(*collections, dense_in_features=3).out_features == 6 * 8 + 3


@pytest.mark.parametrize("dim", [0, 2, 18])
def test_a_dim_that_fbgemm_cannot_hold_is_named(dim: int) -> None:
    schema = Schema((Table("item", 5),), (IdFeature("item", "item"),))
    with pytest.raises(OptionError, match=f"`embedding_dim` {dim} is not a positive multiple of 4"):
        embedding_bag_collections(schema, dim)


def test_tables_of_another_prefix_never_collide() -> None:
    """A column may be called like the prefixed table of a second set of tables."""
    columns = ("item", "click_item", "click:item")
    first, second = module_names(columns), module_names(columns, prefix="click")
    assert len({*first.values(), *second.values()}) == 2 * len(columns)


def test_dense_features_must_be_those_the_model_was_built_for() -> None:
    schema = Schema((Table("item", 5),), (IdFeature("item", "item"),))
    bags = KeyedJaggedTensor(["item"], torch.tensor([1, 2]), lengths=torch.ones(2).int())
    for built_with, given in ((0, torch.zeros(2, 3)), (3, None), (3, torch.zeros(2, 2))):
        collections = embedding_bag_collections(schema, 4, device="cpu")
        features = PooledFeatures(*collections, dense_in_features=built_with)
        with pytest.raises(OptionError, match=f"built with dense_in_features {built_with}"):
            features(BatchFeatures(sparse_features=bags, dense_features=given))
