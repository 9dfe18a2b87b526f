"""What the windowed metrics take of a training step."""

from __future__ import annotations

import torch

from esmm_torchrec.metrics.windowed import model_output
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.models.scores import probabilities, read_scores
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.tasks import DEFAULT_TASKS, TaskChain


def windowed_output(
    output: TrainOutput, tasks: TaskChain = DEFAULT_TASKS
) -> dict[str, torch.Tensor]:
    """What TorchRec's windowed metrics take of a training step; see `known_tasks`."""
    labels = output.labels
    known = probabilities(output.logits, tasks)
    return model_output(known, labels, labels.get("weight"), tasks=tasks)


def known_tasks(logits: Logits, tasks: TaskChain = DEFAULT_TASKS) -> frozenset[str]:
    """Names of the probabilities that a model's logits give."""
    return frozenset(read_scores(logits, tasks))
