"""Logits of a sharded model for a stream of batches, gathered on rank 0 in the stream's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.models.towers import Logits
from esmm_torchrec.sharding.process_group import Ranks


def predict(
    model: DistributedModelParallel, batches: Iterable[ImpressionBatch], ranks: Ranks
) -> Iterator[Logits | None]:
    """Runs a sharded train task over batches without training it.

    Every rank must go through its whole stream; all streams have the same number of batches of
    the same size.

    Yields:
        on rank 0, per step, the logits of all ranks' batches one after the other, float32 (W·B,)
        on the CPU, those the model has; on the other ranks None.
    """
    was_training = model.training
    model.eval()
    pipeline = EvalPipelineSparseDist(model, model.fused_optimizer, ranks.device)
    stream = iter(batches)
    try:
        while True:
            try:
                with torch.no_grad():
                    output = pipeline.progress(stream)
            except StopIteration:
                break
            own = output.logits
            stacked = torch.stack(list(own.values())).cpu()
            parts = [torch.empty_like(stacked) for _ in range(ranks.world_size)]
            dist.gather(stacked, parts if ranks.is_first else None, dst=0)
            gathered = dict(zip(own, torch.cat(parts, dim=1), strict=True))
            yield Logits(gathered) if ranks.is_first else None
        # Not after an error: within a step it fails, and hides what went wrong.
        pipeline.detach()
    finally:
        model.train(was_training)
