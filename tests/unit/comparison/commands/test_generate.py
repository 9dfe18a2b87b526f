from __future__ import annotations

import json
from pathlib import Path

import pytest

from esmm_torchrec.cli.main import main
from esmm_torchrec.comparison.worlds import World


def test_writes_the_world_asked_for_and_says_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "world"
    main(["generate", str(out), "--impressions", "3001", "--seed", "7", "--correlation", "-0.3"])
    written = json.loads((out / "world.json").read_text())
    assert World(**written["world"]) == World(impressions=3001, seed=7, correlation=-0.3)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["impressions", "1,500", "1,501"] in lines
    clicks = [f"{written[split]['clicks']:,}" for split in ("train", "test")]
    assert ["clicks", *clicks] in lines
    assert lines[-1] == f"next: esmm-torchrec prepare ali-ccp {out} {out}-prepared".split()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ctr", "2"], "--ctr is 2.0; it must be from 0.001 to 0.5"),
        (["--impressions", "10"], "--impressions is 10; it must be from 1,000 to 90,000,000"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(tmp_path / "world"), *arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"esmm-torchrec: {sentence}\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(tmp_path), "--impressions", "1000"])
    assert stop.value.code == 2
    assert "already exists; remove it or choose another folder" in capsys.readouterr().err
