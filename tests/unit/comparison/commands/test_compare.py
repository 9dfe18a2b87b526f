from __future__ import annotations

from pathlib import Path

import pytest

from esmm_torchrec.cli.main import main
from tests.prepared_data import write_data_set


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    sentences = [line for line in said if line.startswith("esmm-torchrec: ")]
    assert len(sentences) == 1
    assert said[-1] == sentences[0]
    return sentences[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "esmn"], ["--methods esmn", "shared-bottom"]),
        (["--seeds", "0"], ["--seeds 0"]),
        (["--fractions", "0", "1"], ["--fractions 0"]),
        (["--trials", "99"], ["--trials 99"]),
        (["--processes", "0"], ["--processes 0"]),
        (["--fractions", "0.00001", "--device", "cpu"], ["--fractions 1e-05", "conversions"]),
        (["--world.ctr", "2"], ["--ctr is 2"]),
        (["--data", "nowhere", "--world.seed", "3"], ["--world", "--data"]),
        (["--data", "nowhere", "--regime", "dense"], ["--regime", "--data"]),
        (["--regime", "dense", "--world.seed", "3"], ["--regime", "--world"]),
        (
            ["--settings-of", "nowhere", "--device", "cpu"],
            ["--settings-of nowhere", "results.json"],
        ),
        (["--keep-best", "run"], ["--keep-best", "--data"]),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / "out"
    sentence = _refused(["--out", str(out), *arguments], capsys)
    assert all(word in sentence for word in words), sentence
    assert not out.exists()


def test_help_names_the_methods_and_the_world(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "--help"])
    text = capsys.readouterr().out
    for word in ("--methods", "--seeds", "--fractions", "--data", "--world.correlation"):
        assert word in text


def test_a_fraction_without_conversions_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data_set(tmp_path / "data", train=300, test=200)
    arguments = ["--data", str(tmp_path / "data"), "--fractions", "0.0001", "1", "--device", "cpu"]
    sentence = _refused(["--out", str(tmp_path / "out"), *arguments], capsys)
    assert "--fractions 0.0001" in sentence
    assert "no conversion" in sentence


def test_a_data_set_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    sentence = _refused(["--out", str(tmp_path / "out"), "--data", str(missing)], capsys)
    assert str(missing) in sentence
