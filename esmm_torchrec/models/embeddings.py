"""From a schema to TorchRec's EmbeddingBagCollections, and from those to one matrix of features.

Shapes: B impressions, F the sum of the embedding dims of all features plus the dense features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import IdFeature, Schema


class EmbeddingBagCollections(NamedTuple):
    """The collections of a schema: `is_weighted` holds for a whole EmbeddingBagCollection, and
    weighting every single-valued feature would double its cost, so there are two."""

    unweighted: EmbeddingBagCollection | None
    weighted: EmbeddingBagCollection | None


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

    def collection(
        features: tuple[IdFeature, ...], is_weighted: bool
    ) -> EmbeddingBagCollection | None:
        by_table: dict[str, list[str]] = {}
        for feature in features:
            by_table.setdefault(feature.table, []).append(feature.name)
        configs = [
            EmbeddingBagConfig(
                name=name_prefix + table,
                num_embeddings=schema.table(table).num_embeddings,
                embedding_dim=embedding_dim,
                feature_names=names,
                pooling=PoolingType.SUM,
            )
            for table, names in by_table.items()
        ]
        if not configs:
            return None
        return EmbeddingBagCollection(
            tables=configs, is_weighted=is_weighted, device=torch.device(device)
        )

    return EmbeddingBagCollections(
        unweighted=collection(schema.unweighted_features, is_weighted=False),
        weighted=collection(schema.weighted_features, is_weighted=True),
    )


class PooledFeatures(nn.Module):
    """Looks up and pools every id feature and lays the dense features beside them.

    Embeddings are addressed by key: the order in which a sharded collection returns its keys
    follows the plan, so taking its values as they come would feed the towers permuted features.

    Args:
        embedding_bag_collection: unweighted, or None.
        weighted_embedding_bag_collection: weighted, or None.
        dense_in_features: number of dense features.

    Raises:
        OptionError: there is no collection, one is weighted where it must not be or the other
            way round, or both have a feature of the same name.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection | None = None,
        weighted_embedding_bag_collection: EmbeddingBagCollection | None = None,
        dense_in_features: int = 0,
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self.weighted_embedding_bag_collection = weighted_embedding_bag_collection
        self.dense_in_features = dense_in_features
        keys: list[str] = []
        out_features = dense_in_features
        for collection, weighted in (
            (embedding_bag_collection, False),
            (weighted_embedding_bag_collection, True),
        ):
            if collection is None:
                continue
            if collection.is_weighted() != weighted:
                raise OptionError(
                    "embedding_bag_collection must be unweighted and "
                    "weighted_embedding_bag_collection weighted; exchange them"
                )
            for config in collection.embedding_bag_configs():
                keys += config.feature_names
                out_features += config.embedding_dim * len(config.feature_names)
        if not keys:
            raise OptionError("a model needs at least one EmbeddingBagCollection")
        if len(set(keys)) < len(keys):
            raise OptionError("every feature name may occur once over both collections")
        self._keys = keys
        self.out_features = out_features

    def forward(
        self,
        sparse_features: KeyedJaggedTensor | None = None,
        weighted_sparse_features: KeyedJaggedTensor | None = None,
        dense_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pools one batch.

        Args:
            sparse_features: features of the unweighted collection.
            weighted_sparse_features: features of the weighted collection, with weights.
            dense_features: float32 (B, dense_in_features).

        Returns:
            float32 (B, F), features in the order in which the collections declare them.
        """
        pooled: list[KeyedTensor] = []
        if self.embedding_bag_collection is not None:
            pooled.append(self.embedding_bag_collection(sparse_features))
        if self.weighted_embedding_bag_collection is not None:
            pooled.append(self.weighted_embedding_bag_collection(weighted_sparse_features))
        embedded = KeyedTensor.regroup(pooled, [self._keys])[0]
        if self.dense_in_features == 0 or dense_features is None:
            return embedded
        return torch.cat([embedded, dense_features], dim=1)
