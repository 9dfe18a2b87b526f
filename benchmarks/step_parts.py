"""Cost of the parts of a training step: towers, look-ups, and updates by fbgemm's kernels.

    python benchmarks/step_parts.py [--turns 20] [--out step_parts.json]

The towers are those of the paper over 23 embeddings of 16 columns, float32: as in the library, with
both first layers in one product, and compiled. Tables and ids are distributed as in
`training_speed.py`. Each update is timed as one kernel on one thread and as two kernels on two
threads. All take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

import torch  # noqa: E402
from alternate import publish  # noqa: E402
from fbgemm_gpu.split_embedding_configs import EmbOptimType  # noqa: E402
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # noqa: E402
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from impressions import LARGEST_TABLE, NUM_FEATURES  # noqa: E402
from torch import nn  # noqa: E402

from esmm_torchrec.models.towers import EsmmTowers  # noqa: E402
from esmm_torchrec.sharding.host import usable_cores  # noqa: E402

DIM = 16
TOWER = (360, 200, 80)
OPTIMIZERS = {
    "row-wise Adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "Adagrad": EmbOptimType.EXACT_ADAGRAD,
    "SGD": EmbOptimType.EXACT_SGD,
}


@dataclass(frozen=True)
class Options:
    """Measure the parts of a training step."""

    turns: int = 20
    """Number of turns of every part."""
    batch_size: int = 4096
    """Impressions per step."""
    out: Path | None = None
    """JSON file for the figures."""


class OneProduct(nn.Module):
    """The towers with both first layers in one product."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, 2 * TOWER[0])
        self.rest = nn.ModuleList(
            nn.Sequential(
                nn.Linear(TOWER[0], TOWER[1]),
                nn.ReLU(inplace=True),
                nn.Linear(TOWER[1], TOWER[2]),
                nn.ReLU(inplace=True),
                nn.Linear(TOWER[2], 1),
            )
            for _ in range(2)
        )

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        halves = self.first(features).relu_().chunk(2, dim=1)
        return [rest(half).squeeze(1) for rest, half in zip(self.rest, halves, strict=True)]


def towers(model: Callable[..., Any], features: torch.Tensor) -> None:
    """Runs a forward and a backward pass."""
    logits = model(features.detach().requires_grad_())
    values = list(logits if isinstance(logits, list) else logits.values())
    torch.autograd.backward(values, [torch.ones_like(value) for value in values])


@dataclass
class Tables:
    """A kernel over some of the tables."""

    rows: list[int]
    batch_size: int
    optimizer: EmbOptimType

    def __post_init__(self) -> None:
        random = np.random.default_rng(0)
        ids = [np.minimum(n ** random.random(self.batch_size), n - 1) for n in self.rows]
        self._ids = torch.from_numpy(np.concatenate(ids).astype(np.int64))
        self._offsets = torch.arange(len(self._ids) + 1)
        self._gradient = 1e-4 * torch.randn(self.batch_size, DIM * len(self.rows))
        self._kernel = SplitTableBatchedEmbeddingBagsCodegen(
            [(n, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for n in self.rows],
            optimizer=self.optimizer,
            learning_rate=0.02,
            device=torch.device("cpu"),
        )
        self._pooled = self.look_up()

    def look_up(self) -> torch.Tensor:
        self._pooled = self._kernel(self._ids, self._offsets)
        return self._pooled

    def update(self) -> None:
        self._pooled.backward(self._gradient)


def main(options: Options) -> None:
    torch.set_num_threads(usable_cores())
    rows = [max(10, LARGEST_TABLE >> i) + 1 for i in range(NUM_FEATURES)]
    features = torch.randn(options.batch_size, DIM * NUM_FEATURES)
    compiled = torch.compile(EsmmTowers(features.shape[1]))
    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "towers": (int, partial(towers, EsmmTowers(features.shape[1]), features)),
        "towers, first layers in one": (
            int,
            partial(towers, OneProduct(features.shape[1]), features),
        ),
        "towers, compiled": (int, partial(towers, compiled, features)),
    }
    pool = ThreadPoolExecutor(2)
    for name, optimizer in OPTIMIZERS.items():
        one = Tables(rows, options.batch_size, optimizer)
        two = [Tables(half, options.batch_size, optimizer) for half in (rows[:6], rows[6:])]
        if name == "SGD":
            parts["look-ups"] = (int, one.look_up)
        parts[f"{name}, one kernel"] = (
            one.look_up,
            lambda one=one: pool.submit(one.update).result(),
        )
        parts[f"{name}, two on threads"] = (
            lambda two=two: [half.look_up() for half in two],
            lambda two=two: list(pool.map(Tables.update, two)),
        )
    milliseconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(options.turns + 2):
        for name, (prepare, work) in parts.items():
            prepare()
            started = time.perf_counter()
            work()
            if turn >= 2:  # the first ones are warm-up and compilation
                milliseconds[name].append((time.perf_counter() - started) * 1e3)
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    print(f"{'':30}{'ms, median':>12}{'lowest':>10}")
    for name, values in milliseconds.items():
        print(f"{name:30}{medians[name]:>12.1f}{min(values):>10.1f}")
    fastest = medians["towers"] + medians["look-ups"] + medians["SGD, one kernel"]
    print(f"towers + look-ups + the fastest update: {fastest:.1f} ms")
    publish({"milliseconds": milliseconds, "fastest": fastest}, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
