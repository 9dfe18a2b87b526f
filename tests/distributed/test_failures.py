"""Two ranks, one of which dies, or which are interrupted: no rank hangs or is left running, and the
resumed run has the result of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.prepared_data import write_data_set
from tests.ranks import torchrun

LONG = ["--epochs", "25", "--checkpoint-every", "10", "--batch-size", "20"]
MODEL = ["--embedding-dim", "8", "--tower", "8", "--sharding", "row_wise"]
ENDS_WITHIN_SECONDS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prepared"
    write_data_set(path, train=410, test=90)
    return path


class Job:
    """A training under torchrun, and its workers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.workers: dict[int, int] = {}
        """Rank → process id."""

    def find_workers(self) -> None:
        torchrun = self.process.pid
        children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
        for child in map(int, children):
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
            ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
            self.workers |= {int(rank): child for rank in ranks}

    def end(self) -> str:
        """Waits until the job ends without help, within a time limit; returns its stderr."""
        _, err = self.process.communicate(timeout=ENDS_WITHIN_SECONDS)
        assert self.process.returncode == 1  # torchrun's exit status
        for worker in self.workers.values():
            assert not Path(f"/proc/{worker}").exists()
        return err


@contextmanager
def _job(data: Path, out: Path, *, until: Path) -> Iterator[Job]:
    """Starts a training on two ranks and waits for a checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "esmm_torchrec", "train", "--data", str(data), "--out", str(out)]
    process = subprocess.Popen(
        [*command, *MODEL, *LONG],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    job = Job(process)
    try:
        deadline = time.monotonic() + 120
        while not until.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.find_workers()
        assert sorted(job.workers) == [0, 1]
        yield job
    finally:
        process.kill()
        for worker in job.workers.values():
            if _is_running(worker):
                os.kill(worker, signal.SIGKILL)


def _sentences(err: str) -> list[str]:
    """Returns the library's messages, without the forty lines that torchrun adds."""
    assert "[rank" not in err, err  # torch's prefix of a rank's traceback
    return [line for line in err.splitlines() if line.startswith("esmm-torchrec: ")]


def test_a_run_that_was_killed_and_interrupted_ends_as_if_it_had_not_been(
    data: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    checkpoints = out / "checkpoints"

    with _job(data, out, until=checkpoints / "step-00000020") as job:
        os.kill(job.workers[1], signal.SIGKILL)
        err = job.end()
    lost = "esmm-torchrec: another rank has ended; see its output or that of torchrun"
    assert _sentences(err) in ([lost], [])  # torchrun may have ended the rank first
    assert "Signal 9 (SIGKILL)" in err

    with _job(data, out, until=checkpoints / "step-00000120") as job:
        os.killpg(job.process.pid, signal.SIGINT)  # as Ctrl-C does
        err = job.end()
    (sentence,) = _sentences(err)
    assert sentence.startswith(
        f"esmm-torchrec: interrupted; rerun the same command to resume {out} from step 1"
    )
    assert not (out / "metrics.json").exists()

    command = ["-m", "esmm_torchrec", "train", "--data", data, *MODEL, *LONG]
    last = torchrun(2, *command, "--out", out)
    assert last.returncode == 0, last.stderr
    assert "resuming from step " in last.stdout
    reference = torchrun(2, *command, "--out", whole)
    assert reference.returncode == 0, reference.stderr
    metrics = [json.loads((run / "metrics.json").read_text())["test"] for run in (out, whole)]
    assert metrics[0].pop("reasons") == metrics[1].pop("reasons") == {}
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    histories = [
        [json.loads(line)["step"] for line in (run / "history.jsonl").read_text().splitlines()]
        for run in (out, whole)
    ]
    assert histories[0] == histories[1]
    assert not list(checkpoints.glob("*.partial"))


def test_ranks_end_with_a_killed_torchrun(data: Path, tmp_path: Path) -> None:
    with _job(data, tmp_path, until=tmp_path / "checkpoints" / "step-00000010") as job:
        job.process.kill()
        _, err = job.process.communicate(timeout=ENDS_WITHIN_SECONDS)  # their ends close the pipe
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while any(_is_running(worker) for worker in job.workers.values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    ended = "esmm-torchrec: torchrun has ended; rerun the same command"
    assert _sentences(err) in ([ended], [])  # the other rank may have ended first
    assert not (tmp_path / "metrics.json").exists()


def _is_running(process: int) -> bool:
    """Returns whether a process exists and is not a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def test_what_one_rank_refuses_all_refuse_and_one_says(data: Path, tmp_path: Path) -> None:
    """A broken plan, which every rank reads."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format_version": 1}))
    failed = torchrun(
        2, "-m", "esmm_torchrec", "train", "--data", data, "--out", tmp_path / "run",
        "--plan", plan, *MODEL,
    )  # fmt: skip
    assert failed.returncode == 1
    assert len(_sentences(failed.stderr)) == 1
    assert str(plan) in _sentences(failed.stderr)[0]
    assert "exitcode  : 2 " in failed.stderr
    assert not (tmp_path / "run").exists()
