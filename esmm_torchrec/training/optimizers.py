"""Optimisers of tables and towers.

fbgemm updates tables with the fused kernel inside the backward pass; torch optimisers update the
towers and tables with the dense kernel. Both are parts of one TorchRec optimiser, whose state has
the same form for every kernel, so that a checkpoint remains valid after a change of plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from esmm_torchrec.errors import PlanError
from esmm_torchrec.sharding.apply import local_shards
from esmm_torchrec.sharding.planner import (
    SparseOptimizerOption,
    embedding_bag_collections_of,
    kernel_has,
)

EPSILON = 1e-8

_TABLES, _TOWERS = "tables", "towers"

_CLASSES: dict[SparseOptimizerOption, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}

_FIRST_STATE: dict[SparseOptimizerOption, str] = {
    "rowwise_adagrad": "sum",
    "adagrad": "sum",
    "adam": "exp_avg",
}
"""Name in torch's optimiser of the state that TorchRec calls momentum1."""


class ModelOptimizer(CombinedOptimizer):
    """Combines the optimisers of a sharded model.

    TorchRec returns the state of a fused table as a ShardedTensor under TorchRec's own name, and
    the state of a dense table as this rank's plain tensor, so that ranks overwrite each other's
    state in a checkpoint. Here, `state_dict` is {"state": {key of the weight: {torch's name of the
    state: tensor}}} for both; the tensor is a ShardedTensor, sharded like the weight, if the weight
    is one. It does not contain the tables' step count, which `set_optimizer_step` restores.

    Args:
        parts: name → optimiser; the fused optimisers have the empty name.
        weights: `model.state_dict()`, or only its tables.
        optimizer: optimiser of the tables.
    """

    def __init__(
        self,
        parts: Mapping[str, KeyedOptimizer],
        *,
        weights: Mapping[str, torch.Tensor],
        optimizer: SparseOptimizerOption,
    ) -> None:
        super().__init__(list(parts.items()))
        self._weights = weights
        self._table_optimizer: SparseOptimizerOption = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, whose tensors share memory with the optimisers'."""
        state: dict[str, dict[str, torch.Tensor]] = {}
        for part_name, part in self.optimizers:
            for key, own in part.state_dict()["state"].items():
                if not part_name:
                    named = {self._name_of_fused(name): value for name, value in own.items()}
                elif part_name == _TABLES:
                    named = {
                        name: _cut_like(self._weights[key], value)
                        for name, value in own.items()
                        if isinstance(value, torch.Tensor) and name != "step"
                    }
                else:
                    named = own
                state[key] = named
        return {"state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies the tensors of a `state_dict` of the same model on the same ranks. The state of
        the optimisers must exist; see `init_state`."""
        for key, named in self.state_dict()["state"].items():
            for name, value in named.items():
                others = local_shards(state_dict["state"][key][name])
                for (own, _), (other, _) in zip(local_shards(value), others, strict=True):
                    own.detach().copy_(other)

    def init_state(self, sparse_grad_parameter_names: set[str] | None = None) -> None:
        """Creates the state of torch's optimisers, which otherwise exists only after the first
        step. It takes a step with zero gradients, so weights must be loaded afterwards."""
        for name, part in self.optimizers:
            if name:
                part.init_state(sparse_grad_parameter_names)

    def _name_of_fused(self, name: str) -> str:
        """Returns torch's name of a state such as "item.momentum1"."""
        own = name.rpartition(".")[2]
        return _FIRST_STATE[self._table_optimizer] if own == "momentum1" else own


class _DenseTables(KeyedOptimizerWrapper):
    """Wraps torch's optimiser of the tables with the dense kernel."""

    def set_optimizer_step(self, step: int) -> None:
        """Sets torch's step count of each parameter."""
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(step)


def _cut_like(weight: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Returns this rank's state of a table as a ShardedTensor of the whole table, sharing memory.

    Args:
        weight: weight of the whole table; a ShardedTensor if it is sharded.
        state: state with one value per weight of this rank; the rank's shards of the table are
            concatenated.
    """
    if not isinstance(weight, ShardedTensor):
        return state
    shards, first = [], 0
    flat = state.detach().view(-1)
    for shard in weight.local_shards():
        size = shard.tensor.numel()
        part = flat[first : first + size].view(shard.tensor.shape)
        shards.append(Shard(part, shard.metadata))
        first += size
    assert first == flat.numel()
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, weight.metadata())


def fuse_optimizer(
    module: nn.Module,
    optimizer: SparseOptimizerOption,
    *,
    lr: float,
    kernels: Mapping[str, str],
    device: torch.device,
) -> None:
    """Fuses the optimiser of every table with a fused kernel into the backward pass; to be called
    before the module is sharded.

    Raises:
        PlanError: a table's kernel does not support this optimiser on this device.
    """
    for collection in embedding_bag_collections_of(module).values():
        for config in collection.embedding_bag_configs():
            dense = kernels[config.name] == EmbeddingComputeKernel.DENSE.value
            exists = kernel_has(kernels[config.name], optimizer, device.type)
            if dense and not exists:
                raise PlanError(
                    f"table {config.name!r} has the dense kernel in the plan, which "
                    "does not support `sparse_optimizer` rowwise_adagrad; use adagrad"
                )
            if not exists:
                raise PlanError(
                    f"table {config.name!r} has the kernel {kernels[config.name]!r} in the plan, "
                    "which does not support adam on a CPU; use the dense kernel"
                )
            if not dense:
                parameter = collection.embedding_bags.get_parameter(f"{config.name}.weight")
                # A new dict for each table, as apply_optimizer_in_backward modifies its argument.
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
    clip_gradients: float | None = None,
) -> ModelOptimizer:
    """Builds the optimiser of a sharded model from the fused optimisers, the dense tables'
    optimiser, and Adam for the towers, as in the paper (betas 0.9, 0.999, epsilon 1e-8). Weight
    decay applies only to the towers: fbgemm ignores it without a mode, which TorchRec does not pass
    on. Clipping does too: the gradients of a fused table exist only in fbgemm's backward pass.

    Args:
        model: sharded model.
        optimizer: optimiser of the tables.
        sparse_lr: learning rate of the tables.
        dense_lr: learning rate of the towers.
        weight_decay: weight decay of the towers.
        clip_gradients: maximum L2 norm of the gradient of all towers together; None: no limit. The
            towers are the same on every rank, so each rank clips by the same norm.
    """
    parts: dict[str, KeyedOptimizer] = {"": model.fused_optimizer}
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    # TorchRec adds an empty parameter for a table without a shard on this rank.
    tables = {k: value for k, value in rest.items() if _is_table(k) and value.numel()}
    towers = {k: value for k, value in rest.items() if not _is_table(k)}

    def adam(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            parameters, lr=dense_lr, eps=EPSILON, weight_decay=weight_decay, fused=True
        )

    def of_tables(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        return dense_table_optimizer(parameters, optimizer, lr=sparse_lr)

    if tables:
        parts[_TABLES] = _DenseTables(tables, of_tables)
    of_towers = KeyedOptimizerWrapper(towers, adam)
    parts[_TOWERS] = (
        of_towers
        if clip_gradients is None
        else GradientClippingOptimizer(
            of_towers, clipping=GradientClipping.NORM, max_gradient=clip_gradients
        )
    )
    weights = {key: value for key, value in model.state_dict().items() if _is_table(key)}
    return ModelOptimizer(parts, weights=weights, optimizer=optimizer)


def _is_table(key: str) -> bool:
    return ".embedding_bags." in key


def dense_table_optimizer(
    parameters: Iterable[Any], optimizer: SparseOptimizerOption, *, lr: float
) -> torch.optim.Optimizer:
    """Builds torch's optimiser for tables with the dense kernel."""
    arguments = _arguments(optimizer, lr)
    if optimizer == "adam":
        arguments["fused"] = True
    return _CLASSES[optimizer](parameters, **arguments)


def _arguments(optimizer: SparseOptimizerOption, lr: float) -> dict[str, Any]:
    return {"lr": lr} if optimizer == "sgd" else {"lr": lr, "eps": EPSILON}
