"""Sharded weights: those that went in, or those that the seed gives, whatever the plan."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.sharding import apply
from esmm_torchrec.sharding.apply import shard
from esmm_torchrec.sharding.planner import KernelOption, ShardingOption, Workload, make_plan
from esmm_torchrec.sharding.process_group import Ranks, process_group

ROWS, DIM = 53, 8
SHARDINGS: tuple[tuple[ShardingOption, KernelOption], ...] = (
    ("table_wise", "fused"),
    ("table_wise", "dense"),
    ("row_wise", "fused"),
    ("column_wise", "fused"),
    ("table_row_wise", "fused"),
    ("data_parallel", "dense"),
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group("cpu") as ranks:
        yield ranks


class Model(nn.Module):
    """Two tables and something dense."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name]
                )
                for name in ("item", "shop")
            ],
            device=torch.device(device),
        )
        self.dense = nn.Linear(3, 2)


def _sharded(
    model: Model,
    sharding: ShardingOption,
    kernel: KernelOption,
    ranks: Ranks,
    seed: int = 0,
    zero_row: int | None = None,
) -> dict[str, torch.Tensor]:
    """State of the sharded model, each table whole."""
    plan = make_plan(model, ranks=ranks, sharding=sharding, kernel=kernel, workload=Workload(64))
    state = shard(model, plan=plan, ranks=ranks, seed=seed, zero_row=zero_row).state_dict()
    whole = {}
    for key, value in state.items():
        if isinstance(value, ShardedTensor):
            whole[key] = torch.empty(*value.metadata().size)
            for part in value.local_shards():
                row, column = part.metadata.shard_offsets
                rows, columns = part.tensor.shape
                whole[key][row : row + rows, column : column + columns] = part.tensor
        else:
            whole[key] = value.clone()
    return whole


@pytest.mark.parametrize(("sharding", "kernel"), SHARDINGS)
def test_weights_that_are_there_are_kept(
    sharding: ShardingOption, kernel: KernelOption, ranks: Ranks
) -> None:
    model = Model("cpu")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = _sharded(model, sharding, kernel, ranks)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize(("sharding", "kernel"), SHARDINGS)
def test_drawn_weights_depend_on_the_seed_alone(
    sharding: ShardingOption, kernel: KernelOption, ranks: Ranks
) -> None:
    reference = _sharded(Model("meta"), "table_wise", "fused", ranks, seed=3)
    torch.manual_seed(123)  # what the process drew before must not matter
    drawn = _sharded(Model("meta"), sharding, kernel, ranks, seed=3)
    other = _sharded(Model("meta"), sharding, kernel, ranks, seed=4)
    for name in ("item", "shop"):
        key = f"collection.embedding_bags.{name}.weight"
        assert torch.equal(drawn[key], reference[key])
        assert (other[key] != drawn[key]).all()


def test_drawn_weights_are_what_torchrec_draws(ranks: Ranks) -> None:
    """Uniform within the square root of 1 / rows."""
    drawn = _sharded(Model("meta"), "row_wise", "fused", ranks)
    tables = [drawn[f"collection.embedding_bags.{name}.weight"] for name in ("item", "shop")]
    assert not torch.equal(*tables)
    limit = (1 / ROWS) ** 0.5
    for table in tables:
        assert (table != 0).all()
        assert table.abs().max() <= limit
        assert table.mean().abs() < 0.1 * limit
        assert table.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("sharding", "kernel"), SHARDINGS)
def test_a_row_starts_at_zero_only_when_asked(
    device: str, sharding: ShardingOption, kernel: KernelOption, ranks: Ranks
) -> None:
    """Row 0 is an ordinary id in somebody else's pipeline."""
    keys = [f"collection.embedding_bags.{name}.weight" for name in ("item", "shop")]
    plain = _sharded(Model(device), sharding, kernel, ranks)
    zeroed = _sharded(Model(device), sharding, kernel, ranks, zero_row=5)
    for key in keys:
        assert (plain[key] != 0).all()
        assert not zeroed[key][5].any()
        assert (zeroed[key].abs().sum(dim=1) != 0).sum() == ROWS - 1


def test_any_part_of_a_table_is_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that begin and end within blocks; no rank ever draws the whole table."""
    monkeypatch.setattr(apply, "DRAWN_ROWS", 8)
    config = EmbeddingBagConfig(
        name="item", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["item"]
    )
    whole = torch.full((ROWS, DIM), float("nan"))
    apply._draw(whole, 0, 0, config=config, seed=5)
    assert not whole.isnan().any()
    assert len(whole.unique()) > 0.9 * ROWS * DIM  # no block repeats another
    for row, rows, column, columns in (
        (0, 8, 0, 8), (3, 20, 4, 4), (8, 16, 0, 4), (47, 6, 0, 8), (20, 0, 0, 8), (13, 1, 0, 8)
    ):  # fmt: skip
        part = torch.empty(rows, columns)
        apply._draw(part, row, column, config=config, seed=5)
        assert torch.equal(part, whole[row : row + rows, column : column + columns])
