"""The form of a column in each file, by its type or first value, and in all files together."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeVar

import pyarrow as pa

from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.sources.raw_ids import IdKind, id_kind, is_list
from esmm_torchrec.data.sources.raw_tables import RawTable
from esmm_torchrec.data.sources.raw_times import are_integers
from esmm_torchrec.data.sources.raw_values import is_number, is_text, one_array
from esmm_torchrec.errors import DataError

T = TypeVar("T")


class IdForm(NamedTuple):
    """Form of an id column in one file, as its type defines it; None if the type leaves it open."""

    multi_valued: bool | None
    kind: IdKind | None
    where: str

    @classmethod
    def of(cls, table: RawTable, column: str, list_separator: str | None) -> IdForm:
        """Returns the form of a column of a file.

        Raises:
            DataError: the type of the column cannot hold ids.
        """
        if table.is_text:
            multi_valued = None if list_separator else False
            return cls(multi_valued, None, f"{table.name} has single values in column {column!r}")
        kind = table.type_of(column)
        where = f"{table.name} has {kind} in column {column!r}"
        try:
            found = id_kind(kind)
        except TypeError:
            raise DataError(f"{where}, but ids must be integers or text; convert it") from None
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        unsure = pa.types.is_null(kind) or (list_separator is not None and is_text(values))
        # pandas stores a column without any value as floats; `raw_ids` checks for it.
        return cls(
            None if unsure else is_list(kind), None if pa.types.is_floating(kind) else found, where
        )


def time_form(table: RawTable, column: str) -> tuple[Literal["times", "integers"] | None, str]:
    """Returns the form of the times in a column of a file, None if unknown, and a sentence about
    it."""
    kind = table.type_of(column)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    form: Literal["times", "integers"] | None = None
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        form = "times"
    elif is_number(kind):
        form = "integers"
    elif is_text(kind):
        for rows in table.blocks([column], BadRows(sys.maxsize)):
            values = one_array(rows.table.column(column)).drop_null()
            if len(values):
                form = "integers" if are_integers(values[:1])[0].as_py() else "times"
                break
    return form, f"{table.name} has {form} in column {column!r}"


def agreed(said: Iterable[tuple[T | None, str]], what: str) -> T | None:
    """Returns the value on which the files of a column agree; None if it is unknown in all of them.

    Args:
        said: value for each file, None if unknown, and a sentence about it.
        what: noun for the value in the error message.

    Raises:
        DataError: two files differ; names both.
    """
    first: tuple[T, str] | None = None
    for value, where in said:
        if value is None:
            continue
        if first is not None and value != first[0]:
            raise DataError(f"{where} and {first[1]}; give both one {what}")
        first = first or (value, where)
    return None if first is None else first[0]
