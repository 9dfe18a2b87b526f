"""Inputs and outputs of the program of a model: plain tensors in a fixed order.

    B impressions, L ids of a multi-valued feature in all of them, D raw dense columns

    NAME           int64 (B,)       row of the raw id in the vocabulary; -1: missing
    NAME.weights   float32 (B,)     weight of each id, if the feature is weighted
    NAME.values    int64 (L,)       multi-valued feature: the rows of the first impression, then
                                    those of the second, …
    NAME.lengths   int64 (B,)       number of rows of each impression; 0: missing
    NAME.weights   float32 (L,)     weight of each value, as in the raw data
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
"""Row of a missing id of a single-valued feature."""

DENSE = "dense"
IMPRESSIONS = "impressions"
"""Name of the first dimension of all inputs except values and their weights."""

TensorType = Literal["int64", "float32", "float64"]


@dataclass(frozen=True)
class Input:
    """An input tensor of a program."""

    name: str
    dtype: TensorType
    dims: tuple[int | str, ...]
    """Size of each dimension; a dimension of variable size has a name instead."""


@dataclass(frozen=True)
class Signature:
    """Input and output tensors of a program, in order."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    """Columns of scores, each float32 (B,)."""
    dense: tuple[str, ...]
    """Raw dense columns, in the order of the columns of `dense`."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(one.name for one in self.inputs)

    @classmethod
    def of(cls, schema: Schema, *, dense: tuple[str, ...]) -> Signature:
        """Creates the signature of a model, without its outputs.

        Args:
            schema: schema of its data; the inputs are in the order of its id features.
            dense: raw dense columns.

        Raises:
            DataError: the name of a feature is that of an input of another feature.
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
