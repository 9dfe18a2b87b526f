"""Optimisers of tables and towers.

A table with the fused kernel is updated inside the backward pass by fbgemm; a table with the dense
kernel, like the towers, by an optimiser of torch's. Both end up in one TorchRec optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.planner import SparseOptimizerOption, embedding_bag_collections_of

EPSILON = 1e-8

_CLASSES: dict[SparseOptimizerOption, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}


def fuse_optimizer(
    module: nn.Module,
    optimizer: SparseOptimizerOption,
    *,
    lr: float,
    kernels: Mapping[str, str],
    device: torch.device,
) -> None:
    """Puts the optimiser of every table with a fused kernel into its backward pass; to be called
    before the module is sharded.

    Raises:
        PlanError: a table's kernel does not exist with this optimiser on this device.
    """
    for collection in embedding_bag_collections_of(module).values():
        for config in collection.embedding_bag_configs():
            dense = kernels[config.name] == EmbeddingComputeKernel.DENSE.value
            if dense and optimizer == "rowwise_adagrad":
                raise PlanError(
                    f"table {config.name!r} has the dense kernel in the plan, where "
                    "--sparse-optimizer rowwise_adagrad does not exist; use adagrad"
                )
            if not dense and optimizer == "adam" and device.type == "cpu":
                raise PlanError(
                    f"table {config.name!r} has the kernel {kernels[config.name]!r} in the plan, "
                    "where adam does not exist on a CPU; use the dense kernel"
                )
            if not dense:
                parameter = collection.embedding_bags.get_parameter(f"{config.name}.weight")
                # A new dict each time: apply_optimizer_in_backward changes the one it is given.
                apply_optimizer_in_backward(
                    _CLASSES[optimizer], [parameter], _arguments(optimizer, lr)
                )


def build_optimizer(
    model: DistributedModelParallel,
    optimizer: SparseOptimizerOption,
    *,
    sparse_lr: float,
    dense_lr: float,
    weight_decay: float = 0.0,
) -> KeyedOptimizer:
    """One optimiser for a sharded model: the fused ones, the dense tables', and Adam for the
    towers, as in the paper (betas 0.9, 0.999, epsilon 1e-8). Weight decay is for the towers alone:
    fbgemm ignores it unless it is told a mode, which TorchRec does not pass on."""
    parts: list[KeyedOptimizer | tuple[str, KeyedOptimizer]] = [("", model.fused_optimizer)]
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    tables = {name: value for name, value in rest.items() if ".embedding_bags." in name}
    towers = {name: value for name, value in rest.items() if name not in tables}

    def adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            parameters, lr=dense_lr, eps=EPSILON, weight_decay=weight_decay, fused=True
        )

    def table_optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        arguments = _arguments(optimizer, sparse_lr)
        if optimizer == "adam":
            arguments["fused"] = True
        return _CLASSES[optimizer](parameters, **arguments)

    if tables:
        parts.append(("tables", KeyedOptimizerWrapper(tables, table_optimizer)))
    parts.append(("towers", KeyedOptimizerWrapper(towers, adam)))
    return CombinedOptimizer(parts)


def _arguments(optimizer: SparseOptimizerOption, lr: float) -> dict[str, Any]:
    return {"lr": lr} if optimizer == "sgd" else {"lr": lr, "eps": EPSILON}
