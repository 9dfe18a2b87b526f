"""Permutation importance: what a model's AUC loses when one feature tells nothing.

Breiman, "Random Forests", Machine Learning 45 (2001), section 10. The values of one feature are
permuted among the impressions of a sample, which keeps their distribution and breaks what they say
of the labels.

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
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.models.scores import read_scores
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.schema import COLLECTIONS, WEIGHT, missing_column

Model = Callable[[BatchFeatures], Logits]


class Importance(NamedTuple):
    """Of one feature."""

    feature: str
    loss: dict[str, float | None]
    """By `TaskProbability.name`, the AUC of the sample minus that with the feature permuted; None
    if there is one class only."""


def permutation_importance(
    model: Model, split: MappedSplit, *, sample: int = 20_000, seed: int = 0
) -> list[Importance]:
    """The importance of each feature, the largest loss of any AUC first.

    Args:
        model: unsharded, on the CPU.
        split: whose impressions.
        sample: how many of them, drawn by chance.
        seed: of the sample and the permutation.
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
    schema = split.schema
    whole = _aucs(model, batch.features, split, rows)

    def loss(features: BatchFeatures) -> dict[str, float | None]:
        found = _aucs(model, features, split, rows)
        pairs = {name: (whole[name], found[name]) for name in whole}
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


def _aucs(
    model: Model, features: BatchFeatures, split: MappedSplit, rows: np.ndarray
) -> dict[str, float | None]:
    with torch.inference_mode():
        scores = read_scores(model(features), split.schema.tasks)
    labels = {label: split.scalars[label][rows] == 1 for label in split.schema.tasks.labels}
    happened = split.schema.tasks.happened(labels)
    weights = split.scalars[WEIGHT][rows] if WEIGHT in split.scalars else None
    found = {}
    for name, _, task, given in split.schema.tasks.probabilities:
        if name not in scores:
            continue
        space = np.ones(len(rows), np.bool_) if given is None else happened[given.name]
        own = None if weights is None else weights[space]
        found[name] = auc(scores[name].values.numpy()[space], happened[task.name][space], own)
    return found


def _permuted(bags: KeyedJaggedTensor, key: str, order: torch.Tensor) -> KeyedJaggedTensor:
    """The bags of one key in another order."""
    values, lengths, weights = [], [], []
    for name, one in bags.to_dict().items():
        own = one.weights_or_none()
        if name != key:
            values.append(one.values())
            lengths.append(one.lengths())
            weights.append(own)
            continue
        moved = one.lengths()[order].long()
        starts = one.offsets()[:-1][order].long()
        before = moved.cumsum(0) - moved
        places = torch.repeat_interleave(starts - before, moved) + torch.arange(int(moved.sum()))
        values.append(one.values()[places])
        lengths.append(one.lengths()[order])
        weights.append(None if own is None else own[places])
    known = [one for one in weights if one is not None]
    return KeyedJaggedTensor(
        bags.keys(),
        torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(known) if known else None,
    )
