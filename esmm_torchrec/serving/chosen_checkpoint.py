"""Which checkpoint of a run is used, in numbers and in words.

Without a step it is the best one if validation chose one, else the last one. A run may still be
training: what it scores should not be taken for what the finished run would.
"""

from __future__ import annotations

import hashlib
import json

from esmm_torchrec.checkpoints.files import read_description, step_of
from esmm_torchrec.runs.run_folder import RunFolder


def chosen_step(run: RunFolder, step: int | None = None) -> int:
    """The step of the checkpoint asked for, or of the model.

    Raises:
        RunError: there is no such checkpoint.
    """
    return step_of(run.model_checkpoint(step))


def identity(run: RunFolder, step: int) -> str:
    """Stands for the weights of a checkpoint: a hash of the checksums of its files."""
    described = json.dumps(read_description(run.model_checkpoint(step)), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def is_finished(run: RunFolder) -> bool:
    """Whether the training came to its end, which metrics.json marks."""
    return (run.path / "metrics.json").exists()


def described(run: RunFolder, step: int) -> str:
    """A line for a person."""
    line = f"model: {run.path}, step {step}"
    return line if is_finished(run) else f"{line}, from an unfinished training"
