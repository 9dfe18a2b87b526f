"""Run folders: which may be started, resumed, opened."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esmm_torchrec.checkpoints.files import checkpoint_folders, find_checkpoint
from esmm_torchrec.errors import RunError
from esmm_torchrec.models.methods import ModelOptions
from esmm_torchrec.runs.lock import RunLock
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.schema import IdFeature, Schema, Table

SCHEMA = Schema((Table("item", 9),), (IdFeature("item", "item"),))


def _config(*, data: str = "abc", path: str = "data", **identity: Any) -> dict[str, Any]:
    return {
        "identity": {"embedding_dim": 16, "tower": (8, 4), "seed": 0}
        | {"rows": {"name": "aman", "negative_rate": 0.5}}
        | identity,
        "options": {"history_weights": "normalised", "epochs": 1},
        "model": ModelOptions(tower=(8, 4)).to_dict(),
        "schema": SCHEMA.to_dict(),
        "mean_values_per_bag": {"item": 1.0},
        "history": [{"step": 0, "data": {"path": path, "fingerprint": data}, "ranks": 2}],
    }


def _written(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({"format_version": 2} | config))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.start(tmp_path / "runs" / "one", _config(), resume="auto")


def _refused(sentence: str):
    return pytest.raises(RunError, match=f"^{re.escape(sentence)}$")


def test_what_is_started_can_be_opened(run: RunFolder) -> None:
    found = RunFolder.open(run.path)
    assert found.schema == SCHEMA
    assert found.model_options.to_dict() == ModelOptions(tower=(8, 4)).to_dict()
    assert [path.name for path in run.path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_folder_will_do(resume: str, tmp_path: Path) -> None:
    assert RunFolder.find(tmp_path, _config(), resume=resume) is None
    assert list(tmp_path.iterdir()) == []
    assert RunFolder.start(tmp_path, _config(), resume=resume).path == tmp_path


def test_a_run_with_a_checkpoint_keeps_its_config_until_it_is_resumed(run: RunFolder) -> None:
    """Without one it starts again, as the new options say."""
    other = _config() | {"options": {"history_weights": "normalised", "epochs": 2}}
    assert RunFolder.start(run.path, other, resume="auto").config == {"format_version": 2} | other
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    found = RunFolder.start(run.path, _config(), resume="auto")
    assert found.config == _written(other)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"embedding_dim": 32}, "`embedding_dim` 16 and this one has 32"),
        ({"tower": (8,)}, "`tower` 8 4 and this one has 8"),
        ({"seed": 3}, "`seed` 0 and this one has 3"),
        ({"rows": {"name": "all"}}, "`rows` aman and this one has all"),
        (
            {"rows": {"name": "aman", "negative_rate": 0.25}},
            "`rows.negative_rate` 0.5 and this one has 0.25",
        ),
        ({"dtype": "bfloat16"}, "`dtype` none and this one has bfloat16"),
    ],
)
def test_another_run_is_refused_by_the_option_that_differs(
    changed: dict[str, Any], what: str, run: RunFolder
) -> None:
    before = (run.path / "config.json").read_bytes()
    sentence = (
        f"{run.path} holds a run with {what}; choose another `out`, or give the same option to "
        "resume"
    )
    with _refused(sentence):
        RunFolder.start(run.path, _config(**changed), resume="auto")
    assert (run.path / "config.json").read_bytes() == before


def test_a_run_is_not_begun_twice(run: RunFolder) -> None:
    with _refused(f"{run.path} holds a run already and `resume` is never; choose another `out`"):
        RunFolder.start(run.path, _config(), resume="never")


def test_a_step_to_go_on_from_must_be_there(run: RunFolder, tmp_path: Path) -> None:
    for step in (10, 20):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    (run.checkpoints / "step-00000030.partial").mkdir()
    assert RunFolder.find(run.path, _config(), resume="20") is not None
    with _refused(f"{run.checkpoints} has no checkpoint of step 30; it has: 10, 20"):
        RunFolder.find(run.path, _config(), resume="30")
    with _refused(f"{tmp_path / 'new'} does not hold a run to resume; leave out `resume` 20"):
        RunFolder.find(tmp_path / "new", _config(), resume="20")
    assert not (tmp_path / "new").exists()


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with _refused(f"{tmp_path} is not empty and does not hold a run; choose another `out`"):
        RunFolder.start(tmp_path, _config(), resume="auto")
    with _refused(f"{tmp_path / 'letters.txt'} is a file; choose another `out`"):
        RunFolder.start(tmp_path / "letters.txt", _config(), resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_start_that_was_cut_short_begins_anew(tmp_path: Path) -> None:
    """A full disk, for one, leaves this."""
    (tmp_path / "config.json.partial").write_text("{")
    run = RunFolder.start(tmp_path, _config(), resume="auto")
    assert RunFolder.open(run.path).schema == SCHEMA


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("[1]", "'list' object has no attribute 'get'"),
        ('{"format_version": 2, "identity": 1}', "'int' object has no attribute 'items'"),
        (
            '{"format_version": 2, "identity": {}, "mean_values_per_bag": {}, "history": []}',
            "list index out of range",
        ),
    ],
)
def test_a_broken_config_is_said_to_be(text: str, reason: str, run: RunFolder) -> None:
    (run.path / "config.json").write_text(text)
    with _refused(f"{run.path / 'config.json'} is broken ({reason}); train again"):
        RunFolder.open(run.path)


@pytest.mark.parametrize(
    "key", ["identity", "options", "model", "schema", "mean_values_per_bag", "history"]
)
def test_a_config_must_be_whole(key: str, run: RunFolder) -> None:
    config = _written(_config())
    del config[key]
    (run.path / "config.json").write_text(json.dumps(config))
    with _refused(f"{run.path / 'config.json'} is broken ('{key}'); train again"):
        RunFolder.open(run.path)


def test_a_changed_value_in_a_config_is_found(run: RunFolder) -> None:
    written = (run.path / "config.json").read_text()
    for before, after in (
        ('"normalised"', '"raw"'),
        ('"num_embeddings": 9', '"num_embeddings": 8'),
    ):
        assert before in written
        (run.path / "config.json").write_text(written.replace(before, after))
        with _refused(
            f"{run.path / 'config.json'} is broken (its content does not match its checksum); "
            "train again"
        ):
            RunFolder.open(run.path)


def test_a_changed_description_of_the_data_is_found(run: RunFolder, tmp_path: Path) -> None:
    content = b'{"statistics": 1}'
    config = _config(data=hashlib.sha256(content).hexdigest())
    run = RunFolder.start(tmp_path / "other", config, resume="auto")
    with pytest.raises(RunError, match=r"dataset\.json, which encodes raw rows, cannot be read"):
        run.check_preprocessing()
    run.preprocessing.mkdir()
    (run.preprocessing / "dataset.json").write_bytes(content)
    run.check_preprocessing()
    (run.preprocessing / "dataset.json").write_bytes(content.replace(b"1", b"2"))
    with pytest.raises(RunError, match=r"dataset\.json was changed after it was written"):
        run.check_preprocessing()


def test_a_method_of_a_later_version_is_named(run: RunFolder) -> None:
    config = _written(_config())
    config["model"]["method"] = "esmm3"
    run.write_json("config.json", config)
    with pytest.raises(RunError, match=r"is broken \(there is no method 'esmm3'; choose from "):
        RunFolder.open(run.path)


def test_the_config_of_another_version_is_said_to_be_one(run: RunFolder) -> None:
    for version in ({}, {"format_version": 1}, {"format_version": 3}):
        run.write_json("config.json", _config() | version)
        with _refused(
            f"{run.path} was written by another version of this library, which this one cannot "
            "read; train again, or use that version"
        ):
            RunFolder.open(run.path)


def test_no_run_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with _refused(
        f"{tmp_path} is not a run folder: it has no config.json; give the `out` of a training run"
    ):
        RunFolder.open(tmp_path)


def _write_description(folder: Path, **changed: Any) -> None:
    """What check_data looks at in a dataset.json."""
    description = {
        "checksums": {"vocabulary/item.parquet": "1a", "train/impressions-00000.parquet": "2b"},
        "dense": {"price": {"mean": 2.0, "std": 4.0}},
        "schema": SCHEMA.to_dict(),
    } | changed
    folder.mkdir(exist_ok=True)
    statistics = {"dense": description.pop("dense"), "mean_values_per_bag": {}}
    text = json.dumps(description | {"statistics": statistics})
    (folder / "dataset.json").write_text(text)


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        (
            {"schema": replace(SCHEMA, tables=(Table("item", 10),)).to_dict()},
            "has other features or vocabularies than",
        ),
        (
            {"checksums": {"vocabulary/item.parquet": "3c"}},
            "gives ids other rows of their tables than",
        ),
        (
            {"dense": {"price": {"mean": 2.5, "std": 4.0}}},
            "standardised its dense features differently from",
        ),
    ],
)
def test_data_that_means_something_else_than_in_training_is_refused(
    changed: dict[str, Any], differs: str, run: RunFolder, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    _write_description(run.preprocessing)
    _write_description(data, **changed)
    with _refused(
        f"{data} {differs} the data of {run.path}; give the data set that the run was trained on, "
        "or score its raw rows"
    ):
        run.check_data(data)


def test_other_rows_in_the_same_form_are_taken(run: RunFolder, tmp_path: Path) -> None:
    data = tmp_path / "data"
    _write_description(run.preprocessing)
    checksums = {"vocabulary/item.parquet": "1a", "train/impressions-00000.parquet": "9z"}
    _write_description(data, checksums=checksums)
    run.check_data(str(data))
    (run.preprocessing / "dataset.json").write_text("{}")
    with _refused(f"{run.preprocessing / 'dataset.json'} is broken ('checksums'); create it again"):
        run.check_data(data)


def test_a_run_is_resumed_with_data_of_the_same_form_only(run: RunFolder, tmp_path: Path) -> None:
    _write_description(run.preprocessing)
    same, other = tmp_path / "same", tmp_path / "other"
    checksums = {"vocabulary/item.parquet": "1a", "train/impressions-00000.parquet": "9z"}
    _write_description(same, checksums=checksums)
    _write_description(other, checksums={"vocabulary/item.parquet": "3c"})
    assert RunFolder.find(run.path, _config(data="def", path=str(same)), resume="auto") is not None
    with _refused(
        f"{other} gives ids other rows of their tables than the data of {run.path}; give data "
        f"prepared with the same vocabularies, or start another run with `start_from` {run.path}"
    ):
        RunFolder.find(run.path, _config(data="def", path=str(other)), resume="auto")


def test_what_comes_after_the_step_to_resume_from_is_dropped(run: RunFolder) -> None:
    for step in (10, 20, 30):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    run.history.write_text("".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30)))
    (run.path / "metrics.json").write_text("{}")
    resumed = run.resume_from(20, _config(data="b")).resume_from(10, _config(data="c"))
    assert list(checkpoint_folders(run.checkpoints)) == [10]
    assert run.history.read_text() == '{"step": 10}\n'
    assert not (run.path / "metrics.json").exists()
    history = RunFolder.open(str(run.path)).config["history"]
    assert [(entry["step"], entry["data"]["fingerprint"]) for entry in history] == [
        (0, "abc"),
        (20, "b"),
        (10, "c"),
    ]
    assert [resumed.data_of(step) for step in (5, 10, 15, 20, 25)] == ["abc", "abc", "c", "c", "c"]
    assert resumed.was_trained_on("c")
    assert not resumed.was_trained_on("b")


def test_only_one_of_two_starts_gets_the_folder(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    RunFolder.start(tmp_path / "run", _config(), resume="auto", lock=first)
    with pytest.raises(RunError, match="is in use by another training"):
        RunFolder.start(tmp_path / "run", _config(), resume="auto", lock=second)
    first.close()
    RunFolder.start(tmp_path / "run", _config(), resume="auto", lock=second)
    second.close()


def test_a_kept_pctr_is_read_back_and_must_be_whole(run: RunFolder) -> None:
    assert run.read_pctr(3) is None
    run.write_pctr(np.array([0.25, 0.5, 0.75]))
    kept = run.read_pctr(3)
    assert kept is not None
    assert kept.tolist() == [0.25, 0.5, 0.75]
    with _refused(f"{run.pctr} is broken ((3,) values for 4 clicks); train again"):
        run.read_pctr(4)
    whole = run.pctr.read_bytes()
    run.pctr.write_bytes(whole[:-4])
    with pytest.raises(RunError, match=re.escape(f"{run.pctr} is broken (")):
        run.read_pctr(3)
    found = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 8
        run.pctr.write_bytes(changed)
        try:
            kept = run.read_pctr(3)
        except RunError:
            found += 1
        else:  # a date, for example
            assert kept is not None
            assert kept.tolist() == [0.25, 0.5, 0.75]
    assert found > len(whole) / 2


def test_history_forgets_what_is_done_again(run: RunFolder) -> None:
    run.drop_history(0)
    assert not run.history.exists()
    lines = [json.dumps({"step": step}) + "\n" for step in (5, 10, 15)]
    for text, after, kept in (
        ("".join(lines), 15, lines),
        ("".join(lines), 14, lines[:2]),
        ("".join(lines), 0, []),
        ("".join(lines) + '{"ste', 20, lines),
    ):
        run.history.write_text(text)
        run.drop_history(after)
        assert run.history.read_text() == "".join(kept)


def test_a_broken_line_of_the_history_is_named(run: RunFolder) -> None:
    run.history.write_text('{"step": 5}\n{"stop": 10}\n')
    with pytest.raises(RunError, match=r"history\.jsonl has a line without figures"):
        run.drop_history(20)


def test_checkpoints_are_found_by_step_and_whole_ones_alone(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere") is None
    for name in ("step-00000100", "step-00000020", "step-00000300.partial", "other"):
        (tmp_path / name).mkdir()
    assert list(checkpoint_folders(tmp_path)) == [20, 100]
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000100"
    assert find_checkpoint(tmp_path, 20) == tmp_path / "step-00000020"
    with _refused(f"{tmp_path} has no checkpoint of step 300; it has: 20, 100"):
        find_checkpoint(tmp_path, 300)
