"""Checkpoints of a sharded model and its optimiser, written by all ranks, read by any number.

    checkpoints/step-00001234/     torch.distributed.checkpoint's files, and
        progress.json              the step and the reader's position

A checkpoint is written beside its final name and renamed last, so that whatever is found is whole.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from esmm_torchrec.errors import RunError
from esmm_torchrec.sharding.process_group import Ranks

_PREFIX = "step-"
_PROGRESS = "progress.json"


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Step → whole checkpoint, ascending."""
    found = {
        int(path.name.removeprefix(_PREFIX)): path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit()
    }
    return dict(sorted(found.items()))


def find_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """The checkpoint of a step, or the last one; None where there is none at all.

    Raises:
        RunError: there is none of the step asked for.
    """
    found = checkpoint_folders(folder)
    if step is not None and step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise RunError(f"{folder} has no checkpoint of step {step}; there is: {there}")
    if not found:
        return None
    return found[max(found) if step is None else step]


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint was written after."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    progress: dict[str, Any],
    ranks: Ranks,
    rank_state: Mapping[str, Any] | None = None,
) -> None:
    """Writes the state after `step` steps; every rank must call it.

    A checkpoint of the same step is replaced when the new one is whole, not before.

    Args:
        folder: of all checkpoints; made where it is not there.
        step: number of steps done.
        model: sharded.
        optimizer: of the model.
        progress: "reader" and "seconds", for whoever goes on.
        ranks: this process among the others.
        rank_state: what only this rank knows.

    Raises:
        RunError: it cannot be written; the checkpoints are as they were.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = final.with_name(f"{final.name}.partial")
    if ranks.is_first:
        for ending in ("partial", "removed"):
            for left in folder.glob(f"{_PREFIX}*.{ending}"):
                shutil.rmtree(left, ignore_errors=True)
    ranks.barrier()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def finish() -> None:
        (partial / _PROGRESS).write_text(
            json.dumps({"step": step, "num_ranks": ranks.world_size} | progress)
        )
        _remove(final)
        partial.rename(final)

    try:
        save(state, checkpoint_id=partial)
        if rank_state is not None:
            torch.save(dict(rank_state), partial / f"rank-{ranks.rank:05d}.pt")
        ranks.barrier()
        ranks.from_first(finish)
    except (CheckpointException, OSError) as error:
        reason = _reason(error)
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise RunError(
            f"checkpoint {final} cannot be written ({reason}; "
            f"{shutil.disk_usage(there).free / 1e6:,.0f} MB are free on its disk); make room and "
            "give the same command again"
        ) from error


def load_checkpoint(
    path: Path, *, model: DistributedModelParallel, optimizer: CombinedOptimizer
) -> dict[str, Any]:
    """Loads a checkpoint into a sharded model and its optimiser; every rank must call it.

    Placement, kernels and number of ranks may be others than when it was written.

    Args:
        path: of the checkpoint.
        model: sharded, its weights are overwritten.
        optimizer: of the model; its state and its count of steps are overwritten.

    Returns:
        what `save_checkpoint` was given as progress, with "step".

    Raises:
        RunError: it cannot be read, is of another model, or keeps the optimiser's state of a table
            in a form that goes with another placement.
    """
    progress = _read_progress(path)
    optimizer.init_state()  # dcp skips what is not there
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    _check_forms(state, path)
    _load(state, path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    # fbgemm's Adam corrects its bias by a count of its own, which is no part of its state.
    optimizer.set_optimizer_step(progress["step"])
    return progress


def remove_later(folder: Path, step: int) -> None:
    """Removes the checkpoints of steps beyond `step`; on rank 0 alone."""
    for later, path in checkpoint_folders(folder).items():
        if later > step:
            _remove(path)


def remove_checkpoint(folder: Path, step: int) -> None:
    """Removes the checkpoint of a step; on rank 0 alone."""
    _remove(checkpoint_folders(folder)[step])


def load_model(path: Path, model: nn.Module) -> None:
    """Loads the weights alone, into a sharded model or a plain one.

    Raises:
        RunError: they cannot be read, or are of another model.
    """
    state = {"model": model.state_dict()}
    _load(state, path)
    model.load_state_dict(state["model"])


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        progress = json.loads((path / _PROGRESS).read_text())
        _ = progress["step"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _broken(path, f"{_PROGRESS}: {error}") from error
    return progress


def _check_forms(state: dict[str, Any], path: Path) -> None:
    """Makes sure that all of an optimiser's state is there in the size it has here, which column
    shards may change; the same outcome on every rank.

    Raises:
        RunError: it is not; names the first table.
    """
    try:
        there = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception:  # whatever unpickling makes of a broken file
        return  # `_load` will say so
    wrong = []
    for key, tensors in state["optimizer"]["state"].items():
        for name, tensor in tensors.items():
            entry = there.get(f"optimizer.state.{key}.{name}")
            weight = there.get(f"model.{key}")
            if not isinstance(entry, TensorStorageMetadata):
                continue
            if not isinstance(weight, TensorStorageMetadata):
                continue
            same_model = key in state["model"] and weight.size == _size(state["model"][key])
            if same_model and entry.size != _size(tensor):
                wrong.append((key, name, tuple(entry.size), tuple(_size(tensor))))
    if dist.is_initialized():
        of_ranks: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, wrong)
        wrong = sorted({entry for of_rank in of_ranks for entry in of_rank})
    for key, name, size, here in wrong:
        table = key.removesuffix(".weight").rpartition(".")[2]
        raise RunError(
            f"checkpoint {path} keeps the optimiser's state {name!r} of table {table!r} as "
            f"{' x '.join(map(str, size))} values where this placement has "
            f"{' x '.join(map(str, here))}: row-wise Adagrad keeps one for each row and column "
            "shard; go on with as many column shards, such as by the run's plan.json as --plan"
        )


def _size(tensor: torch.Tensor) -> torch.Size:
    """Of the whole tensor."""
    return tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.size()


def _load(state: dict[str, Any], path: Path) -> None:
    logged = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch logs tracebacks of what it then raises
    try:
        load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise _broken(path, _reason(error)) from error
    finally:
        logging.disable(logged)


def _broken(path: Path, reason: str) -> RunError:
    return RunError(
        f"checkpoint {path} is broken or of another model ({reason}); remove it and go on from an "
        "earlier one, or train again"
    )


def _reason(error: CheckpointException | OSError) -> str:
    """What went wrong on the first rank where something did.

    Raises:
        KeyboardInterrupt: that was it; torch takes it for an error like any other.
    """
    failures: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
    for failure in failures:
        if isinstance(failure, KeyboardInterrupt):
            raise KeyboardInterrupt from error
    if isinstance(failures[0], OSError) and failures[0].strerror:
        return failures[0].strerror.lower()
    if "inline_container" in str(failures[0]):  # where torch forgets what the system said
        return "a file was cut short"
    first, *_ = re.split(r"[.;] ", " ".join(str(failures[0]).split()))
    return first.rstrip(".") or type(failures[0]).__name__


def _remove(path: Path) -> None:
    """Removes a checkpoint, if it is there, so that no part of it is ever taken for a whole one."""
    if path.exists():
        removed = path.rename(path.with_name(f"{path.name}.removed"))
        shutil.rmtree(removed)
