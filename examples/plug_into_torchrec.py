"""ESMM in a typical TorchRec training script, in the place of DLRM.

    python examples/plug_into_torchrec.py                                 one rank
    torchrun --nproc-per-node 2 examples/plug_into_torchrec.py            two ranks
    … --steps 100 --save FOLDER             and later, on any number of ranks:
    … --steps 200 --load FOLDER

Everything around the model is TorchRec's own: planner, DistributedModelParallel, an optimiser in
the backward pass, the pipeline, the metrics; checkpoints are those of torch.distributed.
docs/plug_in.md shows the lines that differ from a script that trains DLRM.

Shapes: B impressions per rank, W ranks.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.model_parallel import get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec import ESMM, EsmmTowers, EsmmTrainTask, ImpressionBatch
from esmm_torchrec.metrics.windowed import metric_module, model_output, windowed_figures
from esmm_torchrec.models.scores import probabilities

USERS, ITEMS, HISTORY = 200, 100, 5
DENSE_FEATURES = 2
EMBEDDING_DIM = 16
FEATURES = {"user": USERS, "item": ITEMS, "history": ITEMS}
"""Feature → rows of its table."""


@dataclass(frozen=True)
class Options:
    """Train ESMM in a TorchRec pipeline on synthetic impressions."""

    steps: int = 200
    """Total number of steps, including those of a loaded state."""
    batch_size: int = 512
    """Impressions per rank and step."""
    report_every: int = 50
    """Steps between two lines of figures; each line covers the steps since the one before."""
    load: Path | None = None
    """Folder of a saved state to resume from."""
    save: Path | None = None
    """Folder to save the state in at the end."""


def made_up_batches(first: int, batch_size: int) -> Iterator[ImpressionBatch]:
    """Yields this rank's part of the global batches `first`, `first` + 1, …

    Clicks depend on the item and a dense feature, conversions of clicked impressions on the user
    and on the length of the history. Put your own loader here.
    """
    mine = slice(dist.get_rank() * batch_size, (dist.get_rank() + 1) * batch_size)
    rows = dist.get_world_size() * batch_size
    step = first
    while True:
        random = torch.Generator().manual_seed(step)
        user = torch.randint(USERS, (rows,), generator=random)
        item = torch.randint(ITEMS, (rows,), generator=random)
        seen = torch.randint(ITEMS, (rows, HISTORY), generator=random)
        lengths = torch.randint(HISTORY + 1, (rows,), generator=random)
        dense = torch.randn(rows, DENSE_FEATURES, generator=random)
        chance = torch.rand(2, rows, generator=random)
        click = chance[0] < (item % 5 - 2.5 + dense[:, 0]).sigmoid()
        conversion = click & (chance[1] < (user % 4 - 2.5 + 0.5 * lengths).sigmoid())

        history = seen[mine][torch.arange(HISTORY) < lengths[mine, None]]
        one = torch.ones(batch_size, dtype=torch.long)
        yield ImpressionBatch(
            sparse_features=KeyedJaggedTensor(
                keys=list(FEATURES),
                values=torch.cat([user[mine], item[mine], history]),
                lengths=torch.cat([one, one, lengths[mine]]),
            ),
            dense_features=dense[mine],
            click=click[mine].float(),
            conversion=conversion[mine].float(),
        )
        step += 1


def train(options: Options, device: torch.device) -> None:
    """Builds, shards, trains and saves; every rank calls it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature}",
            embedding_dim=EMBEDDING_DIM,
            num_embeddings=rows,
            feature_names=[feature],
        )
        for feature, rows in FEATURES.items()
    ]
    esmm = ESMM(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=DENSE_FEATURES,
        towers=EsmmTowers(len(FEATURES) * EMBEDDING_DIM + DENSE_FEATURES, (64, 32), device=device),
    )
    task = EsmmTrainTask(esmm)
    # A new dict, since apply_optimizer_in_backward changes its argument.
    apply_optimizer_in_backward(RowWiseAdagrad, esmm.features.parameters(), {"lr": 0.1})

    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            trainer_config=TrainerConfig(
                world_size=world_size,
                local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            ),
            kernel_config=KernelConfig(compute_device=device.type),
        ),
        batch_size=options.batch_size,
        storage_reservation=FixedPercentageStorageReservation(0.15),
        # By default, the planner makes small tables data_parallel, which has no fused
        # row-wise Adagrad. On GPUs, row_wise and table_row_wise belong in this list too.
        constraints={
            table.name: ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value])
            for table in tables
        },
    )
    sharders = get_default_sharders()
    plan = planner.collective_plan(task, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(task, device=device, plan=plan, sharders=sharders)

    dense_optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=0.003),
    )
    optimizer = CombinedOptimizer([("", model.fused_optimizer), ("dense", dense_optimizer)])

    progress = torch.zeros((), dtype=torch.long)  # steps done

    def state() -> dict[str, Any]:
        optimizer_state = optimizer.state_dict()
        return {"model": model.state_dict(), "optimizer": optimizer_state, "progress": progress}

    if options.load is not None:
        # Adam's moments exist only after a step, and load silently skips missing entries.
        dense_optimizer.init_state()
        loaded = state()
        load(loaded, checkpoint_id=options.load)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])

    metrics = metric_module(
        batch_size=options.batch_size,
        world_size=world_size,
        rank=rank,
        device=device,
        window_size=options.report_every * options.batch_size * world_size,
        compute_interval_steps=options.report_every,
    )
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    batches = made_up_batches(int(progress), options.batch_size)
    loss = torch.zeros((), device=device)
    for step in range(int(progress) + 1, options.steps + 1):
        output = pipeline.progress(batches)
        logits, labels = output.logits, output.labels
        metrics.update(model_output(probabilities(logits), labels))
        loss += output.loss / options.report_every
        if metrics.should_compute():
            figures = windowed_figures(metrics.compute())
            dist.all_reduce(loss)
            if rank == 0:
                print(f"step {step}  loss {loss.item() / world_size:.5f}", end="  ")
                aucs = {name: value for name, value in figures.items() if name.endswith("_auc")}
                print(*(f"{name} {value:.5f}" for name, value in aucs.items()), sep="  ")
            loss.zero_()
    pipeline.detach()

    if options.save is not None:
        progress.fill_(options.steps)
        save(state(), checkpoint_id=options.save)


def main(options: Options) -> None:
    """Joins the process group that torchrun describes, or creates one for this process alone."""
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu")
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    train(options, device)
    # If a DistributedModelParallel outlives its group, the process sometimes aborts.
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Options))
