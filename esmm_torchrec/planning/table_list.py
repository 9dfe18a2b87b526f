"""The embedding tables of a model as a list, without the model: a YAML file or a schema.

The file::

    batch_size: 4096              # impressions per rank and step; --batch-size goes before it
    tables:
      - name: item
        num_embeddings: 23500000
        embedding_dim: 16
        features: [item]          # names, or how many; one if left out
        pooling: sum              # or mean
        pooling_factor: 1         # mean ids per bag; a list where features differ
        weighted: false           # whether each id carries a weight
        data_type: float32        # or float16, bfloat16
        shared_by: 1              # impressions that share a stored row, within a batch
        count: 1                  # that many tables alike, named item_0, item_1, ...

All but the first three fields of a table may be left out.
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
"""Values, of which the optimiser's state is a multiple: what counts bytes in 64 bits holds them."""

MAX_COUNT = 10_000
"""Tables, or features of a table, that one entry may describe."""

Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
FeatureName = Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True)
class PlannedFeature:
    """A feature and what a batch holds of it."""

    name: str
    pooling_factor: float = 1.0
    """Mean ids per bag."""


@dataclass(frozen=True)
class PlannedTable:
    """One table to place."""

    name: str
    num_embeddings: int
    embedding_dim: int
    features: tuple[PlannedFeature, ...]
    pooling: Pooling = "sum"
    weighted: bool = False
    data_type: str = "float32"
    shared_by: float = 1.0
    """Impressions of a batch that share a stored row; its bags are pooled once for them."""
    family: str = ""
    """Name of the entry with a `count` that the table is of; none: the table's own."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.num_embeddings * self.embedding_dim * DATA_TYPES[self.data_type][1]


@dataclass(frozen=True)
class TableList:
    """The tables of a model and the size of its batches."""

    tables: tuple[PlannedTable, ...]
    batch_size: int | None = None
    """Impressions per rank and step, if the source says."""
    dense_features: int = 0
    """Dense features that the towers take beside the embeddings."""
    source: str = "the tables"
    """What messages call the list: its file."""

    @property
    def num_embeddings(self) -> int:
        """Rows of all tables."""
        return sum(table.num_embeddings for table in self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(table.nbytes for table in self.tables)

    @property
    def tower_width(self) -> int:
        """Columns of a tower's input: all features' embeddings and the dense features. A feature
        that two networks look up in tables of their own counts once."""
        columns = {f.name: table.embedding_dim for table in self.tables for f in table.features}
        return self.dense_features + sum(columns.values())

    @property
    def not_trainable(self) -> str | None:
        """Why `train` cannot have such tables, in a clause; None: it can."""
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
        """What a batch of a rank holds of the features."""
        features = [(feature, table) for table in self.tables for feature in table.features]
        return Workload(
            rows_per_rank,
            {feature.name: feature.pooling_factor for feature, _ in features},
            {f.name: math.ceil(rows_per_rank / table.shared_by) for f, table in features},
        )

    def to_module(self) -> nn.Module:
        """The tables on the meta device, nothing allocated: an EmbeddingBagCollection for those
        that agree in being weighted and in `shared_by`, by the names of `collections`."""
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
        """Name of an EmbeddingBagCollection → its tables. `is_weighted` and the number of bags of
        a batch hold for a whole collection."""
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
    """The tables that a model of a prepared data set has, by the names that the model gives them.

    Args:
        module: the model, its tables on the meta device.
        schema: of the data set.
        mean_ids_per_bag: feature → mean ids per stored row; 1 if a feature is not named.
        shared_by: impressions of a rank's batch per distinct shared row.
        source: what messages call the list.
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
    """Each a `_TableForm`, checked one by one so that messages name the table."""
    batch_size: PositiveInt | None = None


def read_tables(path: Path | str) -> TableList:
    """Reads a list of tables.

    Raises:
        PlanError: the file is not such a list; the sentence names the file and the entry.
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
