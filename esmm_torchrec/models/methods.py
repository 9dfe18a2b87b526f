"""What can be trained, by name: tables, towers and objective of each method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from esmm_torchrec.models.embeddings import PooledFeatures, embedding_bag_collections
from esmm_torchrec.models.esmm import ESMM, EsmmTowers, EsmmTrainTask
from esmm_torchrec.schema import Schema

MethodOption = Literal["esmm"]
DtypeOption = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelOptions:
    """What, beside a schema, decides the shape of a model."""

    method: MethodOption = "esmm"
    embedding_dim: int = 16
    tower: tuple[int, ...] = (360, 200, 80)
    dtype: DtypeOption = "float32"
    detach_click: bool = False


def build_train_task(
    schema: Schema,
    options: ModelOptions,
    *,
    seed: int = 0,
    click_prior: float | None = None,
    conversion_prior: float | None = None,
    embedding_device: torch.device | str = "meta",
) -> EsmmTrainTask:
    """A model and its objective; the towers are drawn from the seed.

    Args:
        schema: tables and features.
        options: shape of the model.
        seed: of the towers' weights, and of the tables' where they are not on "meta".
        click_prior: share of clicks among the training impressions.
        conversion_prior: share of conversions among the training clicks.
        embedding_device: "meta" leaves the tables to `sharding.shard`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        collections = embedding_bag_collections(
            schema, options.embedding_dim, device=embedding_device
        )
        num_dense = len(schema.dense_features)
        towers = EsmmTowers(
            PooledFeatures(*collections, dense_in_features=num_dense).out_features,
            options.tower,
            click_prior=click_prior,
            conversion_prior=conversion_prior,
            dtype=getattr(torch, options.dtype),
        )
    model = ESMM(*collections, dense_in_features=num_dense, towers=towers)
    return EsmmTrainTask(model, detach_click=options.detach_click)
