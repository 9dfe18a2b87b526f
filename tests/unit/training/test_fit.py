"""What a method trains on, and the size of its steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.data.stream import StreamedSplit
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.objectives.delayed import DelayedFeedbackObjective
from esmm_torchrec.training.fit import automatic_batch_size, shared_bags, training_part
from esmm_torchrec.training.options import TrainOptions
from tests.prepared_data import write_data_set


@pytest.mark.parametrize(
    ("rows", "device", "size"),
    [(1, "cpu", 64), (8_000, "cpu", 64), (40_000, "cpu", 128), (117_000, "cpu", 256),
     (600_000, "cpu", 2048), (43_000_000, "cpu", 4096), (43_000_000, "cuda", 32768)],
)  # fmt: skip
def test_the_automatic_batch_size_follows_the_rows(rows: int, device: str, size: int) -> None:
    assert automatic_batch_size(rows, torch.device(device)) == size


def test_a_batch_size_is_auto_or_positive() -> None:
    with pytest.raises(OptionError, match="`batch_size` 0 is not positive"):
        TrainOptions(batch_size=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": -1}, "`seed` -1 is negative"), ({"resume": "²"}, "`resume` ² is not auto")],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainOptions(**options)


@pytest.mark.parametrize("method", ["esmm", "base"])
def test_weights_of_the_data_count_in_the_loss_and_the_base_rates(
    method: str, tmp_path: Path
) -> None:
    write_data_set(tmp_path / "data", train=300, test=10)
    split = MappedSplit.open(PreparedDataSet.open(tmp_path / "data"), "train")
    weight = np.random.default_rng(0).uniform(0.5, 3.0, 300).astype(np.float32)
    weighted = replace(split, scalars=split.scalars | {"sample_weight": weight})
    part = training_part(weighted, TrainOptions(method=method))
    click, conversion = (split.scalars[name] == 1 for name in ("click", "conversion"))
    rows = np.flatnonzero(click) if method == "base" else np.arange(300)
    assert part.selection is not None
    np.testing.assert_array_equal(part.selection.rows, rows)
    np.testing.assert_array_equal(part.selection.weights, weight[rows])
    assert part.base_rates.impressions == pytest.approx(weight[rows].sum())
    assert part.base_rates.prior("conversion", "click") == pytest.approx(
        weight[click & conversion].sum() / weight[click].sum()
    )
    (batch,) = ImpressionReader(weighted, batch_size=300, selection=part.selection)
    assert batch.weight is not None
    assert float(batch.weight.sum()) == pytest.approx(weight[rows].sum(), rel=1e-6)


def test_the_planner_counts_shared_bags_once_unless_they_are_written_out(tmp_path: Path) -> None:
    dataset = write_data_set(tmp_path / "data", train=400, test=20)
    split = MappedSplit.open(dataset, "train")
    once = shared_bags(split, TrainOptions(), rows_per_rank=64, num_rows=400)
    assert once
    assert all(0 < bags < 64 for bags in once.values())
    expanded = TrainOptions(shared_features="expanded")
    assert shared_bags(split, expanded, rows_per_rank=64, num_rows=400) == {}


def test_streamed_rows_have_no_labels_of_their_own(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data", train=300, test=10)
    split = StreamedSplit(PreparedDataSet.open(tmp_path / "data"), "train", lanes=1, window=64)
    with pytest.raises(OptionError, match=r"the objective needs rows with .*; choose another"):
        training_part(split, TrainOptions(objective=DelayedFeedbackObjective()))
