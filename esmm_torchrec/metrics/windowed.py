"""TorchRec's metrics over a sliding window, for monitoring a model during training.

`metric_module` builds a `torchrec.metrics.metric_module.RecMetricModule` with normalised entropy,
AUC and calibration of every probability of a chain of tasks: by default "ctr" over impressions,
"cvr" over clicked impressions, "ctcvr" over impressions. Its input is the result of `model_output`
for probabilities and labels. It is an ordinary RecMetricModule, usable in this library's trainer
and in any other pipeline:

    metrics = metric_module(batch_size=4096, world_size=2, rank=rank, device=device)
    for batch in batches:
        …
        metrics.update(model_output(probabilities(logits), batch.labels, batch.weight))
        if metrics.should_compute():                    # every compute_interval_steps, all ranks
            figures = windowed_figures(metrics.compute())                   # on rank 0

where `esmm_torchrec.models.scores.probabilities` computes the probabilities from a model's logits.

These figures are for monitoring. TorchRec's AUC ranks float32 probabilities and orders ties
arbitrarily (for constant scores, it is 0 or 1 depending on the order of rows), and is 0.5 if a
class is missing; `metrics.ranking` computes the figure of record.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torchrec.metrics.deferrable_metrics import DeferrableMetrics
from torchrec.metrics.metric_module import MetricsResult, RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import (
    MetricsConfig,
    RecComputeMode,
    RecMetricDef,
    RecMetricEnum,
    RecTaskInfo,
)

from esmm_torchrec.errors import OptionError
from esmm_torchrec.tasks import DEFAULT_TASKS, Task, TaskChain

WINDOW_SIZE = 500_000
"""Number of impressions in the window, over all ranks. TorchRec's AUC gathers and sorts the window
at each `compute`, which takes about 0.1 s on one core for this size."""


def _label(task: Task) -> str:
    """Returns the name of the label for the task and all tasks before it."""
    return f"{task.name}_label"


def _weight(given: Task | None) -> str:
    """Returns the name of the weight, which is 0 for impressions without the task `given`."""
    return "weight" if given is None else f"{given.name}_weight"


def metrics_config(
    *,
    tasks: TaskChain = DEFAULT_TASKS,
    window_size: int = WINDOW_SIZE,
    compute_interval_steps: int = 100,
    metrics: Iterable[RecMetricEnum] = (
        RecMetricEnum.NE,
        RecMetricEnum.AUC,
        RecMetricEnum.CALIBRATION,
    ),
) -> MetricsConfig:
    """Builds TorchRec's configuration; `dataclasses.replace` can change it.

    The probabilities are measured together (FUSED_TASKS_COMPUTATION), which halves the cost of an
    update: each uses all rows of the batch, some with weight 0.

    Args:
        tasks: the chain.
        window_size: impressions over all ranks; for NE and calibration, TorchRec keeps at most the
            last 1000 batches of each rank.
        compute_interval_steps: updates between two `compute` calls, see
            `RecMetricModule.should_compute`.
        metrics: TorchRec's metrics to compute. Grouped AUC is not supported.
    """
    rec_tasks = [
        RecTaskInfo(
            name, label_name=_label(task), prediction_name=column, weight_name=_weight(given)
        )
        for name, column, task, given in tasks.probabilities
    ]
    return MetricsConfig(
        rec_tasks=rec_tasks,
        rec_metrics={
            metric: RecMetricDef(rec_tasks=rec_tasks, window_size=window_size) for metric in metrics
        },
        rec_compute_mode=RecComputeMode.FUSED_TASKS_COMPUTATION,
        compute_interval_steps=compute_interval_steps,
    )


def metric_module(
    *,
    batch_size: int,
    world_size: int,
    rank: int,
    device: torch.device,
    tasks: TaskChain = DEFAULT_TASKS,
    window_size: int = WINDOW_SIZE,
    compute_interval_steps: int = 100,
    process_group: dist.ProcessGroup | None = None,
) -> RecMetricModule:
    """Builds the module that keeps the window. `compute` is a collective: all ranks call it at the
    same step, and rank 0 gets the figures.

    Args:
        batch_size: impressions per rank in one update.
        world_size: number of ranks.
        rank: this rank.
        device: device of probabilities and labels.
        tasks: the chain.
        window_size: impressions over all ranks.
        compute_interval_steps: updates between two `compute` calls.
        process_group: ranks that share the figures; None: all.

    Raises:
        OptionError: the window is smaller than one batch of every rank.
    """
    if window_size < batch_size * world_size:
        raise OptionError(
            f"window_size {window_size} is smaller than one step of {world_size} ranks of "
            f"batch_size {batch_size}; take at least {batch_size * world_size}"
        )
    return generate_metric_module(
        RecMetricModule,
        metrics_config(
            tasks=tasks, window_size=window_size, compute_interval_steps=compute_interval_steps
        ),
        batch_size=batch_size,
        world_size=world_size,
        my_rank=rank,
        state_metrics_mapping={},
        device=device,
        process_group=process_group,
    )


@torch.no_grad()
def model_output(
    probabilities: Mapping[str, torch.Tensor],
    labels: Mapping[str, torch.Tensor],
    weight: torch.Tensor | None = None,
    *,
    tasks: TaskChain = DEFAULT_TASKS,
) -> dict[str, torch.Tensor]:
    """Returns the input of `RecMetricModule.update` for a batch. All are (B,), on one device.

    TorchRec keeps these tensors for the length of the window. Labels and weights are copied, so
    that they keep no batch alive.

    Args:
        probabilities: `TaskProbability.name` → probability, see `models.scores.probabilities`. A
            missing one is replaced by 0: leave its figures out, see `windowed_figures`.
        labels: label → 0 or 1.
        weight: weight of each impression, 0 for padding; None: all 1.
        tasks: the chain.

    Returns:
        float32 (B,) by the names in `metrics_config`; for the default chain: pctr, pcvr, pctcvr,
        click_label, conversion_label (click · conversion), weight and click_weight (click ·
        weight).
    """
    # `to(copy=True)`: labels and weights may be views of the batch's memory.
    copies = {label: labels[label].to(torch.float32, copy=True) for label in tasks.labels}
    if weight is None:
        weight = torch.ones_like(copies[tasks.labels[0]])
    weight = weight.to(torch.float32, copy=True)
    output = {_weight(None): weight}
    happened = tasks.happened(copies)
    for task in tasks:
        output[_label(task)] = happened[task.name]
    for _, before in tasks.links:
        output[_weight(before)] = happened[before.name] * weight
    for name, column, *_ in tasks.probabilities:
        probability = probabilities.get(name)
        output[column] = (
            torch.zeros_like(weight) if probability is None else probability.detach().float()
        )
    return output


def windowed_figures(
    computed: DeferrableMetrics | MetricsResult, known: Iterable[str] | None = None
) -> dict[str, float]:
    """Returns figures of the window by metrics.json's names: ctr_ne, cvr_auc, ctcvr_calibration, …

    Empty on ranks other than 0. A probability without positives in the window is left out, which
    its calibration shows: TorchRec then returns an AUC of 0.5, a calibration of 0 and an arbitrary
    NE.

    Args:
        computed: result of `RecMetricModule.compute`.
        known: names of the probabilities that the model has; None: all.
    """
    result = computed.resolve() if isinstance(computed, DeferrableMetrics) else computed
    figures: dict[str, dict[str, float]] = {}
    for key, value in result.items():
        # TorchRec's keys read like "ne-ctr|window_ne".
        metric_and_name, _, window = key.partition("|")
        metric, _, name = metric_and_name.partition("-")
        if window == f"window_{metric}":
            figures.setdefault(name, {})[metric] = float(value)
    wanted = figures if known is None else set(known)
    return {
        f"{name}_{metric}": value
        for name, of_name in figures.items()
        if name in wanted and of_name.get("calibration") != 0
        for metric, value in of_name.items()
        if math.isfinite(value)
    }
