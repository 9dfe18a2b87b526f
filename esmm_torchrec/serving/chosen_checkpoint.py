"""Chooses the checkpoint of a run to use, and describes it.

Without a step, this is the best checkpoint if validation chose one, else the last. The run may
still be training; its scores should not be mistaken for those of the finished run.
"""

from __future__ import annotations

import hashlib
import json

from esmm_torchrec.checkpoints.files import read_description, step_of
from esmm_torchrec.runs.run_folder import RunFolder


def chosen_step(run: RunFolder, step: int | None = None) -> int:
    """Returns the step of the requested checkpoint; without `step`, that of the model.

    Raises:
        RunError: the checkpoint does not exist.
    """
    return step_of(run.model_checkpoint(step))


def identity(run: RunFolder, step: int) -> str:
    """Returns a hash of the checksums of a checkpoint's files, which identifies its weights."""
    described = json.dumps(read_description(run.model_checkpoint(step)), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def is_finished(run: RunFolder) -> bool:
    """Whether the training has ended, which metrics.json marks."""
    return (run.path / "metrics.json").exists()


def described(run: RunFolder, step: int) -> str:
    """Returns a line that names the model for the terminal."""
    line = f"model: {run.path}, step {step}"
    return line if is_finished(run) else f"{line}, from an unfinished training"
