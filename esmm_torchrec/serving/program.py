"""A trained model as a program of plain tensors: raw dense values and rows in, probabilities out.

TorchRec's collections take KeyedJaggedTensors and call fbgemm's operators. Here torch's own
operators look into the same tables, so that the program can be exported, and compiled for a
process that has torch alone. What it takes is described in `signature`.

Shapes: B impressions, L ids of one feature, F pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.batch import BatchFeatures
from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.metrics.calibration import Calibration
from esmm_torchrec.models.embeddings import PooledFeatures
from esmm_torchrec.models.scores import Score, read_scores
from esmm_torchrec.schema import COLLECTIONS, IdFeature, Schema, missing_column
from esmm_torchrec.serving.signature import DENSE, MISSING_ROW, Signature


class Program(nn.Module):
    """From the tensors of a `Signature` to its outputs.

    Args:
        model: of a train task; its embeddings are replaced, the tables stay.
        schema: of its data.
        dense: by raw dense column, how its values become inputs of the model.
        normalise: divide the weights of a multi-valued feature by their sum in each bag.
        calibration: applied to the scores; None: none is.
    """

    def __init__(
        self,
        model: nn.Module,
        schema: Schema,
        dense: Mapping[str, DenseTransform],
        *,
        normalise: bool,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, PooledFeatures):
                    setattr(parent, name, _Lookup(child, schema))
        self.model = model.requires_grad_(False).eval()
        self._schema = schema
        self._transforms = dict(dense)
        self._normalise = normalise
        self._calibration = calibration
        self._signature = Signature.of(schema, dense=tuple(dense))

    def outputs(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scores that the model gives, float32 (B,), by their column."""
        given = dict(zip(self._signature.names, inputs, strict=True))
        self._check(given)
        bags = {f.name: self._bag(f, given) for f in self._schema.id_features}
        known = self._scores(_Features(bags, self._dense(given)))
        return {
            column: known[name].probability
            for name, column, *_ in self._schema.tasks.probabilities
            if name in known
        }

    def scores(self, features: BatchFeatures) -> dict[str, Score]:
        """The scores of a batch of a prepared data set, by the names of `read_scores`.

        Args:
            features: of B impressions, encoded; no feature is shared.
        """
        collections = (getattr(features, name) for name in COLLECTIONS)
        bags = {
            name: _Bag(own.values().long(), own.lengths().long(), own.weights_or_none())
            for bags in collections
            if bags is not None
            for name, own in bags.to_dict().items()
        }
        return self._scores(_Features(bags, features.dense_features))

    def _scores(self, features: _Features) -> dict[str, Score]:
        known = read_scores(self.model(features), self._schema.tasks)
        return known if self._calibration is None else known | self._calibrated(known)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The values of `outputs`."""
        return tuple(self.outputs(*inputs).values())

    def _calibrated(self, scores: Mapping[str, Score]) -> dict[str, Score]:
        """What `Calibration.apply` gives: a curve for each task, and products of what they give."""
        assert self._calibration is not None
        logits = {}
        for task in self._schema.tasks:
            if task.rate in scores:
                curve = self._calibration.curves[task.rate]
                calibrated = curve.logits(scores[task.rate].values.double(), torch)
                logits[task.name] = calibrated.float()
        return read_scores(logits, self._schema.tasks)

    def _check(self, given: Mapping[str, torch.Tensor]) -> None:
        """Stops before a wrong score or a read outside of a table."""
        in_range = []
        for feature in self._schema.id_features:
            rows = self._schema.table(feature.table).num_embeddings
            if feature.multi_valued:
                ids, lengths = given[f"{feature.name}.values"], given[f"{feature.name}.lengths"]
                fits = (lengths.sum() == ids.shape[0]) & (lengths >= 0).all()
                _assert(
                    fits,
                    f"the lengths of {feature.name} are negative or do not sum to the number of "
                    "its values",
                )
                in_range.append(((ids >= 0) & (ids < rows)).all())
            else:
                ids = given[feature.name]
                in_range.append(((ids >= MISSING_ROW) & (ids < rows)).all())
        _assert(
            torch.stack(in_range).all(),
            "an id is outside the rows of its table; give 0 for an unknown id",
        )

    def _bag(self, feature: IdFeature, given: Mapping[str, torch.Tensor]) -> _Bag:
        name = feature.name
        weights = given[f"{name}.weights"] if feature.weighted else None
        if not feature.multi_valued:
            return _Bag(given[name], None, weights)
        lengths = given[f"{name}.lengths"]
        if weights is not None and self._normalise:
            weights = _normalised(weights, lengths)
        return _Bag(given[f"{name}.values"], lengths, weights)

    def _dense(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """float32 (B, dense features)."""
        if not self._schema.dense_features:
            return None
        raw = given[DENSE]
        columns = {}
        for place, (name, transform) in enumerate(self._transforms.items()):
            values = raw[:, place]
            columns[name] = transform.apply(values, torch).float()
            if transform.has_indicator:
                columns[missing_column(name)] = torch.isnan(values).float()
        dense = torch.stack([columns[name] for name in self._schema.dense_features], dim=1)
        _assert(
            torch.isfinite(dense).all() & ~torch.isinf(raw).any(),
            "a dense value is infinite, or too far from its training values for a 32-bit float; "
            "give NaN for a missing one",
        )
        return dense


class _Bag(NamedTuple):
    """One feature of B impressions."""

    ids: torch.Tensor
    lengths: torch.Tensor | None
    """None: at most one id per impression, `MISSING_ROW` for none."""
    weights: torch.Tensor | None


class _Features(NamedTuple):
    """What a program's model takes in place of `BatchFeatures`."""

    bags: Mapping[str, _Bag]
    dense: torch.Tensor | None


class _Lookup(nn.Module):
    """What `PooledFeatures` does, by torch's own operators; takes its place in a model."""

    def __init__(self, pooled: PooledFeatures, schema: Schema) -> None:
        super().__init__()
        self.tables = nn.ParameterList()
        self._table_of: dict[str, int] = {}
        known = {feature.name for feature in schema.id_features}
        # In the order of PooledFeatures.forward's result.
        for collection in pooled.children():
            assert isinstance(collection, EmbeddingBagCollection)
            for config in collection.embedding_bag_configs():
                for feature in config.feature_names:
                    assert feature in known
                    self._table_of[feature] = len(self.tables)
                weight = collection.embedding_bags.get_parameter(f"{config.name}.weight")
                self.tables.append(weight)

    def forward(self, features: _Features) -> torch.Tensor:
        """(B, F)."""
        parts = [
            _pooled(features.bags[feature], self.tables[table])
            for feature, table in self._table_of.items()
        ]
        if features.dense is not None:
            parts.append(features.dense)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pooled(bag: _Bag, table: torch.Tensor) -> torch.Tensor:
    """(B, embedding dim): the weighted sum of a bag's embeddings."""
    if bag.lengths is None:
        embeddings = table[bag.ids.clamp(min=0)]
        if bag.weights is not None:
            embeddings = embeddings * bag.weights[:, None]
        return torch.where((bag.ids != MISSING_ROW)[:, None], embeddings, 0.0)
    return F.embedding_bag(
        bag.ids,
        table,
        F.pad(bag.lengths.cumsum(0), (1, 0)),
        mode="sum",
        per_sample_weights=bag.weights,
        include_last_offset=True,
    )


def _normalised(weights: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """As `data.mapped` does it: divided by the sum of absolute values; a bag of zeros stays."""
    exact = weights.double()
    places = torch.arange(weights.shape[0], device=weights.device)
    bag = torch.bucketize(places, lengths.cumsum(0), right=True)
    sums = exact.new_zeros(lengths.shape[0]).index_add(0, bag, exact.abs())
    return (exact / torch.where(sums > 0, sums, 1.0)[bag]).float()


def _assert(holds: torch.Tensor, sentence: str) -> None:
    """Raises RuntimeError with the sentence, also from an exported or compiled program."""
    torch.ops.aten._assert_async.msg(holds, sentence)
