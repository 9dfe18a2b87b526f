"""Which raw columns hold the features, and what the features of a block of raw rows are.

The same for what a model is trained on and for what it scores. In this file: n rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from esmm_torchrec.data.prepared_form import MAX_BAG_LENGTH
from esmm_torchrec.data.sources.delimited_text import TextFormat
from esmm_torchrec.data.sources.raw_ids import IdKind, read_ids, read_tokens
from esmm_torchrec.data.sources.raw_times import TimePart, read_time_part
from esmm_torchrec.data.sources.raw_values import Fault, read_numbers
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import IdFeature

TOO_LONG = f"the list holds more than {MAX_BAG_LENGTH} ids; shorten it"
"""The end of a sentence."""

CONSTANT = "__constant"
"""The id feature of a table that has no other: a model looks up at least one table."""


class Features(NamedTuple):
    """Feature values of n rows, not yet encoded. The content of a row with a fault is arbitrary."""

    ids: dict[str, pa.Array]
    """By feature, int64 or string: n scalars with null for missing, or n lists without nulls."""
    weights: dict[str, pa.Array]
    """By weighted feature, float32: n scalars, null if the id is, or n lists beside the ids."""
    dense: dict[str, np.ndarray]
    """By dense feature, float64 (n,), NaN for missing."""

    def filter(self, keep: np.ndarray) -> Features:
        """The rows where `keep`, bool (n,), is true."""
        mask = pa.array(keep)
        return Features(
            {name: values.filter(mask) for name, values in self.ids.items()},
            {name: values.filter(mask) for name, values in self.weights.items()},
            {name: values[keep] for name, values in self.dense.items()},
        )


@dataclass(frozen=True)
class FeatureColumns:
    """Which raw columns hold the features, and how. A feature is called as its raw column, unless
    `columns` says otherwise."""

    id_features: tuple[IdFeature, ...]
    kinds: Mapping[str, IdKind]
    """By id feature: what its raw ids are."""
    weights: Mapping[str, str]
    """By weighted feature: the raw column of its weights."""
    dense: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    """By feature that is not called as its raw column: the raw column."""
    texts: tuple[str, ...] = ()
    """Id features whose ids are the words of a text."""
    time_parts: Mapping[str, TimePart] = field(default_factory=dict)
    """By id feature that is a part of a time: which."""
    list_separator: str | None = None
    """Separator of the values of lists that are written as text."""

    def column_of(self, feature: str) -> str:
        """The raw column of a feature."""
        return self.columns.get(feature, feature)

    @property
    def roles(self) -> list[tuple[str, str]]:
        """(what it is, name) of every raw column."""
        return [
            *(
                ("an id feature", self.column_of(feature.name))
                for feature in self.id_features
                if feature.name != CONSTANT
            ),
            *((f"the weights of {name!r}", column) for name, column in self.weights.items()),
            *(("a dense feature", self.column_of(name)) for name in self.dense),
        ]

    def read(self, block: pa.Table) -> tuple[Features, list[Fault]]:
        """The features of a block.

        Raises:
            DataError: a column is of a type that cannot hold the feature.
        """
        features, faults = Features({}, {}, {}), []
        for feature in self.id_features:
            name, column = feature.name, self.column_of(feature.name)
            if name == CONSTANT:
                features.ids[name] = pa.array(np.zeros(len(block), np.int64))
                continue
            if name in self.time_parts:
                features.ids[name], fault = read_time_part(
                    block.column(column), column, self.time_parts[name]
                )
                faults.append(fault)
                continue
            weights_name = self.weights.get(name)
            ids, weights, found = read_ids(
                read_tokens(block.column(column), column)
                if name in self.texts
                else block.column(column),
                column,
                kind=self.kinds[name],
                multi_valued=feature.multi_valued,
                weights=None if weights_name is None else block.column(weights_name),
                weights_name=weights_name or "",
                list_separator=self.list_separator,
            )
            features.ids[name] = ids
            if feature.multi_valued:
                too_long = np.diff(ids.offsets.to_numpy()) > MAX_BAG_LENGTH
                found.append(Fault(column, too_long, lambda _: TOO_LONG))
            if weights is not None:
                features.weights[name] = weights
            faults += found
        for name in self.dense:
            column = self.column_of(name)
            features.dense[name], fault = read_numbers(
                block.column(column), column, may_be_missing=True
            )
            faults.append(fault)
        return features, faults


@dataclass(frozen=True)
class RawReading:
    """How the rows of a data set were read; new rows are read in the same way."""

    features: FeatureColumns
    sample_id: str | None
    """The raw column of sample ids, if there was one."""
    text_format: TextFormat

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is its inverse."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_dict(cls, values: Any) -> RawReading:
        """The reading that `to_dict` wrote.

        Raises:
            DataError: something else wrote it.
        """
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            reason = str(error).replace("`", "'")
            raise DataError(
                f"the data set does not say how its rows were read ({reason}); prepare it again"
            ) from None
