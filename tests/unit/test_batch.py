"""A batch moves whole, field by field, and only where it must."""

from __future__ import annotations

import re

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import BatchFeatures, ImpressionBatch, NamedTensors
from esmm_torchrec.errors import OptionError

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
        mean_label_weight={"click": torch.tensor(1.0)},
    )


def _tensors(value: object) -> list[torch.Tensor]:
    """Every tensor below a value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, KeyedJaggedTensor):
        weights = value.weights_or_none()
        return [value.values(), value.lengths(), *([] if weights is None else [weights])]
    if isinstance(value, NamedTensors):
        return list(value.values())
    assert isinstance(value, tuple)
    return [tensor for part in value if part is not None for tensor in _tensors(part)]


def test_every_attribute_moves() -> None:
    """The meta device stands for a GPU: another device, on any machine."""
    batch = _full()
    moved = batch.to(META)
    assert vars(moved).keys() == vars(batch).keys()
    for name, before in vars(batch).items():
        after = getattr(moved, name)
        assert type(after) is type(before)
        olds, news = _tensors(before), _tensors(after)
        assert olds, f"{name} is not covered"
        for old, new in zip(olds, news, strict=True):
            assert old.device.type == "cpu"
            assert new.device == META
            assert new.shape == old.shape


def test_a_batch_on_its_device_is_not_copied() -> None:
    batch = _full()
    assert batch.to(torch.device("cpu")) is batch


def test_what_is_left_out_stays_out() -> None:
    batch = ImpressionBatch(click=torch.zeros(2), conversion=torch.zeros(2))
    moved = batch.to(META)
    assert moved.click.device == META
    assert moved.features == BatchFeatures()
    assert moved.weight is None
    assert list(moved.labels) == ["click", "conversion"]


def test_labels_of_another_chain_go_by_name() -> None:
    labels = {"click": torch.ones(2), "cart": torch.zeros(2)}
    batch = ImpressionBatch(labels=labels)
    assert batch.labels.cart.tolist() == [0, 0]
    with pytest.raises(AttributeError, match="there is no 'order', only click, cart"):
        _ = batch.labels.order
    with pytest.raises(OptionError, match="either labels or click"):
        ImpressionBatch(labels=labels, click=torch.ones(2))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"conversion": torch.zeros(3, 1)}, "conversion has shape (3, 1), not (3,)"),
        ({"weight": torch.ones(3, 1)}, "weight has shape (3, 1), not (3,)"),
        ({"weight": torch.ones(2)}, "weight has shape (2,), not (3,)"),
        ({"click": torch.ones(3, dtype=torch.int64)}, "click is torch.int64, not float32"),
        ({"dense_features": torch.zeros(3)}, "dense_features has shape (3,), not (3, D)"),
        ({"shared_index": torch.zeros(2).long()}, "shared_index has shape (2,), not (3,)"),
        ({"click": torch.ones(2), "conversion": torch.ones(2), "weight": torch.ones(2),
          "dense_features": torch.zeros(2, 2), "shared_index": torch.zeros(2).long()},
         "sparse_features has 3 bags per key, not 2"),
    ],
)  # fmt: skip
def test_wrong_shapes_and_dtypes_are_refused(changed: dict, sentence: str) -> None:
    """A (B, 1) label against (B,) logits would broadcast to (B, B) and train something else."""
    row = torch.zeros(3)
    arguments = {
        "click": row,
        "conversion": row,
        "weight": torch.ones(3),
        "sparse_features": _bags(weighted=False),
        "dense_features": torch.zeros(3, 2),
    }
    with pytest.raises(OptionError, match=re.escape(sentence)):
        ImpressionBatch(**(arguments | changed))
