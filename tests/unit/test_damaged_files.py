"""Damaged files of every kind that is read back: the right content, or one of our sentences.

The files are written by the library itself. Text, Parquet and the raw Ali-CCP form, whose rows are
counted, have tests of their own in `data/sources`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from esmm_torchrec.checkpoints.files import (
    checkpoint_path,
    find_best,
    find_checkpoint,
    mark_best,
    read_description,
)
from esmm_torchrec.checkpoints.manager import CheckpointManager
from esmm_torchrec.checkpoints.state import load_model
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import EsmmTorchrecError
from esmm_torchrec.metrics.calibration import Calibration, PlattCurve
from esmm_torchrec.models.methods import ModelOptions, build_train_task
from esmm_torchrec.planning.table_list import read_tables
from esmm_torchrec.runs.run_folder import CALIBRATION, RunFolder
from esmm_torchrec.schema import IdFeature, Schema, Table
from esmm_torchrec.sharding.plan_json import plan_to_dict, read_plan
from esmm_torchrec.sharding.planner import Workload
from esmm_torchrec.sharding.process_group import Ranks, process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.trainer import Trainer
from tests.mutations import mutated
from tests.prepared_data import write_data_set

MUTATIONS = [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
SCHEMA = Schema((Table("item", 900),), (IdFeature("item", "item"),))
PLAN = {
    "format_version": 1,
    "world_size": 2,
    "local_world_size": 2,
    "device": "cpu",
    "tables": {
        "item": {
            "num_embeddings": 1000,
            "embedding_dim": 16,
            "sharding_type": "table_wise",
            "compute_kernel": "fused",
            "ranks": [1],
        },
        "user": {
            "num_embeddings": 77,
            "embedding_dim": 16,
            "sharding_type": "row_wise",
            "compute_kernel": "fused",
        },
    },
}
TABLES = """batch_size: 4096
tables:
  - {name: item, num_embeddings: 1000000, embedding_dim: 16, pooling_factor: 3.5}
  - name: user   # shared
    num_embeddings: 25000
    embedding_dim: 32
    weighted: true
    shared_by: 58.0
    features: [user, friend]
  - {name: shop, num_embeddings: 10, embedding_dim: 8, count: 3, data_type: float16}
"""


class Kind(NamedTuple):
    """A kind of file."""

    make: Callable[[Path], list[Path]]
    """Files to damage, in a folder that it makes."""
    read: Callable[[Path], Any]
    """What is read from the folder."""
    is_right: Callable[[Path, Any, Any], bool]
    """Of the folder, what was read before the damage and what was read after it."""


def _same(_: Path, before: Any, after: Any) -> bool:
    return before == after


def _make_data_set(folder: Path) -> list[Path]:
    write_data_set(folder, train=40, test=20)
    return [folder / "dataset.json", *sorted(folder.glob("vocabulary/*.parquet"))]


def _read_data_set(folder: Path) -> Any:
    data_set = PreparedDataSet.open(folder)
    vocabularies = {
        table.name: data_set.vocabulary(table.name).raw_ids.to_pylist()
        for table in data_set.schema.tables
    }
    return replace(data_set, fingerprint=""), vocabularies


def _make_data_files(folder: Path) -> list[Path]:
    write_data_set(folder, train=40, test=20)
    return sorted(folder.glob("t*/*.parquet"))


def _read_data_files(folder: Path) -> Any:
    data_set = PreparedDataSet.open(folder)
    return [
        block.to_pydict()
        for split in ("train", "test")
        for kind in ("impressions", "shared")
        for block in data_set.checked_rows(split, kind)
    ]


def _make_run(folder: Path) -> list[Path]:
    config = {
        "identity": {"embedding_dim": 16, "tower": (8, 4), "seed": 0},
        "options": {"history_weights": "normalised", "epochs": 1},
        "model": ModelOptions(tower=(8, 4)).to_dict(),
        "schema": SCHEMA.to_dict(),
        "mean_values_per_bag": {"item": 1.0},
        "history": [{"step": 0, "data": {"path": "data", "fingerprint": "abc"}, "ranks": 2}],
    }
    run = RunFolder.start(folder, config, resume="auto")
    run.write_pctr(np.linspace(0.1, 0.9, 20))
    return [folder / "config.json", run.pctr]


def _read_run(folder: Path) -> Any:
    run = RunFolder.open(folder)
    pctr = run.read_pctr(20)
    assert pctr is not None
    return run.config, run.schema, run.model_options, pctr.tolist()


def _make_choices(folder: Path) -> list[Path]:
    config = {"identity": {}, "history": [], "schema": SCHEMA.to_dict(), "options": {}, "model": {}}
    run = RunFolder.start(folder, config | {"mean_values_per_bag": {}}, resume="auto")
    for step in (3, 12, 20):
        checkpoint_path(run.checkpoints, step).mkdir(parents=True)
    mark_best(run.checkpoints, 12)
    curves = {"ctr": PlattCurve(1.25, -0.5), "cvr": PlattCurve(0.75, 0.125)}
    run.write_json(CALIBRATION, Calibration("platt", curves).to_dict() | {"step": 12})
    return [run.checkpoints / "best.json", run.path / CALIBRATION]


def _read_choices(folder: Path) -> Any:
    run = RunFolder(folder, {})
    return find_best(run.checkpoints), run.calibration(12)


def _make_plan(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN, indent=2))
    return [folder / "plan.json"]


def _model_of(plan: dict[str, Any]) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=table["num_embeddings"],
                embedding_dim=table["embedding_dim"],
                feature_names=[name],
            )
            for name, table in plan["tables"].items()
        ],
        device=torch.device("meta"),
    )


def _read_plan(folder: Path) -> Any:
    plan = read_plan(folder / "plan.json")
    plan.to_sharding_plan(_model_of(PLAN), world_size=2, local_world_size=2)
    return json.loads(json.dumps(plan_to_dict(plan)))


def _says_what_the_plan_says(folder: Path, _: Any, after: Any) -> bool:
    """People edit plans, so that a change may be one that is meant."""
    written = json.loads((folder / "plan.json").read_text())
    return all(
        after["tables"][name][key] == value
        for name, table in written["tables"].items()
        for key, value in table.items()
        if key in after["tables"][name]
    )


def _make_tables(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "tables.yaml").write_text(TABLES)
    return [folder / "tables.yaml"]


def _says_what_the_list_says(folder: Path, _: Any, after: Any) -> bool:
    written = yaml.safe_load((folder / "tables.yaml").read_text())
    rows = [table.num_embeddings for table in after.tables]
    expected = [
        entry["num_embeddings"] for entry in written["tables"] for _ in range(entry.get("count", 1))
    ]
    return rows == expected and after.batch_size == written.get("batch_size")


def _make_checkpoint(folder: Path) -> list[Path]:
    options = TrainOptions(embedding_dim=8, tower=(6,), batch_size=4, device="cpu")

    def save(ranks: Ranks) -> None:
        task = build_train_task(SCHEMA, options.model, seed=1)
        trainer = Trainer(task, options=options, ranks=ranks, workload=Workload(4))
        trainer.optimizer.init_state()  # as a first step would
        CheckpointManager(folder, ranks=ranks, asynchronous=False).save(
            step=5,
            model=trainer.model,
            optimizer=trainer.optimizer,
            progress={"reader": {"row": 50}},
            rank_state={"window": torch.arange(3.0)},
        )

    with process_group("cpu") as ranks:
        save(ranks)
    return sorted((folder / "step-00000005").iterdir())


def _read_checkpoint(folder: Path) -> Any:
    path = find_checkpoint(folder)
    assert path is not None
    options = ModelOptions(embedding_dim=8, tower=(6,), first_order=True)
    task = build_train_task(SCHEMA, options, embedding_device="cpu")
    load_model(path, task)
    description = read_description(path)
    return description, {key: value.tolist() for key, value in task.state_dict().items()}


KINDS = {
    "checkpoint": Kind(_make_checkpoint, _read_checkpoint, _same),
    "dataset.json and vocabularies": Kind(_make_data_set, _read_data_set, _same),
    "prepared rows": Kind(_make_data_files, _read_data_files, _same),
    "config.json and pctr.npz": Kind(_make_run, _read_run, _same),
    "best.json and calibration.json": Kind(_make_choices, _read_choices, _same),
    "plan.json": Kind(_make_plan, _read_plan, _says_what_the_plan_says),
    "tables.yaml": Kind(
        _make_tables, lambda folder: read_tables(folder / "tables.yaml"), _says_what_the_list_says
    ),
}


@pytest.mark.parametrize("mutations", MUTATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_right_or_refused(name: str, mutations: int, tmp_path: Path) -> None:
    kind, folder = KINDS[name], tmp_path / "files"
    files = kind.make(folder)
    before = kind.read(folder)
    random = np.random.default_rng(len(name))
    outcomes: Counter[str] = Counter()
    for _ in range(mutations):
        file = files[int(random.integers(len(files)))]
        content = file.read_bytes()
        damaged = mutated(content, random)
        file.write_bytes(damaged)
        try:
            after = kind.read(folder)
        except EsmmTorchrecError as error:
            outcomes["sentence"] += 1
            outcomes["lines"] += str(error).count("\n") + 1
        else:
            outcomes["result"] += 1
            assert kind.is_right(folder, before, after), (file, damaged)
        file.write_bytes(content)
    assert outcomes["sentence"] > mutations // 5
    assert outcomes["lines"] == outcomes["sentence"]
    assert kind.is_right(folder, before, kind.read(folder))
