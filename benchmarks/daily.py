"""A week of daily continued training, against training from scratch on all days every day.

    python benchmarks/daily.py [--days 7] [--impressions 6000] [--out daily.json]

Tastes drift from day to day, and every day brings new items. Each evening one model continues on
that day alone (`prepare append`, `train --from`), another is trained on all days so far, and a
third remains that of the first day. All are measured on the next day: on all its impressions, on
those of items new today, and on those of items that existed from the start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import tyro
from alternate import publish

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train

USERS, FIRST_ITEMS, LATENT = 500, 300, 4
COLUMNS: dict[str, Any] = {
    "click": "click",
    "conversion": "conversion",
    "ids": ["user", "item", "category"],
}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    days: int = 7
    """Number of days of training."""
    impressions: int = 6000
    """Impressions per day."""
    new_items: int = 30
    """Number of new items per day, in addition to 300 at the start."""
    drift: float = 0.15
    """Standard deviation of the daily change of a taste; that of the taste itself is 1."""
    seed: int = 0
    """Seed of the world and of the models."""
    batch_size: int = 64
    """Impressions per step."""
    out: Path | None = None
    """Output file for the figures, as JSON."""


class World:
    """Users and items whose tastes are vectors that change every day."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._users = self._random.normal(size=(2, USERS, LATENT))
        self._items = self._random.normal(size=(2, FIRST_ITEMS, LATENT + 1))

    def day(self) -> pd.DataFrame:
        """Draws the impressions of the next day, in random order of users and items."""
        random, n = self._random, self._options.impressions
        user = random.integers(0, USERS, n)
        num_items = self._items.shape[1]
        # New items are shown five times as often, as shops do.
        shown = np.ones(num_items)
        shown[FIRST_ITEMS:][-self._options.new_items :] = 5.0
        item = random.choice(num_items, n, p=shown / shown.sum())
        match = (self._users[:, user] * self._items[:, item, :LATENT]).sum(-1) / LATENT**0.5
        logits = 0.7 * match + 0.9 * self._items[:, item, LATENT] + np.array([[-2.5], [-1.5]])
        happened = random.random(logits.shape) < 1 / (1 + np.exp(-logits))
        frame = pd.DataFrame(
            {
                "click": happened[0].astype(np.int8),
                "conversion": happened.all(axis=0).astype(np.int8),
                "user": user,
                "item": item,
                "category": item % 40,
            }
        )
        self._change()
        return frame

    def _change(self) -> None:
        drift, random = self._options.drift, self._random
        for name in ("_users", "_items"):
            tastes = getattr(self, name)
            moved = tastes + drift * random.normal(size=tastes.shape)
            setattr(self, name, moved / (1 + drift**2) ** 0.5)
        new = random.normal(size=(2, self._options.new_items, LATENT + 1))
        self._items = np.concatenate([self._items, new], axis=1)


def measured(run: Path, rows: pd.DataFrame, known_items: Sequence[int]) -> dict[str, float]:
    """Returns the AUC of clicks, and of clicks that convert, over rows of the next day.

    Args:
        run: run folder of the model.
        rows: impressions.
        known_items: number of items on the first day, until today, and today.
    """
    scores = Predictor(run).score(rows)
    parts = {
        "all": np.ones(len(rows), bool),
        "new": np.asarray((rows["item"] >= known_items[1]) & (rows["item"] < known_items[2])),
        "old": np.asarray(rows["item"] < known_items[0]),
    }
    figures: dict[str, float] = {}
    for name, part in parts.items():
        for task, score in (("click", "pctr"), ("conversion", "pctcvr")):
            value = auc(np.asarray(scores[score])[part], np.asarray(rows[task])[part])
            figures[f"{task}_auc_{name}"] = float("nan") if value is None else value
    return figures


def week(options: Options, folder: Path) -> list[dict[str, Any]]:
    """Returns the figures of every evening."""
    world = World(options)
    days = [world.day()]
    training = TrainOptions(
        batch_size=options.batch_size, tower=(64, 32), epochs=1, seed=options.seed
    )
    evenings: list[dict[str, Any]] = []
    for number in range(options.days):
        days.append(world.day())
        today, tomorrow = days[-2:]
        seconds = {"daily": -time.perf_counter()}
        if number == 0:
            added = prepare_table(folder / "log", train=today, test=tomorrow, **COLUMNS)
        else:
            added = append_table(folder / "log", train=today, test=tomorrow)
            training = replace(training, start_from=folder / f"daily-{number - 1}")
        with process_group("cpu") as ranks:
            train(added.path, folder / f"daily-{number}", training, ranks)
        seconds["daily"] += time.perf_counter()
        seconds["scratch"] = -time.perf_counter()
        prepare_table(folder / f"all-{number}", train=days[:-1], test=tomorrow, **COLUMNS)
        fresh = replace(training, start_from=None)
        with process_group("cpu") as ranks:
            train(folder / f"all-{number}", folder / f"scratch-{number}", fresh, ranks)
        seconds["scratch"] += time.perf_counter()

        known = [FIRST_ITEMS + options.new_items * n for n in (0, max(0, number - 1), number)]
        runs = {"daily": f"daily-{number}", "scratch": f"scratch-{number}", "first": "daily-0"}
        if number:
            runs["yesterday"] = f"daily-{number - 1}"
        evening = {"day": number + 1, "seconds": seconds}
        evening |= {name: measured(folder / run, tomorrow, known) for name, run in runs.items()}
        evening["items"] = PreparedDataSet.open(folder / "log").schema.table("item").num_embeddings
        evenings.append(evening)
        print(line(evening), flush=True)
    return evenings


def line(evening: dict[str, Any]) -> str:
    """Formats an evening as a row of the table in docs/daily.md."""
    cells = [str(evening["day"])]
    cells += [f"{evening['seconds'][name]:.1f}" for name in ("daily", "scratch")]
    names = ("daily", "scratch", "first")
    cells += [f"{evening[name]['click_auc_all']:.4f}" for name in names]
    cells += [f"{evening[name]['conversion_auc_all']:.4f}" for name in names]
    for part in ("new", "old"):
        with_yesterday = ("daily", "scratch", "yesterday" if part == "new" else "first")
        cells += [
            f"{evening[name][f'click_auc_{part}']:.4f}" if name in evening else ""
            for name in with_yesterday
        ]
    return f"| {' | '.join(cells)} |"


def main(options: Options) -> None:
    """Runs the week."""
    with TemporaryDirectory() as folder:
        evenings = week(options, Path(folder))
    publish({"evenings": evenings}, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
