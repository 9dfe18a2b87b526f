"""Training of each method: the same on one and two ranks, and right on data with a known answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from esmm_torchrec.data.mapped import MappedSplit
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.reader import ImpressionReader
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.models.esmm import TrainOutput
from esmm_torchrec.models.methods import AFTER_METHODS, METHODS
from esmm_torchrec.models.parts import LoggedImpressions, Rows, TrainingRows
from esmm_torchrec.models.rows.clicked import ClickedRows, MissingAsNegativeRows, OversampledRows
from esmm_torchrec.models.rows.inverse_propensity import (
    InversePropensityRows,
    RejectionSampledRows,
)
from esmm_torchrec.schema import IdFeature
from esmm_torchrec.serving.scorer import score_split
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.tasks import DEFAULT_TASKS
from esmm_torchrec.training.fit import (
    FOLDS,
    TrainingPart,
    batch_of_equal_updates,
    fit,
    out_of_fold_pctr,
    part_of,
    training_part,
)
from esmm_torchrec.training.loop import Callback, TrainingLoop
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train as train_run
from tests.ranks import run_on_ranks

ALL_METHODS = tuple(METHODS)
GLOBAL_BATCH = 16
OPTIONS = TrainOptions(
    embedding_dim=8,
    tower=(12, 6),
    first_order=False,
    sparse_lr=0.05,
    dense_lr=0.005,
    epochs=2,
    seed=3,
    device="cpu",
)
CELLS = 20
ROWS_PER_CELL = 960
EPOCHS_TO_THE_END = 30
ITEMS = 400


def _columns(click: np.ndarray, conversion: np.ndarray, item: np.ndarray) -> pa.Table:
    size = len(click)
    return pa.table(
        {
            "click": click.astype(np.int8),
            "conversion": (click * conversion).astype(np.int8),
            "sample_id": np.arange(size),
            "group_id": np.arange(size) // 3,
            "item": pa.array(item.astype(np.int32)),
        }
    )


def _write(path: Path, train: pa.Table, test: pa.Table, *, items: int) -> PreparedDataSet:
    with PreparedWriter(
        path,
        id_features=[IdFeature("item", "item")],
        columns=["group_id"],
        source={"kind": "test"},
        min_count=1,
    ) as writer:
        counts = np.full(items, 3)
        writer.write_vocabulary("item", Vocabulary.from_counts(np.arange(items), counts, 1))
        writer.write_impressions("train", train)
        writer.write_impressions("test", test)
    return PreparedDataSet.open(path)


def _write_sparse_clicks(path: Path) -> None:
    """Writes one click in ten, so that many batches of a rank have no click."""
    rng = np.random.default_rng(2)
    item = rng.integers(1, 11, 200)
    click = rng.random(200) < 0.02 * item
    table = _columns(click, rng.random(200) < 0.5, item)
    _write(path, table, table.slice(0, 90), items=10)


def _write_cells(path: Path) -> None:
    """Writes 20 cells with known numbers of clicks and conversions."""
    cell = np.repeat(np.arange(CELLS), ROWS_PER_CELL)
    place = np.tile(np.arange(ROWS_PER_CELL), CELLS)
    clicks = 240 + 30 * (np.arange(CELLS) * 7 % CELLS)
    conversions = (clicks * (0.15 + 0.6 * np.arange(CELLS) / CELLS)).astype(int)
    table = _columns(place < clicks[cell], place < conversions[cell], cell + 1)
    one_each = _columns(np.ones(CELLS), np.ones(CELLS), np.arange(CELLS) + 1)
    _write(path, table, one_each, items=CELLS)


def _write_items(path: Path, ctr: np.ndarray, cvr: np.ndarray, rng: np.random.Generator) -> None:
    """Writes both splits, with impressions of items with these click and conversion rates."""
    tables = []
    for _ in range(2):
        item = rng.integers(0, ITEMS, 12_000)
        click, conversion = rng.random(12_000) < ctr[item], rng.random(12_000) < cvr[item]
        tables.append(_columns(click, conversion, item + 1))
    _write(path, *tables, items=ITEMS)


def _write_tastes(path: Path) -> None:
    """Writes items whose click rates and conversion rates are independent."""
    rng = np.random.default_rng(4)
    _write_items(path, rng.uniform(0.2, 0.8, ITEMS), rng.uniform(0.1, 0.9, ITEMS), rng)


def _write_related_tastes(path: Path) -> None:
    """Writes items whose conversion rate rises with their click rate."""
    rng = np.random.default_rng(8)
    ctr = rng.uniform(0.1, 0.9, ITEMS)
    _write_items(path, ctr, np.clip(ctr + rng.normal(0, 0.1, ITEMS), 0.05, 0.95), rng)


def _write_own_items(path: Path) -> None:
    """Writes users who each see only an item of their own, and click it always or never."""
    rng = np.random.default_rng(9)
    item = np.repeat(np.arange(60), 3)
    click = (rng.random(60) < 0.5)[item]
    table = _columns(click, rng.random(180) < 0.5, item + 1)
    _write(path, table, table.slice(0, 90), items=60)


def _out_of_fold(data: Path, ranks: Ranks) -> np.ndarray:
    train = MappedSplit.open(PreparedDataSet.open(data), "train")
    options = replace(OPTIONS, batch_size=GLOBAL_BATCH, epochs=5)
    return out_of_fold_pctr(train, options, ranks)


class _CountSteps(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, loop: TrainingLoop, output: TrainOutput) -> None:  # noqa: ARG002
        self.steps += 1


def _updates(data: Path, ranks: Ranks) -> dict[str, int]:
    """Counts the steps of a pass over all impressions and of a pass over the clicks alone."""
    train = MappedSplit.open(PreparedDataSet.open(data), "train")
    steps = {}
    for method in ("esmm", "base"):
        options = replace(OPTIONS, method=method, batch_size=GLOBAL_BATCH, epochs=1)
        taken = _CountSteps()
        fit(
            train,
            options,
            ranks,
            part=training_part(train, options),
            updates_per_pass=10,
            callbacks=(taken,),
        )
        steps[method] = taken.steps
    return steps


def _train_all(data: Path, ranks: Ranks) -> dict[str, Any]:
    """Trains every method; returns its scores, and for each batch of this rank whether it has no
    click."""
    dataset = PreparedDataSet.open(data)
    train, test = (MappedSplit.open(dataset, name) for name in ("train", "test"))
    scores: dict[str, Any] = {}
    for method in ALL_METHODS:
        options = replace(
            OPTIONS,
            method=method,
            batch_size=GLOBAL_BATCH,
            sharding="row_wise" if ranks.world_size > 1 else "auto",
        )
        pctr = None
        if METHODS[method].rows.needs_pctr:
            pctr = out_of_fold_pctr(train, options, ranks)
        part = training_part(train, options, pctr=pctr)
        model = fit(train, options, ranks, part=part)
        scored = score_split(model, test, ranks, batch_size=32, progress=False)
        if scored is not None:
            scores[method] = {name: score.values for name, score in scored.scores.items()}
            scores[method] |= {"pctr": pctr}
    reader = ImpressionReader(
        train,
        batch_size=GLOBAL_BATCH // ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=OPTIONS.seed,
    )
    return {"scores": scores, "without_click": [not batch.click.any() for batch in reader]}


def _on_ranks(data: Path) -> dict[str, Any]:
    with process_group("cpu") as ranks:
        torch.set_num_threads(1)
        return _train_all(data, ranks)


def _weights(model: Any, part: str) -> dict[str, np.ndarray]:
    """Returns name → parameter below `model.<part>`, with whole tables."""
    weights = {}
    for key, value in model.state_dict().items():
        prefix = f"model.{part}."
        if key.startswith(prefix):
            local = value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
            weights[key.removeprefix(prefix)] = local.detach().numpy().copy()
    assert weights
    return weights


def _identities(data: Path, ranks: Ranks) -> dict[str, dict[str, np.ndarray]]:
    """Returns the weights of conversion networks that must be equal."""
    train = MappedSplit.open(PreparedDataSet.open(data), "train")
    columns = {label: train.scalars[label] for label in DEFAULT_TASKS.labels}
    even = np.full(train.impressions, 0.3)

    def trained(method: str, rows: TrainingRows | None, part: str = "conversion") -> Any:
        options = replace(OPTIONS, method=method, batch_size=GLOBAL_BATCH)
        own = part_of(train, rows, name=method)
        return _weights(fit(train, options, ranks, part=own), part)

    def rows(part: Rows) -> TrainingRows | None:
        return part.select(LoggedImpressions(columns, DEFAULT_TASKS, even, OPTIONS.seed))

    return {
        "base": trained("base", rows(ClickedRows())),
        "aman at 0": trained("aman", rows(MissingAsNegativeRows(1e-12))),
        "oversampling x 1": trained("oversampling", rows(OversampledRows(1))),
        "unbias, constant pctr": trained("unbias", rows(RejectionSampledRows(0.9))),
        "unbias-weighted, constant pctr": trained(
            "unbias-weighted", rows(InversePropensityRows(0.9))
        ),
        "aman at 1": trained("aman", rows(MissingAsNegativeRows(1.0))),
        "ctcvr of division": trained("division", None, "ctcvr"),
    }


def _saturated(data: Path, ranks: Ranks) -> dict[str, np.ndarray]:
    """Returns method → pCVR of each cell after training to convergence."""
    dataset = PreparedDataSet.open(data)
    train, test = (MappedSplit.open(dataset, name) for name in ("train", "test"))
    own_rows: dict[str, Rows] = {
        "aman": MissingAsNegativeRows(1.0),
        "oversampling": OversampledRows(3),
    }
    pcvr = {}
    for method in ALL_METHODS:
        if method == "ctr" or method in set(AFTER_METHODS) - {"mtl-ips", "escm2-dr"}:
            continue  # the others are variants of these two, or biased by design
        options = replace(
            OPTIONS,
            method=method,
            rows=own_rows.get(method),
            batch_size=4800,
            tower=(32,),
            sparse_lr=0.1,
            dense_lr=0.01,
            epochs=EPOCHS_TO_THE_END,
        )
        true_pctr = train.scalars["click"].reshape(CELLS, -1).mean(axis=1)
        pctr = np.repeat(true_pctr, ROWS_PER_CELL)
        part = training_part(train, options, pctr=pctr)
        model = fit(train, options, ranks, part=part)
        scored = score_split(model, test, ranks, batch_size=CELLS, progress=False)
        assert scored is not None
        pcvr[method] = scored.scores["cvr"].block(slice(None)).probability
    return pcvr


def _shuffled_labels(
    data: Path, ranks: Ranks, methods: tuple[str, ...]
) -> dict[str, tuple[ScoredImpressions, ...]]:
    """Returns method → scores of models trained on true and on shuffled conversion labels."""
    dataset = PreparedDataSet.open(data)
    train, test = (MappedSplit.open(dataset, name) for name in ("train", "test"))
    conversion = train.scalars["conversion"].copy()
    clicked = np.flatnonzero(train.scalars["click"])
    conversion[clicked] = np.random.default_rng(0).permutation(conversion[clicked])
    shuffled = replace(train, scalars=train.scalars | {"conversion": conversion})
    results = {}
    for method in methods:
        options = replace(
            OPTIONS,
            method=method,
            batch_size=200,
            rows=MissingAsNegativeRows(1.0) if method == "aman" else None,
        )
        scored = []
        for split in (train, shuffled):
            part = training_part(split, options)
            model = fit(split, options, ranks, part=part)
            scored.append(score_split(model, test, ranks, batch_size=512, progress=False))
        results[method] = tuple(scored)
    return results


def _known_answers(folder: Path) -> dict[str, Any]:
    with process_group("cpu") as ranks:
        torch.set_num_threads(1)
        return {
            "identities": _identities(folder / "sparse", ranks),
            "saturated": _saturated(folder / "cells", ranks),
            "shuffled": _shuffled_labels(
                folder / "tastes", ranks, ("base", "oversampling", "shared-bottom")
            ),
            "related": _shuffled_labels(folder / "related", ranks, ("aman", "ctr")),
            "out of fold": _out_of_fold(folder / "own-items", ranks),
            "updates": _updates(folder / "sparse", ranks),
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("methods")
    _write_sparse_clicks(path / "sparse")
    _write_cells(path / "cells")
    _write_tastes(path / "tastes")
    _write_related_tastes(path / "related")
    _write_own_items(path / "own-items")
    return path


@pytest.fixture(scope="module")
def known(folder: Path) -> dict[str, Any]:
    return run_on_ranks(1, _known_answers, folder)[0]


def test_two_ranks_train_what_one_trains(folder: Path) -> None:
    (alone,) = run_on_ranks(1, _on_ranks, folder / "sparse")
    both = run_on_ranks(2, _on_ranks, folder / "sparse")
    assert any(
        first != second
        for first, second in zip(*(rank["without_click"] for rank in both), strict=True)
    ), "a batch without a click on one rank alone is what this is about"
    for method in ALL_METHODS:
        one, two = alone["scores"][method], both[0]["scores"][method]
        assert any(column is not None for column in one.values())
        for name, column in one.items():
            if column is None:
                assert two[name] is None
            else:
                np.testing.assert_allclose(
                    two[name], column, atol=2e-5, rtol=2e-5, err_msg=f"{method} {name}"
                )


def test_methods_at_their_neutral_rates_train_what_base_trains(known: dict[str, Any]) -> None:
    identities = known["identities"]
    for name in ("aman at 0", "oversampling x 1", "unbias, constant pctr"):
        for key, value in identities["base"].items():
            np.testing.assert_array_equal(identities[name][key], value, err_msg=f"{name} {key}")
    for key, value in identities["base"].items():
        weighted = identities["unbias-weighted, constant pctr"][key]
        np.testing.assert_allclose(weighted, value, atol=1e-6)


def test_aman_on_everything_trains_the_ctcvr_network_of_division(known: dict[str, Any]) -> None:
    identities = known["identities"]
    assert identities["aman at 1"].keys() == identities["ctcvr of division"].keys()
    for key, value in identities["ctcvr of division"].items():
        np.testing.assert_allclose(identities["aman at 1"][key], value, atol=1e-6, err_msg=key)
        assert value.size == 1 or not np.array_equal(value, identities["base"].get(key))


def test_cells_with_plenty_of_data_give_the_rates_they_hold(
    folder: Path, known: dict[str, Any]
) -> None:
    train = MappedSplit.open(PreparedDataSet.open(folder / "cells"), "train")
    clicks, conversions = (
        train.scalars[name].reshape(CELLS, -1).sum(axis=1) for name in ("click", "conversion")
    )
    truth = conversions / clicks
    for method, pcvr in known["saturated"].items():
        expected = {
            "aman": conversions / ROWS_PER_CELL,
            "oversampling": 3 * conversions / (3 * conversions + clicks - conversions),
        }.get(method, truth)
        # Rejection keeps a random part of the clicks, whose rate has the noise of its size.
        tolerance = 0.15 if method == "unbias" else 0.05
        np.testing.assert_allclose(pcvr, expected, atol=tolerance, err_msg=method)
        if method == "unbias":
            assert abs((pcvr - truth).mean()) < 0.05


def test_shuffled_conversions_leave_nothing_to_rank_clicks_by(known: dict[str, Any]) -> None:
    def on_clicks(scored: ScoredImpressions) -> float:
        clicked, converted = scored.happened("click"), scored.happened("conversion")
        value = auc(scored.scores["cvr"].values[clicked], converted[clicked])
        assert value is not None
        return value

    # A random order of 400 items has an AUC of .5 with a standard error of about .015.
    for method in ("base", "oversampling", "shared-bottom"):
        learnt, shuffled = map(on_clicks, known["shuffled"][method])
        assert learnt > 0.65, method
        assert abs(shuffled - 0.5) < 0.06, method


def test_shuffled_conversions_leave_aman_what_pctr_alone_gives(known: dict[str, Any]) -> None:
    """With every unclicked impression a negative, what is left to learn is the click."""

    def on_clicks(scored: ScoredImpressions, name: str) -> float:
        clicked, converted = scored.happened("click"), scored.happened("conversion")
        value = auc(scored.scores[name].values[clicked], converted[clicked])
        assert value is not None
        return value

    learnt, shuffled = (on_clicks(of, "cvr") for of in known["related"]["aman"])
    of_pctr = on_clicks(known["related"]["ctr"][0], "ctr")
    assert of_pctr > 0.6, "items that are clicked are converted"
    # With the true labels, AMAN knows more; otherwise, this test would show nothing.
    assert learnt > of_pctr
    assert shuffled == pytest.approx(of_pctr, abs=0.03)


def test_out_of_fold_pctr_knows_nothing_of_its_users(folder: Path, known: dict[str, Any]) -> None:
    """A user's only item is always clicked, so that a network which saw the user would know; and
    it is unknown to the other fold, all of whose users must look alike to it."""
    click = MappedSplit.open(PreparedDataSet.open(folder / "own-items"), "train").scalars["click"]
    pctr = known["out of fold"]
    assert np.isnan(pctr[click == 0]).all()
    of_clicked = pctr[click == 1]
    # Sums in batches of other sizes differ in their last digits.
    assert 1 <= len(np.unique(of_clicked.round(6))) <= FOLDS
    # All users clicked: it is the other users' rate, and not 1.
    assert abs(of_clicked - click.mean()).max() < 0.25


def test_a_pass_takes_as_many_updates_as_asked(known: dict[str, Any]) -> None:
    # 200 rows by 20; some 20 clicks by 2 or 3.
    assert known["updates"]["esmm"] == 10
    assert 7 <= known["updates"]["base"] <= 10
    assert batch_of_equal_updates(360_000, updates=176) == 2046
    assert batch_of_equal_updates(31_000, updates=176) == 177
    assert batch_of_equal_updates(50, updates=176) == 1


def _trained_weights(folder: Path) -> list[dict[str, np.ndarray]]:
    weights = []
    with process_group("cpu") as ranks:
        torch.set_num_threads(1)
        for name in ("plain", "other-test"):
            options = replace(OPTIONS, batch_size=100, epochs=1)
            train_run(folder / name, folder / f"run-{name}", options, ranks)
            train = MappedSplit.open(PreparedDataSet.open(folder / name), "train")
            options = replace(OPTIONS, batch_size=GLOBAL_BATCH)
            part: TrainingPart = training_part(train, options)
            model = fit(train, options, ranks, part=part)
            weights.append(_weights(model, "features") | _weights(model, "towers"))
    return weights


def test_the_test_half_changes_nothing_that_is_learnt(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    frames = []
    for first_id in (0, 0, 40):
        click = rng.random(400) < 0.3
        frames.append(
            pd.DataFrame(
                {
                    "click": click.astype(int),
                    "buy": (click & (rng.random(400) < 0.4)).astype(int),
                    "item": rng.integers(first_id, first_id + 60, 400),
                    "price": rng.normal(first_id, 1, 400),
                }
            )
        )
    plain, other = (
        prepare_table(
            tmp_path / name,
            train=frames[0],
            test=test,
            click="click",
            conversion="buy",
            ids=["item"],
            dense=["price"],
            min_count=3,
        )
        for name, test in (("plain", frames[1]), ("other-test", frames[2]))
    )
    assert plain.schema == other.schema
    # Shares belong to each split; whatever encodes values is of the training split.
    of_train, of_other = (
        replace(
            dataset.statistics,
            missing={name: share["train"] for name, share in dataset.statistics.missing.items()},
            unknown={name: share["train"] for name, share in dataset.statistics.unknown.items()},
        )
        for dataset in (plain, other)
    )
    assert of_train == of_other
    train_and_vocabulary = {
        file: checksum for file, checksum in plain.checksums.items() if not file.startswith("test")
    }
    assert train_and_vocabulary.items() <= other.checksums.items()
    assert plain.checksums != other.checksums
    ((first, second),) = run_on_ranks(1, _trained_weights, tmp_path)
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value, err_msg=key)
    runs = [tmp_path / f"run-{name}" for name in ("plain", "other-test")]
    checkpoints = [sorted((run / "checkpoints").rglob("*.distcp")) for run in runs]
    assert checkpoints[0]
    for one, other_one in zip(*checkpoints, strict=True):
        assert one.name == other_one.name
        assert one.read_bytes() == other_one.read_bytes()
    metrics = [(run / "metrics.json").read_text() for run in runs]
    assert metrics[0] != metrics[1], "the test split is another"
