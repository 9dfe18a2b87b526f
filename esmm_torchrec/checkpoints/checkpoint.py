"""Checkpoints of a sharded model and its optimiser, written by all ranks, read by any number.

    checkpoints/step-00001234/     torch.distributed.checkpoint's files, and
        progress.json              the step and the reader's position

A checkpoint is written beside its final name and renamed last, so that whatever is found is whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

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


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    progress: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Writes the state after `step` steps; every rank must call it."""
    final = folder / f"{_PREFIX}{step:08d}"
    partial = final.with_name(final.name + ".partial")
    if ranks.is_first:
        for stale in (partial, final):
            shutil.rmtree(stale, ignore_errors=True)
    ranks.barrier()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save(state, checkpoint_id=partial)
    if ranks.is_first:
        (partial / _PROGRESS).write_text(json.dumps({"step": step} | progress))
        partial.rename(final)
    ranks.barrier()


def load_checkpoint(
    path: Path, *, model: DistributedModelParallel, optimizer: KeyedOptimizer
) -> dict[str, Any]:
    """Loads a checkpoint into a sharded model and its optimiser, and gives back its progress."""
    _init_state(optimizer)
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    _load(state, path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return json.loads((path / _PROGRESS).read_text())


def load_model(path: Path, model: nn.Module) -> None:
    """Loads the weights alone, into a sharded model or a plain one."""
    state = {"model": model.state_dict()}
    _load(state, path)
    model.load_state_dict(state["model"])


def _load(state: dict[str, Any], path: Path) -> None:
    try:
        load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise RunError(
            f"checkpoint {path} is broken or of another model ({reason}); "
            "remove it and go on from an earlier one"
        ) from error


def _init_state(optimizer: KeyedOptimizer) -> None:
    """Makes the state of torch's optimisers, which exists only after a step: dcp would silently
    skip what is not there."""
    assert isinstance(optimizer, CombinedOptimizer)
    for name, part in optimizer.optimizers:
        if name:
            part.init_state()
