"""Speed of evaluating and of scoring to Parquet, against training, per impression.

    python benchmarks/evaluation.py [--turns 5] [--out evaluation.json]

The same model, impressions and batch size; training, evaluation (scores into memory) and `score`
(scores into a Parquet file) take turns, for towers in float32 and in bfloat16.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from alternate import alternate, publish  # noqa: E402
from impressions import write_impressions  # noqa: E402
from training_speed import Options as TrainingSpeed  # noqa: E402
from training_speed import library  # noqa: E402

from esmm_torchrec.data.mapped import MappedSplit  # noqa: E402
from esmm_torchrec.models.methods import DtypeOption  # noqa: E402
from esmm_torchrec.serving.scorer import score_split  # noqa: E402
from esmm_torchrec.serving.scoring import score  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Options:
    """Measure the speed of evaluation."""

    turns: int = 5
    """Number of turns of every contender."""
    impressions: int = 200_000
    """Impressions scored per turn."""
    batch_size: int = 4096
    """Impressions per step."""
    steps: int = 18
    """Steps trained per turn."""
    out: Path | None = None
    """JSON file for the figures."""


def measure(options: Options, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Lets training, evaluation and scoring take turns."""
    steps = WARM_UP_STEPS + options.turns * options.steps
    dataset = write_impressions(
        folder / "prepared", train=steps * options.batch_size, test=options.impressions
    )
    train, test = MappedSplit.open(dataset, "train"), MappedSplit.open(dataset, "test")
    dtypes: tuple[DtypeOption, ...] = ("float32", "bfloat16")
    contenders: dict[str, Callable[[], int]] = {}
    for dtype in dtypes:
        settings = TrainingSpeed(batch_size=options.batch_size)
        trainer, training = library(train, test, ranks, settings, dtype=dtype)
        training.take(WARM_UP_STEPS)

        def evaluated(model: Any = trainer.model) -> int:
            score_split(model, test, ranks, batch_size=options.batch_size, progress=False)
            return test.impressions

        def scored(model: Any = trainer.model, out: Path = folder / f"{dtype}.parquet") -> int:
            out.unlink(missing_ok=True)
            score(model, test, out, ranks, batch_size=options.batch_size)
            return test.impressions

        def trained(take: Callable[[int], int] = training.take) -> int:
            return take(options.steps) * options.batch_size

        contenders |= {
            f"{dtype}: training": trained,
            f"{dtype}: evaluation": evaluated,
            f"{dtype}: score": scored,
        }
    timings = alternate(contenders, turns=options.turns)
    print(f"{'':24}{'impressions/s':>14}{'ratio to training':>26}")
    ratios = {}
    for name in timings.rates:
        per_turn = timings.ratios(name, f"{name.partition(':')[0]}: training")
        ratios[name] = statistics.median(per_turn)
        spread = f"{min(per_turn):.2f} to {max(per_turn):.2f}"
        print(f"{name:24}{timings.rate(name):>14,.0f}{f'{ratios[name]:.2f} ({spread})':>26}")
    print(f"\nload {timings.load_average[0]:.1f} before, {timings.load_average[1]:.1f} after")
    return timings.to_dict("float32: training") | {"ratio_to_training": ratios}


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder, process_group("cpu") as ranks:
        figures = measure(options, ranks, Path(folder))
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
