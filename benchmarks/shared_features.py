"""Pooling a user's features once per user of a batch, against writing them out per impression.

    python benchmarks/shared_features.py [--tables world] [--out shared_features.json]
    python benchmarks/shared_features.py --accuracy [--seeds 3]

Users have four histories, 613 weighted ids in all as in Ali-CCP, shared by 58 impressions. The
model is trained end to end on one process with the histories pooled once and written out, over the
same batches, for several `--shuffle-chunk` K: up to K impressions of a user stay together when
rows are shuffled. U is the number of distinct users in a batch. Its share at K = 1 falls with the
number of users; many impressions bring it near one user an impression.

What a look-up costs depends on the size of its table. `--tables ali-ccp` draws ids of tables as
large as Ali-CCP's id ranges (400 000 shops); `--tables world` generates a world with Ali-CCP's
histories, whose tables of a few thousand rows fit a core's cache.

`--accuracy` measures test AUCs after one epoch over K instead, in a world with short histories.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from esmm_torchrec.cli.main import settle_process

settle_process()  # before torch is imported

from alternate import Timings, alternate, describe, environment  # noqa: E402
from impressions import write_histories  # noqa: E402

from esmm_torchrec.data.ali_ccp import prepare_ali_ccp  # noqa: E402
from esmm_torchrec.data.mapped import MappedSplit  # noqa: E402
from esmm_torchrec.data.reader import ImpressionReader, SharedFeatures  # noqa: E402
from esmm_torchrec.data.synthetic import World, generate  # noqa: E402
from esmm_torchrec.metrics.report import measure as measure_scores  # noqa: E402
from esmm_torchrec.models.esmm import TrainOutput  # noqa: E402
from esmm_torchrec.models.methods import DtypeOption  # noqa: E402
from esmm_torchrec.sharding.planner import Workload  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402
from esmm_torchrec.training.evaluation import score_split  # noqa: E402
from esmm_torchrec.training.fit import build_trainer, fit, training_part  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402

MIN_COUNT = 2
"""Low, or a small world would lose half of its histories to row 0."""

AUCS = ("ctr_auc", "cvr_auc", "ctcvr_auc")


@dataclass(frozen=True)
class Options:
    """Measure what shared features cost."""

    impressions: int = 400_000
    """Half of them to train on."""
    tables: Literal["ali-ccp", "world"] = "ali-ccp"
    """How large the tables of the histories are."""
    chunks: tuple[int, ...] = (1, 4, 8, 16)
    """Values of K."""
    turns: int = 3
    """Turns that every contender takes."""
    steps: int = 2
    """Steps in a turn."""
    batch_size: int = 4096
    """Impressions in a step."""
    dtype: DtypeOption = "bfloat16"
    """What the towers compute in."""
    accuracy: bool = False
    """Measure AUCs over K instead of speed."""
    seeds: int = 3
    """Trainings for each K, with --accuracy."""
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


def speed(train: MappedSplit, ranks: Ranks, options: Options) -> dict[str, Any]:
    """Both ways for every K, in turns."""

    def contender(chunk: int, shared_features: SharedFeatures) -> Contender:
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
        reader = ImpressionReader(
            train,
            batch_size=options.batch_size,
            shuffle_chunk=chunk,
            shared_features=shared_features,
        )
        return Contender(trainer.steps(reader, reader.steps_left))

    once = {f"K = {k}, pooled once": contender(k, "once") for k in options.chunks}
    expanded = {f"K = {k}, written out": contender(k, "expanded") for k in options.chunks}
    contenders = once | expanded
    for each in contenders.values():
        each.take(1)

    def turn(each: Contender) -> Callable[[], int]:
        return lambda: each.take(options.steps) * options.batch_size

    timings = alternate(
        {name: turn(each) for name, each in contenders.items()}, turns=options.turns
    )
    rows = [
        _row(k, timings, once_name, expanded_name, contenders)
        | {"distinct_users": _distinct_users(train, k, options)}
        for k, once_name, expanded_name in zip(options.chunks, once, expanded, strict=True)
    ]
    print(
        f"{'K':>3}{'U':>7}{'pooled once':>14}{'written out':>14}{'ratio':>7}{'spread':>14}"
        f"{'CPU ratio':>11}{'loss differs by':>17}"
    )
    for row in rows:
        print(
            f"{row['shuffle_chunk']:>3}{row['distinct_users']:>7,.0f}"
            f"{row['once']:>12,.0f}/s{row['expanded']:>12,.0f}/s{row['ratio']:>7.2f}"
            f"{row['spread']:>14}{row['cpu_ratio']:>11.2f}"
            f"{row['loss_difference']:>17.1e}"
        )
    print(
        f"\n{options.dtype} towers; load {timings.load_average[0]:.1f} before, "
        f"{timings.load_average[1]:.1f} after"
    )
    return {"rows": rows, "timings": timings.to_dict(next(iter(expanded)))}


def _row(
    chunk: int, timings: Timings, once: str, expanded: str, contenders: dict[str, Contender]
) -> dict[str, Any]:
    ratios = timings.ratios(once, expanded)
    losses = list(zip(contenders[once].losses, contenders[expanded].losses, strict=True))
    cpu = [
        slow / fast
        for slow, fast in zip(timings.cpu_seconds[expanded], timings.cpu_seconds[once], strict=True)
    ]
    return {
        "shuffle_chunk": chunk,
        "once": timings.rate(once),
        "expanded": timings.rate(expanded),
        "ratio": statistics.median(ratios),
        "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "cpu_ratio": statistics.median(cpu),
        "loss_difference": max(abs(left - right) / right for left, right in losses),
    }


def _distinct_users(train: MappedSplit, chunk: int, options: Options) -> float:
    """Mean over the batches of an epoch, the last one left out."""
    reader = ImpressionReader(train, batch_size=options.batch_size, shuffle_chunk=chunk)
    sizes = []
    for batch in reader:
        assert batch.shared_weighted_sparse_features is not None
        sizes.append(batch.shared_weighted_sparse_features.stride())
    return statistics.mean(sizes[:-1] or sizes)


def accuracy(
    splits: dict[str, MappedSplit], ranks: Ranks, options: Options
) -> list[dict[str, Any]]:
    """Test AUCs of every seed for every K."""
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
                workload=Workload(options.batch_size),
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
    """Makes the world and measures on it."""
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
        facts = environment()
        print(describe(facts))
    if options.out is not None:
        options.out.write_text(json.dumps(figures | {"environment": facts}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
