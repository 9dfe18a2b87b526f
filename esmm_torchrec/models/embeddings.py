"""Builds TorchRec's EmbeddingBagCollections from a schema, and a matrix of features from them.

Shapes: B impressions, F the sum of the embedding dims of all features plus the dense features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from esmm_torchrec.batch import BatchFeatures
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.id_range import LookedUp, check_ids, looked_up
from esmm_torchrec.schema import COLLECTIONS, CollectionName, Schema

DIM_MULTIPLE = 4
"""Embedding dims must be a multiple of this number, as fbgemm's kernels require."""

_RESERVED_MODULE_NAMES = frozenset({"", *dir(nn.ModuleDict())})


class EmbeddingBagCollections(NamedTuple):
    """Collections of a schema, in the order of `PooledFeatures`' arguments.

    `is_weighted` applies to a whole EmbeddingBagCollection, and weighting every single-valued
    feature would double its cost. Features that impressions share have a different batch size.
    Hence there are up to four collections, whereas TorchRec's models have one.
    """

    sparse_features: EmbeddingBagCollection | None
    weighted_sparse_features: EmbeddingBagCollection | None
    shared_sparse_features: EmbeddingBagCollection | None
    shared_weighted_sparse_features: EmbeddingBagCollection | None


def module_names(tables: Iterable[str], *, prefix: str = "") -> dict[str, str]:
    """Maps each table to its name in a model, in plans and in checkpoints. The name is changed if
    it cannot be a key of an nn.ModuleDict ("items", "a.b") or if another table already has it.

    Args:
        tables: names of a schema's tables, in the schema's order.
        prefix: prefix of each name, for a model with more than one set of tables. Names with
            different prefixes cannot collide, because ":" occurs in prefixes only.
    """
    names: dict[str, str] = {}
    taken = set(_RESERVED_MODULE_NAMES)
    for table in tables:
        legal = table.replace(".", "_").replace(":", "_")
        name = legal
        if name in _RESERVED_MODULE_NAMES:
            name = f"{legal}_table"
        number = 2
        while name in taken:
            name = f"{legal}_{number}"
            number += 1
        taken.add(name)
        names[table] = f"{prefix}:{name}" if prefix else name
    return names


def embedding_bag_collections(
    schema: Schema,
    embedding_dim: int,
    *,
    device: torch.device | str = "meta",
    prefix: str = "",
    init_scale: float = 1.0,
    zero_columns: int = 0,
) -> EmbeddingBagCollections:
    """Builds the collections that look up every id feature of a schema.

    Bags are sum-pooled: a missing feature is the zero vector, a weighted bag the weighted sum.

    Args:
        schema: tables and features.
        embedding_dim: columns of every table; a multiple of 4, which fbgemm's kernels require.
        device: "meta" allocates nothing; `sharding.shard` then draws the weights table by table.
        prefix: prefix of the tables' names, see `module_names`.
        init_scale: factor of the range from which weights are drawn; at 1, it is ±1/√rows.
        zero_columns: number of leading columns of every table that start at zero.

    Raises:
        OptionError: the embedding dim is not a positive multiple of 4.
    """
    if embedding_dim < DIM_MULTIPLE or embedding_dim % DIM_MULTIPLE:
        raise OptionError(
            f"`embedding_dim` {embedding_dim} is not a positive multiple of {DIM_MULTIPLE}, which "
            "fbgemm's kernels require; use the next one up"
        )

    names = module_names((table.name for table in schema.tables), prefix=prefix)

    def config(table: str, feature_names: list[str]) -> EmbeddingBagConfig:
        made = EmbeddingBagConfig(
            name=names[table],
            num_embeddings=schema.table(table).num_embeddings,
            embedding_dim=embedding_dim,
            feature_names=feature_names,
            pooling=PoolingType.SUM,
            init_fn=_init_fn(schema.table(table).num_embeddings, init_scale),
        )
        if zero_columns:
            assert made.init_fn is not None
            made.init_fn = partial(_draw_others, draw=made.init_fn, zero_columns=zero_columns)
        return made

    collections: dict[CollectionName, EmbeddingBagCollection | None] = dict.fromkeys(COLLECTIONS)
    for name, features in schema.collections.items():
        by_table: dict[str, list[str]] = {}
        for feature in features:
            by_table.setdefault(feature.table, []).append(feature.name)
        collections[name] = EmbeddingBagCollection(
            tables=[config(table, feature_names) for table, feature_names in by_table.items()],
            is_weighted=COLLECTIONS[name].weighted,
            device=torch.device(device),
        )
    return EmbeddingBagCollections(**collections)


def _init_fn(rows: int, scale: float) -> Callable[[torch.Tensor], torch.Tensor | None] | None:
    """Returns the initialisation of a table, or None for TorchRec's default."""
    if scale == 1:
        return None
    reach = scale / rows**0.5
    return partial(nn.init.uniform_, a=-reach, b=reach)


def _draw_others(
    weight: torch.Tensor, *, draw: Callable[[torch.Tensor], object], zero_columns: int
) -> torch.Tensor:
    """Draws the weights of a table, except for its first columns, which are zero."""
    draw(weight)
    with torch.no_grad():
        weight[..., :zero_columns] = 0  # a table of another rank has one empty dimension here
    return weight


class PooledFeatures(nn.Module):
    """Looks up and pools every id feature, and concatenates the dense features.

    Embeddings are selected by key. A sharded collection returns its keys in the order of the plan,
    so using its values in that order would feed permuted features to the towers.

    Args:
        embedding_bag_collection: unweighted, or None.
        weighted_embedding_bag_collection: weighted, or None.
        shared_embedding_bag_collection: unweighted, of features that impressions share, or None.
        shared_weighted_embedding_bag_collection: weighted, of features that impressions share.
        dense_in_features: number of dense features.

    Raises:
        OptionError: there is no collection, a collection is weighted but must not be (or vice
            versa), or two collections have a feature of the same name.
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
        configs = [
            config
            for collection in self.children()
            for config in cast(EmbeddingBagCollection, collection).embedding_bag_configs()
        ]
        self._tables = looked_up(configs)
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
            config.embedding_dim * len(config.feature_names) for config in configs
        )

    def forward(self, features: BatchFeatures | KeyedJaggedTensor) -> torch.Tensor:
        """Pools the features of one batch.

        Args:
            features: features of B impressions; a KeyedJaggedTensor means `sparse_features` only.

        Returns:
            float32 (B, F): features in the order of the collections' declarations, first those of
            the collections that are not shared, then the shared ones, then the dense features.

        Raises:
            OptionError: the number of dense features is not `dense_in_features`, or an id is not a
                row of its table.
        """
        if isinstance(features, KeyedJaggedTensor):
            features = BatchFeatures(features)
        pooled: dict[bool, list[KeyedTensor]] = {False: [], True: []}
        for name, kind in COLLECTIONS.items():
            collection = getattr(self, name.replace("sparse_features", "embedding_bag_collection"))
            if collection is not None:
                bags = getattr(features, name)
                _check_ids(bags, self._tables)
                pooled[kind.shared].append(collection(bags))
        own, shared = pooled.values()
        parts: list[torch.Tensor] = []
        if own:
            parts.append(_in_order(own, self._keys))
        if shared:
            parts.append(_expanded(_in_order(shared, self._shared_keys), features.shared_index))
        dense = _checked_dense(features.dense_features, self.dense_in_features)
        if self.dense_in_features:
            parts.append(dense)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@torch.fx.wrap
def _check_ids(features: KeyedJaggedTensor | None, tables: dict[str, LookedUp]) -> None:
    check_ids(features, tables)


@torch.fx.wrap
def _expanded(once: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Expands shared rows, (U, F), to impressions, (B, F)."""
    return once if index is None else once.index_select(0, index)


@torch.fx.wrap
def _checked_dense(dense: torch.Tensor | None, num_features: int) -> torch.Tensor:
    """Checks the number of dense features and returns them."""
    given = 0 if dense is None else dense.shape[1]
    if given != num_features:
        raise OptionError(
            f"dense_features has {given} columns, but the model was built with dense_in_features "
            f"{num_features}; give it that many columns"
        )
    return torch.empty(0) if dense is None else dense


@torch.fx.wrap
def _in_order(pooled: list[KeyedTensor], keys: list[str]) -> torch.Tensor:
    """Returns the values of all keys, (rows, sum of dims), in the order of `keys`."""
    if len(pooled) == 1 and pooled[0].keys() == keys:
        return pooled[0].values()
    return KeyedTensor.regroup(pooled, [keys])[0]


def _keys(*collections: EmbeddingBagCollection | None) -> list[str]:
    """Returns the features in the order in which the collections declare them."""
    return [
        key
        for collection in collections
        if collection is not None
        for config in collection.embedding_bag_configs()
        for key in config.feature_names
    ]
