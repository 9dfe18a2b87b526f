"""The command line as a whole: commands, their help, and one sentence for each error."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from esmm_torchrec.cli.arguments import read_options
from esmm_torchrec.cli.help import EXTENDED_GROUPS, made_help, stored_help
from esmm_torchrec.cli.main import COMMANDS, configure_threads, main, run_command
from esmm_torchrec.cli.serve import listen
from esmm_torchrec.errors import DataError, OptionError, RunError
from esmm_torchrec.progress import progress_bar

PROGRAM = [sys.executable, "-m", "esmm_torchrec"]
TRAIN = ["train", "--data", "nowhere", "--out", "run"]


def _options(command: str) -> type:
    return importlib.import_module(f"esmm_torchrec.{COMMANDS[command][0]}").Options


def test_idle_threads_spin_for_a_moment_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    configure_threads()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "10000")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    configure_threads()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_without_a_command_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        shown = capsys.readouterr().out
        for command, (_, help_text) in COMMANDS.items():
            assert re.search(rf"^  {command} +{help_text}$", shown, flags=re.MULTILINE)


def test_help_needs_neither_torch_nor_the_data_libraries() -> None:
    program = (
        "import sys\nfrom esmm_torchrec.cli.main import COMMANDS, main\n"
        "for command in COMMANDS:\n    main([*command.split(), '--help'])\n"
        "assert not {'torch', 'torchrec', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage: esmm-torchrec") == len(COMMANDS)


def test_help_of_chosen_parts_and_of_installed_packages_is_made_from_the_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--architecture", "mmoe", "--help"])
    assert stop.value.code == 0
    assert "--architecture.num-experts" in capsys.readouterr().out
    added = EntryPoint("own", "esmm_torchrec.models.rows.everything:AllRows", EXTENDED_GROUPS[0])
    monkeypatch.setattr("esmm_torchrec.cli.help.entry_points", lambda: EntryPoints([added]))
    assert stored_help("train", ["--help"]) is None


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_says_what_it_is_for(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    # Versions of tyro may wrap lines differently.
    assert shown.split() == made_help(command).split(), "run python -m esmm_torchrec.cli.help"
    assert f"usage: esmm-torchrec {command} " in shown
    assert "{None}" not in shown
    text = re.sub(r"[│|\s]+", " ", shown).replace(", --no-", ",--no-")
    parts = re.split(r" (?=--[a-z])", text)
    for field in dataclasses.fields(_options(command)):
        if "Positional" in str(field.type):
            assert f" {field.name.upper()} " in text
            continue
        option = f"--{field.name.removeprefix('start_').replace('_', '-')}"
        # The fields of an option that is a dataclass follow its name and a dot.
        told = [part for part in parts if re.match(rf"{option}(\.[a-z-]+)?[ ,]", part)]
        assert told, f"{option} is not named"
        # A description follows its name and form.
        places = [m.end() for m in re.finditer(rf" {option}[ ,]", text)]
        following = [text[place : place + 300].split("(default")[0].split() for place in places]
        counts = [sum(word.strip(".,;:").islower() for word in words) for words in following]
        assert max(counts, default=2) >= 2, told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "there is no command 'trian'; see 'esmm-torchrec --help'"),
        (["--data", "x"], "there is no command '--data'; see 'esmm-torchrec --help'"),
        (
            ["prepare", "csv"],
            "there is no command 'prepare csv', but 'prepare ali-ccp', 'prepare table' and "
            "'prepare append'; see 'esmm-torchrec --help'",
        ),
        (["train"], "--data and --out must be given; see 'esmm-torchrec train --help'"),
        (["generate"], "OUT must be given; see 'esmm-torchrec generate --help'"),
        (["evaluate", "--data", "x"], "RUN must be given; see 'esmm-torchrec evaluate --help'"),
        (
            [*TRAIN, "--batch-siz", "3"],
            "there is no option --batch-siz (did you mean --batch-size?); see 'esmm-torchrec "
            "train --help'",
        ),
        (
            ["train", "--dat", "x", "--out", "y"],
            "there is no option --dat, and --data must be given; see 'esmm-torchrec train --help'",
        ),
        (
            [*TRAIN, "more"],
            "unexpected argument more; see 'esmm-torchrec train --help'",
        ),
        (
            [*TRAIN, "--batch-size", "1.5"],
            "--batch-size takes a whole number, not '1.5'; see 'esmm-torchrec train --help'",
        ),
        (
            [*TRAIN, "--max-steps", "few"],
            "--max-steps takes a whole number, not 'few'; see 'esmm-torchrec train --help'",
        ),
        (
            [*TRAIN, "--tower", "64", "x"],
            "--tower takes whole numbers, not '64 x'; see 'esmm-torchrec train --help'",
        ),
        (
            [*TRAIN, "--sparse-lr", "fast"],
            "--sparse-lr takes a number, not 'fast'; see 'esmm-torchrec train --help'",
        ),
        ([*TRAIN, "--seed"], "--seed needs a value; see 'esmm-torchrec train --help'"),
        (
            [*TRAIN, "--device", "tpu"],
            "--device 'tpu' is not one of auto, cpu, cuda; see 'esmm-torchrec train --help'",
        ),
        (
            [*TRAIN, "--objective.click-loss-weight", "-1"],
            "--objective.click-loss-weight -1.0 is out of range; give 0 or more; see "
            "'esmm-torchrec train --help'",
        ),
        ([*TRAIN, "--epochs", "0"], "--epochs 0 is not positive; give a number above 0"),
        ([*TRAIN, "--sparse-lr", "nan"], "--sparse-lr nan is not positive; give a number above 0"),
        (
            [*TRAIN, "--tower"],
            "--tower needs the widths of the hidden layers, such as 360 200 80",
        ),
        (
            [*TRAIN, "--resume", "-3"],
            "--resume -3 is not auto, never or the number of a step",
        ),
        (
            ["score", "run", "--out", "x"],
            "give what to score, as either --data or --input",
        ),
        (
            ["score", "run", "--data", "data", "--out", "s3://scores/day.parquet"],
            "--out s3://scores/day.parquet is the URI of a file, but scores of --data in a store "
            "are written to a folder; leave its ending out",
        ),
        (
            TRAIN,
            "nowhere is not a prepared data set (dataset.json is missing); create one with "
            "'esmm-torchrec prepare'",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"esmm-torchrec: {sentence}\n")
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Sample:
    """Options of types that no command has."""

    place: Annotated[tuple[int, int], tyro.conf.arg(metavar="X Y")] = (0, 0)
    kind: Literal["a", "b"] | None = None
    name: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.note:
            raise OptionError(f"--note {self.note} cannot be, for a reason " + "of length " * 20)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_tyros_frames_are_gone_on_any_terminal(encoding: str) -> None:
    process = subprocess.run(
        [*PROGRAM, "generate", "world", "--seed", "x"],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    assert process.stderr == (
        "esmm-torchrec: --seed takes a whole number, not 'x'; see 'esmm-torchrec generate --help'\n"
    )


def test_what_tyro_says_of_other_options_stays_on_one_line() -> None:
    for arguments in (["--place", "1"], ["--place", "1", "x"], ["--kind", "c"], ["--kind"]):
        with pytest.raises(OptionError) as error:
            read_options(Sample, "sample", arguments)
        text = str(error.value)
        assert arguments[0] in text
        assert text.endswith("; see 'sample --help'")
        assert not re.search(r"[\n│╭─|+]|  |--( |-)", text)


def test_an_optional_option_takes_its_own_kind_alone() -> None:
    assert read_options(Sample, "sample", []) == Sample()
    assert read_options(Sample, "sample", ["--name", "None"]).name == "None"
    assert read_options(Sample, "sample", ["--kind", "b", "--place", "3", "4"]) == Sample(
        place=(3, 4), kind="b"
    )


def test_the_options_own_sentence_is_not_touched() -> None:
    with pytest.raises(OptionError) as error:
        read_options(Sample, "sample", ["--note", "a  b"])
    assert str(error.value) == "--note a  b cannot be, for a reason " + "of length " * 20


@dataclass(frozen=True)
class Out:
    """Options with only an output path."""

    out: Path


def _full_disk(_: Out) -> None:
    with open("/dev/full", "w") as file:
        file.write("x" * 10)
        file.flush()


def _is_a_folder(options: Out) -> None:
    options.out.parent.read_text()


def _broken_data(_: Out) -> None:
    raise DataError("a.csv, line 3, column 'age': 'x' is not a number")


def _wrong_argument(_: Out) -> None:
    raise RunError("give `start_from`, or `objective.detach_click` of `Other` for `out`")


def _interrupted(_: Out) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("work", "code", "sentence"),
    [
        (
            _full_disk,
            2,
            "cannot write {out}: no space left on device; make room and rerun the same command",
        ),
        (_is_a_folder, 2, "cannot read or write {out.parent}: is a directory"),
        (_broken_data, 2, "a.csv, line 3, column 'age': 'x' is not a number"),
        (
            _wrong_argument,
            2,
            "give --from, or --objective.detach-click of `Other` for --out",
        ),
        (_interrupted, 130, "interrupted; rerun the same command"),
    ],
)
def test_failures_of_the_work_are_sentences_too(
    work: Callable[[Out], None],
    code: int,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = Out(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        run_command(work, options)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"esmm-torchrec: {sentence.format(out=options.out)}\n"


def test_faults_of_our_own_are_not_hidden() -> None:
    def work(_: Out) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(work, Out(Path("out")))


def test_progress_is_not_shown_before_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def work(fail: bool) -> None:
        with progress_bar("Reading", 10, "rows") as bar:
            bar.update(4)
            if fail:
                raise DataError("no")

    work(fail=False)
    assert re.fullmatch(r"Reading: 4\.00/10\.0 rows \[.*\]\n", capsys.readouterr().err)
    with pytest.raises(DataError):
        work(fail=True)
    assert capsys.readouterr().err == ""


def test_an_interrupted_command_leaves_nothing_and_one_sentence(tmp_path: Path) -> None:
    command = [*PROGRAM, "generate", "world", "--impressions", "20000000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "world.partial").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err == "esmm-torchrec: interrupted; rerun the same command\n"
    assert not (tmp_path / "world").exists()


def test_nobody_reading_on_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [*PROGRAM, "generate", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


def test_a_full_disk_behind_stdout_is_said() -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [*PROGRAM], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert process.returncode == 2
    assert process.stderr.startswith("esmm-torchrec: cannot write: no space left on device;")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("nowhere.invalid", 0, "name or service not known|temporary failure in name resolution"),
        ("127.0.0.1", None, "address already in use"),
    ],
)
def test_a_place_that_cannot_be_listened_on_is_named(
    host: str, port: int | None, reason: str
) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(OptionError) as refusal:
        listen(host, taken.getsockname()[1] if port is None else port)
    assert re.fullmatch(
        rf"cannot listen on `host` {host}, `port` \d+ \(({reason}).*\); choose others",
        str(refusal.value),
    )
