"""Loads the model of a run as a program."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.checkpoints.files import step_of
from esmm_torchrec.checkpoints.state import load_model
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.models.esmm import TrainTask
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.serving.program import Program
from esmm_torchrec.serving.scoring import check_preprocessing


class TrainedProgram(NamedTuple):
    """The model of a run as a program."""

    program: Program
    task: TrainTask
    """Train task from which the program was built; its embedding collections are replaced."""
    step: int
    """Step of the checkpoint."""


def trained_program(
    run: RunFolder,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    tables: Path | None = None,
    calibrated: bool = False,
) -> TrainedProgram:
    """Loads the model of a run in this process, unsharded.

    Args:
        step: step of the checkpoint; None: that of the model.
        tables: folder for files that store the tables instead of memory, one per table; they may
            be deleted once the program is no longer used.
        calibrated: whether the program applies the calibration that 'calibrate' fitted.

    Raises:
        RunError: the run lacks the checkpoint, a calibration of it, or the description of its
            data.
    """
    check_preprocessing(run)
    checkpoint = run.model_checkpoint(step)
    step = step_of(checkpoint)
    calibration = run.calibration(step) if calibrated else None
    task = build_train_task(
        run.schema, run.model_options, embedding_device="cpu" if tables is None else "meta"
    )
    if tables is not None:
        _keep_in_files(task, tables)
    load_model(checkpoint, task)
    described = PreparedDataSet.open(run.preprocessing, data_files=False)
    program = Program(
        task.model,
        run.schema,
        described.statistics.dense,
        normalise=run.history_weights == "normalised",
        calibration=calibration,
    )
    program.to(device)
    return TrainedProgram(program, task, step)


def _keep_in_files(task: nn.Module, folder: Path) -> None:
    """Replaces every table by a mapped file, which the system writes to disk if memory is short."""
    collections = [one for one in task.modules() if isinstance(one, EmbeddingBagCollection)]
    for number, collection in enumerate(collections):
        for config in collection.embedding_bag_configs():
            size = config.num_embeddings * config.embedding_dim
            path = folder / f"{number}-{len(list(folder.iterdir()))}"
            weight = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
            bag = collection.embedding_bags[config.name]
            shaped = weight.view(config.num_embeddings, config.embedding_dim)
            bag.register_parameter("weight", nn.Parameter(shaped))
