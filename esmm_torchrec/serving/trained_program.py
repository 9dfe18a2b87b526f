"""The program of a run's model, and what its checkpoint is loaded into."""

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
    """The model of a run."""

    program: Program
    task: TrainTask
    """The train task that the program was made of; its embedding collections are replaced."""
    step: int
    """Of the checkpoint."""


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
        step: of the checkpoint; None: that of the model.
        tables: a folder for files in which the tables are kept instead of in memory, one per table;
            they may go once the program is no longer used.
        calibrated: whether the program calibrates its scores as 'calibrate' fitted it.

    Raises:
        RunError: the run has no such checkpoint, has no calibration of it, or lacks the description
            of its data.
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
    """Lets every table be a mapped file, which the system writes to disk where memory is short."""
    collections = [one for one in task.modules() if isinstance(one, EmbeddingBagCollection)]
    for number, collection in enumerate(collections):
        for config in collection.embedding_bag_configs():
            size = config.num_embeddings * config.embedding_dim
            path = folder / f"{number}-{len(list(folder.iterdir()))}"
            weight = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
            bag = collection.embedding_bags[config.name]
            shaped = weight.view(config.num_embeddings, config.embedding_dim)
            bag.register_parameter("weight", nn.Parameter(shaped))
