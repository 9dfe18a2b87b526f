"""Trainer of a train task: plan, sharded model, optimiser, and TorchRec's train pipeline."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.data.batch_reader import BatchReader
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.schema import UNKNOWN_ROW
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.plan_file import PlanFile, embedding_tables
from esmm_torchrec.sharding.plan_json import read_plan
from esmm_torchrec.sharding.planner import (
    Workload,
    choose_kernel,
    make_plan,
)
from esmm_torchrec.sharding.process_group import Ranks
from esmm_torchrec.training.optimizers import build_optimizer, fuse_optimizer
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.table_kernels import (
    ConstantBagWeights,
    UpdatesOnThreads,
    group_tables,
)


class Trainer:
    """Shards a train task and trains it.

    Args:
        task: result of `models.methods.build_train_task`, with tables on the meta device.
        workload: expected size of a batch, for the planner.

    Raises:
        PlanError: the sharding of the options does not exist or does not fit.
    """

    def __init__(
        self,
        task: nn.Module,
        *,
        options: TrainOptions,
        ranks: Ranks,
        workload: Workload,
    ) -> None:
        self.objective = options.parts.objective
        """Objective of the training."""
        optimizer = options.sparse_optimizer
        fuse = partial(fuse_optimizer, task, optimizer, lr=options.sparse_lr, device=ranks.device)
        if options.plan is None:
            kernel = choose_kernel(optimizer, sharding=options.sharding, device=ranks.device)
            fuse(kernels=dict.fromkeys(embedding_tables(task), str(kernel)))
            plan = make_plan(
                task, ranks=ranks, sharding=options.sharding, kernel=kernel, workload=workload
            )
            self.plan = PlanFile.from_sharding_plan(
                plan,
                embedding_tables(task).values(),
                world_size=ranks.world_size,
                local_world_size=ranks.local_world_size,
                device=ranks.device.type,
            )
        else:
            self.plan = read_plan(options.plan)
            plan = self.plan.to_sharding_plan(
                task,
                world_size=ranks.world_size,
                local_world_size=ranks.local_world_size,
                device=ranks.device.type,
            )
            tables = self.plan.tables.items()
            fuse(kernels={name: table.compute_kernel for name, table in tables})
        update_threads = torch.get_num_threads() if ranks.device.type == "cpu" else 1
        group_tables(task, update_threads, workload=workload)
        self.model = shard(task, plan=plan, ranks=ranks, seed=options.seed, zero_row=UNKNOWN_ROW)
        self._bag_weights = ConstantBagWeights(self.model)
        if update_threads > 1:
            UpdatesOnThreads(self.model, update_threads)
        self.optimizer = build_optimizer(
            self.model,
            optimizer,
            sparse_lr=options.sparse_lr,
            dense_lr=options.dense_lr,
            weight_decay=options.weight_decay,
            clip_gradients=options.clip_gradients,
        )
        self._device = ranks.device
        self._pipeline = (
            _FiniteStepsPipeline if options.on_nonfinite == "skip" else TrainPipelineSparseDist
        )

    def steps(self, reader: BatchReader, num_steps: int) -> Generator[TrainOutput, None, None]:
        """Trains for `num_steps`, at most the rest of the reader's epoch, one step per `next`, and
        advances the reader's position after each step. Close the generator to stop early; the model
        cannot be called until the generator has ended."""
        self.model.train()
        pipeline = self._pipeline(self.model, self.optimizer, self._device)
        stream = iter(reader)
        for _ in range(num_steps):
            output = pipeline.progress(stream)
            self._bag_weights.check()
            reader.advance()
            try:
                yield output
            except GeneratorExit:
                pipeline.detach()
                raise
        # Not after an error: within a step, `detach` fails and hides the cause.
        pipeline.detach()


class _FiniteStepsPipeline(TrainPipelineSparseDist[ImpressionBatch, TrainOutput]):
    """Skips the backward pass and the update of a step if the loss of any rank is not finite. The
    fused kernels update tables in the backward pass, so the loss is checked before it."""

    _finite = True

    def _backward(self, losses: torch.Tensor) -> None:
        finite = losses.detach().sum().isfinite().float()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        self._finite = bool(finite)
        if self._finite:
            super()._backward(losses)

    def _optimizer_step(self) -> None:
        if self._finite:
            super()._optimizer_step()
