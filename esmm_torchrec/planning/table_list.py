"""A list of embedding tables, read from a YAML file or derived from a model.

The file::

    batch_size: 4096              # impressions per rank and step; --batch-size overrides it
    tables:
      - name: item
        num_embeddings: 23500000
        embedding_dim: 16
        features: [item]          # names, or their number; 1 by default
        pooling: sum              # or mean
        pooling_factor: 1         # mean ids per bag; a list if features differ
        weighted: false           # whether each id carries a weight
        data_type: float32        # or float16, bfloat16
        shared_by: 1              # impressions that share a stored row, within a batch
        count: 1                  # number of equal tables, named item_0, item_1, ...

All fields of a table except the first three are optional.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.errors import PlanError
from esmm_torchrec.models.embeddings import DIM_MULTIPLE, module_names
from esmm_torchrec.planning.strict_yaml import load_yaml
from esmm_torchrec.schema import Schema
from esmm_torchrec.sharding.forms import Form, PositiveFloat, PositiveInt, checked
from esmm_torchrec.sharding.planner import embedding_bag_collections_of
from esmm_torchrec.sharding.search import Workload
from esmm_torchrec.sharding.table_placement import DATA_TYPES

Pooling = Literal["sum", "mean"]

MAX_TABLE_VALUES = 2**56
"""Maximum number of values of a table, so that bytes fit into 64 bits, optimiser state included."""

MAX_COUNT = 10_000
"""Maximum number of tables, or of features of a table, in one entry."""

Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
FeatureName = Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True)
class PlannedFeature:
    """A feature of a table."""

    name: str
    pooling_factor: float = 1.0
    """Mean number of ids per bag."""


@dataclass(frozen=True)
class PlannedTable:
    """A table to place."""

    name: str
    num_embeddings: int
    embedding_dim: int
    features: tuple[PlannedFeature, ...]
    pooling: Pooling = "sum"
    weighted: bool = False
    data_type: str = "float32"
    shared_by: float = 1.0
    """Number of impressions of a batch that share a stored row, whose bags are pooled only once."""
    family: str = ""
    """Name of the entry, if its `count` describes several tables; else empty."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.num_embeddings * self.embedding_dim * DATA_TYPES[self.data_type][1]


@dataclass(frozen=True)
class TableList:
    """The tables of a model and the batch size."""

    tables: tuple[PlannedTable, ...]
    batch_size: int | None = None
    """Impressions per rank and step; None if the source does not specify it."""
    dense_features: int = 0
    """Number of dense features in the input of the towers, in addition to the embeddings."""
    source: str = "the tables"
    """Name of the list in messages: its file."""

    @property
    def num_embeddings(self) -> int:
        """Number of rows of all tables."""
        return sum(table.num_embeddings for table in self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(table.nbytes for table in self.tables)

    @property
    def tower_width(self) -> int:
        """Width of a tower's input: all features' embeddings and the dense features. A feature that
        two networks look up in separate tables counts once."""
        columns = {f.name: table.embedding_dim for table in self.tables for f in table.features}
        return self.dense_features + sum(columns.values())

    @property
    def not_trainable(self) -> str | None:
        """Clause that says why `train` does not support these tables; None if it does."""
        for table in self.tables:
            if table.data_type != "float32":
                return f"its tables are float32, and table {table.name!r} is {table.data_type}"
            if table.pooling != "sum":
                return f"its bags are sums, and table {table.name!r} has {table.pooling} pooling"
        widths = {table.embedding_dim: table.name for table in self.tables}
        if len(widths) > 1:
            (first, a), (second, b) = list(widths.items())[:2]
            return (
                f"its tables have one embedding_dim, and tables {a!r} and {b!r} have {first} and "
                f"{second}"
            )
        return None

    def workload(self, rows_per_rank: int) -> Workload:
        """Returns the expected content of a rank's batch."""
        features = [(feature, table) for table in self.tables for feature in table.features]
        return Workload(
            rows_per_rank,
            {feature.name: feature.pooling_factor for feature, _ in features},
            {f.name: math.ceil(rows_per_rank / table.shared_by) for f, table in features},
        )

    def to_module(self) -> nn.Module:
        """Returns a module with the EmbeddingBagCollections of `collections`, by name, on the meta
        device: nothing is allocated."""
        return nn.ModuleDict(
            {
                name: EmbeddingBagCollection(
                    device=torch.device("meta"),
                    is_weighted=tables[0].weighted,
                    tables=[_config(table) for table in tables],
                )
                for name, tables in self.collections.items()
            }
        )

    @property
    def collections(self) -> dict[str, tuple[PlannedTable, ...]]:
        """Name of an EmbeddingBagCollection → its tables. Tables are grouped by `weighted` and
        `shared_by`: `is_weighted` and the bags per batch apply to a whole collection."""
        kinds = sorted({(table.weighted, table.shared_by) for table in self.tables})
        return {
            f"{'weighted' if weighted else 'unweighted'}_{number}": tuple(
                table
                for table in self.tables
                if (table.weighted, table.shared_by) == (weighted, shared_by)
            )
            for number, (weighted, shared_by) in enumerate(kinds)
        }


def _config(table: PlannedTable) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=[feature.name for feature in table.features],
        pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
        data_type=DATA_TYPES[table.data_type][0],
    )


def tables_of_model(
    module: nn.Module,
    schema: Schema,
    *,
    mean_ids_per_bag: Mapping[str, float],
    shared_by: float,
    source: str,
) -> TableList:
    """Lists the tables of a model for a prepared data set.

    Args:
        module: the model; its tables may be on the meta device.
        schema: schema of the data set.
        mean_ids_per_bag: feature → mean ids per stored row; 1 for features not listed.
        shared_by: impressions of a rank's batch per distinct shared row.
        source: name of the list in messages.
    """
    shared = {feature.name for feature in schema.id_features if feature.shared}
    return TableList(
        tables=tuple(
            PlannedTable(
                name=config.name,
                num_embeddings=config.num_embeddings,
                embedding_dim=config.embedding_dim,
                features=tuple(
                    PlannedFeature(name, mean_ids_per_bag.get(name, 1.0))
                    for name in config.feature_names
                ),
                weighted=collection.is_weighted(),
                shared_by=shared_by if shared.intersection(config.feature_names) else 1.0,
            )
            for collection in embedding_bag_collections_of(module).values()
            for config in collection.embedding_bag_configs()
        ),
        dense_features=len(schema.dense_features),
        source=source,
    )


class _TableForm(Form, frozen=True):
    name: Annotated[str, Meta(min_length=1)]
    num_embeddings: PositiveInt
    embedding_dim: PositiveInt
    features: Count | Annotated[list[FeatureName], Meta(min_length=1)] = 1
    pooling: Pooling = "sum"
    pooling_factor: PositiveFloat | list[PositiveFloat] = 1.0
    weighted: bool = False
    data_type: Literal["float32", "float16", "bfloat16"] = "float32"
    shared_by: Annotated[float, Meta(ge=1)] = 1.0
    count: Count = 1


class _ListForm(Form, frozen=True):
    tables: Annotated[list[Any], Meta(min_length=1)]
    """Values of `_TableForm`s, checked one by one so that messages name the table."""
    batch_size: PositiveInt | None = None


def read_tables(path: Path | str) -> TableList:
    """Reads a list of tables.

    Raises:
        PlanError: the file is not a valid list; the sentence names the file and the entry.
    """
    where = str(path)
    form = checked(load_yaml(Path(path)), _ListForm, where)
    tables: list[PlannedTable] = []
    seen: dict[tuple[str, str], str] = {}
    for number, entry in enumerate(form.tables, start=1):
        label = f"table {number}"
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            label += f" ({entry['name']!r})"
        for table in _tables_of(entry, f"{where}: {label}"):
            names = [("table", table.name), *(("feature", f.name) for f in table.features)]
            for kind, name in names:
                if (kind, name) in seen:
                    raise PlanError(
                        f"{where}: {label}: the {kind} name {name!r} is taken by "
                        f"{seen[kind, name]}; give each its own"
                    )
                seen[kind, name] = label
            tables.append(table)
    return TableList(tables=tuple(tables), batch_size=form.batch_size, source=where)


def _tables_of(entry: Any, where: str) -> list[PlannedTable]:
    form = checked(entry, _TableForm, where)
    name, rows, dim = form.name, form.num_embeddings, form.embedding_dim
    legal = module_names([name])[name]
    if legal != name:
        raise PlanError(
            f"{where}: TorchRec cannot hold a table of the name {name!r}, which is taken in its "
            f"modules; call it {legal!r}"
        )
    if dim % DIM_MULTIPLE:
        raise PlanError(
            f"{where}: embedding_dim {dim} is not a positive multiple of {DIM_MULTIPLE}, which the "
            "fused kernels require; take the next one up"
        )
    if rows * dim > MAX_TABLE_VALUES:
        raise PlanError(
            f"{where}: num_embeddings {rows} of embedding_dim {dim} are more than the "
            f"{MAX_TABLE_VALUES} values that a table may have"
        )
    if form.weighted and form.pooling == "mean":
        raise PlanError(
            f"{where}: TorchRec has no weighted mean; use pooling: sum with normalised weights"
        )
    features = form.features
    if isinstance(features, int):
        numbered = [f"{name}_feature_{index}" for index in range(features)]
        features = [name] if features == 1 else numbered
    factors = form.pooling_factor
    if not isinstance(factors, list):
        factors = [factors] * len(features)
    if len(factors) != len(features):
        raise PlanError(
            f"{where}: pooling_factor has {len(factors)} numbers for {len(features)} features; "
            "give one each"
        )
    suffixes = [""] if form.count == 1 else [f"_{number}" for number in range(form.count)]
    return [
        PlannedTable(
            name=name + suffix,
            num_embeddings=rows,
            embedding_dim=dim,
            features=tuple(
                PlannedFeature(feature + suffix, factor)
                for feature, factor in zip(features, factors, strict=True)
            ),
            pooling=form.pooling,
            weighted=form.weighted,
            data_type=form.data_type,
            shared_by=form.shared_by,
            family=name if form.count > 1 else "",
        )
        for suffix in suffixes
    ]
