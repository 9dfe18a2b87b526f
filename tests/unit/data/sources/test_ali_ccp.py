"""The Ali-CCP importer against a plain parser of a few lines, written from the format alone."""

import io
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, Statistics
from esmm_torchrec.data.sources.ali_ccp.prepare import UNCLICKED_CONVERSIONS, prepare_ali_ccp
from esmm_torchrec.data.sources.bad_rows import MAX_EXAMPLES
from esmm_torchrec.errors import DataError, OptionError
from tests.mutations import mutated

COMMON_FIELDS = ["101", "109_14", "110_14", "127_14", "150_14", "121", "122", "124", "125", "126"]
COMMON_FIELDS += ["127", "128", "129"]
SKELETON_FIELDS = ["205", "206", "207", "210", "216", "508", "509", "702", "853", "301"]
MULTI_VALUED = {"109_14", "110_14", "127_14", "150_14", "210", "853"}
WEIGHTED = {"109_14", "110_14", "127_14", "150_14", "508", "509", "702", "853"}

Bag = list[tuple[int, str]]


# The plain parser


def features_of(text: str) -> dict[str, Bag]:
    bags: dict[str, Bag] = {}
    for feature in text.split("\x01") if text else []:
        name, number, value = re.split("[\x02\x03]", feature)
        bags.setdefault(name, []).append((int(number), value))
    return bags


def lines_of(path: Path) -> list[str]:
    return path.read_text().rstrip("\n").split("\n")


@dataclass
class Plain:
    """A split as plain Python values."""

    common: list[dict[str, Bag]] = field(default_factory=list)
    impressions: list[dict] = field(default_factory=list)


def plain(raw: Path, split: str) -> Plain:
    result = Plain()
    row_of = {}
    for line in lines_of(raw / f"common_features_{split}.csv"):
        index, _, features = line.split(",")
        row_of[index] = len(result.common)
        result.common.append(features_of(features))
    for line in lines_of(raw / f"sample_skeleton_{split}.csv"):
        sample_id, click, purchase, index, _, features = line.split(",")
        if (click, purchase) == ("0", "1"):
            continue
        own = features_of(features)
        impression = {"sample_id": int(sample_id), "click": int(click), "own": own}
        impression |= {"conversion": int(purchase), "shared": result.common[row_of[index]]}
        result.impressions.append(impression)
    return result


def expected_vocabularies(train: Plain, min_count: int) -> dict[str, dict[int, int]]:
    counts: dict[str, Counter] = {name: Counter() for name in COMMON_FIELDS + SKELETON_FIELDS}
    for impression in train.impressions:
        for name, bag in (impression["shared"] | impression["own"]).items():
            counts[name].update(number for number, _ in bag)
    vocabularies = {}
    for name, counted in counts.items():
        kept = [number for number, count in counted.items() if count >= min_count]
        kept.sort(key=lambda number: (-counted[number], number))
        vocabularies[name] = {number: row for row, number in enumerate(kept, start=1)}
    return vocabularies


# The same from a prepared data set


def rows_of(files: list[Path]) -> list[dict]:
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def bag_of(row: dict, name: str) -> list[tuple[int, float | None]]:
    ids = row[name] if name in MULTI_VALUED else [row[name]]
    weights = row.get(f"{name}__weight", [None] * len(ids) if name in MULTI_VALUED else None)
    weights = weights if name in MULTI_VALUED else [weights]
    return [(i, w) for i, w in zip(ids, weights, strict=True) if i is not None]


def vocabularies_of(data_set: PreparedDataSet) -> dict[str, dict[int, int]]:
    return {
        table.name: {
            raw_id: row
            for row, raw_id in enumerate(
                data_set.vocabulary(table.name).raw_ids.to_pylist(), start=1
            )
        }
        for table in data_set.schema.tables
    }


def joined(data_set: PreparedDataSet, split: str) -> list[dict]:
    """Returns labels and bags of each impression, wherever its shared row is stored."""
    shared = rows_of(data_set.shared_files(split))
    result = []
    for row in rows_of(data_set.impression_files(split)):
        common = shared[row["shared_row"]]
        bags = {name: bag_of(common, name) for name in COMMON_FIELDS}
        bags |= {name: bag_of(row, name) for name in SKELETON_FIELDS}
        labels = {name: row[name] for name in ("sample_id", "click", "conversion", "group_id")}
        result.append(labels | {"bags": bags})
    return result


def assert_equals_plain(data_set: PreparedDataSet, raw: Path, min_count: int) -> None:
    train = plain(raw, "train")
    vocabularies = expected_vocabularies(train, min_count)
    assert vocabularies_of(data_set) == vocabularies
    for split in SPLITS:
        of = plain(raw, split)
        found = joined(data_set, split)
        assert len(found) == len(of.impressions) == data_set.splits[split].impressions
        assert len(of.common) == data_set.splits[split].shared_rows
        for impression, row in zip(of.impressions, found, strict=True):
            for label in ("sample_id", "click", "conversion"):
                assert row[label] == impression[label]
            user = impression["shared"].get("101")
            assert row["group_id"] == user[0][0] if user else row["group_id"] < 0
            bags = impression["shared"] | impression["own"]
            for name in COMMON_FIELDS + SKELETON_FIELDS:
                expected = [
                    (
                        vocabularies[name].get(number, 0),
                        float(np.float32(value)) if name in WEIGHTED else None,
                    )
                    for number, value in bags.get(name, [])
                ]
                assert row["bags"][name] == expected, (split, row["sample_id"], name)
        for name in COMMON_FIELDS + SKELETON_FIELDS:
            ids = [number for row in found for number, _ in row["bags"][name]]
            missing = sum(not row["bags"][name] for row in found) / len(found)
            assert data_set.statistics.missing[name][split] == pytest.approx(missing)
            unknown = ids.count(0) / max(1, len(ids))
            assert data_set.statistics.unknown[name][split] == pytest.approx(unknown)


# Raw files


def raw_line(*columns: object, bags: list[tuple[str, object, str]]) -> str:
    features = "\x01".join(f"{name}\x02{number}\x03{value}" for name, number, value in bags)
    return ",".join([*map(str, columns), str(len(bags)), features]) + "\n"


def random_features(random: np.random.Generator, names: list[str]) -> list[tuple]:
    bags = []
    for place, name in enumerate(names):
        if random.random() < 0.2:
            continue
        size = random.integers(1, 9) if name in MULTI_VALUED else 1
        for _ in range(size):
            value = f"{random.random() * 9:.5f}" if name in WEIGHTED else "1.0"
            bags.append((name, 1_000_000 * place + int(random.geometric(0.3)), value))
    # In the real files the order of the features follows no rule.
    return [bags[i] for i in random.permutation(len(bags))]


def write_random(folder: Path, seed: int = 0, users: int = 30) -> Path:
    random = np.random.default_rng(seed)
    folder.mkdir()
    for split in SPLITS:
        indices = [f"{i:016x}" for i in random.integers(0, 2**64, users, dtype=np.uint64)]
        common = [raw_line(i, bags=random_features(random, COMMON_FIELDS)) for i in indices]
        skeleton = []
        for index in indices[:-3]:
            for _ in range(random.integers(1, 12)):
                click = random.random() < 0.4
                buy = click and random.random() < 0.5
                bags = random_features(random, SKELETON_FIELDS)
                skeleton.append(raw_line(len(skeleton) + 1, int(click), int(buy), index, bags=bags))
        skeleton.append(raw_line(len(skeleton) + 1, 0, 1, indices[0], bags=[("205", 1, "1.0")]))
        skeleton.append(raw_line(len(skeleton) + 1, 1, 1, indices[0], bags=[]))
        random.shuffle(common)
        (folder / f"common_features_{split}.csv").write_text("".join(common))
        (folder / f"sample_skeleton_{split}.csv").write_text("".join(skeleton))
    return folder


USER_7 = raw_line(
    "00000000000000ff",
    bags=[("101", 7, "1.0"), ("110_14", 40, "0.5"), ("124", 2, "1.0"), ("110_14", 41, "1.94591")],
)
NOBODY = raw_line("ff00000000000000", bags=[("110_14", 40, "3.0")])
TRAIN = [
    raw_line(1, 0, 0, "00000000000000ff", bags=[("205", 5, "1.0"), ("210", 8, "1.0")]),
    raw_line(2, 1, 1, "ff00000000000000", bags=[("210", 9, "1.0"), ("210", 8, "1.0")]),
    raw_line(3, 1, 0, "00000000000000ff", bags=[("508", 3, "2.5"), ("205", 6, "1.0")]),
]
TEST = [
    raw_line(1, 0, 0, "00000000000000ff", bags=[("205", 99, "1.0"), ("210", 9, "1.0")]),
]


def write_small(folder: Path, train: list[str] = TRAIN, test: list[str] = TEST) -> Path:
    folder.mkdir()
    (folder / "common_features_train.csv").write_text(USER_7 + NOBODY)
    (folder / "sample_skeleton_train.csv").write_text("".join(train))
    (folder / "common_features_test.csv").write_text(USER_7)
    (folder / "sample_skeleton_test.csv").write_text("".join(test))
    return folder


def small(tmp_path: Path, **options) -> PreparedDataSet:
    return prepare_ali_ccp(tmp_path / "raw", tmp_path / "out", **({"min_count": 1} | options))


# Tests


def test_a_few_rows_by_hand(tmp_path: Path):
    write_small(tmp_path / "raw")
    data_set = small(tmp_path)
    data_set.verify()
    # 110_14: 40 occurs twice; 41 once. 210: 8 twice, 9 once. 205: a tie, the lower id first.
    vocabularies = vocabularies_of(data_set)
    assert vocabularies["110_14"] == {40: 1, 41: 2}
    assert vocabularies["210"] == {8: 1, 9: 2}
    assert vocabularies["205"] == {5: 1, 6: 2}
    assert data_set.vocabulary("210").counts.tolist() == [2, 1]
    assert vocabularies["853"] == {}

    (shared,) = data_set.shared_files("train")
    table = pq.read_table(shared)
    assert table.column("101").to_pylist() == [1, None]
    assert table.column("110_14").to_pylist() == [[1, 2], [1]]
    assert table.column("110_14__weight").to_pylist() == [[0.5, np.float32(1.94591)], [3.0]]
    assert table.column("109_14").to_pylist() == [[], []]

    (impressions,) = data_set.impression_files("train")
    table = pq.read_table(impressions)
    assert table.column("click").to_pylist() == [0, 1, 1]
    assert table.column("conversion").to_pylist() == [0, 1, 0]
    assert table.column("sample_id").to_pylist() == [1, 2, 3]
    assert table.column("shared_row").to_pylist() == [0, 1, 0]
    assert table.column("group_id").to_pylist() == [7, 0xFF00000000000000 - 2**64, 7]
    assert table.column("205").to_pylist() == [1, None, 2]
    assert table.column("210").to_pylist() == [[1], [2, 1], []]
    assert table.column("508").to_pylist() == [None, None, 1]
    assert table.column("508__weight").to_pylist() == [None, None, 2.5]

    (impressions,) = data_set.impression_files("test")
    table = pq.read_table(impressions)
    assert table.column("205").to_pylist() == [0], "an id of the test split alone is unknown"
    assert table.column("210").to_pylist() == [[2]]
    statistics = data_set.statistics
    assert statistics.mean_values_per_bag["110_14"] == 1.5
    assert statistics.mean_values_per_bag["210"] == 1.0
    assert statistics.impressions_per_shared_row == 1.5
    assert data_set.source["files"] == [
        "common_features_train.csv",
        "sample_skeleton_train.csv",
        "common_features_test.csv",
        "sample_skeleton_test.csv",
    ]


@pytest.mark.parametrize("min_count", [1, 4])
def test_every_value_equals_the_plain_parser(tmp_path: Path, min_count):
    raw = write_random(tmp_path / "raw")
    data_set = prepare_ali_ccp(raw, tmp_path / "out", min_count=min_count)
    data_set.verify()
    assert_equals_plain(data_set, raw, min_count)
    assert data_set.dropped == {split: {UNCLICKED_CONVERSIONS: 1} for split in SPLITS}
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_bytes_depend_on_neither_the_run_nor_the_blocks(tmp_path: Path):
    raw = write_random(tmp_path / "raw")
    outs = [
        prepare_ali_ccp(raw, tmp_path / str(run), min_count=2, block_bytes=size)
        for run, size in enumerate((1 << 24, 1 << 24, 1, 997, 20_000))
    ]
    assert len({out.fingerprint for out in outs}) == 1
    for out in outs:
        out.verify()


def archive(raw: Path, to: Path, split: str, names: list[str], folder: str = "") -> Path:
    to.mkdir(exist_ok=True)
    path = to / f"sample_{split}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.add(raw / name, arcname=f"{folder}{name}")
    return path


@pytest.mark.parametrize("folder", ["", "ali/ccp/"])
@pytest.mark.parametrize("common_first", [True, False])
def test_archives_give_what_files_give(tmp_path: Path, folder, common_first):
    raw = write_random(tmp_path / "raw")
    for split in SPLITS:
        names = [f"common_features_{split}.csv", f"sample_skeleton_{split}.csv"]
        if not common_first:
            names.reverse()
        archive(raw, tmp_path / "tar", split, names, folder)
    of_files = prepare_ali_ccp(raw, tmp_path / "a", block_bytes=5000)
    of_archives = prepare_ali_ccp(tmp_path / "tar", tmp_path / "b", block_bytes=5000)
    assert of_archives.checksums == of_files.checksums
    assert of_archives.splits == of_files.splits
    assert of_archives.source["files"] == ["sample_train.tar.gz", "sample_test.tar.gz"]


def test_files_one_folder_down_are_found(tmp_path: Path):
    raw = write_random(tmp_path / "raw")
    expected = prepare_ali_ccp(raw, tmp_path / "a").checksums
    (tmp_path / "up").mkdir()
    raw.rename(tmp_path / "up" / "raw")
    assert prepare_ali_ccp(tmp_path / "up", tmp_path / "b").checksums == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.removesuffix("\n"),
        lambda text: text.replace("\x03", "\x02"),
    ],
    ids=["carriage returns", "no last newline", "one separator"],
)
def test_harmless_differences_move_nothing(tmp_path: Path, change: Callable[[str], str]):
    raw = write_random(tmp_path / "raw")
    expected = prepare_ali_ccp(raw, tmp_path / "a").checksums
    for file in raw.iterdir():
        file.write_bytes(change(file.read_text()).encode())
    assert prepare_ali_ccp(raw, tmp_path / "b").checksums == expected


def test_reversing_the_common_files_moves_no_impression(tmp_path: Path):
    raw = write_random(tmp_path / "raw")
    before = prepare_ali_ccp(raw, tmp_path / "a", min_count=2)
    for split in SPLITS:
        path = raw / f"common_features_{split}.csv"
        path.write_text("\n".join(reversed(lines_of(path))) + "\n")
    after = prepare_ali_ccp(raw, tmp_path / "b", min_count=2)
    for split in SPLITS:
        assert joined(after, split) == joined(before, split)
        (a,), (b,) = before.shared_files(split), after.shared_files(split)
        assert pq.read_table(a).to_pylist() == pq.read_table(b).to_pylist()[::-1]
    names = [f"vocabulary/{table.name}.parquet" for table in before.schema.tables]
    assert [after.checksums[n] for n in names] == [before.checksums[n] for n in names]
    assert after.statistics == before.statistics


def of_training(statistics: Statistics) -> Statistics:
    def shares(of_splits: Mapping) -> dict:
        return {name: {"train": of_split["train"]} for name, of_split in of_splits.items()}

    missing, unknown = shares(statistics.missing), shares(statistics.unknown)
    return replace(statistics, missing=missing, unknown=unknown)


def test_the_test_split_moves_no_vocabulary_and_no_statistic(tmp_path: Path):
    raw = write_random(tmp_path / "raw")
    before = prepare_ali_ccp(raw, tmp_path / "a", min_count=2)
    other = write_random(tmp_path / "other", seed=5, users=60)
    for name in ("common_features_test.csv", "sample_skeleton_test.csv"):
        shutil.copy(other / name, raw / name)
    after = prepare_ali_ccp(raw, tmp_path / "b", min_count=2)
    kept = [name for name in before.checksums if not name.startswith("test/")]
    assert [after.checksums[n] for n in kept] == [before.checksums[n] for n in kept]
    assert of_training(after.statistics) == of_training(before.statistics)
    assert after.schema == before.schema
    assert after.splits["test"] != before.splits["test"]
    assert_equals_plain(after, raw, 2)


def test_a_user_is_one_group_in_both_splits(tmp_path: Path):
    write_small(tmp_path / "raw")
    data_set = small(tmp_path)
    groups = {row["group_id"] for row in joined(data_set, "test")}
    assert groups == {7}


# Purchases without a click


def test_unclicked_purchases(tmp_path: Path):
    odd = raw_line(4, 0, 1, "00000000000000ff", bags=[("205", 5, "1.0")])
    write_small(tmp_path / "raw", train=[*TRAIN, odd, odd.replace("4", "5", 1)])
    dropped = prepare_ali_ccp(tmp_path / "raw", tmp_path / "a", min_count=1)
    assert dropped.splits["train"].impressions == 3
    assert dropped.dropped["train"] == {UNCLICKED_CONVERSIONS: 2}
    assert dropped.vocabulary("205").counts.tolist() == [1, 1], "what is dropped does not count"
    kept = prepare_ali_ccp(
        tmp_path / "raw", tmp_path / "b", min_count=1, unclicked_purchases="keep"
    )
    rows = joined(kept, "train")
    assert [(row["sample_id"], row["click"], row["conversion"]) for row in rows[3:]] == [
        (4, 0, 0),
        (5, 0, 0),
    ]
    assert kept.vocabulary("205").counts.tolist() == [3, 1]
    assert kept.dropped["train"] == {}
    for data_set in (dropped, kept):
        assert data_set.source["unclicked_conversion_rows"] == {"train": 2, "test": 0}
    with pytest.raises(DataError, match=r"sample_skeleton_train\.csv, line 4: a purchase without"):
        prepare_ali_ccp(tmp_path / "raw", tmp_path / "c", unclicked_purchases="error")
    assert not (tmp_path / "c").exists()


# What is wrong with the rows

ONE = [("205", 5, "1.0")]
FF = "00000000000000ff"
BAD_SKELETON_ROWS = {
    "the line is empty": "\n",
    "3 columns instead of 6": "4,0,0\n",
    "7 columns instead of 6": raw_line(4, 0, 0, FF, 9, bags=ONE),
    "sample_id 'x4' is not a whole number": raw_line("x4", 0, 0, FF, bags=ONE),
    "sample_id '-4' is not a whole number": raw_line(-4, 0, 0, FF, bags=ONE),
    "click '2' is neither 0 nor 1": raw_line(4, 2, 0, FF, bags=ONE),
    "click '' is neither 0 nor 1": raw_line(4, "", 0, FF, bags=ONE),
    "purchase 'yes' is neither 0 nor 1": raw_line(4, 1, "yes", FF, bags=ONE),
    "purchase '1000' is neither 0 nor 1": raw_line(4, 1, 1000, FF, bags=ONE),
    "common_feature_index 'ff' is not 16 hex digits": raw_line(4, 0, 0, "ff", bags=ONE),
    "common_feature_index 'x000000000000000' is not 16 hex": raw_line(
        4, 0, 0, "x" + "0" * 15, bags=ONE
    ),
    "common_feature_index 0000000000000123 is not in": raw_line(
        4, 0, 0, "0" * 13 + "123", bags=ONE
    ),
    "feature_num 'many' is not a whole number": f"4,0,0,{FF},many,205\x025\x031.0\n",
    "feature_num '-1' is not a whole number": f"4,0,0,{FF},-1,\n",
    "feature_num is 2 and feature_list holds 1 features": f"4,0,0,{FF},2,205\x025\x031.0\n",
    "feature_num is 0 and feature_list holds 1 features": f"4,0,0,{FF},0,205\x025\x031.0\n",
    "feature_num is 1 and feature_list holds 0 features": f"4,0,0,{FF},1,\n",
    "feature_num is 1 and feature_list holds 2 features": (
        f"4,0,0,{FF},1,205\x025\x031.0\x01206\x025\x031.0\n"
    ),
    "the feature '205\\x025' is not a field, an id and a value": f"4,0,0,{FF},1,205\x025\n",
    "the feature '' is not a field, an id and a value": f"4,0,0,{FF},2,205\x025\x031.0\x01\n",
    "field '999' is unknown": raw_line(4, 0, 0, FF, bags=[("999", 5, "1.0")]),
    "field '101' belongs in the other file": raw_line(4, 0, 0, FF, bags=[("101", 5, "1.0")]),
    "field '205' has two values and takes one": raw_line(4, 0, 0, FF, bags=ONE * 2),
    "id '5x' of field 205 is not a whole number": raw_line(4, 0, 0, FF, bags=[("205", "5x", "1")]),
    "id '' of field 205 is not a whole number": raw_line(4, 0, 0, FF, bags=[("205", "", "1")]),
    "id -5 of field 205 is not between 0 and": raw_line(4, 0, 0, FF, bags=[("205", -5, "1.0")]),
    "id 9223372036854775808 of field 205 is not between": raw_line(
        4, 0, 0, FF, bags=[("205", 2**63, "1.0")]
    ),
    "value 'one' of field 205 is not a number": raw_line(4, 0, 0, FF, bags=[("205", 5, "one")]),
    "value '' of field 205 is not a number": raw_line(4, 0, 0, FF, bags=[("205", 5, "")]),
    "value 'nan' of field 508 is not a finite": raw_line(4, 0, 0, FF, bags=[("508", 5, "nan")]),
    "value '-inf' of field 508 is not a finite": raw_line(4, 0, 0, FF, bags=[("508", 5, "-inf")]),
    "value '1e39' of field 508 is not a finite": raw_line(4, 0, 0, FF, bags=[("508", 5, "1e39")]),
    "value '1.0\\r2.0' of field 508 is not a number": raw_line(
        4, 0, 0, FF, bags=[("508", 5, "1.0\r2.0")]
    ),
    "not in the form of this file": raw_line(4, 0, 0, FF, bags=[("508", 5, "1_0")]),
}


@pytest.mark.parametrize(("what", "line"), BAD_SKELETON_ROWS.items(), ids=BAD_SKELETON_ROWS)
def test_a_bad_impression_is_named(tmp_path: Path, what, line):
    write_small(tmp_path / "raw", train=[*TRAIN[:2], line, *TRAIN[2:]])
    sentence = f"sample_skeleton_train.csv, line 3: {what}"
    with pytest.raises(DataError, match=re.escape(sentence)) as raised:
        small(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("fix it, or skip up to N bad rows with `max_bad_rows` N")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


@pytest.mark.parametrize(
    ("what", "line"),
    {
        "2 columns instead of 3": "00000000000000aa,1\n",
        "common_feature_index '' is not 16 hex digits": raw_line("", bags=[]),
        "field '205' belongs in the other file": raw_line("0" * 16, bags=ONE),
        "field '101' has two values and takes one": raw_line("0" * 16, bags=[("101", 7, "1")] * 2),
        "value 'nan' of field 110_14 is not a finite": raw_line(
            "0" * 16, bags=[("110_14", 7, "nan")]
        ),
    }.items(),
)
def test_a_bad_common_row_is_named_or_skipped(tmp_path: Path, what, line):
    write_small(tmp_path / "raw")
    (tmp_path / "raw" / "common_features_train.csv").write_text(USER_7 + NOBODY + line)
    sentence = f"common_features_train.csv, line 3: {what}"
    with pytest.raises(DataError, match=re.escape(sentence)):
        small(tmp_path)
    skipped = small(tmp_path, max_bad_rows=1)
    assert skipped.dropped["train"] == {"bad common rows": 1}
    assert skipped.splits["train"].shared_rows == 2
    assert skipped.splits["train"].impressions == 3


def test_feature_counts_that_only_agree_in_sum_are_found(tmp_path: Path):
    one_more = f"1,0,0,{FF},3,205\x025\x031.0\x01206\x025\x031.0\n"
    one_less = f"2,1,1,{FF},1,205\x025\x031.0\x01206\x025\x031.0\n"
    write_small(tmp_path / "raw", train=[one_more, one_less])
    with pytest.raises(DataError, match="line 1: feature_num is 3 and feature_list holds 2"):
        small(tmp_path)


@pytest.mark.parametrize("block_bytes", [4000, 1 << 20])
def test_bad_rows_are_skipped_and_counted_up_to_the_limit(tmp_path: Path, block_bytes):
    raw = write_random(tmp_path / "raw", users=60)
    expected = prepare_ali_ccp(raw, tmp_path / "good").checksums
    random = np.random.default_rng(1)
    bad = list(BAD_SKELETON_ROWS.values())
    where = {}
    for split in SPLITS:
        lines = [f"{line}\n" for line in lines_of(raw / f"sample_skeleton_{split}.csv")]
        places = sorted(random.choice(len(lines), len(bad), replace=False))
        for done, (place, line) in enumerate(zip(places, bad, strict=True)):
            lines.insert(place + done, line)
        where[split] = [place + done + 1 for done, place in enumerate(places)]
        (raw / f"sample_skeleton_{split}.csv").write_text("".join(lines))
    total = 2 * len(bad)
    out = prepare_ali_ccp(raw, tmp_path / "out", max_bad_rows=total, block_bytes=block_bytes)
    assert out.checksums == expected
    for split in SPLITS:
        assert out.dropped[split] == {UNCLICKED_CONVERSIONS: 1, "bad skeleton rows": len(bad)}
    named = [int(re.findall(r"line (\d+):", s)[0]) for s in out.dropped_rows["train"]]
    assert named == where["train"][:MAX_EXAMPLES]
    assert out.dropped_rows["test"] == (), "the limit is one for both splits"
    assert str(tmp_path) not in (out.path / "dataset.json").read_text()
    last = where["test"][-1]
    with pytest.raises(
        DataError, match=rf"more than {total - 1} bad rows .*_test\.csv, line {last}: "
    ):
        prepare_ali_ccp(raw, tmp_path / "b", max_bad_rows=total - 1, block_bytes=block_bytes)


def test_an_index_that_occurs_twice_is_refused(tmp_path: Path):
    write_small(tmp_path / "raw")
    (tmp_path / "raw" / "common_features_train.csv").write_text(USER_7 + NOBODY + USER_7)
    with pytest.raises(
        DataError, match=r"_train\.csv, line 3: .* 00000000000000ff is already in line 1"
    ):
        small(tmp_path, max_bad_rows=5)


# What is wrong with the files


def test_missing_and_empty_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="raw is not a folder"):
        small(tmp_path)
    raw = write_small(tmp_path / "raw")
    (raw / "common_features_test.csv").rename(tmp_path / "common")
    with pytest.raises(DataError, match=r"common_features_test\.csv is missing"):
        small(tmp_path)
    (raw / "common_features_test.csv").write_text("")
    with pytest.raises(DataError, match=r"common_features_test\.csv is empty"):
        small(tmp_path)
    (raw / "common_features_test.csv").unlink()
    (raw / "sample_skeleton_test.csv").unlink()
    with pytest.raises(DataError, match=r"holds neither sample_skeleton_test.* nor sample_test\."):
        small(tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_broken_archives_are_named(tmp_path: Path):
    raw = write_random(tmp_path / "files", users=300)
    names = ["common_features_train.csv", "sample_skeleton_train.csv"]
    for split in SPLITS:
        of = [name.replace("train", split) for name in names]
        path = archive(raw, tmp_path / "raw", split, of)
    whole = path.read_bytes()
    for size in (len(whole) * 3 // 4, len(whole) // 4, 100, 5):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"sample_test\.tar\.gz is truncated or damaged"):
            small(tmp_path)
    path.write_bytes(b"not gzip" * 100)
    with pytest.raises(DataError, match=r"sample_test\.tar\.gz is truncated or damaged"):
        small(tmp_path)
    archive(raw, tmp_path / "raw", "test", ["common_features_test.csv"])
    with pytest.raises(DataError, match=r"does not contain sample_skeleton_test\.csv"):
        small(tmp_path)
    with tarfile.open(path, "w:gz") as tar:
        for name in ("common_features_test.csv", "sample_skeleton_test.csv"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(DataError, match=r"tar\.gz: common_features_test\.csv is empty"):
        small(tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_a_stop_midway_leaves_nothing_and_a_rerun_ends_the_same(tmp_path: Path):
    write_small(tmp_path / "raw", test=[*TEST, "broken\n"])
    with pytest.raises(DataError, match=r"sample_skeleton_test\.csv, line 2"):
        small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    with pytest.raises(DataError, match="is not a prepared data set"):
        PreparedDataSet.open(tmp_path / "out")
    (tmp_path / "raw" / "sample_skeleton_test.csv").write_text("".join(TEST))
    (tmp_path / "out.partial" / "scratch").mkdir(parents=True)
    (tmp_path / "out.partial" / "scratch" / "shared-0.arrow").write_text("left behind")
    rerun = small(tmp_path)
    assert (
        rerun.fingerprint
        == prepare_ali_ccp(tmp_path / "raw", tmp_path / "b", min_count=1).fingerprint
    )


def test_nothing_to_learn_from_is_refused(tmp_path: Path):
    write_small(tmp_path / "raw", train=[TRAIN[0]])
    with pytest.raises(DataError, match="1 impressions but no click"):
        small(tmp_path)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_count": 0}, "`min_count` must be 1 or more, not 0"),
        ({"max_bad_rows": -1}, "`max_bad_rows` must be 0 or more, not -1"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options, sentence):
    write_small(tmp_path / "raw")
    with pytest.raises(OptionError, match=sentence):
        small(tmp_path, **options)


# Known probabilities


def truth_of(raw: Path) -> pa.Table:
    random = np.random.default_rng(3)
    ids, splits = [], []
    for split in SPLITS:
        own = [int(line.split(",")[0]) for line in lines_of(raw / f"sample_skeleton_{split}.csv")]
        ids += own
        splits += [split] * len(own)
    return pa.table(
        {
            "sample_id": pa.array(ids, pa.int64()),
            "split": splits,
            "true_ctr": random.random(len(ids)).astype(np.float32),
            "true_cvr": random.random(len(ids)).astype(np.float32),
            "conversion_if_clicked": np.zeros(len(ids), np.int8),
        }
    )


@pytest.mark.parametrize("order", ["file", "shuffled"])
def test_truth_is_joined(tmp_path: Path, order):
    raw = write_random(tmp_path / "raw")
    truth = truth_of(raw)
    stored = truth
    if order == "shuffled":
        stored = truth.take(np.random.default_rng(0).permutation(len(truth)))
    pq.write_table(stored, raw / "truth.parquet", row_group_size=50)
    data_set = prepare_ali_ccp(raw, tmp_path / "out", block_bytes=2000)
    data_set.verify()
    assert data_set.columns == {"group_id", "true_ctr", "true_cvr"}
    assert "truth.parquet" in data_set.source["files"]
    known = {
        (row["split"], row["sample_id"]): (row["true_ctr"], row["true_cvr"])
        for row in truth.to_pylist()
    }
    for split in SPLITS:
        for row in rows_of(data_set.impression_files(split)):
            found = (row["true_ctr"], row["true_cvr"])
            assert found == known[split, row["sample_id"]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.slice(0, len(t) - 1),
            r"truth\.parquet has no row for sample_id \d+ of the test",
        ),
        (lambda t: t.drop_columns(["true_cvr"]), "truth.parquet lacks the column 'true_cvr'"),
        (
            lambda t: t.set_column(0, "sample_id", t["sample_id"].cast(pa.string())),
            "truth.parquet has string in column 'sample_id' instead of int64",
        ),
        (
            lambda t: t.set_column(2, "true_ctr", pa.array([1.5] * len(t), pa.float32())),
            "sample_id 1 of the train split: true_ctr or true_cvr is not a probability",
        ),
    ],
)
def test_wrong_truth_is_refused(tmp_path: Path, change, sentence):
    raw = write_random(tmp_path / "raw")
    pq.write_table(change(truth_of(raw)), raw / "truth.parquet")
    with pytest.raises(DataError, match=sentence):
        prepare_ali_ccp(raw, tmp_path / "out")
    (raw / "truth.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"truth\.parquet is not a Parquet file"):
        prepare_ali_ccp(raw, tmp_path / "out")


def lines_in(raw: Path, name: str) -> int:
    return sum(map(bool, (raw / name).read_bytes().split(b"\n")))


@pytest.mark.parametrize(
    "mutations", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_damaged_files_are_read_line_by_line_or_refused(mutations: int, tmp_path: Path):
    """Checks that every line becomes a row or is counted as dropped; if none is, all values are
    right."""
    raw = write_random(tmp_path / "raw", users=5)
    random, files = np.random.default_rng(0), sorted(raw.glob("*.csv"))
    compared = 0
    for _ in range(mutations):
        file = files[int(random.integers(len(files)))]
        content = file.read_bytes()
        file.write_bytes(mutated(content, random))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            data_set = small(tmp_path, max_bad_rows=10_000)
        except DataError:
            pass
        else:
            for split in SPLITS:
                lines = lines_in(raw, f"sample_skeleton_{split}.csv")
                lines += lines_in(raw, f"common_features_{split}.csv")
                of_split = data_set.splits[split]
                rows = of_split.impressions + of_split.shared_rows
                assert rows + sum(data_set.dropped[split].values()) == lines
            if all(set(data_set.dropped[split]) <= {UNCLICKED_CONVERSIONS} for split in SPLITS):
                assert_equals_plain(data_set, raw, 1)
                compared += 1
        file.write_bytes(content)
    assert compared > 0
