"""What a program that serves a model takes and gives: plain tensors in one order.

    B impressions, L ids of a multi-valued feature in all of them, D raw dense columns

    NAME           int64 (B,)       row of the raw id in the vocabulary; -1: missing
    NAME.weights   float32 (B,)     of a weighted feature
    NAME.values    int64 (L,)       of a multi-valued feature: the rows of the first impression,
                                    then those of the second, …
    NAME.lengths   int64 (B,)       how many of them each impression has; 0: missing
    NAME.weights   float32 (L,)     beside its values, as in the raw data
    dense          float64 (B, D)   raw values; NaN: missing

An id that is not in the vocabulary is row 0. The outputs are float32 (B,).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import IdFeature, Schema

MISSING_ROW = -1
"""Stands for a missing id of a single-valued feature."""

DENSE = "dense"
IMPRESSIONS = "impressions"
"""The dimension that all inputs but values, and their weights, begin with."""

TensorType = Literal["int64", "float32", "float64"]


@dataclass(frozen=True)
class Input:
    """A tensor that a program takes."""

    name: str
    dtype: TensorType
    dims: tuple[int | str, ...]
    """A dimension of any size has a name."""


@dataclass(frozen=True)
class Signature:
    """The tensors of a program, in order."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    """Columns of scores, each float32 (B,)."""
    dense: tuple[str, ...]
    """Raw dense columns, in the order of the columns of `dense`."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the inputs."""
        return tuple(one.name for one in self.inputs)

    @classmethod
    def of(cls, schema: Schema, *, dense: tuple[str, ...]) -> Signature:
        """The signature of a model, not yet with its outputs.

        Args:
            schema: of its data; the inputs are in the order of its id features.
            dense: raw dense columns.

        Raises:
            DataError: a feature is called like an input of another one.
        """
        inputs = [one for feature in schema.id_features for one in _inputs(feature)]
        if dense:
            inputs.append(Input(DENSE, "float64", (IMPRESSIONS, len(dense))))
        names = [one.name for one in inputs]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise DataError(f"two inputs of the model would be called {name!r}; rename the column")
        return cls(tuple(inputs), (), dense)


def _inputs(feature: IdFeature) -> Iterator[Input]:
    name, size = feature.name, IMPRESSIONS
    if feature.multi_valued:
        size = f"ids of {name}"
        yield Input(f"{name}.values", "int64", (size,))
        yield Input(f"{name}.lengths", "int64", (IMPRESSIONS,))
    else:
        yield Input(name, "int64", (IMPRESSIONS,))
    if feature.weighted:
        yield Input(f"{name}.weights", "float32", (size,))
