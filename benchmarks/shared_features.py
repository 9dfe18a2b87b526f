"""Pooling a user's features once per user of a batch, against repeating them per impression.

    python benchmarks/shared_features.py [--tables world] [--out shared_features.json]
    python benchmarks/shared_features.py --accuracy [--seeds 3]

Users have four histories, 613 weighted ids in all as in Ali-CCP, shared by 58 impressions. The
model is trained end to end on one process over the same batches, with the histories pooled once and
repeated; the latter also with fbgemm's gradient of the ids' weights, which TorchRec leaves on and
this library turns off. All this for several `--shuffle-chunk` K: up to K impressions of a user stay
together when rows are shuffled. U is the number of distinct users in a batch. With K = 1 and many
impressions, U approaches one user per impression.

The cost of a look-up depends on the size of its table. `--tables ali-ccp` draws ids for tables as
large as Ali-CCP's id ranges (400 000 shops); `--tables world` generates a world with Ali-CCP's
histories, whose tables of a few thousand rows fit a core's cache.

`--accuracy` measures test AUCs after one epoch over K instead, in a world with short histories.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from alternate import Timings, alternate, publish  # noqa: E402
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # noqa: E402
    SplitTableBatchedEmbeddingBagsCodegen,
)
from impressions import write_histories  # noqa: E402
from torch import nn  # noqa: E402

from esmm_torchrec.comparison.worlds import World, generate  # noqa: E402
from esmm_torchrec.data.mapped import MappedSplit  # noqa: E402
from esmm_torchrec.data.reader import ImpressionReader, SharedFeatures  # noqa: E402
from esmm_torchrec.data.sources.ali_ccp.prepare import prepare_ali_ccp  # noqa: E402
from esmm_torchrec.metrics.report import measure as measure_scores  # noqa: E402
from esmm_torchrec.models.esmm import TrainOutput  # noqa: E402
from esmm_torchrec.models.methods import DtypeOption  # noqa: E402
from esmm_torchrec.serving.scorer import score_split  # noqa: E402
from esmm_torchrec.sharding.planner import Workload  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.fit import build_trainer, fit, training_part  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402

MIN_COUNT = 2
"""Minimum count of an id; low, since a small world would otherwise lose half of its histories to
row 0."""

AUCS = ("ctr_auc", "cvr_auc", "ctcvr_auc")


@dataclass(frozen=True)
class Options:
    """Measure the cost of shared features."""

    impressions: int = 400_000
    """Number of impressions, half of them to train on."""
    tables: Literal["ali-ccp", "world"] = "ali-ccp"
    """Size of the histories' tables."""
    chunks: tuple[int, ...] = (1, 4, 8, 16)
    """Values of K."""
    turns: int = 5
    """Number of turns of every contender."""
    steps: int = 2
    """Steps per turn."""
    batch_size: int = 4096
    """Impressions per step."""
    dtype: DtypeOption = "bfloat16"
    """Data type in which the towers compute."""
    accuracy: bool = False
    """Measure AUCs by K instead of speed."""
    seeds: int = 3
    """Number of trainings for each K, with --accuracy."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass
class Contender:
    """Training with one K, in one of the two ways."""

    steps: Iterator[TrainOutput]
    losses: list[float] = field(default_factory=list)

    def take(self, num_steps: int) -> int:
        self.losses += [float(next(self.steps).loss) for _ in range(num_steps)]
        return num_steps


ONCE, WRITTEN_OUT, AS_TORCHREC = "pooled once", "written out", "written out, as TorchRec does"


def speed(train: MappedSplit, ranks: Ranks, options: Options) -> dict[str, Any]:
    """Measures every way for every K, in turns."""

    def contender(chunk: int, way: str) -> Contender:
        shared_features: SharedFeatures = "once" if way == ONCE else "expanded"
        settings = TrainOptions(
            batch_size=options.batch_size, dtype=options.dtype, shared_features=shared_features
        )
        trainer = build_trainer(
            train,
            settings,
            ranks,
            part=training_part(train, settings),
            workload=Workload(options.batch_size),
        )
        if way == AS_TORCHREC:
            _differentiate_by_weights(trainer.model)
        reader = ImpressionReader(
            train,
            batch_size=options.batch_size,
            shuffle_chunk=chunk,
            shared_features=shared_features,
        )
        return Contender(trainer.steps(reader, reader.steps_left))

    ways = (ONCE, WRITTEN_OUT, AS_TORCHREC)
    contenders = {(k, way): contender(k, way) for k in options.chunks for way in ways}
    for each in contenders.values():
        each.take(1)

    def turn(each: Contender) -> Callable[[], int]:
        return lambda: each.take(options.steps) * options.batch_size

    timings = alternate(
        {f"K = {k}, {way}": turn(each) for (k, way), each in contenders.items()},
        turns=options.turns,
    )
    print(
        f"{'K':>3}{'U':>7}{'impressions/s':>42}{'ratio':>6}{'CPU ratio':>24}{'loss differs by':>17}"
    )
    rows = []
    for k in options.chunks:
        users = _distinct_users(train, k, options)
        for way in ways:
            row = {"shuffle_chunk": k, "distinct_users": users, "way": way}
            row |= _compared(timings, f"K = {k}, {ONCE}", f"K = {k}, {way}")
            losses = zip(contenders[k, ONCE].losses, contenders[k, way].losses, strict=True)
            row["loss_difference"] = max(abs(left - right) / right for left, right in losses)
            rows.append(row)
            print(
                f"{k:>3}{users:>7,.0f}  {way:30}{row['rate']:>10,.0f}"
                f"{row['ratio']:>6.2f} {row['spread']:>12}{row['cpu_ratio']:>11.2f}"
                f"{row['loss_difference']:>17.1e}"
            )
    print(
        f"\nratio: pooled once / this; {options.dtype} towers; load "
        f"{timings.load_average[0]:.1f} before, {timings.load_average[1]:.1f} after"
    )
    return {"rows": rows, "timings": timings.to_dict(f"K = {options.chunks[0]}, {WRITTEN_OUT}")}


def _differentiate_by_weights(model: nn.Module) -> None:
    """Undoes a change of `Trainer`: fbgemm's kernels again compute the gradient of every id's
    weight, which is not needed but which TorchRec leaves on."""
    for collection in model.modules():
        for lookup in getattr(collection, "_lookups", ()):
            for module in lookup.modules():
                if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                    module._forward_pre_hooks.clear()


def _compared(timings: Timings, once: str, other: str) -> dict[str, Any]:
    """Returns the speed of one way, and the speed-up of pooling once."""
    ratios = timings.ratios(once, other)
    cpu = [
        slow / fast
        for slow, fast in zip(timings.cpu_seconds[other], timings.cpu_seconds[once], strict=True)
    ]
    return {
        "rate": timings.rate(other),
        "ratio": statistics.median(ratios),
        "spread": f"{min(ratios):.2f}-{max(ratios):.2f}",
        "cpu_ratio": statistics.median(cpu),
    }


def _distinct_users(train: MappedSplit, chunk: int, options: Options) -> float:
    """Returns the mean over the batches of an epoch except the last."""
    reader = ImpressionReader(train, batch_size=options.batch_size, shuffle_chunk=chunk)
    sizes = []
    for batch in reader:
        assert batch.features.shared_weighted_sparse_features is not None
        sizes.append(batch.features.shared_weighted_sparse_features.stride())
    return statistics.mean(sizes[:-1] or sizes)


def accuracy(
    splits: dict[str, MappedSplit], ranks: Ranks, options: Options
) -> list[dict[str, Any]]:
    """Returns test AUCs of every seed for every K."""
    print(f"{'K':>3}" + "".join(f"{name:>20}" for name in AUCS))
    rows = []
    for chunk in options.chunks:
        aucs: dict[str, list[float]] = {name: [] for name in AUCS}
        for seed in range(options.seeds):
            settings = TrainOptions(
                batch_size=options.batch_size,
                dtype=options.dtype,
                shuffle_chunk=chunk,
                seed=seed,
            )
            model = fit(
                splits["train"],
                settings,
                ranks,
                part=training_part(splits["train"], settings),
            )
            scored = score_split(
                model, splits["test"], ranks, batch_size=options.batch_size, progress=False
            )
            assert scored is not None
            test = measure_scores(scored)["test"]
            for name in AUCS:
                aucs[name].append(test[name])
        rows.append({"shuffle_chunk": chunk} | aucs)
        figures = [
            f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
            if len(values) > 1
            else f"{values[0]:.4f}"
            for values in aucs.values()
        ]
        print(f"{chunk:>3}" + "".join(f"{figure:>20}" for figure in figures), flush=True)
    print(f"\nmean ± standard deviation over {options.seeds} seeds; load {os.getloadavg()[0]:.1f}")
    return rows


def measure(options: Options, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Creates the world and measures on it."""
    half = options.impressions // 2
    if options.tables == "ali-ccp" and not options.accuracy:
        dataset = write_histories(folder / "prepared", train=half, test=1 << 12)
    else:
        scale = World.history_scale if options.accuracy else 1.0
        generate(World(impressions=options.impressions, history_scale=scale), folder / "raw")
        dataset = prepare_ali_ccp(folder / "raw", folder / "prepared", min_count=MIN_COUNT)
    train, test = MappedSplit.open(dataset, "train"), MappedSplit.open(dataset, "test")
    histories = sum(
        mean
        for name, mean in dataset.statistics.mean_values_per_bag.items()
        if any(feature.name == name and feature.shared for feature in dataset.schema.id_features)
    )
    print(
        f"{train.impressions:,} training impressions of {dataset.splits['train'].shared_rows:,} "
        f"users with {histories:,.0f} ids each"
    )
    if options.accuracy:
        return {"aucs": accuracy({"train": train, "test": test}, ranks, options)}
    return speed(train, ranks, options)


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder, process_group("cpu") as ranks:
        figures = measure(options, ranks, Path(folder))
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
