"""Running figures of a training: the mean loss, and TorchRec's metrics over a window.

Updating TorchRec's metrics in each step would take a large part of the step's time. Here, a step
only stores its logits and labels; `compute` then computes the probabilities and metrics of the
whole window at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from esmm_torchrec.metrics.windowed import metric_module, model_output, windowed_figures
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.models.scores import probabilities
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.tasks import TaskChain


class _Step(NamedTuple):
    """Inputs of the metrics from one step on this rank, each (B,)."""

    logits: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]


class RunningFigures:
    """Computes the mean loss since its last computation, and the normalised entropy, AUC and
    calibration of a window of impressions from the last steps.

    Args:
        window_size: number of impressions in the window over all ranks; it has at least one step.
    """

    def __init__(self, ranks: Ranks, tasks: TaskChain, *, window_size: int) -> None:
        self._ranks = ranks
        self._chain = tasks
        self._rows = max(1, window_size // ranks.world_size)
        self._window: deque[_Step] = deque()
        self._losses: list[torch.Tensor] = []
        self._earlier_losses: list[float] = []

    def add(self, output: TrainOutput) -> None:
        """Adds the outputs of a step on this rank."""
        self._losses.append(output.loss)
        # Labels may be views, which would keep the memory of the whole batch alive.
        labels = {name: value.clone() for name, value in output.labels.items()}
        self._window.append(_Step(dict(output.logits.items()), labels))
        self._trim()

    def compute(self) -> dict[str, float]:
        """Computes the figures, named as in metrics.json, and "loss"; to be called on every rank.

        Figures that are not finite are left out, so that the result is valid JSON.

        Returns:
            the figures on rank 0, an empty dictionary on the others.
        """
        losses = self._global_losses()
        self._earlier_losses.clear()
        figures = self._metrics()
        if not self._ranks.is_first:
            return {}
        finite = [loss for loss in losses if math.isfinite(loss)]
        return ({"loss": math.fsum(finite) / len(finite)} if finite else {}) | figures

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's losses and window, on the CPU; to be called on every rank."""
        return {
            "losses": self._global_losses(),
            "window": [
                {
                    part: {name: value.cpu() for name, value in values.items()}
                    for part, values in step._asdict().items()
                }
                for step in self._window
            ],
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restores the states of all ranks of an earlier training, whose number may differ."""
        self._earlier_losses = list(states[0]["losses"])
        rank, world_size = self._ranks.rank, self._ranks.world_size
        own, rows = states, slice(rank, None, world_size)
        if len(states) == world_size:  # bitwise the sums of an uninterrupted training
            own, rows = states[rank : rank + 1], slice(None)

        def joined(steps: Sequence[Mapping[str, Any]], part: str) -> dict[str, torch.Tensor]:
            return {
                name: torch.cat([step[part][name] for step in steps])[rows].to(self._ranks.device)
                for name in steps[0][part]
            }

        self._window = deque(
            _Step(joined(steps, "logits"), joined(steps, "labels"))
            for steps in zip(*(state["window"] for state in own), strict=True)
        )

    def _trim(self) -> None:
        rows = sum(map(_rows, self._window))
        while rows > self._rows and len(self._window) > 1:
            rows -= _rows(self._window.popleft())

    def _global_losses(self) -> list[float]:
        """Returns the loss of each step since the last computation, as a mean over ranks."""
        if self._losses:
            losses = torch.stack(self._losses)
            dist.all_reduce(losses)
            self._earlier_losses += (losses / self._ranks.world_size).tolist()
            self._losses.clear()
        return list(self._earlier_losses)

    def _metrics(self) -> dict[str, float]:
        logits, labels = (
            {name: torch.cat([step[part][name] for step in self._window]) for name in values}
            for part, values in enumerate(self._window[-1])
        )
        known = probabilities(Logits(logits), self._chain)
        window = model_output(known, labels, labels.get("weight"), tasks=self._chain)
        # Skipped steps have no finite outputs.
        finite = torch.stack(list(window.values())).isfinite().all(dim=0)
        window = {name: torch.where(finite, value, 0.0) for name, value in window.items()}
        size = len(finite)
        module = metric_module(
            batch_size=size,
            world_size=self._ranks.world_size,
            rank=self._ranks.rank,
            device=self._ranks.device,
            tasks=self._chain,
            window_size=size * self._ranks.world_size,
        )
        module.update(window)
        return windowed_figures(module.compute(), known)


def _rows(step: _Step) -> int:
    return len(next(iter(step.labels.values())))
