"""Schema of the columns of a data set of impressions.

A schema lists the id features, the embedding table that each looks up, and the dense features. It
is independent of files, models and devices: `models.embeddings` builds EmbeddingBagCollections
from it, and `data` converts files to columns that conform to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from esmm_torchrec.errors import DataError
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain

UNKNOWN_ROW = 0
"""Row of every table for ids that are rare or were not seen in training."""

NEVER = 2**63 - 1
"""Conversion time of an impression without a conversion."""

CLICK, CONVERSION = DEFAULT_TASKS.labels
SAMPLE_ID = "sample_id"
SHARED_ROW = "shared_row"
GROUP_ID = "group_id"
TIMESTAMP = "timestamp"
CONVERSION_TIME = "conversion_time"
WEIGHT = "sample_weight"
TRUE_CTR = "true_ctr"
TRUE_CVR = "true_cvr"

CollectionName = Literal[
    "sparse_features",
    "weighted_sparse_features",
    "shared_sparse_features",
    "shared_weighted_sparse_features",
]
"""Name of a collection of id features, in batches and in a model's `forward`."""


class CollectionKind(NamedTuple):
    """Properties that the features of a collection have in common."""

    weighted: bool
    """Whether ids have weights."""
    shared: bool
    """Whether a bag is stored once for all impressions that share it."""


COLLECTIONS: dict[CollectionName, CollectionKind] = {
    "sparse_features": CollectionKind(weighted=False, shared=False),
    "weighted_sparse_features": CollectionKind(weighted=True, shared=False),
    "shared_sparse_features": CollectionKind(weighted=False, shared=True),
    "shared_weighted_sparse_features": CollectionKind(weighted=True, shared=True),
}
"""Collection → its kind, in the order of the models' arguments."""

RESERVED_COLUMNS = frozenset(
    {
        CLICK,
        CONVERSION,
        SAMPLE_ID,
        SHARED_ROW,
        GROUP_ID,
        TIMESTAMP,
        CONVERSION_TIME,
        WEIGHT,
        TRUE_CTR,
        TRUE_CVR,
    }
)
"""Names that features cannot have, nor labels, except for click and conversion."""


def weight_column(feature: str) -> str:
    """Returns the name of the column of weights of a weighted id feature."""
    return f"{feature}__weight"


def missing_column(feature: str) -> str:
    """Returns the name of the dense feature that indicates whether a dense feature is missing."""
    return f"{feature}__missing"


@dataclass(frozen=True)
class Table:
    """An embedding table."""

    name: str
    num_embeddings: int
    """Number of rows, including row 0 (unknown ids)."""


@dataclass(frozen=True)
class IdFeature:
    """A feature whose values are rows of an embedding table."""

    name: str
    table: str
    multi_valued: bool = False
    """Whether a bag may contain any number of ids instead of at most one."""
    weighted: bool = False
    """Whether each id has a weight; bags are then weighted sums of embeddings."""
    shared: bool = False
    """Whether it is stored once for the many impressions that share it (Ali-CCP's user side)."""


@dataclass(frozen=True)
class Schema:
    """Tables, features and labels of a data set.

    Raises:
        DataError: a name occurs twice, a feature refers to a table that does not exist, a table
            has no rows or no feature, or a feature has the name of a reserved column or a label.
    """

    tables: tuple[Table, ...]
    id_features: tuple[IdFeature, ...]
    dense_features: tuple[str, ...] = ()
    tasks: TaskChain = DEFAULT_TASKS
    """Chain of tasks; its labels are columns of the data set."""

    def __post_init__(self) -> None:
        table_names = [table.name for table in self.tables]
        names = [*(feature.name for feature in self.id_features), *self.dense_features]
        names += [weight_column(feature.name) for feature in self.id_features if feature.weighted]
        for what, given in (("table", table_names), ("feature", names)):
            seen: set[str] = set()
            for name in given:
                if name in seen:
                    raise DataError(f"{what} {name!r} occurs twice; give each {what} its own name")
                seen.add(name)
        for name in names:
            if name in RESERVED_COLUMNS or name in self.tasks.labels:
                raise DataError(f"no feature may be called {name!r}; rename the column")
        for label in self.tasks.labels:
            if label in RESERVED_COLUMNS - {CLICK, CONVERSION} | {"weight"}:
                raise DataError(f"no label may be called {label!r}; rename the column")
        used = {feature.table for feature in self.id_features}
        for feature in self.id_features:
            if feature.table not in table_names:
                raise DataError(
                    f"feature {feature.name!r} names the unknown table {feature.table!r}"
                )
        for table in self.tables:
            if table.num_embeddings < 1:
                raise DataError(f"table {table.name!r} has no rows; it needs at least row 0")
            if table.name not in used:
                raise DataError(f"table {table.name!r} is used by no feature; remove it")

    @property
    def weighted_tables(self) -> frozenset[str]:
        """Tables with a weighted feature. `is_weighted` applies to a whole
        EmbeddingBagCollection, so all features of these tables are stored with weights."""
        return frozenset(feature.table for feature in self.id_features if feature.weighted)

    @property
    def collections(self) -> dict[CollectionName, tuple[IdFeature, ...]]:
        """Collection → its features, without empty collections.

        If the table of a shared feature is also used by a feature that is not shared, the shared
        feature is in the latter's collection and expanded for every impression, because a table
        belongs to one collection only.
        """
        weighted = self.weighted_tables
        own = {feature.table for feature in self.id_features if not feature.shared}
        collections: dict[CollectionName, tuple[IdFeature, ...]] = {}
        for name, kind in COLLECTIONS.items():
            features = tuple(
                feature
                for feature in self.id_features
                if CollectionKind(feature.table in weighted, feature.table not in own) == kind
            )
            if features:
                collections[name] = features
        return collections

    @property
    def has_shared_features(self) -> bool:
        """Whether any feature is stored once for many impressions."""
        return any(feature.shared for feature in self.id_features)

    def table(self, name: str) -> Table:
        """Returns the table called `name`; raises KeyError if it does not exist."""
        return {table.name: table for table in self.tables}[name]

    def to_dict(self) -> dict[str, Any]:
        """Returns the schema as plain values for JSON; `from_dict` is the inverse."""
        values = asdict(self)
        return values | {"tasks": self.tasks.to_list()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schema:
        """Restores a schema from the values of `to_dict`."""
        return cls(
            tables=tuple(Table(**table) for table in values["tables"]),
            id_features=tuple(IdFeature(**feature) for feature in values["id_features"]),
            dense_features=tuple(values["dense_features"]),
            tasks=TaskChain.from_list(values["tasks"]) if "tasks" in values else DEFAULT_TASKS,
        )
