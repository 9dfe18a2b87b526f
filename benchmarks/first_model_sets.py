"""Generated data sets of `first_model.py`: tables and worlds.

A generated table has dense columns, some with heavy tails, id columns with Zipf frequencies, and
missing values. Clicks and conversions are drawn from logits that sum effects of dense values and
ids, a product of two dense columns, a step function, and the match of two ids' latent vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from esmm_torchrec.comparison.worlds import World, generate
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, SplitName
from esmm_torchrec.data.sources.ali_ccp.prepare import prepare_ali_ccp
from esmm_torchrec.data.sources.tabular import prepare_table

CLICK, CONVERSION = "click", "conversion"


@dataclass(frozen=True)
class LogSet:
    """A log in two splits, prepared for the library and as frames for scikit-learn."""

    name: str
    prepared: Path
    train: pd.DataFrame
    test: pd.DataFrame
    ids: tuple[str, ...]
    """Columns with one id per row."""
    lists: tuple[str, ...]
    """Columns with several ids per row."""
    dense: tuple[str, ...]


@dataclass(frozen=True)
class TableShape:
    """A generated table; its rows include both splits."""

    name: str
    rows: int
    dense: int
    heavy: int
    """Number of dense columns that are log-normal, with sigma 1.5."""
    ids: tuple[int, ...]
    """Number of distinct values of each id column."""
    ctr: float = 0.12
    cvr: float = 0.12
    match: float = 0.0
    """Standard deviation of the match between the first two ids in the logits."""
    nonlinear: float = 0.4
    """Standard deviation of the product and of the step function of dense columns."""
    missing: float = 0.05


TABLES = (
    TableShape("numeric-5k", 5_000, dense=8, heavy=2, ids=(6, 20), ctr=0.25, cvr=0.25),
    TableShape("ids-10k", 10_000, dense=1, heavy=0, ids=(400, 60, 8), ctr=0.2, cvr=0.3),
    TableShape("numeric-30k", 30_000, dense=24, heavy=12, ids=(5,)),
    TableShape("heavy-100k", 100_000, dense=6, heavy=6, ids=(2_000, 30), cvr=0.06),
    TableShape("ids-200k", 200_000, dense=2, heavy=1, ids=(20_000, 3_000, 40), match=0.6),
    TableShape("mixed-1m", 1_000_000, dense=8, heavy=3, ids=(50_000, 8_000, 100, 12), match=0.5),
)
LARGE = (
    TableShape(
        "mixed-5m", 5_000_000, dense=6, heavy=2, ids=(200_000, 30_000, 100), ctr=0.06, match=0.6
    ),
)
WORLDS = {
    "world-60k": World(impressions=120_000, ctr=0.15, cvr=0.15),
    "world-500k": World(impressions=1_000_000),
}


def generated_table(shape: TableShape, seed: int) -> pd.DataFrame:
    """Draws the rows of a table."""
    rng = np.random.default_rng([seed, len(shape.name), shape.rows])
    frame: dict[str, np.ndarray] = {}
    inputs = rng.normal(size=(shape.rows, shape.dense))
    if shape.dense > 1:
        inputs[:, 1:] = 0.8 * inputs[:, 1:] + 0.4 * inputs[:, :1]
    heavy = np.arange(shape.dense) < shape.heavy
    for column in range(shape.dense):
        values = np.exp(1.5 * inputs[:, column] + 3) if heavy[column] else inputs[:, column]
        missing = rng.random(shape.rows) < (shape.missing if column % 3 == 0 else 0)
        frame[f"dense{column}"] = np.where(missing, np.nan, values)
    ids = []
    for column, size in enumerate(shape.ids):
        weights = 1 / (np.arange(size) + 5.0) ** 0.8
        ids.append(rng.choice(size, shape.rows, p=weights / weights.sum()))
        frame[f"id{column}"] = rng.permutation(size)[ids[-1]]
    happened = np.ones(shape.rows, bool)
    for label, rate in ((CLICK, shape.ctr), (CONVERSION, shape.cvr)):
        logit = _logit(shape, inputs, ids, rng)
        logit += _intercept(logit[happened], rate)
        happened = happened & (rng.random(shape.rows) < 1 / (1 + np.exp(-logit)))
        frame[label] = happened.astype(np.int8)
    return pd.DataFrame(frame)


def _logit(
    shape: TableShape, inputs: np.ndarray, ids: list[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    logit = inputs @ rng.normal(scale=0.8 / max(1, shape.dense) ** 0.5, size=shape.dense)
    if shape.dense > 1:
        product = inputs[:, 0] * inputs[:, -1]
        logit += shape.nonlinear * (product + (inputs[:, 1] > 0.5) - (inputs[:, 1] < -1.0))
    for values, size in zip(ids, shape.ids, strict=True):
        logit += rng.normal(scale=0.8 / len(ids) ** 0.5, size=size)[values]
    if shape.match:
        vectors = [rng.normal(size=(size, 4)) / 2**0.5 for size in shape.ids[:2]]
        match = (vectors[0][ids[0]] * vectors[1][ids[1]]).sum(axis=1)
        logit += shape.match * match
    return logit


def _intercept(logit: np.ndarray, rate: float) -> float:
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-logit - middle))).mean() < rate:
            low = middle
        else:
            high = middle
    return low


def halves(frame: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns two random halves."""
    order = np.random.default_rng(seed).permutation(len(frame))
    middle = len(frame) // 2
    return (
        frame.iloc[np.sort(order[:middle])].reset_index(drop=True),
        frame.iloc[np.sort(order[middle:])].reset_index(drop=True),
    )


def table_set(
    name: str,
    frame: pd.DataFrame,
    folder: Path,
    *,
    ids: tuple[str, ...],
    dense: tuple[str, ...],
    lists: tuple[str, ...] = (),
) -> LogSet:
    """Prepares a frame with the columns "click" and "conversion"."""
    train, test = halves(frame, seed=1)
    prepared = folder / name
    if not prepared.exists():
        prepare_table(
            prepared,
            train=train,
            test=test,
            click=CLICK,
            conversion=CONVERSION,
            ids=(*ids, *lists),
            dense=dense,
        )
    return LogSet(name, prepared, train, test, ids, lists, dense)


def world_set(name: str, world: World, folder: Path) -> LogSet:
    """Generates a world in raw Ali-CCP form and prepares it; scikit-learn gets its fields, with the
    histories as lists without their weights."""
    prepared = folder / name
    if not prepared.exists():
        raw = folder / f"{name}-raw"
        generate(world, raw)
        prepare_ali_ccp(raw, prepared)
    dataset = PreparedDataSet.open(prepared)
    features = dataset.schema.id_features
    frames = [_joined(dataset, split) for split in SPLITS]
    return LogSet(
        name,
        prepared,
        *frames,
        ids=tuple(f.name for f in features if not f.multi_valued),
        lists=tuple(f.name for f in features if f.multi_valued),
        dense=(),
    )


def _joined(dataset: PreparedDataSet, split: SplitName) -> pd.DataFrame:
    parts = []
    for files in (dataset.impression_files(split), dataset.shared_files(split)):
        parts.append(pd.concat([pd.read_parquet(str(f)) for f in files], ignore_index=True))
    return parts[0].join(parts[1], on="shared_row")
