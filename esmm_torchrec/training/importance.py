"""Permutation importance: the decrease of a model's AUC when one feature is permuted.

Breiman, "Random Forests", Machine Learning 45 (2001), section 10. Permuting the values of a feature
among the impressions of a sample keeps their distribution and removes their relation to the labels.

Shapes: B impressions of the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.reader import ImpressionReader, Selection
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.schema import COLLECTIONS, WEIGHT, missing_column
from esmm_torchrec.serving.scorer import scored_impressions, scores_of

Model = Callable[[BatchFeatures], Logits]


class Importance(NamedTuple):
    """Importance of one feature."""

    feature: str
    loss: dict[str, float | None]
    """`TaskProbability.name` → AUC of the sample minus the AUC with the feature permuted; None if
    there is only one class."""


def permutation_importance(
    model: Model, split: MappedSplit, *, sample: int = 20_000, seed: int = 0
) -> list[Importance]:
    """Returns the importance of each feature, sorted by the largest loss of any AUC, descending.

    Args:
        model: unsharded model on the CPU.
        split: split from which impressions are drawn.
        sample: number of impressions, drawn at random.
        seed: seed of the sample and the permutation.
    """
    random = np.random.default_rng(seed)
    size = min(sample, split.impressions)
    rows = np.sort(random.choice(split.impressions, size, replace=False))
    reader = ImpressionReader(
        split,
        batch_size=size,
        shuffle=False,
        selection=Selection(rows),
        shared_features="expanded",
    )
    (batch,) = reader
    order = torch.from_numpy(random.permutation(size))
    schema, tasks = split.schema, split.schema.tasks
    columns = {
        name: split.scalars[name][rows] for name in (*tasks.labels, WEIGHT) if name in split.scalars
    }

    def aucs(features: BatchFeatures) -> dict[str, float | None]:
        with torch.inference_mode():
            scores = scores_of(model(features), tasks, size)
        figures = measure(scored_impressions(scores, columns, tasks))["test"]
        return {name: figures[f"{name}_auc"] for name in scores}

    whole = aucs(batch.features)

    def loss(features: BatchFeatures) -> dict[str, float | None]:
        pairs = {name: (whole[name], value) for name, value in aucs(features).items()}
        return {
            name: None if before is None or after is None else before - after
            for name, (before, after) in pairs.items()
        }

    importances = []
    for name in COLLECTIONS:
        bags: KeyedJaggedTensor | None = getattr(batch.features, name)
        if bags is None:
            continue
        for key in bags.keys():  # noqa: SIM118
            features = batch.features._replace(**{name: _permuted(bags, key, order)})
            importances.append(Importance(key, loss(features)))
    dense = batch.features.dense_features
    indicators = {missing_column(name) for name in schema.dense_features}
    for name in schema.dense_features:
        if name in indicators:
            continue
        together = (name, missing_column(name))
        places = [n for n, one in enumerate(schema.dense_features) if one in together]
        assert dense is not None
        changed = dense.clone()
        changed[:, places] = dense[order][:, places]
        importances.append(Importance(name, loss(batch.features._replace(dense_features=changed))))
    return sorted(importances, key=lambda one: -max((v or 0.0) for v in one.loss.values()))


def _permuted(bags: KeyedJaggedTensor, key: str, order: torch.Tensor) -> KeyedJaggedTensor:
    """Returns the bags with those of one key in another order."""
    places = torch.arange(len(bags.keys()) * len(order), dtype=torch.int32)
    first = bags.keys().index(key) * len(order)
    places[first : first + len(order)] = first + order
    lengths, values, weights = torch.ops.fbgemm.permute_1D_sparse_data(
        places, bags.lengths(), bags.values(), bags.weights_or_none()
    )
    return KeyedJaggedTensor(bags.keys(), values, weights, lengths=lengths)
