"""The reader against the Parquet files read with pandas."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.reader import ImpressionReader, Selection
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.schema import COLLECTIONS
from tests.plain_esmm import read_frame
from tests.prepared_data import write_data_set


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataSet:
    return write_data_set(tmp_path_factory.mktemp("data") / "prepared", train=317, test=90)


@pytest.fixture(scope="module")
def split(dataset: PreparedDataSet) -> MappedSplit:
    return MappedSplit.open(dataset, "train")


@pytest.fixture(scope="module")
def frame(dataset: PreparedDataSet) -> pd.DataFrame:
    return read_frame(dataset, "train")


def _bags(
    features: KeyedJaggedTensor, key: str, index: torch.Tensor | None, size: int
) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of each impression, read from a KeyedJaggedTensor bag by bag."""
    jagged = features[key]
    ids = [part.tolist() for part in torch.split(jagged.values(), jagged.lengths().tolist())]
    weights: list[list[float]] = [[] for _ in ids]
    if features.weights_or_none() is not None:
        weights = [
            part.tolist() for part in torch.split(jagged.weights(), jagged.lengths().tolist())
        ]
    order = range(size) if index is None else index.tolist()
    return [(ids[bag], weights[bag]) for bag in order]


def _with_samples(reader: ImpressionReader) -> list[tuple[ImpressionBatch, list[int]]]:
    """The rest of an epoch: each batch of this rank with the sample ids of its impressions."""
    samples = reader.split.scalars["sample_id"][reader.rows_left()]
    first = reader.rank * reader.batch_size
    return [
        (batch, samples[start + first : start + first + reader.batch_size].tolist())
        for batch, start in zip(
            reader, range(0, len(samples), reader.global_batch_size), strict=True
        )
    ]


def check_features(
    batch: ImpressionBatch,
    samples: list[int],
    frame: pd.DataFrame,
    split: MappedSplit,
) -> None:
    """Every id and weight of a batch equals the file's; padding is empty."""
    assert batch.weight is not None
    size = len(batch.click)
    kinds = {feature.name: feature for feature in split.schema.id_features}
    for collection, features in split.schema.collections.items():
        given = getattr(batch.features, collection)
        assert sorted(given.keys()) == sorted(feature.name for feature in features)
        index = batch.features.shared_index if COLLECTIONS[collection].shared else None
        for name in given.keys():  # noqa: SIM118  (a KeyedJaggedTensor is no dict)
            for row, (ids, weights) in enumerate(_bags(given, name, index, size)):
                if batch.weight[row] == 0:
                    assert ids == []
                    continue
                stored = frame.loc[samples[row]]
                value = stored[name]
                if kinds[name].multi_valued:
                    assert ids == list(value)
                else:
                    assert ids == ([] if pd.isna(value) else [value])
                if kinds[name].weighted and ids:
                    wanted = np.atleast_1d(stored[f"{name}__weight"]).astype(np.float64)
                    if kinds[name].multi_valued:
                        wanted = wanted / wanted.sum()
                    np.testing.assert_allclose(weights, wanted, rtol=1e-6)


@pytest.mark.parametrize("shared_features", ["once", "expanded"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_batches_hold_what_the_files_hold(
    split: MappedSplit, frame: pd.DataFrame, shared_features, chunk: int
) -> None:
    for rank in range(3):
        reader = ImpressionReader(
            split,
            batch_size=32,
            rank=rank,
            world_size=3,
            seed=5,
            shuffle_chunk=chunk,
            shared_features=shared_features,
        )
        for batch, samples in _with_samples(reader):
            check_features(batch, samples, frame, split)
            assert batch.weight is not None
            real = batch.weight > 0
            assert int(real.sum()) == len(samples)
            rows = frame.loc[samples]
            for value, column in (
                (batch.click, "click"),
                (batch.conversion, "conversion"),
                (batch.features.dense_features, ["price", "recency"]),
            ):
                assert value is not None
                np.testing.assert_array_equal(value[real].numpy(), rows[column].to_numpy())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk", [1, 5])
def test_ranks_share_one_order_and_agree_on_sizes(
    split: MappedSplit, world_size: int, chunk: int
) -> None:
    by_rank = [
        _with_samples(
            ImpressionReader(
                split,
                batch_size=840 // (world_size * 20),
                rank=rank,
                world_size=world_size,
                seed=2,
                shuffle_chunk=chunk,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    order: list[int] = []
    for step in zip(*by_rank, strict=True):
        batches = [batch for batch, _ in step]
        assert len({len(batch.click) for batch in batches}) == 1
        assert len({batch.features.shared_sparse_features.stride() for batch in batches}) == 1
        weight = sum(float(batch.weight.sum()) for batch in batches)
        clicks = sum(float((batch.weight * batch.click).sum()) for batch in batches)
        for batch, samples in step:
            assert float(batch.mean_weight) == pytest.approx(weight / world_size)
            clicked = float(batch.mean_label_weight.click)
            assert clicked == pytest.approx(clicks / world_size)
            order += samples
    assert sorted(order) == list(range(1, 318))
    one_rank = ImpressionReader(split, batch_size=317, seed=2, shuffle_chunk=chunk)
    ((_, whole),) = _with_samples(one_rank)
    assert order == whole


def test_seed_and_epoch_decide_the_order(split: MappedSplit) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        reader = ImpressionReader(split, batch_size=400, seed=seed)
        reader.load_state_dict({"epoch": epoch, "row": 0})
        ((_, samples),) = _with_samples(reader)
        return samples

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != sorted(order(1, 0))


def test_chunks_stay_together_and_are_not_longer(split: MappedSplit, frame: pd.DataFrame) -> None:
    reader = ImpressionReader(split, batch_size=317, seed=1, shuffle_chunk=4)
    ((_, samples),) = _with_samples(reader)
    owner = frame["shared_row"].to_dict()
    follows = [
        after == before + 1 and owner[after] == owner[before] for before, after in pairwise(samples)
    ]
    runs = np.diff(np.flatnonzero(~np.r_[False, follows, False]))
    assert runs.max() >= 4
    assert np.mean(follows) > 0.5
    # Two chunks of one user may come to lie beside each other, but not as a rule.
    assert np.mean(runs <= 4) > 0.9


def test_position_goes_on_exactly_on_another_number_of_ranks(split: MappedSplit) -> None:
    reader = ImpressionReader(split, batch_size=50, seed=4)
    first: list[int] = []
    for _, samples in _with_samples(reader):
        first += samples
        reader.advance()
        if reader.rows_done == 150:
            break
    rest: list[int] = []
    by_rank = []
    for rank in range(2):
        other = ImpressionReader(split, batch_size=30, rank=rank, world_size=2, seed=4)
        other.load_state_dict(reader.state_dict())
        assert other.steps_left == 3
        by_rank.append(_with_samples(other))
    for step in zip(*by_rank, strict=True):
        for _, samples in step:
            rest += samples
    ((_, whole),) = _with_samples(ImpressionReader(split, batch_size=317, seed=4))
    assert first + rest == whole


def test_the_end_of_an_epoch_begins_the_next(split: MappedSplit) -> None:
    reader = ImpressionReader(split, batch_size=200)
    reader.advance()
    assert (reader.epoch, reader.steps_left, reader.rows_done) == (0, 1, 200)
    reader.advance()
    assert (reader.epoch, reader.steps_left, reader.rows_done) == (1, 2, 317)


def test_a_selection_is_read_with_its_weights_and_copies(split: MappedSplit) -> None:
    rows = np.array([3, 5, 5, 5, 10, 200])
    weights = np.array([1.0, 0.5, 0.5, 2.0, 0.0, 1.0], np.float32)
    reader = ImpressionReader(split, batch_size=4, seed=9, selection=Selection(rows, weights))
    read: list[tuple[int, float]] = []
    for batch, samples in _with_samples(reader):
        assert batch.weight is not None
        assert batch.weight[len(samples) :].eq(0).all()
        read += zip(samples, batch.weight.tolist(), strict=False)
    wanted = list(zip((rows + 1).tolist(), weights.tolist(), strict=True))
    assert sorted(read) == sorted(wanted)


def test_unshuffled_rows_keep_the_order_of_the_data(split: MappedSplit) -> None:
    reader = ImpressionReader(split, batch_size=100, shuffle=False)
    order = [sample for _, samples in _with_samples(reader) for sample in samples]
    assert order == list(range(1, 318))


def test_raw_weights_are_left_as_stored(dataset: PreparedDataSet, frame: pd.DataFrame) -> None:
    split = MappedSplit.open(dataset, "train", history_weights="raw")
    (batch,) = ImpressionReader(split, batch_size=317, shuffle=False, shared_features="expanded")
    assert batch.features.shared_weighted_sparse_features is not None
    weights = batch.features.shared_weighted_sparse_features["history"].weights()
    np.testing.assert_array_equal(
        weights.numpy(), np.concatenate(frame["history__weight"].to_numpy())
    )


def test_the_mapped_copy_follows_the_data_set(tmp_path: Path) -> None:
    first = write_data_set(tmp_path / "a", train=40, test=20, seed=1)
    before = MappedSplit.open(first, "train").scalars["sample_id"].copy()
    second = write_data_set(tmp_path / "b", train=55, test=20, seed=2)
    (first.path / ".mapped").rename(second.path / ".mapped")
    assert len(before) == 40
    assert MappedSplit.open(second, "train").impressions == 55


def test_an_id_outside_its_table_is_refused(tmp_path: Path) -> None:
    dataset = write_data_set(tmp_path / "a", train=40, test=20)
    tables = tuple(
        replace(table, num_embeddings=9) if table.name == "item" else table
        for table in dataset.schema.tables
    )
    broken = replace(dataset, schema=replace(dataset.schema, tables=tables))
    with pytest.raises(DataError, match=r"'item', row \d+: id \d+ is outside table 'item' of 9"):
        MappedSplit.open(broken, "train")


@pytest.mark.parametrize(("world_size", "rows_per_step"), [(2, 61), (3, 50), (4, 5), (1, 40)])
def test_a_step_that_ranks_do_not_divide_has_the_same_rows(
    split: MappedSplit, world_size: int, rows_per_step: int
) -> None:
    (reference, *by_rank) = (
        list(
            ImpressionReader(
                split,
                batch_size=-(-rows_per_step // ranks),
                rank=rank,
                world_size=ranks,
                rows_per_step=rows_per_step,
                seed=2,
                shuffle_chunk=4,
            )
        )
        for ranks, rank in [(1, 0), *((world_size, rank) for rank in range(world_size))]
    )
    for whole, *parts in zip(reference, *by_rank, strict=True):
        assert {len(part.click) for part in parts} == {-(-rows_per_step // world_size)}
        real = [part.weight > 0 for part in parts]
        clicks = [part.click[kept] for part, kept in zip(parts, real, strict=True)]
        assert torch.equal(torch.cat(clicks), whole.click[whole.weight > 0])
        dense = [part.features.dense_features[kept] for part, kept in zip(parts, real, strict=True)]
        assert torch.equal(torch.cat(dense), whole.features.dense_features[whole.weight > 0])
        for part in parts:
            assert float(part.mean_weight) * world_size == pytest.approx(float(whole.mean_weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` 0"),
        ({"batch_size": 4, "world_size": 2, "rows_per_step": 9}, "rows_per_step 9 does not fit"),
        ({"batch_size": 4, "shuffle_chunk": 0}, "`shuffle_chunk` 0"),
        ({"batch_size": 4, "selection": Selection(np.array([], np.int64))}, "no impression"),
    ],
)
def test_what_cannot_be_read_is_named(split: MappedSplit, arguments, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ImpressionReader(split, **arguments)


def test_a_position_beyond_the_rows_is_refused(split: MappedSplit) -> None:
    """Such a reader would make no batch, and its loop would wait for one for ever."""
    reader = ImpressionReader(split, batch_size=20)
    for row in (317, 340):
        with pytest.raises(DataError, match=f"row {row} of a pass, is beyond the 317 rows"):
            reader.load_state_dict({"epoch": 1, "row": row})
    reader.load_state_dict({"epoch": 1, "row": 300})
    assert reader.steps_left == 1
