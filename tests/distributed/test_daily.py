"""Warm start with yesterday's model on today's data, on one and two ranks: known rows are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from esmm_torchrec.checkpoints.files import find_checkpoint
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.sources.append import append_table
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import EsmmTorchrecError
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.training.options import TrainOptions
from tests.ranks import run_on_ranks, train_here

OPTIONS = TrainOptions(
    batch_size=64, embedding_dim=8, tower=(8,), sparse_lr=0.2, sharding="row_wise", epochs=2
)
STILL = replace(OPTIONS, sparse_lr=1e-30, dense_lr=1e-30, max_steps=1)
"""Options that train without changing a weight."""


def _day(number: int, rows: int = 500) -> pd.DataFrame:
    random = np.random.default_rng(number)
    click = random.random(rows) < 0.4
    return pd.DataFrame(
        {
            "click": click.astype(int),
            "buy": (click & (random.random(rows) < 0.5)).astype(int),
            "user": random.integers(0, 60, rows) + 25 * number,
            "item": random.integers(0, 40, rows) + 15 * number,
        }
    )


def _state(run: Path) -> Mapping[str, torch.Tensor]:
    """Returns name → whole tensor of the last checkpoint, written on any number of ranks."""
    checkpoint = find_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, FileSystemReader(checkpoint), planner=planner, no_dist=True)
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        for key, entry in value.items():
            if isinstance(entry, Mapping):
                walk(f"{prefix}{key}.", entry)
            elif isinstance(entry, torch.Tensor):
                flat[f"{prefix}{key}"] = entry

    walk("", state)
    return flat


@pytest.fixture(scope="module")
def monday(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of two days and a run on the first day, on two ranks."""
    folder = tmp_path_factory.mktemp("days")
    prepare_table(
        folder / "log",
        train=_day(0),
        test=_day(1),
        click="click",
        conversion="buy",
        ids=["user", "item"],
    )
    run_on_ranks(2, train_here, folder / "log", folder / "monday", OPTIONS)
    append_table(folder / "log", train=_day(1), test=_day(2), day="tuesday")
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_known_ids_are_kept_and_new_ones_are_drawn(
    ranks: int, monday: Path, tmp_path: Path
) -> None:
    today = monday / "log" / "days" / "tuesday"
    start = replace(STILL, start_from=monday / "monday")
    if ranks == 1:
        train_here(today, tmp_path / "tuesday", start)
    else:
        run_on_ranks(ranks, train_here, today, tmp_path / "tuesday", start)
    train_here(today, tmp_path / "fresh", STILL)
    before, after, fresh = map(
        _state, (monday / "monday", tmp_path / "tuesday", tmp_path / "fresh")
    )
    rows = {of.name: of.num_embeddings for of in PreparedDataSet.open(today).schema.tables}
    for table in ("user", "item"):
        (key,) = [name for name in after if name.endswith(f"{table}.weight")]
        kept = len(before[key])
        assert kept < len(after[key]) == rows[table]
        torch.testing.assert_close(after[key][:kept], before[key], rtol=0, atol=0)
        # First-order columns begin at 0, where one step of 1e-30 is not lost to rounding.
        torch.testing.assert_close(after[key][kept:], fresh[key][kept:], rtol=0, atol=1e-25)
        assert not torch.equal(before[key], fresh[key][:kept])
        # Row-wise Adagrad's sums grow in the rows of the one step, which is the same in both runs.
        sums = f"optimizer.state.{key.removeprefix('model.')}.sum"
        still = fresh[sums] == 0
        expected = torch.zeros(rows[table])
        expected[:kept] = before[sums]
        assert 0 < still.sum() < rows[table]
        torch.testing.assert_close(after[sums][still], expected[still], rtol=0, atol=0)
        assert (after[sums] >= expected).all()
        assert before[sums].count_nonzero() > kept / 2
    for name, weight in before.items():
        if ".towers." in name and name.startswith("model."):
            torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)


def test_reserved_rows_keep_the_shape_of_tables_and_of_plans(monday: Path, tmp_path: Path) -> None:
    log = monday / "log"
    reserved = replace(OPTIONS, table_rows={"user": 200})
    train_here(log / "days" / "tuesday", tmp_path / "tuesday", reserved)
    added = append_table(log, train=_day(2), test=_day(3), day="wednesday")
    # More passes over all days, from a run that has fewer rows of items.
    continued = replace(OPTIONS, start_from=tmp_path / "tuesday")
    train_here(log, tmp_path / "wednesday", continued)
    plans = [
        json.loads((tmp_path / run / "plan.json").read_text()) for run in ("tuesday", "wednesday")
    ]
    shapes = [
        {
            name: len(state)
            for name, state in _state(tmp_path / run).items()
            if name.startswith("model.") and "embedding_bags" in name
        }
        for run in ("tuesday", "wednesday")
    ]
    user = next(name for name in shapes[0] if "user" in name)
    item = next(name for name in shapes[0] if "item" in name)
    assert shapes[0][user] == shapes[1][user] == 200
    assert shapes[0][item] < shapes[1][item] == added.schema.table("item").num_embeddings
    assert plans[0] != plans[1]
    assert [str(plan).count("200") for plan in plans] == [str(plans[0]).count("200")] * 2
    scores = Predictor(tmp_path / "wednesday").score(_day(3))
    assert scores["pctr"].between(0, 1).all()

    with pytest.raises(EsmmTorchrecError, match=r"item=10 is too few: .* has \d+ rows"):
        train_here(log, tmp_path / "other", replace(OPTIONS, table_rows={"item": 10}))
    with pytest.raises(EsmmTorchrecError, match=r"'shop', and .* has 'user', 'item'"):
        train_here(log, tmp_path / "other", replace(OPTIONS, table_rows={"shop": 10}))
    with pytest.raises(EsmmTorchrecError, match=r"user=150 is too few: .*tuesday has 200 rows"):
        train_here(log, tmp_path / "other", replace(continued, table_rows={"user": 150}))
    with pytest.raises(EsmmTorchrecError, match="`table_rows` user=200 and this one has user=300"):
        train_here(
            log / "days" / "tuesday",
            tmp_path / "tuesday",
            replace(reserved, table_rows={"user": 300}),
        )
