"""Jobs shared by processes that know nothing of each other but files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from esmm_torchrec.comparison.work import Job, do_all
from esmm_torchrec.sharding.process_group import Ranks, process_group

Start = Callable[..., BaseProcess]

WORKERS = 3
ENDS_WITHIN_SECONDS = 240


def _jobs(folder: Path, *, hangs_in: Path | None = None) -> list[Job]:
    """Ten jobs that need one, which is not wanted by itself; and one that nothing needs."""

    def work(name: str) -> None:
        if name == "3" and hangs_in is not None:
            hangs_in.write_text(str(os.getpid()))
            time.sleep(ENDS_WITHIN_SECONDS)
        time.sleep(0.02)
        with (folder / "log").open("a") as log:
            log.write(f"{name}\n")
        (folder / name).write_text(name)

    def job(name: str, *needs: Path, is_wanted: bool = True) -> Job:
        return Job(name, folder / name, lambda: work(name), needs=needs, is_wanted=is_wanted)

    needed = folder / "needed"
    return [
        *(job(str(number), needed) for number in range(10)),
        job("needed", is_wanted=False),
        job("superfluous", is_wanted=False),
    ]


def _do(folder: Path, ranks: Ranks, hangs_in: Path | None = None) -> list[str]:
    heard: list[str] = []
    started: list[Job] = []
    do_all(
        _jobs(folder, hangs_in=hangs_in),
        ranks,
        on_start=started.append,
        on_done=lambda job: heard.append(job.label),
    )
    assert {job.label for job in started} <= set(heard)
    return heard


def _work(folder: Path, hangs_in: Path | None) -> None:
    with process_group("cpu") as ranks:
        heard = _do(folder, ranks, hangs_in)
    assert sorted(heard) == sorted([*map(str, range(10)), "needed", "superfluous"])


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Start:
    def start(folder: Path, hangs_in: Path | None = None) -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(folder, hangs_in)
        )
        process.start()
        request.addfinalizer(process.kill)
        return process

    return start


def test_each_job_is_done_once_after_what_it_needs(tmp_path: Path, start: Start) -> None:
    workers = [start(tmp_path) for _ in range(WORKERS)]
    for worker in workers:
        worker.join(ENDS_WITHIN_SECONDS)
        assert worker.exitcode == 0
    done = (tmp_path / "log").read_text().split()
    assert done[0] == "needed"
    assert sorted(done[1:]) == [str(number) for number in range(10)]
    assert not list(tmp_path.glob("*.lock"))


def test_the_job_of_a_killed_process_is_done_by_another(tmp_path: Path, start: Start) -> None:
    hanging = tmp_path / "pid"
    first = start(tmp_path, hanging)
    end = time.monotonic() + ENDS_WITHIN_SECONDS
    while not hanging.exists() or not hanging.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(int(hanging.read_text()), signal.SIGKILL)
    first.join()
    second = start(tmp_path)
    second.join(ENDS_WITHIN_SECONDS)
    assert second.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()).count("3") == 1
