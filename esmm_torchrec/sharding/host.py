"""What this process may use of its host: memory, cores and threads, the limits of a container
included. The operating system's own counters tell those of the host only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_memory() -> int:
    """Bytes of memory: the host's, or the smallest limit of the process's cgroups."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += _numbers(folder / name)[:1]
    return min(limits)


def usable_cores() -> int:
    """Cores: those the process is bound to, or the smallest CPU quota of its cgroups; at least
    1."""
    limits: list[float] = [len(os.sched_getaffinity(0))]
    for folder in _cgroups("cpu"):
        # Version 2 has quota and period in one file; an unlimited quota is "max", or -1.
        quota = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2:
            limits.append(quota[0] / quota[1])
    return max(1, int(min(limits)))


def threads_per_rank(local_world_size: int) -> int:
    """Threads of one of `local_world_size` ranks on this host: an equal share of its cores.

    OMP_NUM_THREADS goes before it if it is above 1. A 1 is not taken as the user's choice:
    torchrun exports it to every rank unless the user has set the variable.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 1:
        return int(chosen)
    return max(1, usable_cores() // local_world_size)


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of the cgroups that bound this process, of both versions, from its own up to the
    root. Inside a container the path is often that of the host and only the root is there."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        own = root / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _numbers(path: Path) -> list[int]:
    """The positive numbers in a file of a cgroup; none if it does not exist or sets no limit."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [] if "max" in words else [int(word) for word in words if word.isdecimal() and int(word)]
