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
    """Writes the state after `step` steps; every rank must call it.

    Raises:
        RunError: it cannot be written; the folder is as it was.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    partial = final.with_name(final.name + ".partial")
    if ranks.is_first:
        for stale in (partial, final):
            shutil.rmtree(stale, ignore_errors=True)
    ranks.barrier()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    try:
        save(state, checkpoint_id=partial)
    except CheckpointException as error:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        raise RunError(
            f"checkpoint {final} cannot be written ({_reason(error)}; {free / 1e6:,.0f} MB are "
            "free on its disk); make room and give the same command again"
        ) from error
    if ranks.is_first:
        (partial / _PROGRESS).write_text(json.dumps({"step": step} | progress))
        partial.rename(final)
    ranks.barrier()


def load_checkpoint(
    path: Path, *, model: DistributedModelParallel, optimizer: KeyedOptimizer
) -> dict[str, Any]:
    """Loads a checkpoint into a sharded model and its optimiser, and gives back its progress.

    Raises:
        RunError: it cannot be read, or is of another model.
    """
    progress = _read_progress(path)
    _init_state(optimizer)
    state: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    _load(state, path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return progress


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
        _ = progress["step"], progress["seconds"], progress["reader"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _broken(path, f"{_PROGRESS}: {error}") from error
    return progress


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


def _reason(error: CheckpointException) -> str:
    """What went wrong on the first rank where something did.

    Raises:
        KeyboardInterrupt: that was it; torch takes it for an error like any other.
    """
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


def _init_state(optimizer: KeyedOptimizer) -> None:
    """Makes the state of torch's optimisers, which exists only after a step: dcp would silently
    skip what is not there."""
    assert isinstance(optimizer, CombinedOptimizer)
    for name, part in optimizer.optimizers:
        if name:
            part.init_state()
