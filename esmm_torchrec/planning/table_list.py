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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.errors import PlanError
from esmm_torchrec.models.embeddings import module_names
from esmm_torchrec.planning.strict_yaml import load_yaml
from esmm_torchrec.schema import Schema
from esmm_torchrec.sharding.search import Workload
from esmm_torchrec.sharding.table_placement import COLUMN_MULTIPLE, DATA_TYPES

Pooling = Literal["sum", "mean"]

MAX_TABLE_VALUES = 2**56
"""Values, of which the optimiser's state is a multiple: what counts bytes in 64 bits holds them."""

MAX_COUNT = 10_000
"""Tables, or features of a table, that one entry may stand for."""

REQUIRED_FIELDS = ("name", "num_embeddings", "embedding_dim")
OPTIONAL_FIELDS = (
    "features",
    "pooling",
    "pooling_factor",
    "weighted",
    "data_type",
    "shared_by",
    "count",
)


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
    """Impressions per rank and step, where the source says."""
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
        """Columns of the towers' input: all features' embeddings and the dense features."""
        return self.dense_features + sum(
            table.embedding_dim * len(table.features) for table in self.tables
        )

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


def tables_of_schema(
    schema: Schema,
    embedding_dim: int,
    *,
    mean_values_per_bag: Mapping[str, float],
    impressions_per_shared_row: float | None,
    source: str,
) -> TableList:
    """The tables of a prepared data set, all of one width.

    Args:
        schema: of the data set.
        embedding_dim: columns of every table.
        mean_values_per_bag: feature → mean ids per stored row; 1 where a feature is not named.
        impressions_per_shared_row: of the features that the schema calls shared.
        source: what messages call the list.
    """
    _check_dim(embedding_dim, f"embedding dim {embedding_dim}")
    shared = {
        feature.table
        for name, features in schema.collections.items()
        for feature in features
        if name.startswith("shared_")
    }
    shared_by = impressions_per_shared_row or 1.0
    names = module_names(table.name for table in schema.tables)
    return TableList(
        tables=tuple(
            PlannedTable(
                name=names[table.name],
                num_embeddings=table.num_embeddings,
                embedding_dim=embedding_dim,
                features=tuple(
                    PlannedFeature(feature.name, mean_values_per_bag.get(feature.name, 1.0))
                    for feature in schema.id_features
                    if feature.table == table.name
                ),
                weighted=table.name in schema.weighted_tables,
                shared_by=shared_by if table.name in shared else 1.0,
            )
            for table in schema.tables
        ),
        dense_features=len(schema.dense_features),
        source=source,
    )


def read_tables(path: Path | str) -> TableList:
    """Reads a list of tables.

    Raises:
        PlanError: the file is not such a list; the sentence names the file and the entry.
    """
    values = load_yaml(Path(path))
    where = str(path)
    if not isinstance(values, dict):
        raise PlanError(f"{where} must be a mapping with 'tables' and perhaps 'batch_size'")
    for name in values:
        if name not in ("batch_size", "tables"):
            raise PlanError(f"{where}: there is no field {name!r}; use batch_size or tables")
    batch_size = None
    if "batch_size" in values:
        batch_size = _whole(values["batch_size"], f"{where}: batch_size")
    entries = values.get("tables")
    if not isinstance(entries, list) or not entries:
        raise PlanError(f"{where}: 'tables' must be a list with at least one table")
    tables: list[PlannedTable] = []
    seen: dict[tuple[str, str], str] = {}
    for number, entry in enumerate(entries, start=1):
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
    return TableList(tables=tuple(tables), batch_size=batch_size, source=where)


def _tables_of(entry: Any, where: str) -> list[PlannedTable]:
    if not isinstance(entry, dict):
        raise PlanError(f"{where} must be a mapping with {', '.join(REQUIRED_FIELDS)}")
    known = (*REQUIRED_FIELDS, *OPTIONAL_FIELDS)
    for name in entry:
        if name not in known:
            raise PlanError(f"{where}: there is no field {name!r}; use {', '.join(known)}")
    for name in REQUIRED_FIELDS:
        if name not in entry:
            raise PlanError(f"{where} lacks {name!r}")
    name = entry["name"]
    if not isinstance(name, str) or not name or "." in name:
        raise PlanError(f"{where}: name must be a text without dots, not {name!r}")
    legal = module_names([name])[name]
    if legal != name:
        raise PlanError(
            f"{where}: TorchRec cannot hold a table of the name {name!r}, which is taken in its "
            f"modules; call it {legal!r}"
        )
    rows = _whole(entry["num_embeddings"], f"{where}: num_embeddings")
    dim = _whole(entry["embedding_dim"], f"{where}: embedding_dim")
    _check_dim(dim, f"{where}: embedding_dim {dim}")
    if rows * dim > MAX_TABLE_VALUES:
        raise PlanError(
            f"{where}: num_embeddings {rows} of embedding_dim {dim} are more than the "
            f"{MAX_TABLE_VALUES} values that a table may have"
        )
    pooling = _choice(entry.get("pooling", "sum"), f"{where}: pooling", ("sum", "mean"))
    data_type = _choice(entry.get("data_type", "float32"), f"{where}: data_type", tuple(DATA_TYPES))
    weighted = entry.get("weighted", False)
    if not isinstance(weighted, bool):
        raise PlanError(f"{where}: weighted must be true or false, not {weighted!r}")
    if weighted and pooling == "mean":
        raise PlanError(
            f"{where}: TorchRec has no weighted mean; use pooling: sum with normalised weights"
        )
    count = _whole(entry.get("count", 1), f"{where}: count", MAX_COUNT)
    feature_names = _feature_names(entry.get("features", 1), name, where)
    factors = _factors(entry.get("pooling_factor", 1), len(feature_names), where)
    shared_by = _positive(entry.get("shared_by", 1), f"{where}: shared_by")
    if shared_by < 1:
        raise PlanError(f"{where}: shared_by must be at least 1, not {shared_by:g}")
    suffixes = [""] if count == 1 else [f"_{number}" for number in range(count)]
    return [
        PlannedTable(
            name=name + suffix,
            num_embeddings=rows,
            embedding_dim=dim,
            features=tuple(
                PlannedFeature(feature + suffix, factor)
                for feature, factor in zip(feature_names, factors, strict=True)
            ),
            pooling="mean" if pooling == "mean" else "sum",
            weighted=weighted,
            data_type=data_type,
            shared_by=shared_by,
            family=name if count > 1 else "",
        )
        for suffix in suffixes
    ]


def _check_dim(dim: int, what: str) -> None:
    if dim < COLUMN_MULTIPLE or dim % COLUMN_MULTIPLE:
        raise PlanError(
            f"{what} is not a positive multiple of {COLUMN_MULTIPLE}, which the fused kernels "
            "require; take the next one up"
        )


def _feature_names(value: Any, table: str, where: str) -> list[str]:
    if isinstance(value, list):
        if not value or not all(isinstance(name, str) and name for name in value):
            raise PlanError(f"{where}: features must be a list of names, not {value!r}")
        return value
    number = _whole(value, f"{where}: features (a number or a list of names)", MAX_COUNT)
    return [table] if number == 1 else [f"{table}_feature_{index}" for index in range(number)]


def _factors(value: Any, number: int, where: str) -> Sequence[float]:
    what = f"{where}: pooling_factor"
    if not isinstance(value, list):
        return [_positive(value, what)] * number
    if len(value) != number:
        raise PlanError(f"{what} has {len(value)} numbers for {number} features; give one each")
    return [_positive(item, what) for item in value]


def _whole(value: Any, what: str, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{what} must be a whole number of at least 1, not {value!r}")
    if most is not None and value > most:
        raise PlanError(f"{what} must be at most {most}, not {value}")
    return value


def _positive(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
        raise PlanError(f"{what} must be a number above 0, not {value!r}")
    return float(value)


def _choice(value: Any, what: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise PlanError(f"{what} must be {' or '.join(choices)}, not {value!r}")
    return value
