"""A batch moves whole, field by field, and only where it must."""

from __future__ import annotations

from dataclasses import fields

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch

META = torch.device("meta")


def _bags(*, weighted: bool) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        keys=["item"],
        values=torch.tensor([3, 1, 4]),
        lengths=torch.tensor([2, 0, 1]),
        weights=torch.ones(3) if weighted else None,
    )


def _full() -> ImpressionBatch:
    """Every field given."""
    row = torch.zeros(3)
    return ImpressionBatch(
        click=row,
        conversion=row,
        sparse_features=_bags(weighted=False),
        weighted_sparse_features=_bags(weighted=True),
        shared_sparse_features=_bags(weighted=False),
        shared_weighted_sparse_features=_bags(weighted=True),
        shared_index=row.long(),
        dense_features=torch.zeros(3, 2),
        weight=row,
        mean_weight=torch.tensor(3.0),
        mean_click_weight=torch.tensor(1.0),
        sample_id=row.long(),
        group_id=row.long(),
        true_ctr=row,
        true_cvr=row,
    )


def _tensors(value: torch.Tensor | KeyedJaggedTensor) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    weights = value.weights_or_none()
    return [value.values(), value.lengths(), *([] if weights is None else [weights])]


def test_every_field_moves() -> None:
    """The meta device stands for a GPU: another device, on any machine."""
    batch = _full()
    moved = batch.to(META)
    for field in fields(ImpressionBatch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert before is not None, f"{field.name} is not covered"
        assert type(after) is type(before)
        for old, new in zip(_tensors(before), _tensors(after), strict=True):
            assert old.device.type == "cpu"
            assert new.device == META
            assert new.shape == old.shape


def test_what_is_there_already_is_not_copied() -> None:
    batch = _full()
    assert batch.to(torch.device("cpu")) is batch


def test_what_is_left_out_stays_out() -> None:
    batch = ImpressionBatch(click=torch.zeros(2), conversion=torch.zeros(2))
    moved = batch.to(META)
    assert moved.click.device == META
    assert [field.name for field in fields(moved) if getattr(moved, field.name) is not None] == [
        "click",
        "conversion",
    ]
