"""The page that `report` writes contains the figures of the run and of its scores."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from esmm_torchrec.cli.main import main
from tests.unit.serving.conftest import ROWS, impressions

CLICK, IF_CLICK = "click", "conversion if click"


class _Page(HTMLParser):
    """Rows of tables by the heading above them, and images by their description."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.pictures: dict[str, str] = {}
        self._heading, self._tag = "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        given = dict(attrs)
        if tag == "tr":
            self.rows.setdefault(self._heading, []).append([])
        if tag == "img":
            kind, _, content = str(given["src"]).partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.pictures[str(given["alt"])] = base64.b64decode(content).decode()

    def handle_data(self, data: str) -> None:
        if self._tag in ("h2", "h3") and data.strip():
            self._heading = data.strip()
        if self._tag in ("td", "th") and data.strip():
            self.rows[self._heading][-1].append(data.strip())


def _row(page: _Page, heading: str, first: str) -> dict[str, str]:
    names, *rows = page.rows[heading]
    (found,) = [row for row in rows if row[0] == first]
    names = names if len(names) == len(found) else ["", *names]
    return dict(zip(names, found, strict=True))


def test_the_figures_are_those_of_the_scores(
    folder: Path, tmp_path: Path, expected: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    chosen = ["--by", "shop", "age", "--sample", "100", "--out", str(out)]
    main(["report", str(folder / "run"), *chosen])
    assert f"report: {out}" in capsys.readouterr().out
    page, metrics = _Page(out), json.loads((folder / "run" / "metrics.json").read_text())["test"]
    assert not re.search(r"(?:src|href)=.https?:|@import|url\(", out.read_text())

    for label, name in ((CLICK, "ctr"), (IF_CLICK, "cvr")):
        shown = _row(page, "Figures", label)
        for title, key in (("AUC", "auc"), ("NE", "ne"), ("PCOC", "pcoc"), ("ECE", "ece")):
            assert shown[title] == f"{metrics[f'{name}_{key}']:.4f}"
    assert _row(page, "Data", "impressions")["test"] == f"{ROWS}"
    assert _row(page, "Data", "clicks")["test"] == f"{metrics['clicks']}"

    test = pd.read_parquet(folder / "test.parquet").join(expected[["pctr", "pcvr"]])
    rome = test[test["shop"] == "Rome"]
    shown = _row(page, "By shop", "Rome")
    assert shown["impressions"] == f"{len(rome)}"
    assert shown["ctr auc"] == f"{roc_auc_score(rome['click'], rome['pctr']):.4f}"
    base = log_loss(rome["click"], [rome["click"].mean()] * len(rome))
    assert float(shown["ctr ne"]) == pytest.approx(
        log_loss(rome["click"], rome["pctr"].astype(float)) / base, abs=1e-4
    )
    clicked = rome[rome["click"] == 1]
    assert shown["cvr auc"] == f"{roc_auc_score(clicked['buy'], clicked['pcvr']):.4f}"
    assert float(shown["cvr pcoc"]) == pytest.approx(
        clicked["pcvr"].sum() / clicked["buy"].sum(), abs=1e-4
    )
    assert _row(page, "By shop", "missing")["impressions"] == f"{test['shop'].isna().sum()}"
    age, ranges = test["age"], [row[0] for row in page.rows["By age"][1:]]
    assert _row(page, "By age", ranges.pop())["impressions"] == f"{age.isna().sum()}"
    assert len(ranges) == 10
    for one in ranges:
        low, high = (float(end) for end in one.split(" to "))
        within = int(age.between(low - 0.01, high + 0.01).sum())
        assert _row(page, "By age", one)["impressions"] == f"{within}"
        assert 8 <= within <= 13

    features = {row[0] for row in page.rows["Importance of features"][1:]}
    assert features == {"user", "shop", "tags", "history", "age", "price"}
    auc = f"AUC {metrics['ctr_auc']:.4f}"
    assert auc in next(svg for alt, svg in page.pictures.items() if alt.startswith("ROC: click,"))
    assert len(page.pictures) == 12
    assert not any("held out" in svg for svg in page.pictures.values())


def test_one_class_a_validation_and_a_resumed_run(tmp_path: Path) -> None:
    """Test impressions without a conversion; the run stops after a pass and is resumed."""
    impressions(400, 0).to_parquet(tmp_path / "train.parquet")
    impressions(60, 1).assign(buy=0).to_parquet(tmp_path / "test.parquet")
    data, run = str(tmp_path / "data"), tmp_path / "run"
    halves = ["--train", str(tmp_path / "train.parquet"), "--test", str(tmp_path / "test.parquet")]
    labels = ["--click", "click", "--conversion", "buy", "--id", "user", "shop"]
    main(["prepare", "table", data, *halves, *labels])
    shape = ["--embedding-dim", "4", "--tower", "4", "--batch-size", "64", "--epochs", "2"]
    train = ["train", "--data", data, "--out", str(run), *shape, "--validation-share", "0.25"]
    main([*train, "--checkpoint-every", "2"])
    (run / "metrics.json").unlink()
    main([*train, "--checkpoint-every", "2", "--resume", "4"])
    main(["report", str(run)])

    page = _Page(run / "report.html")
    assert _row(page, "Figures", IF_CLICK)["AUC"] == "–"
    assert _row(page, "By shop", "Rome")["cvr auc"] == "–"
    assert _row(page, "By shop", "Rome")["ctr auc"] != "–"
    roc = next(svg for alt, svg in page.pictures.items() if alt.startswith("ROC: conversion if"))
    assert "AUC undefined: only one class" in roc
    curve = page.pictures["Learning curves: AUC just before a step"]
    assert f"{CLICK}, held out" in curve
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    held_out = [line["step"] for line in lines if "validation_ctr_auc" in line]
    assert len(held_out) == len(set(held_out)) == 2
