"""Raw columns of the features, and how their values are read from blocks of raw rows.

Training and scoring share this module. In shapes, n is the number of rows of a block.
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
"""Description in a `Fault`, the end of a sentence."""

CONSTANT = "__constant"
"""Id feature of a raw table that has no other: a model looks up at least one embedding table."""


class Features(NamedTuple):
    """Feature values of n rows, not yet encoded. Rows with a fault have arbitrary values."""

    ids: dict[str, pa.Array]
    """Ids by feature, int64 or string: n scalars, null if missing, or n lists without nulls."""
    weights: dict[str, pa.Array]
    """Weights by weighted feature, float32: n scalars, null if the id is, or n lists parallel to
    the ids."""
    dense: dict[str, np.ndarray]
    """Values by dense feature, float64 (n,), NaN if missing."""

    def filter(self, keep: np.ndarray) -> Features:
        """Returns the rows for which `keep`, bool (n,), is true."""
        mask = pa.array(keep)
        return Features(
            {name: values.filter(mask) for name, values in self.ids.items()},
            {name: values.filter(mask) for name, values in self.weights.items()},
            {name: values[keep] for name, values in self.dense.items()},
        )


@dataclass(frozen=True)
class FeatureColumns:
    """Raw columns of the features and how to read them. A feature has the name of its raw column,
    unless `columns` contains it."""

    id_features: tuple[IdFeature, ...]
    kinds: Mapping[str, IdKind]
    """Kind of raw ids, by id feature."""
    weights: Mapping[str, str]
    """Raw column of the weights, by weighted feature."""
    dense: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    """Raw column by feature, for features with a name other than that of their column."""
    texts: tuple[str, ...] = ()
    """Id features whose ids are the words of a text."""
    time_parts: Mapping[str, TimePart] = field(default_factory=dict)
    """Part of a time, by id feature that is such a part."""
    list_separator: str | None = None
    """Separator of the values in lists that are written as text."""

    def column_of(self, feature: str) -> str:
        """Returns the raw column of a feature."""
        return self.columns.get(feature, feature)

    @property
    def roles(self) -> list[tuple[str, str]]:
        """(role, name) of every raw column."""
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
        """Reads the features of a block, and the faults of its rows.

        Raises:
            DataError: a column has a type that cannot hold the feature.
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
    """Settings for reading the raw rows of a data set; new rows are read with the same settings."""

    features: FeatureColumns
    sample_id: str | None
    """Raw column of the sample ids; None if there is none."""
    text_format: TextFormat

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON; `from_dict` is the inverse."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_dict(cls, values: Any) -> RawReading:
        """Restores the settings from the values that `to_dict` returned.

        Raises:
            DataError: `to_dict` did not write these values.
        """
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            reason = str(error).replace("`", "'")
            raise DataError(
                f"the data set does not say how its rows were read ({reason}); prepare it again"
            ) from None
