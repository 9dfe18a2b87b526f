"""Training on two hosts with an object store on a third, each a network namespace; a host dies and
the run is resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.store import CREDENTIALS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and iproute2",
    ),
]
ROOT = Path(__file__).parents[2]
ADDRESSES = {"first": "10.213.7.1", "second": "10.213.7.2", "store": "10.213.7.3"}
URI = (
    "s3://bucket/prepared?scheme=http&region=us-east-1"
    f"&endpoint_override={ADDRESSES['store']}:9000&allow_bucket_creation=true"
)
SECONDS = 240

_WRITE = """
import sys
sys.path.insert(0, {root!r})
import pyarrow.fs
from esmm_torchrec.data import split_writer
from tests.prepared_data import write_data_set
pyarrow.fs.FileSystem.from_uri({uri!r})[0].create_dir("bucket")
split_writer.ROWS_PER_GROUP = {{"impressions": 500, "shared": 9}}
write_data_set({uri!r}, train=8000, test=500, users=200)
"""


class Program(NamedTuple):
    """Program that runs on a host."""

    process: subprocess.Popen[bytes]
    said: Path

    def finished(self) -> str:
        """Waits for the program to succeed; returns its output."""
        self.process.wait(SECONDS)
        assert self.process.returncode == 0, self.said.read_text()
        return self.said.read_text()


class Hosts:
    """Network namespaces joined by a bridge, which is in the store's namespace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tag = uuid.uuid4().hex[:6]
        self._started: list[subprocess.Popen[bytes]] = []
        for host in ADDRESSES:
            self._ip("netns", "add", self._name(host))
            self._ip("-n", self._name(host), "link", "set", "lo", "up")
        store = self._name("store")
        self._ip("-n", store, "link", "add", "hosts", "type", "bridge")
        self._ip("-n", store, "addr", "add", f"{ADDRESSES['store']}/24", "dev", "hosts")
        self._ip("-n", store, "link", "set", "hosts", "up")
        for host in ("first", "second"):
            name = self._name(host)
            cable = ("link", "add", "eth0", "type", "veth", "peer", host, "netns", store)
            self._ip("-n", name, *cable)
            self._ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._ip("-n", store, "link", "set", host, "master", "hosts", "up")

    def _name(self, host: str) -> str:
        return f"esmm-{self._tag}-{host}"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def start(self, host: str, *arguments: str) -> Program:
        """Starts Python on a host."""
        said = self._folder / f"{len(self._started)}-{host}.log"
        with said.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._name(host), sys.executable, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ
                | CREDENTIALS
                | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
            )
        self._started.append(process)
        return Program(process, said)

    def kill(self, host: str) -> None:
        """Kills all programs on a host at once."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._name(host)], capture_output=True, text=True, check=True
        )
        for process in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def remove(self) -> None:
        """Kills all programs and removes the namespaces."""
        for host in ADDRESSES:
            self.kill(host)
        for process in self._started:
            process.wait()
        for host in ADDRESSES:
            self._ip("netns", "del", self._name(host))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    try:
        hosts = Hosts(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here ({error})")
    try:
        yield hosts
    finally:
        hosts.remove()


def _training(hosts: Hosts, out: Path) -> dict[str, Program]:
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    rendezvous += ["--rdzv-endpoint", f"{ADDRESSES['first']}:29400", "--rdzv-id", out.name]
    train = ["-m", "esmm_torchrec", "train", "--data", URI, "--out", str(out), "--device", "cpu"]
    train += ["--batch-size", "32", "--lanes", "2", "--window", "500", "--epochs", "1"]
    train += ["--embedding-dim", "8", "--tower", "16", "8", "--sharding", "table_wise"]
    train += ["--checkpoint-every", "20"]
    return {
        host: hosts.start(
            host,
            *("-m", "torch.distributed.run", *rendezvous, "--local-addr", ADDRESSES[host]),
            # The name of this machine is that of neither host.
            *("--rdzv-conf", f"is_host={str(host == 'first').lower()}"),
            *train,
        )
        for host in ("first", "second")
    }


def test_a_run_of_two_hosts_is_resumed_after_one_has_died(hosts: Hosts, tmp_path: Path) -> None:
    hosts.start("store", "-m", "moto.server", "-H", ADDRESSES["store"], "-p", "9000")
    hosts.start("first", "-c", _WRITE.format(root=str(ROOT), uri=URI)).finished()

    whole = tmp_path / "whole"
    for program in _training(hosts, whole).values():
        program.finished()

    broken = tmp_path / "broken"
    first = _training(hosts, broken)["first"]
    until = time.monotonic() + SECONDS
    while not any((broken / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < until
        assert first.process.poll() is None, first.said.read_text()
        time.sleep(0.02)
    hosts.kill("second")
    assert first.process.wait(SECONDS) != 0  # it notices, and ends
    assert not (broken / "metrics.json").exists()

    said = [program.finished() for program in _training(hosts, broken).values()]
    assert any("resuming from step" in text for text in said)
    histories = [(run / "history.jsonl").read_text().splitlines() for run in (broken, whole)]
    last, expected = (json.loads(history[-1]) for history in histories)
    assert last["step"] == expected["step"]
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    figures = [json.loads((run / "metrics.json").read_text())["test"] for run in (broken, whole)]
    assert [of_run.pop("reasons") for of_run in figures] == [{}, {}]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert json.loads((broken / "plan.json").read_text())["local_world_size"] == 1
