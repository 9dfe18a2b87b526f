"""Speed of training end to end against a plain PyTorch loop over tensors in memory.

    python benchmarks/training_speed.py [--turns 7] [--out training_speed.json]

The library reads zstd Parquet from disk (through a mapped copy, whose seconds are shown
separately), shuffles, makes batches, and trains through TorchRec's pipeline, its
DistributedModelParallel and fbgemm's fused row-wise Adagrad, the default. "train" has all
callbacks of `esmm-torchrec train`, including its metrics and logs; "step" has none. The plain loop
has every batch ready in memory as one tensor of ids, one concatenated nn.Embedding with sparse
gradients, torch's Adagrad for it and fused Adam for the towers. Model, initial weights, batches and
their order are the same, on one process. All contenders take turns. The test AUCs at the end show
that they learned the same.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from alternate import alternate, matrix_peak, publish  # noqa: E402
from impressions import write_impressions  # noqa: E402
from torch import nn  # noqa: E402

from esmm_torchrec.batch import ImpressionBatch  # noqa: E402
from esmm_torchrec.data.mapped import MappedSplit  # noqa: E402
from esmm_torchrec.data.prepared import PreparedDataSet  # noqa: E402
from esmm_torchrec.data.reader import ImpressionReader  # noqa: E402
from esmm_torchrec.metrics.ranking import auc  # noqa: E402
from esmm_torchrec.models.methods import DtypeOption  # noqa: E402
from esmm_torchrec.runs.run_folder import RunFolder  # noqa: E402
from esmm_torchrec.serving.scorer import score_split  # noqa: E402
from esmm_torchrec.sharding.planner import SparseOptimizerOption  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.callbacks import LogFigures, ProgressBar  # noqa: E402
from esmm_torchrec.training.fit import build_loop, training_part  # noqa: E402
from esmm_torchrec.training.loop import Callback  # noqa: E402
from esmm_torchrec.training.nonfinite import WatchLoss  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402
from esmm_torchrec.training.schedule import ScheduleLearningRates  # noqa: E402
from esmm_torchrec.training.trainer import Trainer  # noqa: E402

WARM_UP_STEPS = 5
SPARSE_LR, DENSE_LR, EPSILON = 0.02, 0.001, 1e-8
PLAIN = "plain PyTorch, float32"


@dataclass(frozen=True)
class Options:
    """Measure the speed of training."""

    turns: int = 5
    """Number of turns of every contender."""
    steps: int = 49
    """Steps per turn. The figures of a run are computed every 98 steps of 4096."""
    batch_size: int = 4096
    """Impressions per step."""
    dtypes: tuple[DtypeOption, ...] = ("float32", "bfloat16")
    """Data types in which the towers compute; bfloat16 is slow on CPUs without its instructions."""
    threads: int = 0
    """Threads of torch; 0: one per core."""
    test_impressions: int = 200_000
    """Number of impressions to measure AUCs on."""
    out: Path | None = None
    """JSON file for the figures."""


class PlainEsmm(nn.Module):
    """ESMM as written without a library: one table for all features, two towers."""

    def __init__(self, table: torch.Tensor, towers: list[list[nn.Linear]]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
        self.click, self.conversion = (_with_relu(layers) for layers in towers)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.table(ids).flatten(1)
        return self.click(features).squeeze(1), self.conversion(features).squeeze(1)


def _with_relu(layers: list[nn.Linear]) -> nn.Sequential:
    hidden = [module for layer in layers[:-1] for module in (layer, nn.ReLU())]
    return nn.Sequential(*hidden, layers[-1])


class PlainLoop:
    """A plain training loop over batches in memory; `next` of `steps` trains one step."""

    def __init__(
        self, table: torch.Tensor, towers: list[list[nn.Linear]], *, dtype: torch.dtype
    ) -> None:
        self.model = PlainEsmm(table, towers)
        self.dtype = dtype
        # torch warns of this about its own Adagrad.
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        dense = [*self.model.click.parameters(), *self.model.conversion.parameters()]
        self.optimizers = [
            torch.optim.Adagrad(self.model.table.parameters(), lr=SPARSE_LR, eps=EPSILON),
            torch.optim.Adam(dense, lr=DENSE_LR, eps=EPSILON, fused=True),
        ]

    def logits(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype != torch.float32):
            click, conversion = self.model(ids)
        return click.float(), conversion.float()

    def steps(
        self, batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> Iterator[torch.Tensor]:
        for ids, click, conversion in batches:
            click_logit, conversion_logit = self.logits(ids)
            log_ctcvr = F.logsigmoid(click_logit) + F.logsigmoid(conversion_logit)
            # log(1 - p) of the product, from its log-probability.
            log_not_ctcvr = torch.log(-torch.expm1(log_ctcvr))
            loss = F.binary_cross_entropy_with_logits(click_logit, click)
            loss -= torch.lerp(log_not_ctcvr, log_ctcvr, conversion).mean()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            yield loss.detach()


@dataclass(frozen=True)
class Contender:
    """One program that trains the model."""

    steps: Iterator[Any]
    """Iterator that trains one step for each `next`, as many as an epoch has batches."""
    score: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Function that returns click and conversion scores of the test split, after training."""

    def take(self, num_steps: int) -> int:
        for _ in range(num_steps):
            next(self.steps)
        return num_steps


def library(
    train: MappedSplit,
    test: MappedSplit,
    ranks: Ranks,
    options: Options,
    *,
    dtype: DtypeOption,
    sparse_optimizer: SparseOptimizerOption = "rowwise_adagrad",
    callbacks: Sequence[Callback] = (),
) -> tuple[Trainer, Contender]:
    """Returns the library as `esmm-torchrec train` uses it, with or without its callbacks."""
    settings = TrainOptions(
        batch_size=options.batch_size,
        sparse_optimizer=sparse_optimizer,
        sparse_lr=SPARSE_LR,
        dense_lr=DENSE_LR,
        dtype=dtype,
        first_order=False,
        device="cpu",
        shuffle_chunk=1,
    )
    loop = build_loop(
        train,
        settings,
        ranks,
        part=training_part(train, settings),
        epochs=1000,  # a long run, whose figures are logged at the lowest rate
        callbacks=callbacks,
    )
    trainer = loop.trainer

    def score() -> tuple[np.ndarray, np.ndarray]:
        scored = score_split(
            trainer.model, test, ranks, batch_size=options.batch_size, progress=False
        )
        assert scored is not None
        return scored.scores["ctr"].values, scored.scores["cvr"].values

    return trainer, Contender(loop.steps(), score)


def of_a_run(folder: Path) -> tuple[Callback, ...]:
    """Returns the callbacks of `esmm-torchrec train` between checkpoints."""
    folder.mkdir()
    return (
        ScheduleLearningRates("constant", warmup_steps=0),
        WatchLoss(folder / "nonfinite", "stop"),
        LogFigures(RunFolder(folder, {})),
        ProgressBar(),
    )


def flops_per_impression(towers: list[list[nn.Linear]]) -> int:
    """Counts FLOPs of a step's matrix products: each layer once forward, twice backward."""
    return sum(6 * layer.weight.numel() for layers in towers for layer in layers)


def copy_of_towers(trainer: Trainer) -> list[list[nn.Linear]]:
    """Returns a copy of the layers of each tower."""
    state = trainer.model.state_dict()
    towers: list[list[nn.Linear]] = []
    for tower in ("click", "conversion"):
        names = [name for name in state if f"towers.{tower}." in name and name.endswith("weight")]
        towers.append([])
        for name in names:
            weight, bias = state[name], state[name.removesuffix("weight") + "bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            towers[-1].append(layer)
    return towers


def plain(
    trainer: Trainer,
    batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    test_ids: torch.Tensor,
    *,
    dtype: torch.dtype,
) -> Contender:
    """Returns the plain loop, starting from the weights of a trainer that has not trained yet."""
    tables = [
        value.local_shards()[0].tensor
        for name, value in trainer.model.state_dict().items()
        if ".embedding_bags." in name
    ]
    loop = PlainLoop(torch.cat(tables), copy_of_towers(trainer), dtype=dtype)

    def score() -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            parts = [loop.logits(ids) for ids in test_ids.split(8192)]
        click, conversion = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return click, conversion

    return Contender(loop.steps(batches), score)


def in_memory(
    batches: Iterator[ImpressionBatch], dataset: PreparedDataSet
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns batches for the plain loop: ids of the concatenated table (B, F), labels."""
    rows = torch.tensor([table.num_embeddings for table in dataset.schema.tables])
    first_row = rows.cumsum(0) - rows
    plain_batches = []
    for batch in batches:
        assert batch.features.sparse_features is not None
        ids = batch.features.sparse_features.values().long().view(len(rows), -1).t() + first_row
        plain_batches.append((ids.contiguous(), batch.click.clone(), batch.conversion.clone()))
    return plain_batches


def measure(options: Options, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Runs all contenders."""
    steps = WARM_UP_STEPS + options.turns * options.steps
    dataset = write_impressions(
        folder / "prepared", train=steps * options.batch_size, test=options.test_impressions
    )
    started = time.perf_counter()
    train, test = MappedSplit.open(dataset, "train"), MappedSplit.open(dataset, "test")
    laid_out = time.perf_counter() - started

    reader = ImpressionReader(train, batch_size=options.batch_size)
    batches = in_memory(iter(reader), dataset)
    whole_test = ImpressionReader(test, batch_size=test.impressions, shuffle=False)
    test_ids = in_memory(iter(whole_test), dataset)[0][0]

    contenders: dict[str, Contender] = {}
    trainer, step = library(train, test, ranks, options, dtype="float32")
    flops = flops_per_impression(copy_of_towers(trainer))
    contenders[PLAIN] = plain(trainer, batches, test_ids, dtype=torch.float32)
    if "bfloat16" in options.dtypes:
        contenders["plain PyTorch, bfloat16"] = plain(
            trainer, batches, test_ids, dtype=torch.bfloat16
        )
    for dtype in options.dtypes:
        if dtype == "bfloat16":
            _, step = library(train, test, ranks, options, dtype=dtype)
        contenders[f"step, {dtype}"] = step
        _, contenders[f"train, {dtype}"] = library(
            train, test, ranks, options, dtype=dtype, callbacks=of_a_run(folder / dtype)
        )
        _, contenders[f"step, {dtype}, Adagrad"] = library(
            train, test, ranks, options, dtype=dtype, sparse_optimizer="adagrad"
        )

    for contender in contenders.values():
        contender.take(WARM_UP_STEPS)

    def turn(contender: Contender) -> Callable[[], int]:
        return lambda: contender.take(options.steps) * options.batch_size

    timings = alternate(
        {name: turn(contender) for name, contender in contenders.items()}, turns=options.turns
    )
    click, conversion = test.scalars["click"], test.scalars["conversion"]
    clicked = click == 1
    aucs: dict[str, dict[str, float | None]] = {}
    for name, contender in contenders.items():
        click_score, conversion_score = contender.score()
        aucs[name] = {
            "ctr_auc": auc(click_score, click),
            "cvr_auc": auc(conversion_score[clicked], conversion[clicked]),
        }

    print(timings.table(PLAIN, unit="impressions/s"))
    shares: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        peak, name = matrix_peak(dtype), str(dtype).removeprefix("torch.")
        for contender in contenders:
            if name in contender:
                shares[contender] = timings.rate(contender) * flops / 1e9 / peak
    train_ratios = {
        dtype: timings.ratios(f"train, {dtype}", f"step, {dtype}") for dtype in options.dtypes
    }
    for dtype, ratios in train_ratios.items():
        print(f"train / step, {dtype}: {median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})")
    print(f"\nthe towers take {flops / 1e6:.2f} MFLOP per impression; of the peak, steps reach")
    for contender, share in shares.items():
        print(f"{contender:37}{share:8.0%}")
    print(f"\ntest AUC after {steps} steps (clicks; conversions of clicked impressions)")
    for name, values in aucs.items():
        figures = "".join("     -  " if x is None else f"{x:8.4f}" for x in values.values())
        print(f"{name:37}{figures}")
    size = sum(file.stat().st_size for file in (folder / "prepared").rglob("*.parquet"))
    print(
        f"\n{dataset.splits['train'].impressions:,} training impressions, {size / 1e6:,.0f} MB of "
        f"Parquet, laid out for random access in {laid_out:.1f} s (once, not part of the rates)"
    )
    print(f"load {timings.load_average[0]:.1f} before, {timings.load_average[1]:.1f} after")
    return timings.to_dict(PLAIN) | {
        "test_auc": aucs,
        "train_to_step": train_ratios,
        "share_of_peak": shares,
        "layout_seconds": laid_out,
    }


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder, process_group("cpu") as ranks:
        if options.threads:
            torch.set_num_threads(options.threads)
        figures = measure(options, ranks, Path(folder))
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
