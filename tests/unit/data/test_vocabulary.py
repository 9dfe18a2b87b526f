from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data import vocabulary as vocabulary_module
from esmm_torchrec.data.vocabulary import IdCounter, Vocabulary
from esmm_torchrec.errors import DataError


def listed(vocabulary: Vocabulary) -> list[tuple[int | str, int]]:
    return list(zip(vocabulary.raw_ids.to_pylist(), vocabulary.counts.tolist(), strict=True))


def by_hand(ids: list, min_count: int) -> list[tuple]:
    counts = Counter(ids)
    kept = [(raw_id, count) for raw_id, count in counts.items() if count >= min_count]
    return sorted(kept, key=lambda pair: (-pair[1], pair[0]))


def test_rows_follow_count_then_raw_id():
    vocabulary = Vocabulary.from_counts(np.array([9, 3, 5, 7]), np.array([2, 5, 1, 2]), 2)
    assert listed(vocabulary) == [(3, 5), (7, 2), (9, 2)]
    assert vocabulary.num_embeddings == 4
    rows = vocabulary.encode(np.array([7, 5, 3, 9, -1, 2**63 - 1, -(2**63), 4]))
    assert rows.dtype == np.int32
    assert rows.tolist() == [2, 0, 1, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("spread", [1, 10**4, 10**13], ids=["dense", "wider", "sparse"])
def test_integers_in_any_range_equal_a_plain_count(spread):
    random = np.random.default_rng(spread)
    blocks = [random.integers(-40, 200, size) * spread for size in (100, 1, 3000, 0, 50)]
    counter = IdCounter()
    for block in blocks:
        counter.add(block)
    vocabulary = counter.vocabulary(3)
    expected = by_hand(np.concatenate(blocks).tolist(), 3)
    assert listed(vocabulary) == expected
    row_of = {raw_id: row for row, (raw_id, _) in enumerate(expected, start=1)}
    asked = np.arange(-60, 220) * spread
    assert vocabulary.encode(asked).tolist() == [row_of.get(int(i), 0) for i in asked]


def test_a_range_that_becomes_wide_keeps_its_counts():
    counter = IdCounter()
    counter.add(np.array([5, 5, 6]))
    counter.add(np.array([2**40, 5, 6, -(2**40)]))
    counter.add(np.array([5, 2**40]))
    assert listed(counter.vocabulary(1)) == [(5, 4), (6, 2), (2**40, 2), (-(2**40), 1)]


def test_merging_many_strings_equals_a_plain_count(monkeypatch):
    monkeypatch.setattr(vocabulary_module, "_MERGE_ROWS", 100)
    random = np.random.default_rng(0)
    ids = [f"é{i}" for i in random.geometric(0.001, 20_000)]
    counter = IdCounter()
    for start in range(0, len(ids), 90):
        counter.add(pa.array(ids[start : start + 90]))
    vocabulary = counter.vocabulary(5)
    assert listed(vocabulary) == by_hand(ids, 5)


def test_strings():
    counter = IdCounter()
    counter.add(pa.array(["b", None, "a", "b"]))
    counter.add(np.array(["a", "c"]))
    vocabulary = counter.vocabulary(2)
    assert listed(vocabulary) == [("a", 2), ("b", 2)]
    chunked = pa.chunked_array([["c", "b"], [None, "a"]])
    assert vocabulary.encode(chunked).tolist() == [0, 2, 0, 1]
    assert vocabulary.encode(pa.array(["b"]).dictionary_encode()).tolist() == [2]


def test_nulls_get_row_0_and_are_not_counted():
    counter = IdCounter()
    counter.add(pa.array([None, 0, 0, None, 4]))
    vocabulary = counter.vocabulary(1)
    assert listed(vocabulary) == [(0, 2), (4, 1)]
    assert vocabulary.encode(pa.array([None, 0, 4])).tolist() == [0, 1, 2]
    assert vocabulary.encode(pa.array([None, None])).tolist() == [0, 0]


def test_nothing_counted_gives_only_the_unknown_row():
    vocabulary = IdCounter().vocabulary(1)
    assert vocabulary.num_embeddings == 1
    assert vocabulary.encode(np.array([1, 2])).tolist() == [0, 0]
    assert vocabulary.encode(pa.array(["a"])).tolist() == [0]


@pytest.mark.parametrize("ids", [[3, 3, -8], ["x", "y", "x"], []])
def test_what_is_read_is_what_was_written(tmp_path: Path, ids):
    counter = IdCounter()
    counter.add(pa.array(ids))
    vocabulary = counter.vocabulary(1)
    vocabulary.write(tmp_path / "t.parquet")
    read = Vocabulary.read(tmp_path / "t.parquet")
    assert listed(read) == listed(vocabulary)
    assert read.raw_ids.type == vocabulary.raw_ids.type


def test_ids_of_the_wrong_kind_are_refused():
    integers = Vocabulary.from_counts(np.array([1]), np.array([1]), 1)
    with pytest.raises(DataError, match="text ids cannot be looked up among integer ids"):
        integers.encode(pa.array(["1"]))
    counter = IdCounter()
    counter.add(np.array([1]))
    with pytest.raises(
        DataError, match="text ids occur together with integer ids of the same table"
    ):
        counter.add(pa.array(["1"]))
    with pytest.raises(DataError, match="integers or strings, not double"):
        counter.add(np.array([1.5]))
    with pytest.raises(DataError, match="over 9223372036854775807"):
        counter.add(np.array([2**64 - 1], np.uint64))


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.parquet is missing"):
        Vocabulary.read(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"broken\.parquet is broken or cut short"):
        Vocabulary.read(tmp_path / "broken.parquet")
    vocabulary = Vocabulary(pa.array([1, 2]), np.array([1, 1]))
    vocabulary.write(tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(table.slice(1), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="is not a vocabulary"):
        Vocabulary.read(tmp_path / "t.parquet")


@pytest.mark.parametrize("kind", ["integer", "text"])
@pytest.mark.parametrize("span", [50, 2**60])
def test_an_id_counts_once_for_each_impression_that_shares_its_row(kind: str, span: int):
    random = np.random.default_rng(0)
    known = random.integers(-span, span, 40)
    counter, by_hand_counts = IdCounter(), Counter()
    for _ in range(3):
        numbers, impressions = random.choice(known, 200), random.integers(0, 5, 200)
        missing = random.random(200) < 0.1
        ids = pa.array(numbers, mask=missing)
        counter.add(ids if kind == "integer" else ids.cast(pa.string()), impressions)
        for number, times, is_missing in zip(numbers, impressions, missing, strict=True):
            if not is_missing:
                by_hand_counts[int(number) if kind == "integer" else str(number)] += int(times)
    assert dict(listed(counter.vocabulary(30))) == {
        raw_id: count for raw_id, count in by_hand_counts.items() if count >= 30
    }


@pytest.mark.slow
def test_texts_of_one_vocabulary_may_exceed_the_offsets_of_a_string_array():
    """2.1 GiB of characters, in blocks that fit by themselves."""
    rows = 35_000
    counter = IdCounter()
    for block in range(2):
        counter.add(pa.array([f"{block}-{row}-".ljust(1 << 15, "x") for row in range(rows)]))
    vocabulary = counter.vocabulary(1)
    assert vocabulary.num_embeddings == 2 * rows + 1
    assert vocabulary.encode(vocabulary.raw_ids.slice(2 * rows - 1)).tolist() == [2 * rows]


def test_more_ids_than_a_table_has_rows_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocabulary_module, "MAX_IDS", 3)
    assert Vocabulary.from_counts(np.arange(4), np.array([2, 2, 2, 1]), 2).num_embeddings == 4
    with pytest.raises(DataError, match="4 ids occur 1 times or more, but a table holds at most 3"):
        Vocabulary.from_counts(np.arange(4), np.array([2, 2, 2, 1]), 1)


def test_a_block_of_ids_is_found_in_a_vocabulary_too_wide_for_an_array():
    random = np.random.default_rng(1)
    known = np.unique(random.integers(-(2**62), 2**62, 5000))
    vocabulary = Vocabulary.from_counts(known, np.arange(len(known)) + 1, 1)
    row_of = {raw: row for row, (raw, _) in enumerate(listed(vocabulary), start=1)}
    asked = np.concatenate([random.choice(known, 20_000), random.integers(-(2**62), 2**62, 500)])
    random.shuffle(asked)
    assert vocabulary.encode(asked).tolist() == [row_of.get(raw, 0) for raw in asked.tolist()]
