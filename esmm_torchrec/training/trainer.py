"""A train task on its ranks: plan, sharded model, optimiser, and TorchRec's train pipeline."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from esmm_torchrec.data.reader import ImpressionReader
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


class Trainer:
    """Shards a train task and trains it.

    Args:
        task: as `models.methods.build_train_task` builds it, tables on the meta device.
        options: of the run.
        ranks: this process among the others.
        workload: what the planner should expect.

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
    ) -> None:
        optimizer = options.sparse_optimizer
        if options.plan is None:
            kernel = choose_kernel(optimizer, sharding=options.sharding, device=ranks.device)
            kernels = dict.fromkeys(embedding_tables(task), str(kernel))
            fuse_optimizer(
                task,
                optimizer,
                lr=options.sparse_lr,
                kernels=kernels,
                device=ranks.device,
            )
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
            kernels = {name: table.compute_kernel for name, table in self.plan.tables.items()}
            fuse_optimizer(
                task,
                optimizer,
                lr=options.sparse_lr,
                kernels=kernels,
                device=ranks.device,
            )
        self.model = shard(task, plan=plan, ranks=ranks, seed=options.seed, zero_row=UNKNOWN_ROW)
        _take_weights_as_data(self.model)
        self.optimizer = build_optimizer(
            self.model,
            optimizer,
            sparse_lr=options.sparse_lr,
            dense_lr=options.dense_lr,
            weight_decay=options.weight_decay,
        )
        self._device = ranks.device

    def steps(self, reader: ImpressionReader, num_steps: int) -> Generator[TrainOutput, None, None]:
        """Trains for at most the rest of the reader's epoch, one step at a time, and advances the
        reader's position with each. Close the generator to stop early: until it has ended, the
        model cannot be called."""
        self.model.train()
        pipeline = TrainPipelineSparseDist(self.model, self.optimizer, self._device)
        stream = iter(reader)
        for _ in range(num_steps):
            output = pipeline.progress(stream)
            reader.advance()
            try:
                yield output
            except GeneratorExit:
                pipeline.detach()
                raise
        # Not after an error: within a step it fails and hides the cause.
        pipeline.detach()


def _take_weights_as_data(model: nn.Module) -> None:
    """Keeps fbgemm's fused kernels from differentiating bags by the weights of their ids, which
    they do unless told otherwise and which costs as much as the update of the tables."""
    collections = [m for m in model.modules() if isinstance(m, ShardedEmbeddingBagCollection)]
    # TorchRec keeps the look-ups of a collection out of its tree of modules.
    for lookup in (lookup for collection in collections for lookup in collection._lookups):
        for module in lookup.modules():
            if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                module.register_forward_pre_hook(_without_weight_gradients, with_kwargs=True)


def _without_weight_gradients(
    kernel: SplitTableBatchedEmbeddingBagsCodegen,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weights = keywords.get("per_sample_weights")
    if weights is not None:
        num_features = len(kernel.feature_table_map)
        flags = torch.zeros(num_features, dtype=torch.int32, device=weights.device)
        keywords = keywords | {"feature_requires_grad": flags}
    return arguments, keywords
