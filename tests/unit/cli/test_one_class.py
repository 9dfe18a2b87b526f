"""Logs in which every impression is clicked, every click converts, or a split has one class.

What can be trained is trained, and what cannot be measured is null, with a reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from esmm_torchrec.cli.main import main

SMALL = ["--tower", "4", "--embedding-dim", "4", "--device", "cpu"]
Share = Literal[0, 1] | None


def _log(seed: int, *, clicks: Share = None, conversions: Share = None) -> pd.DataFrame:
    """Returns 300 rows; `clicks`: all (1), none (0) or some (None); likewise `conversions`."""
    rng = np.random.default_rng(seed)
    click = rng.random(300) < (0.5 if clicks is None else clicks)
    conversion = click & (rng.random(300) < (0.4 if conversions is None else conversions))
    return pd.DataFrame(
        {
            "user": rng.integers(0, 40, 300),
            "item": rng.integers(0, 9, 300),
            "click": click.astype(int),
            "conversion": conversion.astype(int),
        }
    )


def _prepare(train: pd.DataFrame, test: pd.DataFrame) -> None:
    train.to_csv("train.csv", index=False)
    test.to_csv("test.csv", index=False)
    columns = ["--click", "click", "--conversion", "conversion", "--id", "user", "item"]
    main(["prepare", "table", "data", "--train", "train.csv", "--test", "test.csv", *columns])


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "null"),
    [
        ({"clicks": 1, "conversions": 1}, {"clicks": 1, "conversions": 1}, "ctr cvr ctcvr"),
        ({"conversions": 1}, {"clicks": 1}, "ctr"),
        ({"conversions": 0}, {}, ""),
        ({}, {"clicks": 0}, "ctr cvr ctcvr"),
    ],
)
def test_one_class_trains_and_scores(
    train: dict[str, Share], test: dict[str, Share], null: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _prepare(_log(0, **train), _log(1, **test))
    main(["train", "--data", "data", "--out", "run", "--epochs", "1", *SMALL])
    said = capsys.readouterr().out
    assert ("warning: there is no conversion to train on" in said) == (
        "conversions" in train and not train["conversions"]
    )
    main(["evaluate", "run", "--data", "data", "--json", "again.json"])
    figures = json.loads(Path("run/metrics.json").read_text())["test"]
    for name in ("ctr", "cvr", "ctcvr"):
        missing = name in null.split()
        assert (figures[f"{name}_auc"] is None) == missing
        assert (f"{name}_auc" in figures["reasons"]) == missing
    main(["score", "run", "--data", "data", "--out", "scores.parquet"])
    scores = pd.read_parquet("scores.parquet")[["pctr", "pcvr", "pctcvr"]]
    assert len(scores) == 300
    assert scores.stack().between(0, 1, inclusive="neither").all()


def test_a_held_out_part_of_one_class_measures_what_it_can() -> None:
    log = _log(0)
    log.loc[log.index[log["conversion"] == 1][1:], "conversion"] = 0
    _prepare(log, _log(1))
    for out, share in (("search", []), ("share", ["--validation-share", "0.1"])):
        main(["train", "--data", "data", "--out", out, *share, *SMALL])
        metrics = json.loads(Path(out, "metrics.json").read_text())
        curve = metrics["validation"]["curve"]
        assert curve
        assert all(entry["cvr_auc"] is None and entry["ctr_auc"] is not None for entry in curve)


def test_nothing_to_learn_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _prepare(_log(0, clicks=0), _log(1))
    assert stop.value.code == 2
    assert (
        "the train split has 300 impressions but no click to learn from" in capsys.readouterr().err
    )
    _prepare(_log(0, conversions=0), _log(1))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "data", "--out", "run", "--method", "base", *SMALL])
    assert stop.value.code == 2
    assert "and no conversion to train on" in capsys.readouterr().err
