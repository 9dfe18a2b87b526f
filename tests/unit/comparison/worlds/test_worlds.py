"""The raw bytes are read by a parser of this file's own; probabilities are judged by outcomes."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from esmm_torchrec.comparison.worlds import Block, GeneratedWorld, Simulation, World, generate
from esmm_torchrec.comparison.worlds.catalogue import Split
from esmm_torchrec.errors import DataError, OptionError

SMALL = World(impressions=20_000, seed=5)
HALF = 10_000
SPLITS: tuple[Split, ...] = ("train", "test")
RAW_FILES = [f"{kind}_{s}.csv" for kind in ("sample_skeleton", "common_features") for s in SPLITS]

PUBLISHED_RANGES = {
    "110_14": (1.4e6, 1.85e6),
    "127_14": (3.49e6, 3.82e6),
    "150_14": (3.87e6, 3.945e6),
    "205": (4.9e6, 6.5e6),
    "210": (9.03e6, 9.115e6),
    "301": (9.35e6, 9.352e6),
    "508": (9.355e6, 9.37e6),
}
HISTORIES = {"508": "109_14", "509": "110_14", "702": "127_14", "853": "150_14"}
WEIGHTED = {*HISTORIES, *HISTORIES.values()}
MULTI_VALUED = {*HISTORIES.values(), "210", "853"}
COMMON = {"101", "121", "122", "124", "125", "126", "127", "128", "129", *HISTORIES.values()}

Features = dict[str, list[tuple[int, str]]]


@dataclass(frozen=True)
class Raw:
    """One split, as a reader of the files sees it."""

    sample_ids: list[int]
    labels: list[tuple[str, str]]
    indices: list[str]
    rows: list[Features]
    common: dict[str, Features]
    """In the order of the file."""


def parse_features(count: str, text: str) -> Features:
    features: Features = defaultdict(list)
    parts = text.split("\x01")
    assert len(parts) == int(count)
    for part in parts:
        field, rest = part.split("\x02")
        raw_id, value = rest.split("\x03")
        features[field].append((int(raw_id), value))
    return features


def parse(folder: Path, split: str) -> Raw:
    common: dict[str, Features] = {}
    text = (folder / f"common_features_{split}.csv").read_bytes().decode("ascii")
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        index, count, features = line.split(",")
        assert index not in common
        common[index] = parse_features(count, features)
    raw = Raw([], [], [], [], common)
    text = (folder / f"sample_skeleton_{split}.csv").read_bytes().decode("ascii")
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        sample_id, click, purchase, index, count, features = line.split(",")
        raw.sample_ids.append(int(sample_id))
        raw.labels.append((click, purchase))
        raw.indices.append(index)
        raw.rows.append(parse_features(count, features))
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "small"
    generate(SMALL, out)
    return out


@pytest.fixture(scope="module")
def raw(folder: Path) -> dict[str, Raw]:
    return {split: parse(folder, split) for split in SPLITS}


@pytest.fixture(scope="module")
def truth(folder: Path) -> pa.Table:
    return pq.read_table(folder / "truth.parquet")


@dataclass(frozen=True)
class Columns:
    """All impressions of a world, end to end."""

    user: npt.NDArray[Any]
    item: npt.NDArray[Any]
    position: npt.NDArray[Any]
    category_times: npt.NDArray[Any]
    click: npt.NDArray[Any]
    outcome: npt.NDArray[Any]
    true_ctr: npt.NDArray[Any]
    true_cvr: npt.NDArray[Any]

    @property
    def click_logit(self) -> npt.NDArray[Any]:
        return np.log(self.true_ctr / (1 - self.true_ctr))

    @property
    def conversion_logit(self) -> npt.NDArray[Any]:
        return np.log(self.true_cvr / (1 - self.true_cvr))


def draw(world: World, visits_per_block: int = 512) -> Iterator[Block]:
    simulation = Simulation(world)
    for split in SPLITS:
        for stretch in simulation.stretches(split, visits_per_block):
            yield simulation.block(*stretch)


def columns(world: World) -> Columns:
    blocks = list(draw(world))
    return Columns(
        user=np.concatenate([b.exposure.user[b.exposure.visit] for b in blocks]),
        item=np.concatenate([b.exposure.item for b in blocks]),
        position=np.concatenate([b.exposure.position for b in blocks]),
        category_times=np.concatenate([b.exposure.category_times for b in blocks]),
        click=np.concatenate([b.click for b in blocks]),
        outcome=np.concatenate([b.conversion_if_clicked for b in blocks]),
        true_ctr=np.concatenate([b.true_ctr for b in blocks]).astype(np.float64),
        true_cvr=np.concatenate([b.true_cvr for b in blocks]).astype(np.float64),
    )


class TestRawFiles:
    def test_counts_and_sample_ids(self, raw: dict[str, Raw]) -> None:
        for split in SPLITS:
            assert raw[split].sample_ids == list(range(1, HALF + 1))

    def test_labels(self, raw: dict[str, Raw], truth: pa.Table) -> None:
        outcome = truth["conversion_if_clicked"].to_pylist()
        labels = [label for split in SPLITS for label in raw[split].labels]
        assert {("0", "0"), ("1", "0"), ("1", "1")} == set(labels)
        for (click, purchase), converts in zip(labels, outcome, strict=True):
            assert int(purchase) == int(click) * converts

    def test_rows_of_an_index_are_adjacent_and_have_one_common_row(
        self, raw: dict[str, Raw]
    ) -> None:
        for split in SPLITS:
            indices = raw[split].indices
            runs = [
                here for here, last in zip(indices, [None, *indices], strict=False) if here != last
            ]
            assert len(runs) == len(set(runs))
            assert set(runs) == set(raw[split].common)
            assert all(re.fullmatch("[0-9a-f]{16}", index) for index in runs)
            assert runs != list(raw[split].common)
            assert 40 < len(indices) / len(runs) < 80
        assert not set(raw["train"].common) & set(raw["test"].common)

    def test_fields_lie_where_they_should(self, raw: dict[str, Raw]) -> None:
        skeleton_fields = {"205", "206", "207", "210", "216", "301", *HISTORIES}
        for split in SPLITS:
            assert {field for row in raw[split].rows for field in row} == skeleton_fields
            assert {field for row in raw[split].common.values() for field in row} == COMMON

    def test_ids_have_ranges_of_their_own(self, raw: dict[str, Raw]) -> None:
        ids: dict[str, set[int]] = defaultdict(set)
        for split in SPLITS:
            for features in [*raw[split].rows, *raw[split].common.values()]:
                for field, values in features.items():
                    ids[field].update(raw_id for raw_id, _ in values)
        ranges = sorted((min(values), max(values), field) for field, values in ids.items())
        for (_, high, _), (low, _, field) in itertools.pairwise(ranges):
            assert high < low, field
        for field, (low, high) in PUBLISHED_RANGES.items():
            assert low <= min(ids[field]) <= max(ids[field]) < high, field

    def test_values(self, raw: dict[str, Raw]) -> None:
        weights = {repr(round(math.log(1 + n), 5)) for n in range(1, 10_000)}
        for split in SPLITS:
            for features in [*raw[split].rows, *raw[split].common.values()]:
                for field, values in features.items():
                    allowed = weights if field in WEIGHTED else {"1.0"}
                    assert {value for _, value in values} <= allowed
                    ids = [raw_id for raw_id, _ in values]
                    assert len(ids) == len(set(ids))
                    assert len(ids) == 1 or field in MULTI_VALUED

    def test_shares_of_rows_with_a_field(self, tmp_path: Path) -> None:
        # A larger world, so that the shares are those of many users.
        generate(World(impressions=120_000, seed=1), tmp_path / "world")

        def share(file: str, field: str, step: int = 1) -> float:
            lines = (tmp_path / "world" / file).read_text().splitlines()[::step]
            return sum(bool(re.search(f"[,\x01]{field}\x02", line)) for line in lines) / len(lines)

        expected = {"101": 0.998, "109_14": 0.991, "150_14": 0.998, "121": 0.87, "126": 0.416}
        for field, real in (expected | {"129": 0.637}).items():
            assert share("common_features_train.csv", field) == pytest.approx(real, abs=0.06), field
        for field, low, high in (
            *((field, 1, 1) for field in ("205", "206", "207", "210", "301")),
            ("216", 0.65, 0.77),
            ("508", 0.5, 0.75),
            ("509", 0.15, 0.4),
            ("702", 0.1, 0.4),
            ("853", 0.15, 0.5),
        ):
            assert low <= share("sample_skeleton_train.csv", field, 29) <= high, field

    def test_crosses_are_the_items_values_in_the_users_history(self, raw: dict[str, Raw]) -> None:
        items = {"508": "206", "509": "207", "702": "216", "853": "210"}
        for cross, history in HISTORIES.items():
            # The fields have ids of their own. A cross id stands for one id of the item and one
            # of the history, so the history ids that it may mean shrink to those always there.
            candidates: dict[int, set[int]] = {}
            of_item: dict[int, set[int]] = {}
            rows = [
                (row, raw[split].common[index])
                for split in SPLITS
                for row, index in zip(raw[split].rows, raw[split].indices, strict=True)
            ]
            for row, common in rows:
                for raw_id, weight in row.get(cross, []):
                    possible = {i for i, w in common[history] if w == weight}
                    candidates[raw_id] = candidates.get(raw_id, possible) & possible
                    possible = {i for i, _ in row[items[cross]]}
                    of_item[raw_id] = of_item.get(raw_id, possible) & possible
            assert all(candidates.values())
            assert all(of_item.values())
            # Where it is clear which ids a cross id stands for, it is there whenever both are.
            known = {
                next(iter(of_item[raw_id])): (next(iter(candidates[raw_id])), raw_id)
                for raw_id in candidates
                if len(candidates[raw_id]) == 1 == len(of_item[raw_id])
            }
            assert len(known) > 20
            for row, common in rows:
                weights = dict(common.get(history, []))
                found = dict(row.get(cross, []))
                for item_id, _ in row.get(items[cross], []):
                    if item_id in known:
                        history_id, raw_id = known[item_id]
                        assert found.get(raw_id) == weights.get(history_id)

    def test_items_and_users_are_the_same_in_both_halves(self, raw: dict[str, Raw]) -> None:
        items: dict[int, Any] = {}
        for split in SPLITS:
            for row in raw[split].rows:
                facts = [sorted(row.get(field, [])) for field in ("206", "207", "210", "216")]
                assert items.setdefault(row["205"][0][0], facts) == facts
        users = {s: {r["101"][0][0] for r in raw[s].common.values() if "101" in r} for s in SPLITS}
        both = len(users["train"] & users["test"]) / len(users["test"])
        assert 0.7 < both < 1


class TestTruth:
    def test_columns(self, truth: pa.Table) -> None:
        assert {field.name: str(field.type) for field in truth.schema} == {
            "sample_id": "int64",
            "split": "string",
            "true_ctr": "float",
            "true_cvr": "float",
            "conversion_if_clicked": "int8",
        }
        assert truth["sample_id"].to_pylist() == 2 * list(range(1, HALF + 1))
        assert truth["split"].to_pylist() == ["train"] * HALF + ["test"] * HALF
        assert not any(column.null_count for column in truth.columns)
        assert set(truth["conversion_if_clicked"].to_pylist()) == {0, 1}
        for name in ("true_ctr", "true_cvr"):
            assert 0 < min(truth[name].to_pylist()) < max(truth[name].to_pylist()) < 1

    def test_world_file(self, folder: Path, raw: dict[str, Raw], truth: pa.Table) -> None:
        written = json.loads((folder / "world.json").read_text())
        assert World(**written["world"]) == SMALL
        clicks = np.array([int(click) for click, _ in raw["test"].labels])
        bought = np.array([int(purchase) for _, purchase in raw["test"].labels])
        half = truth.slice(HALF)
        true_ctr, true_cvr = half["true_ctr"].to_numpy(), half["true_cvr"].to_numpy()
        counted = written["test"]
        assert counted["impressions"] == HALF
        assert counted["clicks"] == clicks.sum()
        assert counted["conversions"] == bought.sum()
        assert counted["conversions_if_all_clicked"] == sum(
            half["conversion_if_clicked"].to_pylist()
        )
        assert counted["common_rows"] == len(raw["test"].common)
        clicked = clicks == 1
        assert counted["ctr_auc"] == pytest.approx(roc_auc_score(clicks, true_ctr), abs=1e-5)
        assert counted["cvr_auc"] == pytest.approx(
            roc_auc_score(bought[clicked], true_cvr[clicked]), abs=1e-4
        )
        soft = roc_auc_score(
            np.repeat([1, 0], len(half)),
            np.concatenate([true_cvr, true_cvr]),
            sample_weight=np.concatenate([true_cvr, 1 - true_cvr]),
        )
        assert counted["cvr_auc_entire_space"] == pytest.approx(soft, abs=1e-5)
        sizes = {name: (folder / name).stat().st_size for name in [*RAW_FILES, "truth.parquet"]}
        assert written["file_bytes"] == sizes


class TestSameBytes:
    def test_seed(self, folder: Path, tmp_path: Path) -> None:
        def digests(folder: Path) -> dict[str, str]:
            return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

        generate(SMALL, tmp_path / "again")
        generate(replace(SMALL, seed=6), tmp_path / "other")
        same, other = digests(tmp_path / "again"), digests(tmp_path / "other")
        assert digests(folder) == same
        assert sorted(same) == sorted([*RAW_FILES, "truth.parquet", "world.json"])
        assert all(same[name] != other[name] for name in same)

    @pytest.mark.parametrize("visits_per_block", [7, 100])
    def test_block_size(
        self, folder: Path, truth: pa.Table, tmp_path: Path, visits_per_block: int
    ) -> None:
        generate(SMALL, tmp_path / "world", visits_per_block=visits_per_block)
        for name in RAW_FILES:
            assert (tmp_path / "world" / name).read_bytes() == (folder / name).read_bytes(), name
        assert pq.read_table(tmp_path / "world" / "truth.parquet").equals(truth)

    def test_draw_and_generate_agree(self, raw: dict[str, Raw], truth: pa.Table) -> None:
        blocks = list(draw(SMALL))
        clicks = np.concatenate([block.click for block in blocks]).tolist()
        bought = np.concatenate([block.conversion for block in blocks]).tolist()
        labels = [tuple(map(int, label)) for split in SPLITS for label in raw[split].labels]
        assert list(zip(clicks, bought, strict=True)) == labels
        true_cvr = np.concatenate([block.true_cvr for block in blocks])
        np.testing.assert_array_equal(true_cvr, truth["true_cvr"].to_numpy())


class TestFolder:
    def test_what_is_there_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "world").mkdir()
        with pytest.raises(DataError, match="world already exists; remove it"):
            generate(SMALL, tmp_path / "world")
        assert not list((tmp_path / "world").iterdir())

    def test_what_an_interrupted_run_left_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "world.partial").mkdir()
        (tmp_path / "world.partial" / "sample_skeleton_train.csv").write_text("half a row")
        generated = generate(World(impressions=1000), tmp_path / "world")
        assert isinstance(generated, GeneratedWorld)
        assert [path.name for path in tmp_path.iterdir()] == ["world"]
        assert len(parse(tmp_path / "world", "train").rows) == 500


@pytest.fixture(scope="module")
def default() -> Columns:
    return columns(World(impressions=300_000, seed=2))


class TestProbabilities:
    def test_clicks_follow_true_ctr(self, default: Columns) -> None:
        assert_calibrated(default.click, default.true_ctr)

    def test_outcomes_follow_true_cvr_everywhere(self, default: Columns) -> None:
        assert_calibrated(default.outcome, default.true_cvr)
        clicked = default.click == 1
        assert_calibrated(default.outcome[clicked], default.true_cvr[clicked])
        assert_calibrated(default.outcome[~clicked], default.true_cvr[~clicked])

    def test_rates_are_those_asked_for(self) -> None:
        drawn = columns(World(impressions=20_000, ctr=0.1, cvr=0.03))
        assert drawn.true_ctr.mean() == pytest.approx(0.1, rel=1e-3)
        of_clicks = (drawn.true_ctr * drawn.true_cvr).sum() / drawn.true_ctr.sum()
        assert of_clicks == pytest.approx(0.03, rel=1e-3)

    def test_default_world(self) -> None:
        drawn = columns(World())
        train = slice(500_000)
        assert drawn.click.mean() == pytest.approx(0.06, rel=0.03)
        assert (drawn.click * drawn.outcome)[train].sum() > 2000
        assert 0.70 < roc_auc_score(drawn.click, drawn.true_ctr) < 0.75
        clicked = drawn.click == 1
        cvr_auc = roc_auc_score(drawn.outcome[clicked], drawn.true_cvr[clicked])
        assert 0.75 < cvr_auc < 0.80

    @pytest.mark.parametrize("correlation", [-1.0, -0.5, 0.0, 0.6, 1.0])
    def test_correlation(self, correlation: float) -> None:
        drawn = columns(
            World(impressions=20_000, correlation=correlation, position_effect=0, noise=0)
        )
        found = np.corrcoef(drawn.click_logit, drawn.conversion_logit)[0, 1]
        assert found == pytest.approx(correlation, abs=0.001)

    def test_positions_act_on_clicks_alone(self) -> None:
        without = columns(World(impressions=20_000, position_effect=0))
        with_effect = columns(World(impressions=20_000, position_effect=0.8))
        np.testing.assert_array_equal(without.item, with_effect.item)
        fall = with_effect.click_logit - without.click_logit + 0.8 * without.position
        assert np.ptp(fall) < 1e-4
        # Same user, same item, whatever the position: the two differ by an intercept.
        assert np.ptp(with_effect.conversion_logit - without.conversion_logit) < 1e-4
        assert set(without.position) == {0, 1, 2}
        # Positions are drawn without a look at user or item.
        chance = 4 / math.sqrt(len(without.position))
        for logit in (without.click_logit, without.conversion_logit):
            assert abs(np.corrcoef(without.position, logit)[0, 1]) < chance

    def test_confounding(self) -> None:
        for confounding, low, high in ((0.0, -0.02, 0.02), (2.0, 0.5, 0.95)):
            drawn = columns(World(impressions=20_000, correlation=0, confounding=confounding))
            assert low < np.corrcoef(drawn.click_logit, drawn.conversion_logit)[0, 1] < high

    def test_noise(self) -> None:
        quiet = columns(World(impressions=20_000, noise=0))
        noisy = columns(World(impressions=20_000, noise=0.7))
        for name in ("click_logit", "conversion_logit"):
            difference = getattr(noisy, name) - getattr(quiet, name)
            assert np.std(difference) == pytest.approx(0.7, rel=0.03)

    @pytest.mark.parametrize("logit", ["click_logit", "conversion_logit"])
    def test_histories_tell_of_the_taste(self, default: Columns, logit: str) -> None:
        # Against the mean of the same item, so that no item effect is taken for a history's.
        value = getattr(default, logit)
        count = np.bincount(default.item)
        excess = (
            value - (np.bincount(default.item, weights=value) / np.maximum(count, 1))[default.item]
        )
        inside = default.category_times > 0
        # Impressions of a user go together: the mean of each user counts once.
        users = []
        for user in np.unique(default.user):
            own = default.user == user
            if inside[own].any() and not inside[own].all():
                users.append(excess[own & inside].mean() - excess[own & ~inside].mean())
        assert len(users) > 1000
        assert np.mean(users) > 5 * np.std(users) / math.sqrt(len(users))

    def test_history_scale_one_has_the_lengths_of_ali_ccp(self) -> None:
        simulation = Simulation(World(impressions=1_000_000, history_scale=1.0))
        exposure = simulation.block("train", 0, 300).exposure
        real = {"categories": 70, "shops": 252, "brands": 155, "nodes": 136}
        for name, length in real.items():
            found = np.diff(getattr(exposure, name).offsets)
            assert found[found > 0].mean() == pytest.approx(length, rel=0.25), name

    def test_rare_share(self) -> None:
        def share_of_rare(world: World) -> float:
            item = columns(world).item
            train, test = item[:50_000], item[50_000:]
            return float((np.bincount(train, minlength=item.max() + 1)[test] < 10).mean())

        none, some, all_even = (
            share_of_rare(World(impressions=100_000, rare_share=share)) for share in (0, 0.3, 1)
        )
        assert none + 0.05 < some < all_even - 0.05


def assert_calibrated(
    outcome: npt.NDArray[Any], probability: npt.NDArray[Any], sigmas: float = 4.0
) -> None:
    """The mean outcome is the mean probability, overall and in deciles, but for chance."""
    order = np.argsort(probability, kind="stable")
    for part in [order, *np.array_split(order, 10)]:
        expected = probability[part]
        spread = math.sqrt((expected * (1 - expected)).sum())
        assert abs(outcome[part].sum() - expected.sum()) < sigmas * spread


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("impressions", 999),
        ("seed", -1),
        ("ctr", 0.0),
        ("cvr", 0.9),
        ("correlation", 1.1),
        ("rare_share", -0.1),
        ("position_effect", 4.0),
        ("confounding", -1.0),
        ("noise", math.nan),
        ("history_scale", 0.0),
    ],
)
def test_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(OptionError, match=rf"^`{setting}` is {value}; it must be from \S+ to \S+$"):
        replace(World(), **{setting: value})


def test_blocks_cover_the_world_in_order() -> None:
    blocks: list[Block] = list(draw(World(impressions=5_001), visits_per_block=5))
    for split, total in (("train", 2_500), ("test", 2_501)):
        expected = 0
        for block in blocks:
            if block.exposure.split == split:
                assert block.exposure.first_impression == expected
                expected += len(block.click)
        assert expected == total
