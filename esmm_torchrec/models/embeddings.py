"""From a schema to TorchRec's EmbeddingBagCollections, and from those to one matrix of features.

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
"""fbgemm's kernels require embedding dims that are a multiple of it."""

_RESERVED_MODULE_NAMES = frozenset({"", *dir(nn.ModuleDict())})


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


def module_names(tables: Iterable[str], *, prefix: str = "") -> dict[str, str]:
    """What a model calls each table: its name, changed if torch cannot hold it in an nn.ModuleDict
    ("items", "a.b") or if another table has that name already. Plans and checkpoints use it.

    Args:
        tables: names of a schema's tables, in its order.
        prefix: put before each name, for a model with more than one set of tables. A name cannot
            collide with one of another prefix, because ":" occurs in prefixes only.
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

    Bags are sums: a missing feature is the zero vector, a weighted bag the weighted sum.

    Args:
        schema: tables and features.
        embedding_dim: columns of every table; a multiple of 4, which fbgemm's kernels require.
        device: "meta" allocates nothing; `sharding.shard` then draws the weights table by table.
        prefix: as in `module_names`.
        init_scale: factor of the range that weights are drawn from, which is ±1/√rows at 1.
        zero_columns: first columns of every table that start at zero.

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
    """None: as TorchRec does it."""
    if scale == 1:
        return None
    reach = scale / rows**0.5
    return partial(nn.init.uniform_, a=-reach, b=reach)


def _draw_others(
    weight: torch.Tensor, *, draw: Callable[[torch.Tensor], object], zero_columns: int
) -> torch.Tensor:
    """Draws a table, except for its first columns."""
    draw(weight)
    with torch.no_grad():
        weight[..., :zero_columns] = 0  # a table of another rank is one empty dimension here
    return weight


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
        OptionError: there is no collection, one is weighted and must not be or the other way
            round, or two have a feature of the same name.
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
            features: of B impressions; a KeyedJaggedTensor alone means `sparse_features`.

        Returns:
            float32 (B, F): features in the order in which the collections declare them, those of
            the shared collections after the others, dense features last.

        Raises:
            OptionError: dense features are given to a model without or missing from one with, or
                an id is not a row of its table.
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
    """(U, F) → (B, F)."""
    return once if index is None else once.index_select(0, index)


@torch.fx.wrap
def _checked_dense(dense: torch.Tensor | None, num_features: int) -> torch.Tensor:
    """The dense features, checked against the model's number of them."""
    given = 0 if dense is None else dense.shape[1]
    if given != num_features:
        raise OptionError(
            f"dense_features has {given} columns, but the model was built with dense_in_features "
            f"{num_features}; give it that many columns"
        )
    return torch.empty(0) if dense is None else dense


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
