"""The page on somebody's own data, run from its first line to its last."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.pages import follow


def test_its_file_becomes_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    follow("your_data.md", tmp_path, ["prepare", "train", "score"])

    description = json.loads(Path("prepared/dataset.json").read_text())
    log = pd.read_csv("log.tsv", sep="\t")
    splits = description["splits"]
    assert splits["train"]["impressions"] + splits["test"]["impressions"] == len(log) == 6000
    for split, rows in (("train", log[:4800]), ("test", log[4800:])):
        assert splits[split]["happened"]["click"] == (rows["clicked"] == "Yes").sum()
        assert splits[split]["happened"]["conversion"] == (rows["booked"] == "Yes").sum()
    features = {feature["name"]: feature for feature in description["schema"]["id_features"]}
    assert list(features) == ["user", "seen", "query", "shown__hour", "shown__weekday"]
    assert [name for name, of in features.items() if of["multi_valued"]] == ["seen", "query"]
    shown = capsys.readouterr().out
    assert "text was read with separator tab, encoding UTF-8\nprepared data set: prepared" in shown
    scores = pd.read_parquet("scores.parquet")
    assert scores["sample_id"].tolist() == list(range(50))
    assert scores[["pctr", "pcvr", "pctcvr"]].stack().between(0, 1, inclusive="neither").all()
