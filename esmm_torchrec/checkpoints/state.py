"""State of a sharded model and its optimiser: copies it to host memory and loads it."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from esmm_torchrec.checkpoints.files import broken, check_files, read_description
from esmm_torchrec.errors import RunError
from esmm_torchrec.sharding.process_group import on_every_rank

_TABLE = ".embedding_bags."

State = dict[str, Any]
"""{"model": state_dict, "optimizer": state_dict}"""


def host_copy(value: Any) -> Any:
    """Copies a state, with its tensors in host memory, so that further training does not change it.

    Args:
        value: nested dicts, lists and tuples of tensors, ShardedTensors and other values.
    """
    if isinstance(value, Mapping):
        return {key: host_copy(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(host_copy(entry) for entry in value)
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        on_host = [
            replace(shard, placement=_on_host(shard.placement))
            for shard in metadata.shards_metadata
        ]
        shards = [
            Shard(
                _tensor_copy(shard.tensor),
                replace(shard.metadata, placement=_on_host(shard.metadata.placement)),
            )
            for shard in value.local_shards()
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, replace(metadata, shards_metadata=on_host)
        )
    if isinstance(value, torch.Tensor):
        return _tensor_copy(value)
    return copy.deepcopy(value)


def _tensor_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _on_host(placement: Any) -> _remote_device:
    return _remote_device(f"rank:{placement.rank()}/cpu")


class _GrowingTables(DefaultLoadPlanner):
    """Loads tables and their optimiser state into tables with more rows, whose additional rows
    remain unchanged.

    Args:
        sizes: name in the checkpoint → size of the whole tensor to load into.
    """

    def __init__(self, sizes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self._sizes = sizes

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        entries = dict(metadata.state_dict_metadata)
        for name, size in self._sizes.items():
            entry = entries.get(name)
            if not isinstance(entry, TensorStorageMetadata) or _TABLE not in name:
                continue
            if size[1:] == entry.size[1:] and size[0] > entry.size[0]:
                # The chunks, which determine what is read from the files, are unchanged.
                entries[name] = replace(entry, size=size)
        super().set_up_planner(
            state_dict, replace(metadata, state_dict_metadata=entries), is_coordinator
        )


def _sizes(state: State) -> dict[str, torch.Size]:
    """Returns name in a checkpoint → size of the whole tensor, for all tensors of a state."""
    sizes = {f"model.{key}": _size(tensor) for key, tensor in state["model"].items()}
    for key, tensors in state["optimizer"]["state"].items():
        for name, tensor in tensors.items():
            sizes[f"optimizer.state.{key}.{name}"] = _size(tensor)
    return sizes


def load_state(
    path: Path,
    *,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    tables_may_grow: bool = False,
) -> dict[str, Any]:
    """Loads a checkpoint into a sharded model and its optimiser; every rank must call it.

    Args:
        model: sharded model, whose weights are overwritten.
        optimizer: optimiser of the model, whose state and step count are overwritten.
        tables_may_grow: whether tables may have more rows than in the checkpoint; the additional
            rows keep their weights and have no optimiser state yet.

    Returns:
        the description of the checkpoint.

    Raises:
        RunError: as `CheckpointManager.load`.
    """
    description, *_ = on_every_rank(lambda: _checked(path, collective=True))
    optimizer.init_state()  # torch.distributed.checkpoint skips missing state
    state: State = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    on_every_rank(lambda: _check_forms(state, path))
    planner = _GrowingTables(_sizes(state)) if tables_may_grow else None
    _load(state, path, collective=True, planner=planner)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    # fbgemm's Adam corrects its bias with its own step count, which is not part of its state.
    optimizer.set_optimizer_step(description["optimizer_step"])
    return description


def load_model(path: Path, model: nn.Module) -> None:
    """Loads only the weights.

    Args:
        model: a sharded model, which all ranks must load together; or any other module, which this
            process loads independently.

    Raises:
        RunError: the weights cannot be read, or belong to another model.
    """
    collective = isinstance(model, DistributedModelParallel)
    if collective:
        on_every_rank(lambda: _checked(path, collective=True))
    else:
        _checked(path, collective=False)
    state = {"model": model.state_dict()}
    _load(state, path, collective=collective)
    model.load_state_dict(state["model"])


def _checked(path: Path, *, collective: bool) -> dict[str, Any]:
    """Checks the files of a checkpoint and returns its description."""
    description = read_description(path)
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if collective else (0, 1)
    check_files(path, description["files"], rank=rank, num_ranks=num_ranks)
    return description


def _check_forms(state: State, path: Path) -> None:
    """Checks that all of an optimiser's state was saved in the size it has here, which may depend
    on column shards.

    Raises:
        RunError: a size differs; the message names the first such table.
    """
    try:
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling a damaged file may raise anything
        raise broken(path, f".metadata: {type(error).__name__}") from error
    for key, tensors in sorted(state["optimizer"]["state"].items()):
        weight = saved.get(f"model.{key}")
        if not isinstance(weight, TensorStorageMetadata):
            continue
        if key not in state["model"] or weight.size[1:] != _size(state["model"][key])[1:]:
            continue  # another model: `_load` reports it
        rows, rows_here = weight.size[0], _size(state["model"][key])[0]
        for name, tensor in tensors.items():
            entry = saved.get(f"optimizer.state.{key}.{name}")
            if not isinstance(entry, TensorStorageMetadata) or not len(entry.size):
                continue  # a scalar of the whole optimiser
            per_row, per_row_here = entry.size[0] / rows, _size(tensor)[0] / rows_here
            table = key.removesuffix(".weight").rpartition(".")[2]
            if rows != rows_here and per_row != 1:
                raise RunError(
                    f"checkpoint {path} keeps the optimiser's state {name!r} of table {table!r} "
                    "for each column shard, and such a table cannot grow; start from a run whose "
                    "plan does not cut its columns"
                )
            if entry.size[1:] != _size(tensor)[1:] or per_row != per_row_here:
                raise RunError(
                    f"checkpoint {path} keeps the optimiser's state {name!r} of table {table!r} as "
                    f"{' x '.join(map(str, entry.size))} values, and this placement has "
                    f"{' x '.join(map(str, _size(tensor)))}: row-wise Adagrad keeps one for each "
                    "row and column shard; resume with as many column shards, for example with the "
                    "run's plan.json as `plan`"
                )


def _size(tensor: torch.Tensor) -> torch.Size:
    """Returns the size of the whole tensor, also if it is sharded."""
    return tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.size()


def _load(
    state: State, path: Path, *, collective: bool, planner: DefaultLoadPlanner | None = None
) -> None:
    try:
        with quiet_torch(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, checkpoint_id=path, planner=planner, no_dist=not collective)
    except CheckpointException as error:
        raise broken(path, reason(error)) from error


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keeps torch from logging tracebacks of errors that it raises anyway."""
    logged = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logged)


def reason(error: CheckpointException | OSError) -> str:
    """Returns the reason of the error on the first rank that failed.

    Raises:
        KeyboardInterrupt: a rank was interrupted; torch treats an interrupt like any other error.
    """
    failures: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        if isinstance(failure, KeyboardInterrupt):
            raise KeyboardInterrupt from error
    if isinstance(failures[0], OSError) and failures[0].strerror:
        return failures[0].strerror.lower()
    if "inline_container" in str(failures[0]):  # torch drops the system's message
        return "a file was cut short"
    first, *_ = re.split(r"[.;] ", " ".join(str(failures[0]).split()))
    return first.rstrip(".") or type(failures[0]).__name__
