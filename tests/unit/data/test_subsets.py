"""Parts of a split, against pandas and against SplitMix64 in Python's whole numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.data.subsets import (
    count_ids,
    rows_between,
    sample_rows,
    splitmix64,
    user_column,
    user_hash,
    without_ids,
)
from tests.plain_esmm import read_frame
from tests.prepared_data import write_data_set


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataSet:
    return write_data_set(tmp_path_factory.mktemp("data") / "set", train=3000, users=300)


@pytest.fixture(scope="module")
def train(dataset: PreparedDataSet) -> MappedSplit:
    return MappedSplit.open(dataset, "train")


def _mixed(value: int) -> int:
    mask = (1 << 64) - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_is_the_published_function() -> None:
    values = [0, 1, 2**63, 2**64 - 1, 123456789]
    assert splitmix64(np.array(values, np.uint64)).tolist() == [_mixed(v) for v in values]
    assert _mixed(0) == 0xE220A8397B1DCDAF


def test_the_user_is_the_group_else_the_shared_row_else_the_sample(train: MappedSplit) -> None:
    assert user_column(train) == "group_id"
    fewer = {name: train.scalars[name] for name in ("click", "sample_id", "shared_row")}
    assert user_column(replace(train, scalars=fewer)) == "shared_row"
    del fewer["shared_row"]
    assert user_column(replace(train, scalars=fewer)) == "sample_id"


def test_a_user_is_on_one_side_and_parts_nest(train: MappedSplit) -> None:
    users = train.scalars["group_id"]
    hashed = user_hash(train, "volume")
    assert len(np.unique(hashed)) == len(np.unique(users))
    parts = [rows_between(train, 0, share, purpose="volume") for share in (0.1, 0.3, 1.0)]
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    assert len(parts[2]) == train.impressions
    rest = rows_between(train, 0.3, 1, purpose="volume")
    assert not set(users[parts[1]]) & set(users[rest])
    assert len(parts[1]) + len(rest) == train.impressions
    noise = np.sqrt(0.3 * 0.7 * 300)
    assert abs(len(np.unique(users[parts[1]])) - 0.3 * 300) < 4 * noise


def test_hashes_of_different_purposes_know_nothing_of_each_other(train: MappedSplit) -> None:
    first, second = user_hash(train, "volume"), user_hash(train, "validation")
    by_user = np.unique(train.scalars["group_id"], return_index=True)[1]
    assert abs(np.corrcoef(first[by_user], second[by_user])[0, 1]) < 0.2


def test_sampled_rows_are_of_whole_users(train: MappedSplit) -> None:
    assert sample_rows(train, 3000) is None
    rows = sample_rows(train, 600)
    assert rows is not None
    assert 300 < len(rows) < 900
    users = train.scalars["group_id"]
    assert len(rows) == np.isin(users, users[rows]).sum()


def _counted(frame: pd.DataFrame, feature: str) -> Counter:
    return Counter(frame[feature].explode().dropna().astype(int))


def test_ids_are_counted_as_a_vocabulary_counts_them(
    dataset: PreparedDataSet, train: MappedSplit
) -> None:
    frame = read_frame(dataset, "train").reset_index(drop=True)
    rows = np.array([5, 900, 5, 17, 2500, 901])
    for chosen in (rows, None):
        part = frame if chosen is None else frame.iloc[np.unique(chosen)]
        once = part.drop_duplicates("shared_row")
        counts = count_ids(train, chosen)
        expected = {
            "item": _counted(part, "item"),
            "tag": _counted(part, "tags") + _counted(part, "second_tags"),
            "cross": _counted(part, "cross"),
            "user": _counted(once, "user"),
            "history": _counted(once, "history"),
        }
        for table, counter in expected.items():
            found = {place: count for place, count in enumerate(counts[table].tolist()) if count}
            assert found == dict(counter), table


def _ids(split: MappedSplit) -> dict[str, list[list[int]]]:
    """Feature → the ids of each impression, as a reader gives them."""
    reader = ImpressionReader(
        split, batch_size=split.impressions, shuffle=False, shared_features="expanded"
    )
    (batch,) = reader
    lists = {}
    for name in (
        "sparse_features",
        "weighted_sparse_features",
        "shared_sparse_features",
        "shared_weighted_sparse_features",
    ):
        features = getattr(batch.features, name)
        for key in features.keys() if features is not None else ():
            jagged = features[key]
            ends = jagged.lengths().cumsum(0).tolist()
            values = jagged.values().tolist()
            starts = [0, *ends[:-1]]
            lists[key] = [values[a:b] for a, b in zip(starts, ends, strict=True)]
    return lists


def test_ids_that_are_not_known_become_the_unknown_one(train: MappedSplit) -> None:
    known = {table: count > 40 for table, count in count_ids(train).items()}
    before = _ids(train)
    after = _ids(without_ids(train, known))
    tables = {feature.name: feature.table for feature in train.schema.id_features}
    assert before.keys() == tables.keys()
    changed = 0
    for name, lists in before.items():
        is_known = known[tables[name]]
        expected = [[i if is_known[i] else 0 for i in ids] for ids in lists]
        assert after[name] == expected, name
        changed += expected != lists
    assert changed
    assert _ids(train) == before


def test_unknown_ids_add_up(train: MappedSplit) -> None:
    counts = count_ids(train)
    first = {table: count > 40 for table, count in counts.items()}
    second = {table: np.arange(len(count)) % 3 != 1 for table, count in counts.items()}
    both = {table: first[table] & second[table] for table in counts}
    assert _ids(without_ids(without_ids(train, first), second)) == _ids(without_ids(train, both))


def test_a_part_is_the_same_wherever_the_data_set_lies(
    dataset: PreparedDataSet, tmp_path: Path
) -> None:
    copy = MappedSplit.open(write_data_set(tmp_path / "copy", train=3000, users=300), "train")
    original = MappedSplit.open(dataset, "train")
    for purpose in ("validation", "fold"):
        np.testing.assert_array_equal(user_hash(copy, purpose), user_hash(original, purpose))
