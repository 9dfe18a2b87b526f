"""Memory, cores and threads that this process may use, within the limits of its container. The
operating system's own counters cover the whole host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_memory() -> int:
    """Returns usable bytes of RAM: the host's, or the smallest limit of this process's cgroups."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += _numbers(folder / name)[:1]
    return min(limits)


def usable_cores() -> int:
    """Returns the number of cores that this process is bound to, or the smallest CPU quota of its
    cgroups if that is lower; at least 1."""
    limits: list[float] = [len(os.sched_getaffinity(0))]
    for folder in _cgroups("cpu"):
        # Version 2 has quota and period in one file. An unlimited quota is "max" (version 1: -1).
        quota = _numbers(folder / "cpu.max") or [
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2:
            limits.append(quota[0] / quota[1])
    return max(1, int(min(limits)))


def threads_per_rank(local_world_size: int) -> int:
    """Returns the number of threads per rank: an equal share of the cores of this host.

    OMP_NUM_THREADS takes precedence if it is above 1. A value of 1 does not count as the user's
    choice: torchrun exports it to every rank unless the user has set the variable.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 1:
        return int(chosen)
    return max(1, usable_cores() // local_world_size)


def _cgroups(controller: str) -> Iterator[Path]:
    """Yields the folders of the cgroups (version 1 or 2) that limit this process, from its own to
    the root. In a container the path is often the host's, and only the root exists."""
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
    """Reads the positive numbers in a cgroup file; none if it does not exist or sets no limit."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [] if "max" in words else [int(word) for word in words if word.isdecimal() and int(word)]
