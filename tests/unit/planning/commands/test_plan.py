"""esmm-torchrec plan: what it writes, what it prints, and what it refuses in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from esmm_torchrec.cli.main import main
from esmm_torchrec.planning.table_list import read_tables
from esmm_torchrec.sharding.plan_json import read_plan
from tests.prepared_data import ROWS, write_data_set

TABLES = """
batch_size: 128
tables:
  - {name: user, num_embeddings: 2000000, embedding_dim: 64}
  - {name: item, num_embeddings: 500000, embedding_dim: 64, pooling_factor: 5}
  - {name: small, num_embeddings: 100, embedding_dim: 16, count: 3}
"""


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    path = tmp_path / "tables.yaml"
    path.write_text(TABLES)
    return path


def plans_of(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    entries = json.loads((out / "plans.json").read_text())["plans"]
    return {(entry["strategy"], entry["gpus"]): entry for entry in entries}


def test_writes_estimates_plans_plots_and_one_page(
    tmp_path: Path, tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--gpu", "h100", "--gpus", "8", "2", "--out", str(out), "--tower", "32", "16"]
    main(["plan", "--tables", str(tables), *options])
    plans = plans_of(out)
    assert len(plans) == 7 * 2
    names = {table.name for table in read_tables(tables).tables}
    for (strategy, gpus), entry in plans.items():
        assert entry["feasible"] == (strategy != "data_parallel")
        if entry["feasible"]:
            plan = read_plan(out / entry["plan_file"])
            assert (plan.world_size, set(plan.tables)) == (gpus, names)
            if strategy == "row_wise":
                assert plan.tables["user"].ranks == tuple(range(gpus))
            image = matplotlib.image.imread(out / "plots" / f"ranks-{strategy}-{gpus}.png")
            assert min(image.shape[:2]) > 100
    summary = json.loads((out / "plans.json").read_text())
    assert summary["batch_size"] == 128
    for gpus in (2, 8):
        fastest = min(
            (entry["step_ms_estimate"], strategy)
            for (strategy, count), entry in plans.items()
            if count == gpus and entry["feasible"]
        )
        assert plans[summary["fastest"][str(gpus)], gpus]["step_ms_estimate"] == fastest[0]

    page = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(s.startswith("data:image/png;base64,") or (out / s).exists() for s in sources)
    assert page.count("data:image/png") == len(list((out / "plots").iterdir()))
    assert "<script" not in page
    assert "estimate" in page

    printed = capsys.readouterr().out
    assert "All numbers are estimates" in printed
    assert "no plan for data_parallel on 2, 8 GPUs: table 'user' would need" in printed
    assert printed.count("*") >= 2
    assert "plans, which 'train' cannot use (its tables have one embedding_dim, and" in printed
    assert "'small_2'" in str(summary["not_trainable_with_train"])


def test_tables_of_a_prepared_data_set(tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")
    out = tmp_path / "out"
    common = ["--data", str(tmp_path / "data"), "--gpu", "cpu", "--gpus", "2", "--embedding-dim"]
    main(["plan", *common, "8", "--strategies", "table_wise", "row_wise", "--out", str(out)])
    plan = read_plan(out / "plan-row_wise-2.json")
    assert {n: t.num_embeddings for n, t in plan.tables.items()} == {
        name: rows + 1 for name, rows in ROWS.items()
    }
    assert {table.embedding_dim for table in plan.tables.values()} == {8}
    assert plan.device == "cpu"
    # 4096 impressions of 40 users: each user's bags are pooled once in a batch.
    assert data.splits["train"].shared_rows == 40
    page = (out / "report.html").read_text()
    history = re.search(r"<td>history</td>.*?</tr>", page, re.DOTALL)
    assert history is not None
    assert history.group().endswith(f"<td class=n>{4096 / 40:.4g}</td></tr>")


@pytest.mark.parametrize("method", ["esmm", "division"])
def test_a_plan_for_a_prepared_data_set_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Of a method with two networks, too, which has two sets of tables."""
    data, out, run = tmp_path / "data", tmp_path / "out", tmp_path / "run"
    write_data_set(data)
    model = ["--data", str(data), "--method", method, "--embedding-dim", "8", "--tower", "8"]
    main(["plan", *model, "--gpu", "cpu", "--gpus", "1", "--out", str(out)])
    assert "the plans for 'train --plan'" in capsys.readouterr().out
    plan = out / "plan-auto-1.json"
    length = ["--max-steps", "2", "--batch-size", "64", "--device", "cpu"]
    main(["train", *model, *length, "--plan", str(plan), "--out", str(run)])
    assert read_plan(run / "plan.json") == read_plan(plan)


def test_a_chunk_ends_with_the_impressions_of_its_user(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data")
    shared_by: list[float] = []
    for chunk in ("17", "1000000"):
        out = tmp_path / f"out{chunk}"
        options = ["--batch-size", "128", "--shuffle-chunk", chunk, "--strategies", "table_wise"]
        common = ["--data", str(tmp_path / "data"), "--gpu", "h100", "--out", str(out)]
        main(["plan", *common, *options])
        page = (out / "report.html").read_text()
        history = re.search(r"<td>history</td>.*?([0-9.]+)</td></tr>", page, re.DOTALL)
        assert history is not None
        shared_by.append(float(history.group(1)))
    # 700 impressions of 40 users are 17.5 each.
    distinct = [40 * (1 - (39 / 40) ** (128 / chunk)) for chunk in (17, 17.5)]
    assert shared_by == [pytest.approx(128 / round(users), rel=1e-3) for users in distinct]


def test_a_machine_from_a_file(tmp_path: Path, tables: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: h100\nmemory_gb_s: 33.5\n")
    steps: list[float] = []
    for machine in (["--gpu", "h100"], ["--hardware", str(tmp_path / "mine.yaml")]):
        out = tmp_path / f"out{len(steps)}"
        options = ["--gpus", "1", "--strategies", "table_wise", "--out", str(out)]
        main(["plan", "--tables", str(tables), *machine, *options])
        parts = plans_of(out)["table_wise", 1]["parts_ms_estimate"]
        steps.append(parts["embedding_forward"])
    assert steps[1] == pytest.approx(100 * steps[0])


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tables.yaml"
    path.write_text("tables: [{name: vast, num_embeddings: 90000000000, embedding_dim: 128}]")
    options = ["--gpu", "h100", "--strategies", "table_wise", "row_wise"]
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--tables", str(path), *options, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "esmm-torchrec: no plan on 8 GPUs of h100: table 'vast' does not fit: table_wise puts"
    )
    entries = plans_of(tmp_path / "out")
    assert not any(entry["feasible"] for entry in entries.values())
    assert "GiB too little" in entries["row_wise", 8]["reason"]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "give either --gpu NAME or --hardware FILE"),
        (["--gpu", "v100"], "there is no GPU 'v100'"),
        (["--gpu", "h100", "--gpus", "12"], "--gpus 12 does not fill hosts of 8"),
        (["--gpu", "h100", "--strategies", "row-wise"], "'row-wise'"),
        (["--gpu", "h100", "--constraint", "shop=row_wise"], "'shop' matches no table"),
        (["--gpu", "h100", "--constraint", "item=row"], "there is no 'row'"),
        (["--gpu", "h100", "--data", "nowhere"], "give either --tables FILE or --data PREPARED"),
        (["--gpu", "h100", "--constraint", "item=data_parallel,fused"], "kernel dense only"),
        (["--gpu", "h100", "--constraint", "item=cache=0.1"], "needs the kernel fused_uvm_caching"),
        (["--gpu", "h100", "--cache-load-factor", "0.1"], "needs the kernel fused_uvm_caching"),
        (["--gpu", "h100", "--reserve", "2"], "--reserve 2.0"),
        (["--hardware", "nowhere.yaml"], "cannot read or write nowhere.yaml"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    tables: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    expected: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--tables", str(tables), "--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esmm-torchrec: ")
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_refused(
    tmp_path: Path, tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--tables", str(tables), "--gpu", "h100", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "already exists; remove it or choose another" in capsys.readouterr().err
