"""Trainings of a comparison as jobs that several processes share.

Every process goes through the same list in the same order and does the jobs that are neither done
nor in progress. A job is claimed by a file lock, which the operating system releases when the
process ends for whatever reason; a finished job is recognised by its result file. Processes share
nothing else, so a job gives the same result in any of them.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from esmm_torchrec.sharding.process_group import Ranks

POLL_SECONDS = 0.2
"""Interval at which a process checks again while all remaining jobs are running or not ready."""


@dataclass(frozen=True)
class Job:
    """A unit of work that writes a file."""

    label: str
    """Text for a progress bar."""
    result: Path
    """File that exists once the job is done."""
    work: Callable[[], object]
    """Function that writes the file; called on every rank."""
    needs: tuple[Path, ...] = ()
    """Results of other jobs that must exist first."""
    is_wanted: bool = True
    """Whether the job is done for its own sake, not only while another job needs its result."""


def do_all(
    jobs: Sequence[Job],
    ranks: Ranks,
    *,
    on_start: Callable[[Job], object],
    on_done: Callable[[Job], object],
) -> None:
    """Does the jobs that no other process does, and returns when all are done.

    Args:
        jobs: in the order in which they should be started.
        ranks: this process among the others; rank 0 chooses for all of them.
        on_start: called on every rank before a job of this process.
        on_done: called on every rank once for each job, whichever process did it, and for each job
            that no other job needs any more.
    """
    waiting = dict(enumerate(jobs))
    locks: list[int] = []

    def choose() -> tuple[list[int], int | None]:
        done = [place for place, job in waiting.items() if job.result.exists()]
        left = {place: job for place, job in waiting.items() if place not in done}
        needed = {path for job in left.values() if job.is_wanted for path in job.needs}
        for place, job in left.items():
            if not job.is_wanted and job.result not in needed:
                done.append(place)
            elif all(path.exists() for path in job.needs):
                lock = _claim(job)
                if lock is not None:
                    locks.append(lock)
                    return done, place
        return done, None

    while waiting:
        try:
            done, chosen = ranks.from_first(choose)
            for place in done:
                on_done(waiting.pop(place))
            if chosen is not None:
                job = waiting.pop(chosen)
                on_start(job)
                job.work()
                ranks.barrier()
                assert job.result.exists(), job.label
                if ranks.is_first:
                    _lock_file(job).unlink(missing_ok=True)
                on_done(job)
            elif waiting and not done:
                time.sleep(POLL_SECONDS)
        finally:
            while locks:
                os.close(locks.pop())


def _lock_file(job: Job) -> Path:
    return job.result.with_name(job.result.name + ".lock")


def _claim(job: Job) -> int | None:
    """Returns an open file with the lock of a job; None if another process does or did it."""
    path = _lock_file(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    if job.result.exists():
        # Finished after the check; its lock file may be gone, so remove this one.
        path.unlink(missing_ok=True)
        os.close(file)
        return None
    return file
