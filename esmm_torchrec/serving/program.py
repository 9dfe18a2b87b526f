"""A trained model as a program on plain tensors: raw dense values and rows in, probabilities out.

TorchRec's collections take KeyedJaggedTensors and call fbgemm's operators. Here torch's own
operators read the same tables, so that the program can be exported, and compiled for a process
that has only torch. `signature` describes its inputs.

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
    """Computes the outputs of a `Signature` from its inputs.

    Args:
        model: model of a train task; its embedding modules are replaced, the tables are kept.
        schema: schema of its data.
        dense: transform of each raw dense column.
        normalise: divide the weights of a multi-valued feature by their sum in each bag.
        calibration: calibration to apply to the scores; None: none.
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
        """Computes the scores that the model predicts, float32 (B,), by column."""
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
        """Scores a batch of a prepared data set, by the names of `read_scores`.

        Args:
            features: encoded features of B impressions; none is shared.
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
        """Returns the values of `outputs`, in order."""
        return tuple(self.outputs(*inputs).values())

    def _calibrated(self, scores: Mapping[str, Score]) -> dict[str, Score]:
        """Calibrates like `Calibration.apply`: a curve per task, then products of the results."""
        assert self._calibration is not None
        logits = {}
        for task in self._schema.tasks:
            if task.rate in scores:
                curve = self._calibration.curves[task.rate]
                calibrated = curve.logits(scores[task.rate].values.double(), torch)
                logits[task.name] = calibrated.float()
        return read_scores(logits, self._schema.tasks)

    def _check(self, given: Mapping[str, torch.Tensor]) -> None:
        """Raises an error instead of computing a wrong score or reading outside a table."""
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
        """Transforms the raw dense values to float32 (B, dense features)."""
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
    """Values of one feature of B impressions."""

    ids: torch.Tensor
    lengths: torch.Tensor | None
    """Number of ids per impression; None: one id per impression, or `MISSING_ROW`."""
    weights: torch.Tensor | None


class _Features(NamedTuple):
    """Input of the model of a program, instead of `BatchFeatures`."""

    bags: Mapping[str, _Bag]
    dense: torch.Tensor | None


class _Lookup(nn.Module):
    """Replaces `PooledFeatures` in a model; uses torch's own operators."""

    def __init__(self, pooled: PooledFeatures, schema: Schema) -> None:
        super().__init__()
        self.tables = nn.ParameterList()
        self._table_of: dict[str, int] = {}
        known = {feature.name for feature in schema.id_features}
        # Features are in the order of the result of PooledFeatures.forward.
        for collection in pooled.children():
            assert isinstance(collection, EmbeddingBagCollection)
            for config in collection.embedding_bag_configs():
                for feature in config.feature_names:
                    assert feature in known
                    self._table_of[feature] = len(self.tables)
                weight = collection.embedding_bags.get_parameter(f"{config.name}.weight")
                self.tables.append(weight)

    def forward(self, features: _Features) -> torch.Tensor:
        """Returns the pooled and dense features, (B, F)."""
        parts = [
            _pooled(features.bags[feature], self.tables[table])
            for feature, table in self._table_of.items()
        ]
        if features.dense is not None:
            parts.append(features.dense)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pooled(bag: _Bag, table: torch.Tensor) -> torch.Tensor:
    """Returns the weighted sum of the embeddings of each bag, (B, embedding dim)."""
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
    """Divides weights by the sum of their absolute values in each bag, like `data.mapped`; a bag
    of zeros is unchanged."""
    exact = weights.double()
    places = torch.arange(weights.shape[0], device=weights.device)
    bag = torch.bucketize(places, lengths.cumsum(0), right=True)
    sums = exact.new_zeros(lengths.shape[0]).index_add(0, bag, exact.abs())
    return (exact / torch.where(sums > 0, sums, 1.0)[bag]).float()


def _assert(holds: torch.Tensor, sentence: str) -> None:
    """Raises RuntimeError with the sentence, even in an exported or compiled program."""
    torch.ops.aten._assert_async.msg(holds, sentence)
