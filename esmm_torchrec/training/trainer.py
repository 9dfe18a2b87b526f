"""A train task on its ranks: plan, sharded model, optimiser, and TorchRec's train pipeline."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from esmm_torchrec.data.reader import ImpressionReader, SharedFeatures
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.plan_file import PlanFile, embedding_tables, read_plan
from esmm_torchrec.sharding.planner import (
    Workload,
    check_shared_features,
    choose_kernel,
    make_plan,
)
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.optimizers import build_optimizer, fuse_optimizer
from esmm_torchrec.training.options import TrainOptions


class Trainer:
    """Shards a train task and trains it.

    Args:
        task: as `models.methods.build_train_task` builds it, tables on the meta device.
        options: of the run.
        ranks: this process among the others.
        workload: what the planner should expect.
        has_shared_features: whether the data stores features once for many impressions.

    Raises:
        PlanError: what the options ask for does not exist or does not fit.
    """

    def __init__(
        self,
        task: nn.Module,
        *,
        options: TrainOptions,
        ranks: Ranks,
        workload: Workload,
        has_shared_features: bool,
    ) -> None:
        optimizer = options.sparse_optimizer
        tables = embedding_tables(task)
        given = None if options.plan is None else read_plan(options.plan)
        if given is None:
            kernel = choose_kernel(optimizer, sharding=options.sharding, device=ranks.device)
            kernels = dict.fromkeys(tables, str(kernel))
        else:
            kernel = "fused"
            kernels = {name: table.compute_kernel for name, table in given.tables.items()}
        self.shared_features: SharedFeatures = "expanded" if "dense" in kernels.values() else "once"
        if options.shared_features != "auto":
            self.shared_features = options.shared_features
        check_shared_features(
            kernels.values(),
            shared_features_once=has_shared_features and self.shared_features == "once",
        )
        if given is not None:
            plan = given.to_sharding_plan(
                task,
                world_size=ranks.world_size,
                local_world_size=ranks.local_world_size,
                device=ranks.device.type,
            )
        fuse_optimizer(task, optimizer, lr=options.sparse_lr, kernels=kernels, device=ranks.device)
        if given is None:
            plan = make_plan(
                task, ranks=ranks, sharding=options.sharding, kernel=kernel, workload=workload
            )
        self.plan = given or PlanFile.from_sharding_plan(
            plan,
            tables.values(),
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            device=ranks.device.type,
        )
        self.model = shard(task, plan=plan, ranks=ranks, seed=options.seed)
        self.optimizer = build_optimizer(
            self.model, optimizer, sparse_lr=options.sparse_lr, dense_lr=options.dense_lr
        )
        self._device = ranks.device

    def steps(self, reader: ImpressionReader, num_steps: int) -> Iterator[TrainOutput]:
        """Trains for at most the rest of the reader's epoch, a step at a time, and moves the
        reader's position with each."""
        self.model.train()
        pipeline = TrainPipelineSparseDist(self.model, self.optimizer, self._device)
        stream = iter(reader)
        try:
            for _ in range(num_steps):
                output = pipeline.progress(stream)
                reader.advance()
                yield output
        finally:
            pipeline.detach()
