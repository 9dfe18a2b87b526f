"""From a schema to TorchRec's EmbeddingBagCollections, and from those to one matrix of features.

Shapes: B impressions, F the sum of the embedding dims of all features plus the dense features.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import COLLECTIONS, CollectionName, Schema

_TAKEN_MODULE_NAMES = frozenset({"", *dir(nn.ModuleDict())})


class EmbeddingBagCollections(NamedTuple):
    """The collections of a schema, in the order `PooledFeatures` takes them.

    `is_weighted` holds for a whole EmbeddingBagCollection, and weighting every single-valued
    feature would double its cost; features that impressions share have a batch size of their own.
    Hence up to four collections where TorchRec's models have one.
    """

    sparse_features: EmbeddingBagCollection | None
    weighted_sparse_features: EmbeddingBagCollection | None
    shared_sparse_features: EmbeddingBagCollection | None
    shared_weighted_sparse_features: EmbeddingBagCollection | None


def module_name(table: str) -> str:
    """What a model calls a table: its name, changed where torch cannot hold it in an nn.ModuleDict
    ("items", "a.b"). Plans and checkpoints have this name, too."""
    name = table.replace(".", "_")
    return f"{name}_table" if name in _TAKEN_MODULE_NAMES else name


def embedding_bag_collections(
    schema: Schema,
    embedding_dim: int,
    *,
    device: torch.device | str = "meta",
    name_prefix: str = "",
) -> EmbeddingBagCollections:
    """Builds the collections that look up every id feature of a schema.

    Bags are sums: a missing feature is the zero vector, a weighted bag the weighted sum.

    Args:
        schema: tables and features.
        embedding_dim: columns of every table; a multiple of 4, which fbgemm's kernels require.
        device: "meta" allocates nothing; `sharding.shard` then draws the weights table by table.
        name_prefix: put before each table's name, for a model with more than one set of tables.

    Raises:
        OptionError: the embedding dim is not a positive multiple of 4.
    """
    if embedding_dim < 4 or embedding_dim % 4:
        raise OptionError(
            f"--embedding-dim {embedding_dim} is not a positive multiple of 4, which fbgemm's "
            "kernels require; take the next one up"
        )

    collections: dict[CollectionName, EmbeddingBagCollection | None] = dict.fromkeys(COLLECTIONS)
    for name, features in schema.collections.items():
        by_table: dict[str, list[str]] = {}
        for feature in features:
            by_table.setdefault(feature.table, []).append(feature.name)
        collections[name] = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name_prefix + module_name(table),
                    num_embeddings=schema.table(table).num_embeddings,
                    embedding_dim=embedding_dim,
                    feature_names=names,
                    pooling=PoolingType.SUM,
                )
                for table, names in by_table.items()
            ],
            is_weighted=name.endswith("weighted_sparse_features"),
            device=torch.device(device),
        )
    return EmbeddingBagCollections(**collections)


class PooledFeatures(nn.Module):
    """Looks up and pools every id feature and lays the dense features beside them.

    Embeddings are addressed by key: the order in which a sharded collection returns its keys
    follows the plan, so taking its values as they come would feed the towers permuted features.

    Args:
        embedding_bag_collection: unweighted, or None.
        weighted_embedding_bag_collection: weighted, or None.
        shared_embedding_bag_collection: unweighted, of features that impressions share, or None.
        shared_weighted_embedding_bag_collection: weighted, of features that impressions share.
        dense_in_features: number of dense features.

    Raises:
        OptionError: there is no collection, one is weighted where it must not be or the other
            way round, or two have a feature of the same name.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection | None = None,
        weighted_embedding_bag_collection: EmbeddingBagCollection | None = None,
        shared_embedding_bag_collection: EmbeddingBagCollection | None = None,
        shared_weighted_embedding_bag_collection: EmbeddingBagCollection | None = None,
        dense_in_features: int = 0,
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self.weighted_embedding_bag_collection = weighted_embedding_bag_collection
        self.shared_embedding_bag_collection = shared_embedding_bag_collection
        self.shared_weighted_embedding_bag_collection = shared_weighted_embedding_bag_collection
        self.dense_in_features = dense_in_features
        for name, collection in self.named_children():
            assert isinstance(collection, EmbeddingBagCollection)
            if collection.is_weighted() != ("weighted" in name):
                raise OptionError(
                    f"{name} must {'' if 'weighted' in name else 'not '}be weighted; exchange the "
                    "weighted and the unweighted collection"
                )
        self._keys = _keys(embedding_bag_collection, weighted_embedding_bag_collection)
        self._shared_keys = _keys(
            shared_embedding_bag_collection, shared_weighted_embedding_bag_collection
        )
        keys = self._keys + self._shared_keys
        if not keys:
            raise OptionError("a model needs at least one EmbeddingBagCollection")
        if len(set(keys)) < len(keys):
            raise OptionError("every feature name may occur once over all collections")
        self.out_features = dense_in_features + sum(
            config.embedding_dim * len(config.feature_names)
            for collection in self.children()
            for config in cast(EmbeddingBagCollection, collection).embedding_bag_configs()
        )

    def forward(
        self,
        sparse_features: KeyedJaggedTensor | None = None,
        weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_sparse_features: KeyedJaggedTensor | None = None,
        shared_weighted_sparse_features: KeyedJaggedTensor | None = None,
        shared_index: torch.Tensor | None = None,
        dense_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pools one batch; see `ImpressionBatch` for the arguments.

        Returns:
            float32 (B, F): features in the order in which the collections declare them, those of
            the shared collections after the others, dense features last.
        """
        pooled: list[KeyedTensor] = []
        shared: list[KeyedTensor] = []
        if self.embedding_bag_collection is not None:
            pooled.append(self.embedding_bag_collection(sparse_features))
        if self.weighted_embedding_bag_collection is not None:
            pooled.append(self.weighted_embedding_bag_collection(weighted_sparse_features))
        if self.shared_embedding_bag_collection is not None:
            shared.append(self.shared_embedding_bag_collection(shared_sparse_features))
        if self.shared_weighted_embedding_bag_collection is not None:
            shared.append(
                self.shared_weighted_embedding_bag_collection(shared_weighted_sparse_features)
            )
        parts: list[torch.Tensor] = []
        if pooled:
            parts.append(_in_order(pooled, self._keys))
        if shared:
            once = _in_order(shared, self._shared_keys)
            parts.append(once if shared_index is None else once.index_select(0, shared_index))
        if self.dense_in_features and dense_features is not None:
            parts.append(dense_features)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@torch.fx.wrap
def _in_order(pooled: list[KeyedTensor], keys: list[str]) -> torch.Tensor:
    """The values of all keys, (rows, sum of dims), in the order of `keys`."""
    if len(pooled) == 1 and pooled[0].keys() == keys:
        return pooled[0].values()
    return KeyedTensor.regroup(pooled, [keys])[0]


def _keys(*collections: EmbeddingBagCollection | None) -> list[str]:
    """Features in the order in which collections declare them."""
    return [
        key
        for collection in collections
        if collection is not None
        for config in collection.embedding_bag_configs()
        for key in config.feature_names
    ]
