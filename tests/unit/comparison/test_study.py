"""A small comparison from end to end: on worlds and on one data set, stopped and resumed."""

from __future__ import annotations

import copy
import csv
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from esmm_torchrec.cli import train as train_cli
from esmm_torchrec.cli.main import parse_options
from esmm_torchrec.comparison.data import Source, prepared_source
from esmm_torchrec.comparison.handover import (
    batch_size_on_all_rows,
    chosen_options,
    train_command,
)
from esmm_torchrec.comparison.options import (
    COMPARED,
    FINALISTS,
    SETTINGS,
    ComparisonOptions,
    Setting,
    Trial,
)
from esmm_torchrec.comparison.report import format_table, write_report
from esmm_torchrec.comparison.results import DIFFERENCES, compared_pairs
from esmm_torchrec.comparison.selection import (
    Chosen,
    Tried,
    at_edge,
    best,
    chosen_in,
    selection_score,
    tuned_line,
)
from esmm_torchrec.comparison.statistics import paired_difference
from esmm_torchrec.comparison.store import code_identity
from esmm_torchrec.comparison.study import compare
from esmm_torchrec.comparison.tables import difference_rows, headline_rows, time_rows
from esmm_torchrec.comparison.trial import _curves, _references
from esmm_torchrec.comparison.verdicts import verdicts
from esmm_torchrec.comparison.worlds import World
from esmm_torchrec.data.sources.tabular import prepare_table
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.ranking import auc, soft_auc
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions
from esmm_torchrec.models.methods import AFTER_METHODS, METHODS, PAPER_METHODS
from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from tests.prepared_data import description_of, record_changed_file, write_data_set
from tests.ranks import run_on_ranks

WORLD = World(impressions=6000, ctr=0.2, cvr=0.4)
BATCH_SIZE = 256
OPTIONS = ComparisonOptions(
    methods=("base", "unbias", "division", "esmm"),
    seeds=2,
    fractions=(0.5, 1.0),
    trials=2,
    epochs=1,
    batch_size=BATCH_SIZE,
    tower=(8,),
    test_impressions=2000,
    processes=1,
    device="cpu",
)
FIXED = replace(OPTIONS, methods=("base", "shared-bottom"), fractions=(1.0,), trials=1)


def _compare_all(folder: Path) -> dict[str, Any]:
    def run(
        name: str,
        options: ComparisonOptions,
        data: Path | None = None,
        keep_best: Path | None = None,
    ) -> dict[str, Any]:
        return compare(
            options,
            folder / name,
            ranks,
            data=data,
            world=WORLD,
            command="test",
            keep_best=keep_best,
        )

    with process_group("cpu") as ranks:
        torch.set_num_threads(2)
        first = run("worlds", OPTIONS)
        assert torch.get_num_threads() == 2, "compare leaves the number of threads as it was"
        torch.set_num_threads(1)
        shutil.copytree(folder / "worlds", folder / "stopped")
        removed = sorted((folder / "stopped" / "trials").glob("*/*"))[::3]
        for path in removed:
            path.unlink()
        resumed = run("stopped", OPTIONS)
        fixed = run("fixed", FIXED, folder / "data", folder / "kept")
        shutil.copytree(folder / "fixed", folder / "settings")
        for path in (folder / "settings" / "trials").glob("*/tune-*"):
            path.unlink()
        as_chosen = compare(
            FIXED,
            folder / "settings",
            ranks,
            data=folder / "data",
            world=WORLD,
            command="test",
            settings=fixed,
        )
        return {
            "as chosen": as_chosen,
            "worlds": first,
            "resumed": resumed,
            "removed": [path.name for path in removed],
            "worlds left": list((folder / "worlds" / "worlds").glob("*")),
            "fixed": fixed,
            "other test split": run("other-test", FIXED, folder / "other-test-data"),
            "no truth": run("no-truth", replace(FIXED, seeds=1), folder / "no-truth-data"),
        }


def _without_truth(source: Path, out: Path) -> None:
    """A copy of a data set that does not know the true probabilities."""
    shutil.copytree(source, out)
    description = description_of(out)
    for name in ("true_ctr", "true_cvr"):
        description["columns"].remove(name)
    (out / "dataset.json").write_text(json.dumps(description))
    for split in description["splits"].values():
        for part in split["impression_parts"]:
            file = part["file"]
            table = pq.read_table(out / file).drop_columns(["true_ctr", "true_cvr"])
            pq.write_table(table, out / file)
            record_changed_file(out, file)


def _with_other_test_half(source: Path, out: Path) -> None:
    """A copy of a data set with other labels and other ids in its test split."""
    shutil.copytree(source, out)
    description = description_of(out)
    rng = np.random.default_rng(1)
    for part in description["splits"]["test"]["impression_parts"]:
        file = part["file"]
        table = pq.read_table(out / file)
        click = rng.integers(0, 2, len(table)).astype(np.int8)
        conversion = click * rng.integers(0, 2, len(table)).astype(np.int8)
        for name, values in (("click", click), ("conversion", conversion)):
            table = table.set_column(table.column_names.index(name), name, [values])
        items = table["item"].to_numpy(zero_copy_only=False)
        other = pa.array(rng.permutation(items), pa.int32(), from_pandas=True)
        table = table.set_column(table.column_names.index("item"), "item", other)
        pq.write_table(table, out / file)
        record_changed_file(out, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def compared(folder: Path) -> dict[str, Any]:
    write_data_set(folder / "data", train=1500, test=900, users=150)
    _without_truth(folder / "data", folder / "no-truth-data")
    _with_other_test_half(folder / "data", folder / "other-test-data")
    return run_on_ranks(1, _compare_all, folder)[0]


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf that is no time."""
    if isinstance(value, dict):
        for key, item in value.items():
            if "seconds" not in key:
                yield from _numbers(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _numbers(item, f"{path}/{place}")
    else:
        yield path, value


def test_results_have_the_form_that_is_promised(compared: dict[str, Any], folder: Path) -> None:
    results = compared["worlds"]
    assert json.loads((folder / "worlds" / "results.json").read_text()) == results
    assert list(results["methods"]) == ["BASE", "UNBIAS", "DIVISION", "ESMM"]
    for fractions in results["methods"].values():
        assert list(fractions) == ["0.5", "1"]
        for metrics in fractions.values():
            for name in ("cvr_auc", "ctcvr_auc_common_ctr", "cvr_auc_entire_space"):
                figure = metrics[name]
                assert len(figure["runs"]) == 2
                assert figure["mean"] == pytest.approx(np.mean(figure["runs"]))
                assert figure["std"] == pytest.approx(np.std(figure["runs"], ddof=1))
    assert results["methods"]["BASE"]["1"]["ctr_auc"]["mean"] is None
    assert results["methods"]["DIVISION"]["1"]["cvr_share_above_one"]["mean"] is not None


def test_differences_are_paired_runs(compared: dict[str, Any]) -> None:
    results = compared["worlds"]
    base, esmm = (results["methods"][name]["1"]["cvr_auc"]["runs"] for name in ("BASE", "ESMM"))
    row = results["differences"]["1"]["cvr_auc"]["BASE"]["ESMM"]
    expected = paired_difference(esmm, base)
    assert row["mean"] == pytest.approx(expected.mean)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["p_value_holm"] >= row["p_value"]
    assert row["within_noise"] == (row["p_value_holm"] > 0.05)


def test_every_method_is_tried_equally_often(compared: dict[str, Any]) -> None:
    tuning = compared["worlds"]["tuning"]
    assert list(tuning) == ["CTR", "BASE", "UNBIAS", "DIVISION", "ESMM"]
    for tried in tuning.values():
        assert len(tried["tried"]) == OPTIONS.trials * OPTIONS.epochs
        assert tried["chosen"]["score"] == max(item["score"] for item in tried["tried"])


def test_a_smaller_fraction_trains_on_less(compared: dict[str, Any]) -> None:
    training = compared["worlds"]["training"]
    for of_method in training.values():
        assert 0.3 < of_method["0.5"]["training_rows"] / of_method["1"]["training_rows"] < 0.7
    assert training["ESMM"]["1"]["training_rows"] == WORLD.split_impressions["train"]
    assert training["ESMM"]["1"]["unknown_share"] == 0
    assert training["BASE"]["1"]["unknown_share"] > 0
    assert 0 < training["UNBIAS"]["1"]["acceptance_rate"] <= 1


def test_a_stopped_comparison_ends_with_the_same_numbers(compared: dict[str, Any]) -> None:
    kinds = {name.partition("-")[0] for name in compared["removed"]}
    assert {"tune", "seed"} <= kinds
    first, resumed = (dict(_numbers(compared[name])) for name in ("worlds", "resumed"))
    assert first == resumed
    assert compared["worlds left"] == []


def test_settings_of_another_comparison_are_used_instead_of_tuning(
    compared: dict[str, Any], folder: Path
) -> None:
    assert compared["as chosen"]["methods"] == compared["fixed"]["methods"]
    assert dict(_numbers(compared["as chosen"]["tuning"])) == dict(
        _numbers(compared["fixed"]["tuning"])
    )
    assert not list((folder / "settings" / "trials").glob("*/tune-*"))
    chosen = chosen_in(compared["fixed"])
    assert set(chosen) == {"ctr", "base", "shared-bottom"}
    assert dict(chosen["shared-bottom"].trial.own) == {"objective.conversion_loss_weight": 1.0}
    older = copy.deepcopy(compared["fixed"])
    del older["tuning"]["BASE"]["chosen"]["min_count"]
    with pytest.raises(OptionError, match="another version"):
        chosen_in(older)


def test_every_pass_takes_as_many_updates(compared: dict[str, Any]) -> None:
    results = compared["worlds"]
    of_everything = -(-WORLD.split_impressions["train"] // BATCH_SIZE)
    for name, of_method in results["training"].items():
        for fraction, figures in of_method.items():
            rows, batch = figures["training_rows"], figures["batch_size"]
            assert 0.85 * of_everything <= figures["updates_per_pass"] <= of_everything, name
            assert figures["updates_per_pass"] == pytest.approx(rows / batch, abs=1), fraction
    assert results["training"]["ESMM"]["1"]["updates_per_pass"] == of_everything
    assert results["training"]["BASE"]["0.5"]["batch_size"] < BATCH_SIZE / 4


def test_seconds_are_those_of_everything(compared: dict[str, Any]) -> None:
    seconds = compared["worlds"]["seconds"]
    parts = [
        *seconds["tuning"].values(),
        *(value for of in seconds["methods"].values() for value in of.values()),
        seconds["common_ctr"],
        seconds["out_of_fold_pctr"],
    ]
    assert min(parts) > 0
    assert seconds["total"] == pytest.approx(sum(parts))


def test_what_is_chosen_at_the_end_of_the_search_is_marked() -> None:
    def trial(sparse_lr: float, rate: float, *, decay: float = 0.0, min_count: int = 1) -> Trial:
        return Trial(Setting(sparse_lr, 0.001, decay, min_count, 1.0), (("rows.rate", rate),))

    trials = [
        trial(0.02, 0.1),
        trial(0.05, 0.5, decay=1e-4, min_count=5),
        trial(0.1, 1.0, min_count=20),
    ]
    tried = [Tried(0, one, epochs, 0.5) for one in trials for epochs in (1, 2)]
    # No decay and a count of 1 are no end, and a rate that was not varied has none.
    assert at_edge(Chosen(trials[0], 1, 0.5), tried) == ["sparse_lr", "rows.rate"]
    assert at_edge(Chosen(trials[1], 1, 0.5), tried) == ["weight_decay"]
    assert at_edge(Chosen(trials[2], 2, 0.5), tried) == [
        "epochs",
        "sparse_lr",
        "min_count",
        "rows.rate",
    ]


def test_the_best_of_a_round_go_on_each_after_its_best_pass() -> None:
    first, second, third = (Trial(setting) for setting in SETTINGS[:3])
    tried = [
        Tried(0, first, 1, 0.6),
        Tried(0, first, 2, 0.7),
        Tried(0, second, 1, None),
        Tried(0, third, 1, 0.7),
        Tried(0, third, 2, 0.1),
    ]
    assert best(tried, 3) == [tried[1], tried[3]]
    assert best(tried, 1) == [tried[1]]


def test_few_trials_are_one_round_and_many_are_two() -> None:
    assert [round_.share for round_ in replace(OPTIONS, trials=2).rounds] == [1.0]
    first, last = replace(OPTIONS, trials=6, epochs=4).rounds
    assert (first.trials, first.epochs) == (6, 1)
    assert (last.trials, last.epochs) == (FINALISTS, 4)
    assert first.share < last.share


def test_few_rows_are_shuffled_row_by_row() -> None:
    """In chunks, a method of few rows would have all of a user's in one batch."""
    trial = Trial(SETTINGS[0])
    chunks = {name: OPTIONS.train(name, trial, seed=0).shuffle_chunk for name in ("base", "esmm")}
    assert chunks == {"base": 1, "esmm": TrainOptions().shuffle_chunk}


def test_records_depend_on_the_sources_that_decide_figures(tmp_path: Path) -> None:
    package = tmp_path / "esmm_torchrec"
    sources = {
        "comparison/trial.py": "from esmm_torchrec.training import fit\n",
        "comparison/data.py": "import esmm_torchrec.data.reader\n",
        "comparison/report.py": "first\n",
        "training/fit.py": "from esmm_torchrec.training.loop import TrainingLoop\n",
        "training/loop.py": "first\n",
        "training/run.py": "first\n",
        "data/reader.py": "first\n",
        "models/esmm.py": "first\n",
        "models/rows/base.py": "first\n",
        "cli/main.py": "first\n",
    }
    for name, text in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text.replace("first", "# first"))
    before = code_identity(package)
    decides = {}
    for name, text in sources.items():
        (package / name).write_text(text.replace("first", "# first") + "# second\n")
        decides[name] = code_identity(package) != before
        (package / name).write_text(text.replace("first", "# first"))
    assert {name for name, changes in decides.items() if not changes} == {
        "comparison/report.py",
        "training/run.py",
        "cli/main.py",
    }


def test_oracle_and_references_stand_beside_the_methods(compared: dict[str, Any]) -> None:
    references = compared["worlds"]["references"]["1"]
    assert set(references) == {
        "pCTR",
        "pCTCVR of DIVISION",
        "true pCVR",
        "true pCTR",
        "true pCTCVR",
    }
    oracle = references["true pCVR"]["cvr_auc_entire_space"]["mean"]
    for of_method in compared["worlds"]["methods"].values():
        assert of_method["1"]["cvr_auc_entire_space"]["mean"] < oracle


def test_division_is_scored_by_its_own_pctr_and_by_the_common_one(
    compared: dict[str, Any],
) -> None:
    of_division = compared["worlds"]["methods"]["DIVISION"]["1"]
    own, common = (of_division[name]["runs"] for name in ("ctcvr_auc", "ctcvr_auc_common_ctr"))
    assert None not in own
    assert all(a != b for a, b in zip(own, common, strict=True))


def test_the_test_half_chooses_no_setting(compared: dict[str, Any]) -> None:
    plain, other = (
        dict(_numbers(compared[name]["tuning"])) for name in ("fixed", "other test split")
    )
    assert plain == other
    scores = [
        compared[name]["methods"]["BASE"]["1"]["cvr_auc"]["mean"]
        for name in ("fixed", "other test split")
    ]
    assert scores[0] != scores[1], "the test split is another"


def test_one_data_set_has_an_interval_over_its_users(compared: dict[str, Any]) -> None:
    results = compared["fixed"]
    row = results["differences"]["1"]["ctcvr_auc_common_ctr"]["BASE"]["shared-bottom"]
    assert row["low_users"] < row["high_users"]
    of_metric = results["differences"]["1"]
    assert set(of_metric) >= set(DIFFERENCES) - {"ctcvr_auc"}
    for metric, of_baseline in of_metric.items():
        for difference in of_baseline["BASE"].values():
            assert 0 < difference["p_value_users"] <= difference["p_value_users_holm"] <= 1, metric
            stands = max(difference["p_value_holm"], difference["p_value_users_holm"]) <= 0.05
            assert difference["within_noise"] is not stands
    # One world is not another: the seeds of one data set share its test split.
    counts = results["methods"]["BASE"]["1"]["conversions"]["runs"]
    assert len(set(counts)) == 1
    worlds = compared["worlds"]["methods"]["BASE"]["1"]["conversions"]["runs"]
    assert len(set(worlds)) == 2


def _compare_weighted(folder: Path) -> list[dict[str, Any]]:
    with process_group("cpu") as ranks:
        return [
            compare(
                replace(FIXED, seeds=1, test_impressions=10_000, held_out_by="group"),
                folder / f"{name} compared",
                ranks,
                data=folder / name,
                world=WORLD,
                command="test",
                settings=None,
            )
            for name in ("weighted", "repeated")
        ]


def test_intervals_over_users_count_weights_as_repetitions(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    click = random.integers(0, 2, 2400)
    log = pd.DataFrame(
        {
            "user": random.integers(0, 120, 2400),
            "item": random.integers(0, 30, 2400),
            "click": click,
            "buy": click * (random.random(2400) < 0.4),
            "weight": 1.0,
        }
    )
    train, test = log[:1500], log[1500:].copy()
    times = random.integers(1, 5, len(test))
    for name, table in (
        ("weighted", test.assign(weight=times.astype(float))),
        ("repeated", test.loc[test.index.repeat(times)]),
    ):
        prepare_table(
            tmp_path / name,
            train=[train],
            test=[table],
            click="click",
            conversion="buy",
            ids=["user", "item"],
            group_id="user",
            weight="weight",
        )
    weighted, repeated = run_on_ranks(1, _compare_weighted, tmp_path)[0]
    for metric in ("cvr_auc", "ctcvr_auc_common_ctr"):
        rows = [
            results["differences"]["1"][metric]["BASE"]["shared-bottom"]
            for results in (weighted, repeated)
        ]
        for figure in ("mean", "low_users", "high_users"):
            assert rows[0][figure] == pytest.approx(rows[1][figure], abs=1e-6), (metric, figure)


def test_report_of_worlds(compared: dict[str, Any], tmp_path: Path) -> None:
    results = compared["worlds"]
    write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in ("ESMM", "68.56 ± 0.37", "Why not division", "Volume of training data", "oracle"):
        assert text in page
    assert "http" not in page, "the page needs nothing but itself"
    assert page.count("<img") == len(list((tmp_path / "plots").glob("*.png"))) == 6
    rows_of_table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    found = next(
        row
        for row in rows_of_table
        if (row["method"], row["fraction"], row["metric"]) == ("ESMM", "1", "cvr_auc")
    )
    assert float(found["mean"]) == results["methods"]["ESMM"]["1"]["cvr_auc"]["mean"]
    assert float(found["seed_1"]) == results["methods"]["ESMM"]["1"]["cvr_auc"]["runs"][1]
    assert "| ESMM |" in (tmp_path / "table.md").read_text()
    assert headline_rows(results)[1][0] == "BASE"
    assert any("BASE" in line for line in verdicts(results))
    differences = [row for row in rows_of_table if row["baseline"]]
    assert len(differences) == sum(
        len(of)
        for f in ("1", "0.5")
        for m in results["differences"][f].values()
        for of in m.values()
    )
    row = next(r for r in differences if (r["fraction"], r["metric"]) == ("0.5", "cvr_auc"))
    expected = results["differences"]["0.5"]["cvr_auc"]["BASE"][row["method"]]
    assert float(row["low"]) == expected["low"]
    assert float(row["seed_0"]) + float(row["seed_1"]) == pytest.approx(2 * expected["mean"])
    for metric in DIFFERENCES:
        for cells in difference_rows(results, metric, "1")[1:]:
            assert all(cell in page for cell in cells), metric


def test_lower_is_better_for_a_loss(compared: dict[str, Any]) -> None:
    results = copy.deepcopy(compared["worlds"])
    for metric, mean, word in (
        ("cvr_excess_log_loss_entire_space", -0.1, "better"),
        ("cvr_excess_log_loss_entire_space", 0.1, "worse"),
        ("cvr_auc", 0.1, "better"),
    ):
        of_base = results["differences"]["1"][metric]["BASE"]
        of_base["ESMM"] |= {"mean": mean, "within_noise": False, "p_value_holm": 0.012}
        (sentence,) = verdicts(results, [metric])
        clauses = sentence.partition(": ")[2].split("; ")
        (clause,) = [clause for clause in clauses if "ESMM " in clause]
        assert clause.startswith(f"{word} than BASE"), sentence
        assert "p = 0.012" in clause


def test_methods_are_called_equal_only_if_their_whole_interval_is_small(
    compared: dict[str, Any],
) -> None:
    results = copy.deepcopy(compared["worlds"])
    pair = results["differences"]["1"]["cvr_auc"]["ESMM"] = {
        "shared-bottom": {"mean": 0.001, "p_value_holm": 1.0, "within_noise": True}
    }
    for high, word in ((0.003, "shared-bottom equals ESMM"), (0.02, "no difference between")):
        pair["shared-bottom"] |= {"low": -0.001, "high": high}
        assert word in verdicts(results, ["cvr_auc"])[1]


def test_each_comparison_is_made_once() -> None:
    pairs = compared_pairs(["BASE", "AMAN", "ESMM", "shared-bottom"])
    assert pairs == [
        ("AMAN", "BASE"),
        ("ESMM", "BASE"),
        ("shared-bottom", "BASE"),
        ("shared-bottom", "ESMM"),
    ]
    assert compared_pairs(["DIVISION", "ESMM"]) == [("DIVISION", "ESMM")]
    assert compared_pairs(["AMAN"]) == []


def test_the_papers_figures_stand_beside_generated_worlds_only(compared: dict[str, Any]) -> None:
    paper = [heading for heading in headline_rows(compared["worlds"])[0] if "paper" in heading]
    assert len(paper) == 2
    assert not any("paper" in heading for heading in headline_rows(compared["fixed"])[0])


def test_relative_improvement_is_over_base(compared: dict[str, Any]) -> None:
    results = compared["worlds"]
    heading, *rows = headline_rows(results)
    auc = {name: of["1"]["cvr_auc"]["mean"] for name, of in results["methods"].items()}
    for row in rows:
        shown = float(row[heading.index("RelaImpr")].rstrip("%").replace("−", "-"))
        expected = 100 * ((auc[row[0]] - 0.5) / (auc["BASE"] - 0.5) - 1)
        assert shown == pytest.approx(expected, abs=0.051)
    of_method = results["methods"]["ESMM"]["1"]
    row = next(row for row in rows if row[0] == "ESMM")
    for title, metric, factor in (
        ("CVR GAUC %", "gauc_cvr", 100),
        ("PCOC, entire space", "cvr_pcoc_entire_space", 1),
    ):
        assert row[heading.index(title)].startswith(f"{of_method[metric]['mean'] * factor:.2f} ±")


def test_times_add_up(compared: dict[str, Any]) -> None:
    rows = time_rows(compared["worlds"])
    together = sum(float(row[3]) for row in rows[1:-1])
    assert float(rows[-1][3]) == pytest.approx(together, abs=0.05 * len(rows))
    assert {"CTR", "BASE", "ESMM"} < {row[0] for row in rows}


def test_report_without_truth_and_with_one_seed_says_so(
    compared: dict[str, Any], tmp_path: Path
) -> None:
    results = compared["no truth"]
    assert "cvr_auc_entire_space" not in results["methods"]["BASE"]["1"]
    row = results["differences"]["1"]["cvr_auc"]["BASE"]["shared-bottom"]
    assert row["low"] is None
    assert row["p_value_users"] is not None
    assert row["within_noise"] is None, "one seed says nothing of the noise of a training"
    assert verdicts(results) == []
    write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "no columns true_ctr and true_cvr" in page
    assert "One seed gives no interval" in page
    assert "One seed gives no interval" in format_table(results)
    assert not (tmp_path / "plots" / "division.png").exists()


def test_options_that_cannot_be_used() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"methods": ("esmn",)}, "esmn"),
        ({"methods": ("ctr",)}, "ctr"),
        ({"methods": ()}, "`methods`"),
        ({"seeds": 0}, "`seeds`"),
        ({"fractions": (0.0, 1.0)}, "`fractions`"),
        ({"fractions": (1.5,)}, "`fractions`"),
        ({"fractions": ()}, "`fractions`"),
        ({"trials": len(SETTINGS) + 1}, "`trials`"),
        ({"validation_share": 1.0}, "`validation_share`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"processes": 0}, "`processes`"),
    )
    for values, word in cases:
        with pytest.raises(OptionError, match=word):
            ComparisonOptions(**values)
    assert ComparisonOptions().chosen_methods == PAPER_METHODS
    assert ComparisonOptions(methods=("all",)).chosen_methods == COMPARED
    assert {*PAPER_METHODS, *AFTER_METHODS} <= set(COMPARED)
    after = ComparisonOptions(methods=("after",)).chosen_methods
    assert set(after) == {"base", "esmm", "shared-bottom", *AFTER_METHODS}
    assert ComparisonOptions(methods=("esmm", "base")).chosen_methods == ("base", "esmm")


def test_tuning_goes_through_the_options_of_a_method() -> None:
    options = ComparisonOptions()
    for method in ("base", "aman", "esmm"):
        assert [trial.setting for trial in options.trials_of(method)] == list(SETTINGS)
    assert {trial.own for trial in options.trials_of("base")} == {()}
    for method, option in (("aman", "rows.rate"), ("esmm", "objective.ctcvr_loss_weight")):
        met: dict[float, set[float]] = {}
        for trial in options.trials_of(method):
            ((name, value),) = trial.own
            assert name == option
            met.setdefault(value, set()).add(trial.setting.sparse_lr)
        assert set(met) == set(METHODS[method].tune[option])
        assert all(len(rates_of_tables) >= 2 for rates_of_tables in met.values())
    few = replace(options, trials=4).trials_of("aman")
    assert [dict(trial.own)["rows.rate"] for trial in few] == [0.1, 0.2, 0.5, 1.0]


def test_what_is_tried_of_a_method_reaches_its_training() -> None:
    trial = Trial(SETTINGS[6], (("objective.ctcvr_loss_weight", 4.0),))
    found = OPTIONS.train("esmm", trial, seed=3, epochs=2)
    assert found.objective == replace(METHODS["esmm"].objective, ctcvr_loss_weight=4.0)
    assert (found.sparse_lr, found.init_scale) == (SETTINGS[6].sparse_lr, SETTINGS[6].init_scale)
    assert (found.seed, found.epochs) == (3, 2)


def test_the_batch_follows_the_rows_unless_it_is_given() -> None:
    assert ComparisonOptions().for_rows(3_400_000).batch_size == 16384
    assert ComparisonOptions().for_rows(100).batch_size == 1
    assert ComparisonOptions(batch_size=7).for_rows(3_400_000).batch_size == 7


def test_a_method_is_chosen_by_the_mean_of_the_papers_two_figures() -> None:
    figures = {"ctr_auc": 0.7, "cvr_auc": 0.6, "ctcvr_auc_common_ctr": 0.5, "ctcvr_auc": 0.9}
    assert selection_score("esmm", figures) == pytest.approx(0.55)
    assert selection_score("ctr", figures) == 0.7
    assert selection_score("esmm", figures | {"cvr_auc": None}) is None


def test_a_test_half_without_conversions_is_refused(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data", train=200, test=200)
    data = prepared_source(tmp_path / "data", held_out_by="auto", test_impressions=100).data
    scalars = data.test.scalars
    none = dict(scalars) | {"conversion": np.zeros_like(scalars["conversion"])}
    source = Source(
        {},
        open_data=lambda: replace(data, test=replace(data.test, scalars=none)),
        impressions=200,
    )
    with pytest.raises(DataError, match="no conversion"):
        _ = source.data


def test_the_command_of_a_method_trains_with_what_was_chosen(compared: dict[str, Any]) -> None:
    commands = compared["fixed"]["train_commands"]
    assert set(commands) == {"BASE", "shared-bottom"}
    replaced = replace(OPTIONS, architecture="mmoe")
    for method, options in (("aman", OPTIONS), ("esmm", OPTIONS), ("esmm", replaced)):
        trial = options.trials_of(method)[1]
        chosen = chosen_options(options, method, Chosen(trial, 3, 0.7), batch_size=97)
        words = shlex.split(train_command(chosen, "DATA"))
        assert words[:2] == ["esmm-torchrec", "train"]
        parsed = parse_options(train_cli.Options, "train", words[2:])
        names = [field.name for field in fields(TrainOptions)]
        found = TrainOptions(**{name: getattr(parsed, name) for name in names})
        assert found.to_dict() == chosen.to_dict()
        assert (found.epochs, found.batch_size) == (3, 97)


def test_the_best_method_is_kept_as_a_run(compared: dict[str, Any], folder: Path) -> None:
    metrics = json.loads((folder / "kept" / "metrics.json").read_text())
    tuning = compared["fixed"]["tuning"]
    best = max(("BASE", "shared-bottom"), key=lambda name: tuning[name]["chosen"]["score"])
    of_best = compared["fixed"]["methods"][best]["1"]["cvr_auc"]["runs"]
    if compared["fixed"]["training"][best]["1"]["unknown_share"] == 0:
        assert metrics["test"]["cvr_auc"] == pytest.approx(of_best[0], abs=1e-4)
    config = json.loads((folder / "kept" / "config.json").read_text())
    assert METHODS[config["options"]["method"]].title == best


def test_a_kept_model_takes_the_updates_that_were_tuned() -> None:
    assert batch_size_on_all_rows({"batch_size": 38, "fraction": 0.2}) == 190
    assert batch_size_on_all_rows({"batch_size": 203, "fraction": 1.0}) == 203


def test_what_cannot_end_well_is_refused_before_the_work(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data", train=60, test=20)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "other.txt").touch()

    def refused(options: ComparisonOptions, **more: Any) -> str:
        with process_group("cpu") as ranks, pytest.raises(OptionError) as refusal:
            compare(
                options, tmp_path / "out", ranks, **({"world": WORLD, "command": "test"} | more)
            )
        assert not (tmp_path / "out" / "trials").exists()
        return str(refusal.value)

    assert refused(FIXED, data=tmp_path / "data", keep_best=tmp_path / "busy") == (
        f"`keep_best` {tmp_path / 'busy'} is neither empty nor a run folder; choose another folder"
    )
    log = pd.DataFrame({"u": np.arange(60) % 7, "a": 1, "b": np.arange(60) % 2})
    log["c"] = (np.arange(60) % 4 == 1).astype(int)
    prepare_table(
        tmp_path / "three", train=log, split="share:0.5", actions=["a", "b", "c"], ids=["u"]
    )
    said = refused(FIXED, data=tmp_path / "three")
    assert said.startswith("`methods` base is not for a chain of 3 tasks (a, b, c); choose from ")
    assert {"division", "esmm", "shared-bottom"} <= set(said.partition("choose from ")[2].split())
    with pytest.raises(OptionError, match="not those of a comparison"):
        chosen_in({})


def test_options_of_words_are_shown() -> None:
    trial = Trial(SETTINGS[0], (("objective.imputation", "mrdr"),))
    chosen = Chosen(trial, 1, 0.5)
    assert "objective.imputation mrdr" in tuned_line("X", chosen)
    assert "objective.imputation" not in at_edge(chosen, [Tried(0, trial, 1, 0.5)])


def test_reference_rows_and_curves_count_weights() -> None:
    random = np.random.default_rng(0)
    weight = random.integers(0, 3, 400).astype(np.float32)
    click = (random.random(400) < 0.5).astype(np.int8)
    labels = {"click": click, "conversion": click & (random.random(400) < 0.4)}
    score = Prediction(random.normal(size=400).astype(np.float32), "logit")
    common = random.normal(size=400).astype(np.float32)
    truth = random.random((2, 400))
    scored = ScoredImpressions(
        labels,
        dict.fromkeys(("ctr", "cvr", "ctcvr"), score),
        true_ctr=truth[0],
        true_cvr=truth[1],
        common_ctr_logit=common,
        weight=weight,
    )
    each = np.repeat(np.arange(400), weight.astype(int))
    repeated = replace(scored.of(np.isin(np.arange(400), each)), weight=None)
    assert _references(scored, measure(scored)) != _references(repeated, measure(repeated))
    found = _references(scored, measure(scored))["pCTR"]
    rows = each[click[each] == 1]
    assert found["cvr_auc"] == pytest.approx(auc(common[rows], labels["conversion"][rows]))
    assert found["cvr_auc_entire_space"] == pytest.approx(soft_auc(common[each], truth[1][each]))
    curve = _curves(scored)["entire space"]["observed"]
    heavy = _curves(replace(scored, weight=weight * 5))["entire space"]["observed"]
    assert curve == pytest.approx(heavy)
    assert curve != pytest.approx(_curves(replace(scored, weight=None))["entire space"]["observed"])
