"""Roles of the columns of a raw table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esmm_torchrec.data.sources.raw_times import TIME_PARTS, TimePart
from esmm_torchrec.data.vocabulary import MAX_IDS
from esmm_torchrec.errors import OptionError
from esmm_torchrec.schema import (
    CONVERSION_TIME,
    GROUP_ID,
    RESERVED_COLUMNS,
    TIMESTAMP,
    TRUE_CTR,
    TRUE_CVR,
    WEIGHT,
)
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


@dataclass(frozen=True)
class TableColumns:
    """Roles of the columns of a raw table.

    A feature has the name of its column, with these exceptions. A dense feature whose column is
    also an id feature is called "price__dense"; a feature whose column has the name of a column of
    prepared data sets is called "timestamp__id"; and the parts of a time are called "shown__hour"
    and "shown__weekday".

    Raises:
        OptionError: a column has two roles that exclude each other, `weights` or `shared_tables`
            names a column that is not an id column, or there is no feature.
    """

    tasks: TaskChain
    """Chain of tasks: the events that may follow an impression."""
    labels: Mapping[str, str]
    """Label → raw column of 0 or 1, -1 or 1, no or yes. A label may be yes only if the label before
    it is; otherwise a missing value is ignored. A label without a column is 0 for every
    impression."""
    ids: tuple[str, ...] = ()
    """Columns of integers, text, booleans, or lists of them; each is an id feature."""
    dense: tuple[str, ...] = ()
    """Columns of numbers; each is a dense feature."""
    texts: tuple[str, ...] = ()
    """Columns of text; each is a multi-valued id feature of its words."""
    time_features: tuple[str, ...] = ()
    """Columns of times; the hour and the weekday (UTC) of each are id features."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Id column → column of its weights, in the same form."""
    shared_tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Embedding table → the id or text columns that look it up. Any other feature has its own
    table, with the name of the feature."""
    hashed: Mapping[str, int] = field(default_factory=dict)
    """Id column → number of rows to which its ids are hashed; such ids need no vocabulary. All id
    columns of a table must have the same number."""
    sample_id: str | None = None
    """Column of int64 sample ids; None numbers the rows of a split from 0."""
    group_id: str | None = None
    """Column of groups: int64, or text, stored as a 64-bit hash (`raw_ids.read_groups`). A row
    without a group is a group of its own."""
    timestamp: str | None = None
    """Column of times: integers stay unchanged; typed times and ISO 8601 text become seconds since
    1970-01-01 UTC."""
    conversion_time: str | None = None
    """Column of the time at which the last task of the chain happened, in the form and unit of
    `timestamp`; missing exactly if it did not happen."""
    weight: str | None = None
    """Column of the weights of impressions, 0 or more."""
    true_ctr: str | None = None
    """Column of the true probability of a click, if known."""
    true_cvr: str | None = None
    """Column of the true probability of a conversion given a click, if known."""
    key: str | None = None
    """Column of users, integers or text: impressions are stored by a 64-bit hash of it."""

    def __post_init__(self) -> None:
        if not (self.ids or self.texts or self.time_features or self.dense):
            raise OptionError("there is no feature; name at least one column with `ids` or `dense`")
        outcomes = list(self.labels.values())
        for column in outcomes:
            if outcomes.count(column) > 1:
                options = " and ".join(role for role, name in self.roles if name == column)
                raise OptionError(f"{column!r} is both {options}; name two columns")
        if self.tasks != DEFAULT_TASKS and (self.true_ctr, self.true_cvr) != (None, None):
            raise OptionError(
                "`true_ctr` and `true_cvr` belong to `click` and `conversion`; leave them out "
                "with `actions`"
            )
        if self.conversion_time is not None and self.timestamp is None:
            raise OptionError("`conversion_time` needs `timestamp`, the time of the impression")
        if self.conversion_time is not None and not self.covers_the_chain:
            raise OptionError("`conversion_time` needs `conversion`, the column of conversions")
        features = [column for _, column in self.features]
        for role, column in self.roles:
            if column in features and role in self._outcome_roles:
                raise OptionError(
                    f"{column!r} is both {role} and a feature; a feature must not reveal the "
                    "outcome"
                )
        for option, named in (
            ("`ids` or `texts`", [*self.ids, *self.texts]),
            ("`dense`", self.dense),
            ("`time_features`", self.time_features),
        ):
            for name in named:
                if named.count(name) > 1:
                    raise OptionError(f"{option} names the column {name!r} twice; name it once")
        for name in self.weights:
            if name not in self.ids:
                raise OptionError(f"`weights` names {name!r}, which is not an `ids` column; add it")
        self._check_shared_tables()
        self._check_hashed()
        names = [name for name, _ in (*self._named_ids, *self._named_dense)]
        for name in names:
            if names.count(name) > 1:
                raise OptionError(
                    f"two features would be called {name!r}; rename one of their columns"
                )

    def _check_shared_tables(self) -> None:
        columns = [*self.ids, *self.texts]
        tables: dict[str, str] = {}
        for table, names in self.shared_tables.items():
            for name in names:
                if name not in columns:
                    raise OptionError(
                        f"`shared_tables` {table} names {name!r}, which is not an `ids` column; "
                        "add it"
                    )
                if name in tables:
                    raise OptionError(
                        f"`shared_tables` puts {name!r} into {tables[name]!r} and into {table!r}; "
                        "choose one"
                    )
                tables[name] = table
        for name in columns:
            if name in self.shared_tables and name not in tables:
                raise OptionError(
                    f"`shared_tables` has {name!r}, which is the name of an `ids` column outside "
                    "it; choose another name"
                )

    @property
    def covers_the_chain(self) -> bool:
        """Whether every label has a column."""
        return len(self.labels) == len(self.tasks)

    @property
    def _taken(self) -> frozenset[str]:
        """Names of the columns of the prepared form, which features cannot have."""
        return RESERVED_COLUMNS.union(self.tasks.labels)

    def _check_hashed(self) -> None:
        for name, rows in self.hashed.items():
            if name not in (*self.ids, *self.texts):
                raise OptionError(
                    f"`hashed` names {name!r}, which is not a column of `ids`; add it"
                )
            if not 1 <= rows <= MAX_IDS:
                raise OptionError(f"`hashed` {name}={rows} is not a number from 1 to {MAX_IDS}")
        for table, names in self.shared_tables.items():
            if len({self.hashed.get(name) for name in names}) > 1:
                raise OptionError(
                    f"`shared_tables` {table} has columns that `hashed` treats differently; "
                    "hash all of them to as many rows"
                )

    @property
    def id_features(self) -> dict[str, str]:
        """Raw column of each id feature."""
        return dict(self._named_ids)

    @property
    def _named_ids(self) -> list[tuple[str, str]]:
        return [
            *(
                (f"{name}__id" if name in self._taken else name, name)
                for name in (*self.ids, *self.texts)
            ),
            *((f"{name}__{part}", name) for name in self.time_features for part in TIME_PARTS),
        ]

    @property
    def dense_features(self) -> dict[str, str]:
        """Raw column of each dense feature."""
        return dict(self._named_dense)

    @property
    def _named_dense(self) -> list[tuple[str, str]]:
        taken = self._taken | set(self.id_features)
        return [(f"{name}__dense" if name in taken else name, name) for name in self.dense]

    @property
    def time_parts(self) -> dict[str, TimePart]:
        """Part of a time, by id feature that is such a part."""
        return {f"{name}__{part}": part for name in self.time_features for part in TIME_PARTS}

    def table_of(self, feature: str) -> str:
        """Returns the embedding table of an id feature."""
        for table, columns in self.shared_tables.items():
            if self.id_features[feature] in columns and feature not in self.time_parts:
                return table
        return feature

    @property
    def optional(self) -> dict[str, str]:
        """Raw column of each optional column of the prepared form that is given."""
        given = {
            GROUP_ID: self.group_id,
            TIMESTAMP: self.timestamp,
            CONVERSION_TIME: self.conversion_time,
            TRUE_CTR: self.true_ctr,
            TRUE_CVR: self.true_cvr,
            WEIGHT: self.weight,
        }
        return {role: column for role, column in given.items() if column is not None}

    @property
    def roles(self) -> list[tuple[str, str]]:
        """(role, raw column) of every column except the features."""
        options = ("sample_id", "group_id", "key", "timestamp", "conversion_time", "weight")
        options = (*options, "true_ctr", "true_cvr")
        return [
            *((self.label_role(label), column) for label, column in self.labels.items()),
            *(
                (f"`{role}`", getattr(self, role))
                for role in options
                if getattr(self, role) is not None
            ),
        ]

    def label_role(self, label: str) -> str:
        """Returns the option that names the column of a label."""
        return f"`{label}`" if self.tasks == DEFAULT_TASKS else f"`actions` {label}"

    @property
    def _outcome_roles(self) -> frozenset[str]:
        others = ("`conversion_time`", "`true_ctr`", "`true_cvr`")
        return frozenset({*map(self.label_role, self.labels), *others})

    @property
    def features(self) -> list[tuple[str, str]]:
        """(role, raw column) of every feature column."""
        return [
            *(("`ids`", name) for name in self.ids),
            *(("`texts`", name) for name in self.texts),
            *(("`time_features`", name) for name in self.time_features),
            *((f"`weights` of {name!r}", column) for name, column in self.weights.items()),
            *(("`dense`", name) for name in self.dense),
        ]
