"""The rows and ids of a comparison's stages, by counting them in the columns as they are stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from esmm_torchrec.comparison import trial
from esmm_torchrec.comparison.data import ComparisonData, with_users
from esmm_torchrec.comparison.trial import Stage, ids_known_to
from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.reader import Selection
from esmm_torchrec.data.subsets import count_ids
from esmm_torchrec.errors import OptionError
from tests.prepared_data import write_data_set

USERS = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ComparisonData:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=600, test=600, users=USERS)
    dataset = PreparedDataSet.open(path)
    train, test = (MappedSplit.open(dataset, name) for name in ("train", "test"))
    return ComparisonData(train, test, None, dataset.min_count)


def test_tuning_holds_out_whole_users(data: ComparisonData) -> None:
    stage = Stage.validation(data, 0.3)
    assert stage.train_rows is not None
    assert stage.scored_rows is not None
    assert stage.scored is data.train, "the test split is no part of tuning"
    everything = np.sort(np.r_[stage.train_rows, stage.scored_rows])
    np.testing.assert_array_equal(everything, np.arange(600))
    user = data.train.scalars["group_id"]
    kept, held_out = (set(user[rows]) for rows in (stage.train_rows, stage.scored_rows))
    assert not kept & held_out
    assert 0.15 < len(held_out) / (len(kept) + len(held_out)) < 0.45


def test_a_part_of_the_users_has_a_vocabulary_of_its_own(data: ComparisonData) -> None:
    stage = Stage.test(data, 0.2)
    assert stage.train_rows is not None
    occurs = count_ids(data.train, stage.train_rows)
    lost = 0
    for table, ids in count_ids(stage.scored, None).items():
        enough = occurs[table] >= data.min_count
        assert not ids[1:][~enough[1:]].any(), table
        lost += int(count_ids(data.test, None)[table][1:][~enough[1:]].sum())
    assert lost > 0, "some ids of the test split must be too rare in the part"
    for table, ids in count_ids(stage.train, stage.train_rows).items():
        assert not ids[1:][occurs[table][1:] < data.min_count].any()


def test_smaller_parts_lie_in_larger_ones(data: ComparisonData) -> None:
    parts = [Stage.test(data, fraction).train_rows for fraction in (0.2, 0.5)]
    assert parts[0] is not None
    assert parts[1] is not None
    assert set(parts[0]) < set(parts[1])
    assert Stage.test(data, 1.0).train_rows is None
    user = data.train.scalars["group_id"]
    assert not set(user[parts[0]]) & set(np.delete(user, parts[0]))


def test_every_row_is_trained_on_at_full_volume_and_scored(data: ComparisonData) -> None:
    stage = Stage.test(data, 1.0)
    assert stage.train is data.train
    assert stage.scored is data.test
    assert stage.scored_rows is None
    np.testing.assert_array_equal(
        stage.clicked_train_rows(), np.flatnonzero(data.train.scalars["click"] == 1)
    )


def test_group_id_does_not_decide_what_is_held_out(data: ComparisonData) -> None:
    """It is for metrics alone, unless users are to be held out by it."""
    without = replace(
        data.train, scalars={k: v for k, v in data.train.scalars.items() if k != "group_id"}
    )
    held_out = [
        Stage.validation(replace(data, train=with_users(train, "auto")), 0.3).scored_rows
        for train in (data.train, without)
    ]
    np.testing.assert_array_equal(*held_out)
    by_group = Stage.validation(replace(data, train=with_users(data.train, "group")), 0.3)
    group = data.train.scalars["group_id"]
    assert not set(group[by_group.scored_rows]) & set(group[by_group.train_rows])
    with pytest.raises(OptionError, match="`held_out_by` group"):
        with_users(without, "group")


def test_unclicked_impressions_are_sampled_in_tuning_and_count_for_those_left_out(
    data: ComparisonData, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Stage.validation(data, 0.5)
    assert whole.scored_rows is not None
    assert whole.scored_weight is None
    monkeypatch.setattr(trial, "UNCLICKED_IN_TUNING", 60)
    stage = Stage.validation(data, 0.5)
    assert stage.scored_rows is not None
    assert stage.scored_weight is not None
    click = data.train.scalars["click"] == 1
    np.testing.assert_array_equal(
        stage.scored_rows[click[stage.scored_rows]], whole.scored_rows[click[whole.scored_rows]]
    )
    of_clicks = stage.scored_weight[click[stage.scored_rows]]
    of_others = stage.scored_weight[~click[stage.scored_rows]]
    assert set(of_clicks) == {1.0}
    expected = np.count_nonzero(~click[whole.scored_rows])
    assert of_others.sum() == pytest.approx(expected, rel=0.35)
    assert len(of_others) < expected / 2


def test_a_round_trains_on_a_share_of_the_users_that_are_not_held_out(
    data: ComparisonData,
) -> None:
    whole, part = (Stage.validation(data, 0.3, share=share) for share in (1.0, 0.25))
    assert whole.train_rows is not None
    assert part.train_rows is not None
    assert set(part.train_rows) < set(whole.train_rows)
    assert 0.1 < len(part.train_rows) / len(whole.train_rows) < 0.45
    assert part.scored_rows is not None
    assert whole.scored_rows is not None
    np.testing.assert_array_equal(part.scored_rows, whole.scored_rows)


def test_ids_that_a_method_has_too_rarely_are_unknown_to_it(data: ComparisonData) -> None:
    stage = Stage.test(data, 1.0)
    clicks = Selection(stage.clicked_train_rows())
    counts = count_ids(data.train, clicks.rows)
    for min_count in (1, 3):
        known = ids_known_to(stage, clicks, min_count=min_count)
        for split, rows in ((known.scored, None), (known.train, clicks.rows)):
            for table, count in count_ids(split, rows).items():
                assert not count[1:][counts[table][1:] < min_count].any(), (table, min_count)
        lost = sum(
            int(count[1:][counts[table][1:] < min_count].sum())
            for table, count in count_ids(data.test, None).items()
        )
        total = sum(int(count.sum()) for count in count_ids(data.test, None).values())
        assert lost > 0
        assert known.unknown_share == pytest.approx(lost / total)
