"""Changes to fbgemm's fused kernels, which update tables in the backward pass: kernels do not
differentiate bag weights, and on a CPU they run on several threads.

TorchRec has no options for these, so the kernels are accessed through a private attribute.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.autograd import Variable
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from esmm_torchrec.sharding.planner import Workload, embedding_bag_collections_of

_GROUP = "_batch_key"
"""Fused parameter by which TorchRec groups tables into kernels. TorchRec does not pass it on to
fbgemm."""


def group_tables(module: nn.Module, num_groups: int, *, workload: Workload) -> None:
    """Divides the tables of each collection into groups of about equal work, each of which becomes
    a separate kernel; to be called after `optimizers.fuse_optimizer` and before the module is
    sharded. Groups are contiguous, so that features keep their order.

    Args:
        module: module with collections that are not sharded yet.
        num_groups: number of groups in each collection.
        workload: expected size of a batch.
    """
    if num_groups == 1:
        return
    for collection in embedding_bag_collections_of(module).values():
        configs = collection.embedding_bag_configs()
        work = [_touched_rows(config, workload) for config in configs]
        total, before = sum(work), 0.0
        for config, own in zip(configs, work, strict=True):
            weight = collection.embedding_bags.get_parameter(f"{config.name}.weight")
            group = int(num_groups * (before + own / 2) / total)
            for arguments in getattr(weight, "_optimizer_kwargs", ()):
                arguments[_GROUP] = str(group)
            before += own


def _touched_rows(config: EmbeddingBagConfig, workload: Workload) -> float:
    """Returns the expected number of distinct table rows that a batch updates, if its ids are drawn
    uniformly."""
    ids = sum(
        workload.bags_per_rank.get(name, workload.rows_per_rank)
        * workload.mean_ids_per_bag.get(name, 1.0)
        for name in config.feature_names
    )
    return -config.num_embeddings * math.expm1(-ids / config.num_embeddings) or 1.0


class UpdatesOnThreads:
    """Runs the backward passes of the fused kernels on a CPU in parallel, each on its own thread.
    fbgemm updates the tables of a kernel on one thread, and autograd runs the backward passes of a
    device one after the other. Kernels update different tables, so the result is bitwise the same.

    An update starts as soon as the gradient of the kernel's output is known, and has ended when
    `backward` returns.

    Args:
        model: sharded model.
        num_threads: number of threads of this process.
    """

    def __init__(self, model: nn.Module, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="update")
        self._updates: list[Future[None]] = []
        for kernel in _fused_kernels(model):
            kernel.register_forward_hook(self._cut)

    def _cut(self, _kernel: nn.Module, _inputs: Any, pooled: torch.Tensor) -> torch.Tensor:
        """Detaches the output from its autograd history, which the update then uses."""
        if not pooled.requires_grad:
            return pooled
        if self._updates:  # left by a backward pass that failed
            self._wait()
        output = pooled.detach().requires_grad_()

        def update(output: torch.Tensor) -> None:
            if not self._updates:
                # A private attribute, which DistributedDataParallel uses as well.
                Variable._execution_engine.queue_callback(self._wait)
            gradient, output.grad = output.grad, None
            self._updates.append(self._pool.submit(torch.autograd.backward, pooled, gradient))

        output.register_post_accumulate_grad_hook(update)
        return output

    def _wait(self) -> None:
        updates, self._updates = self._updates, []
        wait(updates)
        for update in updates:
            update.result()


class ConstantBagWeights:
    """Keeps fbgemm's fused kernels from computing the gradients of id weights. By default they do,
    which costs as much as the update of the tables.

    TorchRec has no option for this; `check` warns if the hook is not called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._fired = False
        self._expected = any(
            getattr(collection, "_is_weighted", True) and _has_fused_shard(collection)
            for collection in model.modules()
            if isinstance(collection, ShardedEmbeddingBagCollection)
        )
        for kernel in _fused_kernels(model):
            kernel.register_forward_pre_hook(self._without_gradients, with_kwargs=True)

    def check(self) -> None:
        """Warns if the first step has weighted bags but did not call the hook."""
        if self._expected and not self._fired:
            warnings.warn(
                "this version of TorchRec differentiates the weights of bags, which makes training "
                "slower; the results are the same",
                stacklevel=2,
            )
        self._expected = False

    def _without_gradients(
        self,
        kernel: SplitTableBatchedEmbeddingBagsCodegen,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        weights = keywords.get("per_sample_weights")
        if weights is not None:
            self._fired = True
            num_features = len(kernel.feature_table_map)
            flags = torch.zeros(num_features, dtype=torch.int32, device=weights.device)
            keywords = keywords | {"feature_requires_grad": flags}
        return arguments, keywords


def _has_fused_shard(collection: ShardedEmbeddingBagCollection) -> bool:
    """Returns whether a fused kernel on this rank updates a shard of the collection."""
    parameters = collection.fused_optimizer.params.values()
    return any(value.local_shards() for value in parameters if isinstance(value, ShardedTensor))


def _fused_kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    for collection in model.modules():
        if isinstance(collection, ShardedEmbeddingBagCollection):
            # TorchRec does not register the lookups of a collection as its submodules.
            for lookup in getattr(collection, "_lookups", ()):
                for module in lookup.modules():
                    if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                        yield module
