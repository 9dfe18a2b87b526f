"""Which column of a raw table is what, and what the types of its files say of the id columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from esmm_torchrec.data.sources.raw_tables import RawTable
from esmm_torchrec.data.sources.raw_values import IdKind, id_kind, is_list
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    GROUP_ID,
    SAMPLE_ID,
    TIMESTAMP,
    TRUE_CTR,
    TRUE_CVR,
)


@dataclass(frozen=True)
class TableColumns:
    """What the columns of a raw table are.

    Raises:
        OptionError: a column has two roles that exclude each other, weights or a shared table name
            no id column, or there is no id column.
    """

    click: str
    """0 or 1."""
    conversion: str
    """0 or 1, 1 only where click is 1."""
    ids: tuple[str, ...]
    """Integers, strings, booleans, or lists of them; each is an id feature called as its column."""
    dense: tuple[str, ...] = ()
    """Numbers; each is a dense feature."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Id column → column of its weights, in the same form."""
    shared_tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Embedding table → the id columns that look it up. An id column that is in none has a table
    of its own, called as the column."""
    sample_id: str | None = None
    """int64; None numbers the rows of a split from 0."""
    group_id: str | None = None
    """int64, or strings, of which a 64-bit hash is kept (`raw_values.read_groups`)."""
    timestamp: str | None = None
    """int64."""
    true_ctr: str | None = None
    """Probability of a click, where it is known."""
    true_cvr: str | None = None
    """Probability of a conversion behind a click, where it is known."""

    def __post_init__(self) -> None:
        if not self.ids:
            raise OptionError("there is no id column; name at least one with --id")
        if self.click == self.conversion:
            raise OptionError(f"{self.click!r} is both --click and --conversion; name two columns")
        features = [*self.ids, *self.dense, *self.weights.values()]
        for role in ("click", "conversion", "true_ctr", "true_cvr"):
            if getattr(self, role) in features:
                raise OptionError(
                    f"{getattr(self, role)!r} is --{role.replace('_', '-')} and a feature, too; a "
                    "feature must not know the outcome"
                )
        named = [*self.ids, *self.dense]
        for name in named:
            if named.count(name) > 1:
                raise OptionError(f"the column {name!r} is named as a feature twice; name it once")
        for name in self.weights:
            if name not in self.ids:
                raise OptionError(f"--weights names {name!r}, which is no --id column; add it")
        tables: dict[str, str] = {}
        for table, columns in self.shared_tables.items():
            for name in columns:
                if name not in self.ids:
                    raise OptionError(
                        f"--share-table {table} names {name!r}, which is no --id column; add it"
                    )
                if name in tables:
                    raise OptionError(
                        f"--share-table puts {name!r} into {tables[name]!r} and into {table!r}; "
                        "choose one"
                    )
                tables[name] = table
        for name in self.ids:
            if name in self.shared_tables and name not in tables:
                raise OptionError(
                    f"--share-table is called {name!r} as an --id column outside of it; choose "
                    "another name"
                )

    def table_of(self, name: str) -> str:
        """The embedding table of an id column."""
        for table, columns in self.shared_tables.items():
            if name in columns:
                return table
        return name

    @property
    def optional(self) -> dict[str, str]:
        """Optional column of the prepared form → raw column, for those that are there."""
        roles = (GROUP_ID, TIMESTAMP, TRUE_CTR, TRUE_CVR)
        return {role: getattr(self, role) for role in roles if getattr(self, role) is not None}

    @property
    def roles(self) -> list[tuple[str, str]]:
        """(what it is, raw column) of every column beside the features."""
        given = {CLICK: self.click, CONVERSION: self.conversion, SAMPLE_ID: self.sample_id}
        return [
            (f"--{role.replace('_', '-')}", column)
            for role, column in (given | self.optional).items()
            if column is not None
        ]

    @property
    def features(self) -> list[tuple[str, str]]:
        """(what it is, raw column) of every feature column."""
        return [
            *(("--id", name) for name in self.ids),
            *((f"--weights of {name!r}", column) for name, column in self.weights.items()),
            *(("--dense", name) for name in self.dense),
        ]


class IdForm(NamedTuple):
    """What the type of an id column in one file says; None where it does not say."""

    multi_valued: bool | None
    kind: IdKind | None
    where: str

    @classmethod
    def of(cls, table: RawTable, column: str) -> IdForm:
        """The form of a column of a file.

        Raises:
            DataError: its type is none of ids.
        """
        kind = table.types([column])[column]
        if table.is_text:
            return cls(False, None, f"{table.name} has single values in column {column!r}")
        where = f"{table.name} has {kind} in column {column!r}"
        try:
            found = id_kind(kind)
        except TypeError:
            raise DataError(f"{where}, and ids are integers or strings; convert it") from None
        return cls(None if pa.types.is_null(kind) else is_list(kind), found, where)


def agreed(forms: Sequence[IdForm], what: Literal["multi_valued", "kind"]) -> Any:
    """What those of the forms that say anything say; None where none does.

    Raises:
        DataError: two of them say different things; names their files.
    """
    said = [form for form in forms if getattr(form, what) is not None]
    for form in said[1:]:
        if getattr(form, what) != getattr(said[0], what):
            raise DataError(f"{form.where} and {said[0].where}; give both one type")
    return getattr(said[0], what) if said else None
