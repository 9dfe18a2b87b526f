"""Restores a trained model from its run folder on any number of ranks."""

from __future__ import annotations

from torchrec.distributed.model_parallel import DistributedModelParallel

from esmm_torchrec.checkpoints.state import load_model
from esmm_torchrec.choices import checks_choices
from esmm_torchrec.models.methods import build_train_task
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.planner import ShardingOption, Workload, make_plan
from esmm_torchrec.sharding.process_group import Ranks


@checks_choices
def restore(
    run: RunFolder,
    ranks: Ranks,
    *,
    batch_size: int,
    sharding: ShardingOption = "auto",
    step: int | None = None,
) -> DistributedModelParallel:
    """Restores the train task of a run with its trained weights, sharded for these ranks; every
    rank must call it.

    Args:
        run: folder of the run.
        ranks: this process among the others; their number may differ from that in training.
        batch_size: impressions per rank and step, for the planner.
        sharding: sharding type of the tables; "auto" leaves the choice to TorchRec's planner.
        step: step of the checkpoint; None: the best one if validation chose one, else the last one.

    Returns:
        the sharded task, ready for `predict` or `score_split`.

    Raises:
        RunError: the run has no checkpoint, or none of this step, or the checkpoint is broken.
        PlanError: the tables do not fit.
    """
    checkpoint = run.model_checkpoint(step)
    task = build_train_task(run.schema, run.model_options)
    plan = make_plan(
        task,
        ranks=ranks,
        sharding=sharding,
        kernel="dense" if sharding == "data_parallel" else "fused",
        workload=Workload(batch_size, run.config["mean_values_per_bag"]),
    )
    model = shard(task, plan=plan, ranks=ranks)
    load_model(checkpoint, model)
    return model
