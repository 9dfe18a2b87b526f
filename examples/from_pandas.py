"""Trains on a pandas DataFrame and returns scores as a DataFrame.

python examples/from_pandas.py

The log is synthetic; for a log of your own, replace the column names.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from esmm_torchrec import Predictor, TrainOptions, prepare_table, process_group, train


def made_up_log(rows: int, seed: int) -> pd.DataFrame:
    """Draws impressions of 200 users and 50 items; every item has its own rates."""
    rng = np.random.default_rng(seed)
    item = rng.integers(0, 50, rows)
    visit = rng.random(rows) < 0.1 + 0.4 * (item % 5) / 5
    return pd.DataFrame(
        {
            "user": rng.integers(0, 200, rows),
            "item": [f"item-{number}" for number in item],
            "seen": [list(rng.integers(0, 50, n)) for n in rng.integers(0, 6, rows)],
            "price": rng.lognormal(size=rows),
            "visit": visit.astype(int),
            "purchase": (visit & (rng.random(rows) < 0.1 + 0.5 * (item % 3) / 3)).astype(int),
        }
    )


def main(folder: Path) -> pd.DataFrame:
    """Prepares, trains and scores inside `folder`."""
    prepare_table(
        folder / "prepared",
        train=made_up_log(20_000, seed=0),
        test=made_up_log(5_000, seed=1),
        click="visit",
        conversion="purchase",
        ids=["user", "item", "seen"],
        dense=["price"],
    )
    with process_group() as ranks:
        options = TrainOptions(batch_size=256, tower=(32, 16), epochs=2, sparse_lr=0.1)
        metrics = train(folder / "prepared", folder / "run", options, ranks)
    print(f"conversion AUC on clicked impressions: {metrics['test']['cvr_auc']:.3f}")

    new_rows = made_up_log(5, seed=2).drop(columns=["visit", "purchase"])
    scores = Predictor(folder / "run").score(new_rows)
    return new_rows.join(scores[["pctr", "pcvr", "pctcvr"]])


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        print(main(Path(temporary)).drop(columns="seen").round(4).to_string())
