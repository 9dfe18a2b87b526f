"""A run's model as a program that needs torch and nothing else, with what encodes raw rows for it.

TorchRec's collections take KeyedJaggedTensors and call fbgemm's operators. Here torch's own
embedding_bag looks into the same tables, so that `torch.export` gives a program of plain tensors,
by the names of the features, for any number of impressions.

    OUT/
        model.pt2         the program, for torch.export.load
        inputs.json       what it takes and gives
        README.txt        the same for a person, with the lines that call it
        preprocessing/    dataset.json and the vocabularies: from raw values to its inputs

Shapes in this file: B impressions, L ids of one feature in all of them, D dense features, F
pooled features.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.data.encoding import copy_preprocessing
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import dense_features
from esmm_torchrec.errors import RunError
from esmm_torchrec.models.embeddings import PooledFeatures
from esmm_torchrec.models.scores import probabilities
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.schema import UNKNOWN_ROW, Schema
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.serving.scoring import check_preprocessing

PROGRAM = "model.pt2"
DESCRIPTION = "inputs.json"
README = "README.txt"
FORMAT_VERSION = 1

_EXAMPLE_ROWS = 3
"""Impressions to trace with; 0 and 1 are what torch.export takes for constants."""


class _Bags(NamedTuple):
    """The id features of B impressions, by name."""

    values: Mapping[str, torch.Tensor]
    """int64 (L,), rows of the table: those of the first impression, then of the second, …"""
    lengths: Mapping[str, torch.Tensor]
    """int64 (B,), how many each impression has."""
    weights: Mapping[str, torch.Tensor]
    """float32 (L,), of the weighted features."""


class _PlainInputs(NamedTuple):
    """What an exported model takes in place of `BatchFeatures`."""

    bags: _Bags
    dense: torch.Tensor | None


class _PlainFeatures(nn.Module):
    """What `PooledFeatures` does, by torch's embedding_bag; takes its place in a model."""

    def __init__(self, pooled: PooledFeatures) -> None:
        super().__init__()
        self.tables = nn.ParameterList()
        self._table_of: dict[str, int] = {}
        # In the order of PooledFeatures.forward's result.
        for collection in pooled.children():
            assert isinstance(collection, EmbeddingBagCollection)
            for config in collection.embedding_bag_configs():
                for feature in config.feature_names:
                    self._table_of[feature] = len(self.tables)
                weight = collection.embedding_bags.get_parameter(f"{config.name}.weight")
                self.tables.append(weight)

    def forward(self, features: _PlainInputs) -> torch.Tensor:
        """(B, F)."""
        bags, dense = features.bags, features.dense
        parts = []
        for feature, table in self._table_of.items():
            offsets = F.pad(bags.lengths[feature].cumsum(0), (1, 0))
            part = F.embedding_bag(
                bags.values[feature],
                self.tables[table],
                offsets,
                mode="sum",
                per_sample_weights=bags.weights.get(feature),
                include_last_offset=True,
            )
            parts.append(part)
        return torch.cat(parts if dense is None else [*parts, dense], dim=1)


class _Program(nn.Module):
    """From plain tensors to probabilities.

    Args:
        model: of a train task; its embeddings are replaced.
        schema: of its features.
        normalise: divide the weights of a multi-valued feature by their sum in each bag.
    """

    def __init__(self, model: nn.Module, schema: Schema, *, normalise: bool) -> None:
        super().__init__()
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, PooledFeatures):
                    setattr(parent, name, _PlainFeatures(child))
        self.model = model.requires_grad_(False)
        self._tasks = schema.tasks
        self._normalised = {
            feature.name
            for feature in schema.id_features
            if normalise and feature.weighted and feature.multi_valued
        }

    def forward(
        self,
        values: dict[str, torch.Tensor],
        lengths: dict[str, torch.Tensor],
        weights: dict[str, torch.Tensor] | None = None,
        dense: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """float32 (B,) by name, see `inputs.json`."""
        weights = {} if weights is None else weights
        used = {
            feature: _normalised(weight, lengths[feature])
            if feature in self._normalised
            else weight
            for feature, weight in weights.items()
        }
        logits = self.model(_PlainInputs(_Bags(values, lengths, used), dense))
        known = probabilities(logits, self._tasks)
        return {
            column: known[name] for name, column, *_ in self._tasks.probabilities if name in known
        }


def _normalised(weights: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """As `data.mapped` does it: divided by the sum of absolute values; a bag of zeros stays."""
    exact = weights.double()
    places = torch.arange(weights.shape[0], device=weights.device)
    bag = torch.bucketize(places, lengths.cumsum(0), right=True)
    sums = exact.new_zeros(lengths.shape[0]).index_add(0, bag, exact.abs())
    return (exact / torch.where(sums > 0, sums, 1.0)[bag]).float()


def export(run: RunFolder | Path | str, out: Path | str, *, step: int | None = None) -> Predictor:
    """Writes what serves a run's model without this library; see the head of this module.

    Args:
        run: the run folder.
        out: the folder to make; it appears when it is whole.
        step: of the checkpoint; None: that of the model.

    Returns:
        the model that was exported.

    Raises:
        RunError: `out` exists, `run` is not a run folder, or it lacks the checkpoint or what
            encodes raw rows.
    """
    out = Path(out)
    if out.exists():
        raise RunError(f"{out} exists already; remove it or choose another folder")
    predictor = Predictor(run, step=step)
    check_preprocessing(predictor.run)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        copy_preprocessing(predictor.run.preprocessing, partial / "preprocessing")
        program, names = _exported(predictor)
        (partial / PROGRAM).write_bytes(program)
        description = _description(predictor, names)
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        (partial / README).write_text(_readme(predictor.run.schema, description))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return predictor


def _exported(predictor: Predictor) -> tuple[bytes, list[str]]:
    """The program as the bytes of its file, and the names of what it gives."""
    schema = predictor.run.schema
    normalise = predictor.run.config["options"]["history_weights"] == "normalised"
    # A copy, as the model loses its collections.
    model = _Program(copy.deepcopy(predictor.task.model), schema, normalise=normalise)
    inputs, shapes = _example(schema)
    names = list(model(**inputs))
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    # Into memory first: torch ends the process where it writes to a disk that is full.
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue(), names


def _example(schema: Schema) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, and which of their dimensions may be of any size."""
    rows = torch.export.Dim("impressions", min=1)
    inputs: dict[str, Any] = {"values": {}, "lengths": {}}
    shapes: dict[str, Any] = {"values": {}, "lengths": {}}
    for number, feature in enumerate(schema.id_features):
        of_feature = {0: torch.export.Dim(f"ids_{number}", min=0)}
        name = feature.name
        inputs["lengths"][name] = torch.ones(_EXAMPLE_ROWS, dtype=torch.int64)
        inputs["values"][name] = torch.zeros(_EXAMPLE_ROWS, dtype=torch.int64)
        shapes["lengths"][name], shapes["values"][name] = {0: rows}, of_feature
        if feature.weighted:
            inputs.setdefault("weights", {})[name] = torch.ones(_EXAMPLE_ROWS)
            shapes.setdefault("weights", {})[name] = of_feature
    if schema.dense_features:
        inputs["dense"] = torch.zeros(_EXAMPLE_ROWS, len(schema.dense_features))
        shapes["dense"] = {0: rows}
    return inputs, shapes


def _description(predictor: Predictor, outputs: list[str]) -> dict[str, Any]:
    schema = predictor.run.schema
    data_set = PreparedDataSet.open(predictor.run.preprocessing, data_files=False)
    return {
        "format_version": FORMAT_VERSION,
        "method": predictor.run.model_options.method,
        "step": predictor.step,
        "torch": torch.__version__,
        "unknown_row": UNKNOWN_ROW,
        "id_features": [
            {
                "name": feature.name,
                "vocabulary": f"preprocessing/{data_set.vocabulary_file(feature.table)}"
                if feature.table in data_set.vocabulary_tables
                else None,
                "hash_rows": data_set.statistics.tables[feature.table].hash_rows,
                "rows": schema.table(feature.table).num_embeddings,
                "multi_valued": feature.multi_valued,
                "weighted": feature.weighted,
            }
            for feature in schema.id_features
        ],
        "dense_features": [
            {
                "name": name,
                "of": column,
                "is": "value" if name == column else "1 if the value is missing, else 0",
                "transform": asdict(transform) if name == column else None,
            }
            for column, transform in data_set.statistics.dense.items()
            for name in dense_features(column, transform)
        ],
        "outputs": outputs,
    }


_README = """\
A model of the method {method}, step {step} of its training, as a program of torch {torch}.

    import torch

    model = torch.export.load("{program}").module()
    scores = model(
{call}
    )

It takes B impressions, any number of them, and every feature of {description} by its name:

{takes}

An id is the row of its raw id in the feature's vocabulary, a Parquet file with the columns raw_id
and row; one that is not there is row {unknown_row}. Multi-valued features alone may have several.

It gives, float32 (B,) by name:

{gives}
"""

_TAKES = {
    "values": "int64 (L,) by id feature: ids of the first impression, then of the second, ...",
    "lengths": "int64 (B,) by id feature: how many ids each impression has, 0 where it is missing",
    "weights": "float32 (L,) by weighted feature: beside its values, as in the raw data",
    "dense": "float32 (B, D): dense_features in their order, values by their transform",
}


def _readme(schema: Schema, description: Mapping[str, Any]) -> str:
    first = schema.id_features[0].name
    weighted = next((feature.name for feature in schema.id_features if feature.weighted), None)
    call = {
        "values": f"{{{first!r}: torch.tensor([3, 17]), ...}}",
        "lengths": f"{{{first!r}: torch.tensor([1, 1]), ...}}",
    }
    if weighted is not None:
        call["weights"] = f"{{{weighted!r}: torch.tensor([0.5, 2.0]), ...}}"
    if schema.dense_features:
        call["dense"] = f"torch.zeros(2, {len(schema.dense_features)})"
    return _README.format(
        **{name: description[name] for name in ("method", "step", "torch", "unknown_row")},
        program=PROGRAM,
        description=DESCRIPTION,
        call="\n".join(f"        {name}={value}," for name, value in call.items()),
        takes="\n".join(f"    {name:<8} {_TAKES[name]}" for name in call),
        gives="\n".join(
            f"    {column:<8} probability of {schema.tasks.describe(probability)}"
            for probability in schema.tasks.probabilities
            if (column := probability.column) in description["outputs"]
        ),
    )
