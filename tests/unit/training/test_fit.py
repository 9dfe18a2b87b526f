"""What a method trains on, and the size of its steps."""

from __future__ import annotations

import pytest
import torch

from esmm_torchrec.errors import OptionError
from esmm_torchrec.training.fit import automatic_batch_size
from esmm_torchrec.training.options import TrainOptions


@pytest.mark.parametrize(
    ("rows", "device", "size"),
    [(1, "cpu", 64), (8_000, "cpu", 64), (40_000, "cpu", 128), (117_000, "cpu", 256),
     (600_000, "cpu", 2048), (43_000_000, "cpu", 4096), (43_000_000, "cuda", 32768)],
)  # fmt: skip
def test_the_automatic_batch_size_follows_the_rows(rows: int, device: str, size: int) -> None:
    assert automatic_batch_size(rows, torch.device(device)) == size


def test_a_batch_size_is_auto_or_positive() -> None:
    with pytest.raises(OptionError, match="--batch-size 0 is not positive"):
        TrainOptions(batch_size=0)
