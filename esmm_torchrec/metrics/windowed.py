"""TorchRec's own metrics over a sliding window, to follow a model while it trains.

`metric_module` builds a `torchrec.metrics.metric_module.RecMetricModule` with normalised entropy,
AUC and calibration of three tasks: "ctr" over impressions, "cvr" over clicked impressions, "ctcvr"
over impressions. It takes what `model_output` makes of logits and labels, and is a RecMetricModule
like any other, in this library's trainer or in somebody's pipeline:

    metrics = metric_module(batch_size=4096, world_size=2, rank=rank, device=device)
    for batch in batches:
        …
        metrics.update(model_output(logits.click, logits.conversion, batch.click,
                                    batch.conversion, batch.weight))
        if metrics.should_compute():                    # every compute_interval_steps, all ranks
            figures = windowed_figures(metrics.compute())                   # on rank 0

These are running figures. TorchRec's AUC ranks float32 probabilities and orders ties by chance
(constant scores give 0 or 1 by the order of rows), and says 0.5 where a class is missing;
`metrics.ranking` gives the figure of record.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

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

CTR, CVR, CTCVR = "ctr", "cvr", "ctcvr"

WINDOW_SIZE = 500_000
"""Impressions, over all ranks. TorchRec's AUC gathers and sorts the window at each `compute`:
about 0.1 s on one core for this many."""


def tasks() -> list[RecTaskInfo]:
    """The three tasks, by the keys of `model_output`."""
    return [
        RecTaskInfo(CTR, label_name="click", prediction_name="pctr", weight_name="weight"),
        RecTaskInfo(CVR, label_name="ctcvr", prediction_name="pcvr", weight_name="click_weight"),
        RecTaskInfo(CTCVR, label_name="ctcvr", prediction_name="pctcvr", weight_name="weight"),
    ]


def metrics_config(
    *,
    window_size: int = WINDOW_SIZE,
    compute_interval_steps: int = 100,
    metrics: Iterable[RecMetricEnum] = (
        RecMetricEnum.NE,
        RecMetricEnum.AUC,
        RecMetricEnum.CALIBRATION,
    ),
) -> MetricsConfig:
    """TorchRec's configuration of the three tasks, to be used whole or changed by
    `dataclasses.replace`.

    The tasks are computed together (FUSED_TASKS_COMPUTATION), which halves the cost of an update:
    every task always has all rows of the batch, some with weight 0.

    Args:
        window_size: impressions over all ranks; of NE and calibration TorchRec keeps the last
            1000 batches of each rank at most.
        compute_interval_steps: updates between two `compute` calls, see
            `RecMetricModule.should_compute`.
        metrics: which of TorchRec's metrics. Grouped AUC is not among those that work here.
    """
    return MetricsConfig(
        rec_tasks=tasks(),
        rec_metrics={
            metric: RecMetricDef(rec_tasks=tasks(), window_size=window_size) for metric in metrics
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
    window_size: int = WINDOW_SIZE,
    compute_interval_steps: int = 100,
    process_group: dist.ProcessGroup | None = None,
) -> RecMetricModule:
    """The module that keeps the window. `compute` is a collective: all ranks call it at the same
    step, rank 0 gets the figures.

    Args:
        batch_size: impressions per rank in one update.
        world_size: number of ranks.
        rank: this rank.
        device: where logits and labels are.
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
        metrics_config(window_size=window_size, compute_interval_steps=compute_interval_steps),
        batch_size=batch_size,
        world_size=world_size,
        my_rank=rank,
        state_metrics_mapping={},
        device=device,
        process_group=process_group,
    )


@torch.no_grad()
def model_output(
    click_logit: torch.Tensor,
    conversion_logit: torch.Tensor,
    click: torch.Tensor,
    conversion: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What `RecMetricModule.update` needs to know of a batch. All (B,), on one device.

    TorchRec keeps these tensors for the length of the window; they are new ones, so that no
    batch is kept alive by them.

    Args:
        click_logit: logit of pCTR.
        conversion_logit: logit of pCVR.
        click: 0 or 1.
        conversion: 0 or 1.
        weight: weight of each impression, 0 for padding; None: all 1.

    Returns:
        float32 (B,): pctr, pcvr, pctcvr, click, ctcvr (click · conversion), weight, and
        click_weight (click · weight).
    """
    pctr, pcvr = click_logit.float().sigmoid(), conversion_logit.float().sigmoid()
    # `to(copy=True)`: labels and weights may be views of the batch's memory.
    click = click.to(torch.float32, copy=True)
    weight = torch.ones_like(click) if weight is None else weight.to(torch.float32, copy=True)
    return {
        "pctr": pctr,
        "pcvr": pcvr,
        "pctcvr": pctr * pcvr,
        "click": click,
        "ctcvr": click * conversion,
        "weight": weight,
        "click_weight": click * weight,
    }


def windowed_figures(computed: DeferrableMetrics | MetricsResult) -> dict[str, float]:
    """Figures of the window by the names of metrics.json: ctr_ne, cvr_auc, ctcvr_calibration, …

    Empty on ranks other than 0. A task without a positive in the window is left out, where its
    calibration says so: TorchRec then gives an AUC of 0.5, a calibration of 0 and an NE of
    anything.

    Args:
        computed: what `RecMetricModule.compute` gave.
    """
    result = computed.resolve() if isinstance(computed, DeferrableMetrics) else computed
    figures = {}
    for key, value in result.items():
        # TorchRec's keys read like "ne-ctr|window_ne".
        metric_and_task, _, name = key.partition("|")
        metric, _, task = metric_and_task.partition("-")
        if name == f"window_{metric}":
            figures[f"{task}_{metric}"] = float(value)
    untold = {
        key.partition("_")[0]
        for key, value in figures.items()
        if value == 0 and key.endswith("_calibration")
    }
    return {
        key: value
        for key, value in figures.items()
        if key.partition("_")[0] not in untold and math.isfinite(value)
    }
