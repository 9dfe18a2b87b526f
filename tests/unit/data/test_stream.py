"""The streamed order, read on any number of ranks, beside what the files hold."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from esmm_torchrec.batch import ImpressionBatch
from esmm_torchrec.data import split_writer, storage
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.stream import StreamedSplit, StreamReader
from esmm_torchrec.errors import DataError, OptionError
from tests.plain_esmm import read_frame
from tests.prepared_data import write_data_set
from tests.store import CREDENTIALS, Store, serve
from tests.unit.data.test_reader import check_features

STEP = 48


class Together:
    """Ranks that are threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier = Barrier(ranks, timeout=60)
        self._values: list[np.ndarray] = []

    def _all(self, values: np.ndarray) -> np.ndarray:
        if self._barrier.wait() == 0:
            self._values = []
        self._barrier.wait()
        self._values.append(values)
        self._barrier.wait()
        return np.stack(self._values)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return self._all(values).sum(axis=0)

    def max(self, values: np.ndarray) -> np.ndarray:
        return self._all(values).max(axis=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataSet:
    """Ten and five row groups of impressions in several files, shared rows in groups of 7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_writer, "ROWS_PER_GROUP", {"impressions": 71, "shared": 7})
        patch.setattr(split_writer, "ROW_GROUPS_PER_FILE", 3)
        return write_data_set(tmp_path_factory.mktemp("stream") / "data")


@pytest.fixture
def split(dataset: PreparedDataSet) -> StreamedSplit:
    return StreamedSplit(dataset, "train", lanes=4, window=60)


def _samples(batch: ImpressionBatch, sample_of_price: dict[float, int]) -> list[int]:
    """The rows of a batch without its padding; a price occurs once."""
    dense = batch.features.dense_features
    assert dense is not None
    assert batch.weight is not None
    return [sample_of_price[price] for price in dense[batch.weight > 0, 0].tolist()]


def _read(
    split: StreamedSplit, world_size: int, *, state: dict | None = None, **options
) -> list[list[ImpressionBatch]]:
    """The batches of each rank."""
    together = Together(world_size)

    def rank(number: int) -> list[ImpressionBatch]:
        reader = StreamReader(
            split,
            rows_per_step=options.pop("rows_per_step", STEP) if world_size == 1 else STEP,
            rank=number,
            world_size=world_size,
            exchange=together,
            **options,
        )
        if state is not None:
            reader.load_state_dict(state)
        steps = reader.steps_left
        batches = list(reader)
        assert len(batches) == steps
        return batches

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank, range(world_size)))


@pytest.fixture(scope="module")
def sample_of_price(dataset: PreparedDataSet) -> dict[float, int]:
    frame = read_frame(dataset, "train")
    prices = frame["price"].astype(np.float32).tolist()
    assert len(set(prices)) == 700
    return dict(zip(prices, frame.index.tolist(), strict=True))


@pytest.mark.parametrize("shared_features", ["once", "expanded"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_every_row_is_read_once_and_holds_what_the_files_hold(
    split: StreamedSplit, dataset, sample_of_price, shared_features, chunk: int
) -> None:
    frame = read_frame(dataset, "train")
    (batches,) = _read(split, 1, shared_features=shared_features, shuffle_chunk=chunk, seed=3)
    samples = [_samples(batch, sample_of_price) for batch in batches]
    assert sorted(row for rows in samples for row in rows) == list(range(1, 701))
    for batch, rows in zip(batches, samples, strict=True):
        padded = rows + [rows[0]] * (STEP - len(rows))
        check_features(batch, padded, frame, dataset)
        real = batch.weight > 0
        np.testing.assert_array_equal(batch.click[real].numpy(), frame.loc[rows]["click"])
        np.testing.assert_array_equal(batch.conversion[real].numpy(), frame.loc[rows]["conversion"])


@pytest.mark.parametrize("chunk", [1, 5])
def test_any_number_of_ranks_reads_the_same_steps(
    split: StreamedSplit, sample_of_price, chunk: int
) -> None:
    (expected,) = _read(split, 1, shuffle_chunk=chunk)
    for world_size in (2, 4):
        by_rank = _read(split, world_size, shuffle_chunk=chunk)
        for one, together in zip(expected, zip(*by_rank, strict=True), strict=True):
            rows = [row for batch in together for row in _samples(batch, sample_of_price)]
            assert rows == _samples(one, sample_of_price)
            assert {batch.mean_weight.item() * world_size for batch in together} == {len(rows)}
            (clicked,) = {batch.mean_label_weight["click"].item() for batch in together}
            assert clicked * world_size == one.click.sum()
            sizes = {batch.features.shared_sparse_features.stride() for batch in together}
            assert len(sizes) == 1
            for batch in together:
                assert int(batch.features.shared_index.max()) < sizes.copy().pop()


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_run_goes_on_with_other_ranks_and_another_batch_size(
    split: StreamedSplit, sample_of_price, steps: int
) -> None:
    (expected,) = _read(split, 1, seed=1)
    reader = StreamReader(split, rows_per_step=STEP, seed=1)
    for _ in range(steps):
        reader.advance()
    state = reader.state_dict()
    by_rank = _read(split, 2, seed=1, state=state)
    for one, together in zip(expected[steps:], zip(*by_rank, strict=True), strict=True):
        rows = [row for batch in together for row in _samples(batch, sample_of_price)]
        assert rows == _samples(one, sample_of_price)
    # With steps of another size the windows stay, and so do the rows to come.
    (others,) = _read(split, 1, seed=1, state=state, rows_per_step=28)
    to_come = [row for batch in expected[steps:] for row in _samples(batch, sample_of_price)]
    assert sorted(to_come) == sorted(
        row for batch in others for row in _samples(batch, sample_of_price)
    )


def test_epochs_and_seeds_have_orders_of_their_own(split: StreamedSplit, sample_of_price) -> None:
    def rows(**options) -> list[int]:
        (batches,) = _read(split, 1, **options)
        return [row for batch in batches for row in _samples(batch, sample_of_price)]

    first = rows()
    assert rows() == first
    assert rows(seed=1) != first
    assert rows(state={"epoch": 1, "row": 0}) != first
    # Without shuffling, the lanes are stretches of the data set.
    one_lane = replace(split, lanes=1)
    (batches,) = _read(one_lane, 1, shuffle=False)
    stored = [row for batch in batches for row in _samples(batch, sample_of_price)]
    assert stored == list(range(1, 701))


def test_the_position_counts_rows_and_passes(split: StreamedSplit) -> None:
    reader = StreamReader(split, rows_per_step=STEP)
    # Lanes of 175 rows and windows of 60: 5 steps of 12 in each of two windows, and 55 rows.
    assert reader.steps_per_epoch == 5 + 5 + 5
    for _ in range(15):
        assert reader.epoch == 0
        reader.advance()
    assert (reader.epoch, reader.rows_done, reader.steps_left) == (1, 700, 15)


def test_lanes_that_do_not_fit_are_refused(split: StreamedSplit) -> None:
    with pytest.raises(OptionError, match="4 lanes cannot be divided among 3 ranks"):
        StreamReader(split, rows_per_step=STEP, world_size=3)
    with pytest.raises(OptionError, match="a `batch_size` of 50 is not a multiple of 4 lanes"):
        StreamReader(split, rows_per_step=50)
    with pytest.raises(OptionError, match="`window` 0 is not positive"):
        replace(split, window=0)


def test_a_lane_may_be_shorter_than_the_others(dataset: PreparedDataSet) -> None:
    """In the last window, one lane has one row and the others none."""
    uneven = StreamedSplit(dataset, "test", lanes=4, window=83)  # 333 = 83 · 4 + 1
    frame = read_frame(dataset, "test")
    test_sample = dict(
        zip(frame["price"].astype(np.float32).tolist(), frame.index.tolist(), strict=True)
    )
    by_rank = _read(uneven, 4)
    rows = [row for rank in by_rank for batch in rank for row in _samples(batch, test_sample)]
    assert sorted(rows) == list(range(1, 334))
    assert sum(batch.weight.sum().item() for batch in (rank[-1] for rank in by_rank)) == 1


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with serve() as store:
        yield store


def test_a_store_is_streamed_like_a_disk(
    server: Store, split: StreamedSplit, sample_of_price, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(split_writer, "ROWS_PER_GROUP", {"impressions": 71, "shared": 7})
    monkeypatch.setattr(split_writer, "ROW_GROUPS_PER_FILE", 3)
    remote = write_data_set(server.uri("bucket/streamed"))
    streamed = replace(split, dataset=remote)
    (expected,) = _read(split, 1)
    server.requests.clear()
    server.failures["GET"] = 2
    (batches,) = _read(streamed, 1)
    for one, other in zip(expected, batches, strict=True):
        assert _samples(one, sample_of_price) == _samples(other, sample_of_price)
    assert {method for method, _, _ in server.requests} <= {"GET", "HEAD"}
    assert all(span for method, _, span in server.requests if method == "GET")  # parts of files

    damaged = remote.root / remote.splits["train"].impression_parts[1].file
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])
    reader = StreamReader(streamed, rows_per_step=STEP)
    with pytest.raises(DataError, match=f"{damaged} has {len(whole) - 9} bytes, but"):
        _consumed(reader)
    damaged.delete()
    position = reader.state_dict()
    with pytest.raises(DataError, match=f"{damaged} is missing"):
        _consumed(reader)
    assert reader.state_dict() == position
    damaged.write_bytes(whole)
    rest = [row for batch in reader for row in _samples(batch, sample_of_price)]
    everything = [row for batch in expected for row in _samples(batch, sample_of_price)]
    assert everything[len(everything) - len(rest) :] == rest


def _consumed(reader: StreamReader) -> None:
    for _ in reader:
        reader.advance()


def test_a_flipped_bit_is_found_when_its_row_group_is_read(tmp_path: Path) -> None:
    copy = write_data_set(tmp_path / "copy")
    (file,) = copy.impression_files("train")
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    split = StreamedSplit(PreparedDataSet.open(copy.path), "train", lanes=1, window=1000)
    with pytest.raises(DataError, match=r"impressions-00000\.parquet (is broken|cannot be read)"):
        list(StreamReader(split, rows_per_step=100))
