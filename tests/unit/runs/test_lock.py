"""The lock of a run folder: held by one process, released with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esmm_torchrec.errors import RunError
from esmm_torchrec.runs.lock import LOCK, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from esmm_torchrec.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(120)
"""


def test_a_second_process_is_told_who_holds_it_until_that_one_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            sentence = (
                rf"{re.escape(str(tmp_path))} is in use by another training \(process "
                rf"{holder.pid} on .+\); wait for it to end, or choose another `out`"
            )
            for attempt in (RunLock(tmp_path).check, RunLock(tmp_path).acquire):
                with pytest.raises(RunError) as refusal:
                    attempt()
                assert re.fullmatch(sentence, str(refusal.value))
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    RunLock(tmp_path).check()
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(RunError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path).acquire()
    lock.close()
    lock.close()
    assert list(tmp_path.iterdir()) == []


def test_checking_makes_nothing(tmp_path: Path) -> None:
    RunLock(tmp_path / "new").check()
    assert list(tmp_path.iterdir()) == []
