"""Limits of a container, read from files as both versions of cgroups have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from esmm_torchrec.sharding import host
from esmm_torchrec.sharding.host import threads_per_rank, usable_cores, usable_memory

MIB = 2**20


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of cgroups of a process on a host of 16 cores."""
    monkeypatch.setattr(host, "CGROUPS", tmp_path)
    monkeypatch.setattr(host, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_cgroups_the_host_is_the_limit(cgroup: Path) -> None:
    assert not (cgroup / "membership").exists()
    assert usable_cores() == 16
    assert usable_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("namespace", ["/", "/kubepods/pod1/main"])
def test_version_2(cgroup: Path, namespace: str) -> None:
    """The pod's limit is below the container's; in a namespace of its own only a root is seen."""
    write(cgroup / "membership", f"0::{namespace}\n")
    own = cgroup / namespace.strip("/")
    write(own / "memory.max", f"{64 * MIB}\n")
    write(own / "cpu.max", "max 100000\n")
    write(cgroup / "cpu.max", "350000 100000\n")
    assert usable_memory() == 64 * MIB
    assert usable_cores() == 3
    write(own / "memory.max", "max\n")
    assert usable_memory() > 64 * MIB


@pytest.mark.parametrize("folder", ["docker/abc", "."])
def test_version_1(cgroup: Path, folder: str) -> None:
    """A container names its cgroup as the host does, and may see its limits at the root."""
    write(
        cgroup / "membership", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n"
    )
    write(cgroup / "memory" / folder / "memory.limit_in_bytes", f"{32 * MIB}\n")
    write(cgroup / "cpu,cpuacct" / folder / "cpu.cfs_quota_us", "50000\n")
    write(cgroup / "cpu,cpuacct" / folder / "cpu.cfs_period_us", "100000\n")
    assert usable_memory() == 32 * MIB
    assert usable_cores() == 1
    write(cgroup / "cpu,cpuacct" / folder / "cpu.cfs_quota_us", "-1\n")
    assert usable_cores() == 16


def test_threads_are_divided_unless_the_user_chose_them(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(cgroup / "membership", "0::/\n")
    write(cgroup / "cpu.max", "800000 100000\n")
    for exported, threads in (("", 4), ("1", 4), ("3", 3), ("many", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", exported)
        assert threads_per_rank(2) == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_per_rank(2) == 4
    assert threads_per_rank(32) == 1
