"""Lock that allows at most one training per run folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from esmm_torchrec.errors import RunError

LOCK = ".lock"
"""Name of the lock file in a run folder."""


class RunLock:
    """Lock of a run folder, held by rank 0 of a training.

    The operating system releases it when the holding process ends, even if it is killed.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def check(self) -> None:
        """Checks that no other process holds the lock.

        Raises:
            RunError: another process holds it.
        """
        if self._path.exists():
            self.acquire()
            self.close()

    def acquire(self) -> None:
        """Acquires the lock; the folder must exist.

        Raises:
            RunError: another process holds it.
        """
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise RunError(
                    f"{self._path.parent} is in use by another training ({holder}); wait for it "
                    "to end, or choose another `out`"
                ) from None
            if self._is_current(descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, self._holder().encode(), 0)
                self._descriptor = descriptor
            else:  # the previous holder has just removed the file
                os.close(descriptor)

    def close(self) -> None:
        """Releases the lock, if it is held."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    @staticmethod
    def _holder() -> str:
        return f"process {os.getpid()} on {socket.gethostname()}"
