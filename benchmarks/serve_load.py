"""Load on `esmm-torchrec serve` over loopback, with and without reloads of the model.

    python benchmarks/serve_load.py PACKAGE [--seconds 20] [--clients 32] [--reloads 20]

Clients in one process send requests of `--rows` impressions one after the other over persistent
connections; that process and the server need a core each. Under this load, a link is switched to a
copy of the package and back, `--reloads` times; every response must have status 200.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from alternate import publish


@dataclass(frozen=True)
class Options:
    """Put a load on a server."""

    package: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="PACKAGE")]]
    """An exported model."""
    seconds: float = 20.0
    """Duration of the measurement."""
    clients: int = 32
    """Number of connections."""
    rows: int = 1
    """Impressions per request."""
    reloads: int = 20
    """Number of reloads of the model under load, after the measurement."""
    out: Path | None = None
    """JSON file for the figures."""


class Seen(NamedTuple):
    """A request and its response."""

    seconds: float
    status: int
    """HTTP status; 0 if the connection was lost."""
    model: str


async def ask(
    address: tuple[str, int], request: bytes, until: asyncio.Event, seen: list[Seen]
) -> None:
    """Sends requests one after the other over one connection, with minimal code, since the client
    has only the other core of the machine."""
    reader, writer = await asyncio.open_connection(*address)
    while not until.is_set():
        start, status, model = time.perf_counter(), 0, ""
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            await reader.readexactly(int(headers[b"content-length"]))
            status, model = int(head.split(b" ", 2)[1]), headers.get(b"x-model", b"").decode()
        except (OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(*address)
        seen.append(Seen(time.perf_counter() - start, status, model))
    writer.close()


async def load(
    options: Options, address: tuple[str, int], request: bytes, link: Path, targets: list[Path]
) -> dict[str, Any]:
    """Measures the figures, and then the reloads."""
    until, seen = asyncio.Event(), []
    clients = [
        asyncio.create_task(ask(address, request, until, seen)) for _ in range(options.clients)
    ]
    await asyncio.sleep(2)  # warm-up
    seen.clear()
    start = time.perf_counter()
    await asyncio.sleep(options.seconds)
    measured, elapsed = list(seen), time.perf_counter() - start
    seen.clear()
    reloads, model = [], measured[-1].model
    for number in range(options.reloads):
        new = link.with_name("new")
        new.symlink_to(targets[(number + 1) % 2])
        new.replace(link)
        start = time.perf_counter()
        while not seen or seen[-1].model in ("", model):
            await asyncio.sleep(0.01)
        model = seen[-1].model
        reloads.append(time.perf_counter() - start)
    until.set()
    await asyncio.gather(*clients)
    seconds = np.array([one.seconds for one in measured])
    return {
        "requests_per_second": len(measured) / elapsed,
        "p50_ms": float(np.quantile(seconds, 0.5) * 1e3),
        "p99_ms": float(np.quantile(seconds, 0.99) * 1e3),
        "statuses": dict(Counter(str(one.status) for one in measured)),
        "reloads": options.reloads,
        "median_seconds_to_a_reload": float(np.median(reloads)) if reloads else None,
        "requests_during_reloads": len(seen),
        "lost_during_reloads": sum(one.status != 200 for one in seen),
        "p99_ms_during_reloads": float(np.quantile([o.seconds for o in seen] or [0], 0.99) * 1e3),
    }


def main(options: Options) -> None:
    """Starts the server, measures, prints and writes the figures."""
    example = json.loads((options.package / "example.json").read_text())["request"]
    row = {name: values[0] for name, values in example.items()}
    body = json.dumps({"rows": [row] * options.rows}).encode()
    head = "POST /score HTTP/1.1\r\nhost: loopback\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with tempfile.TemporaryDirectory() as temporary:
        other, link = Path(temporary, "other"), Path(temporary, "model")
        shutil.copytree(options.package, other)
        described = json.loads((other / "package.json").read_text())
        (other / "package.json").write_text(json.dumps(described | {"note": "a copy"}))
        link.symlink_to(options.package.resolve())
        command = [sys.executable, "-m", "esmm_torchrec", "serve", str(link), "--port", "0"]
        server = subprocess.Popen(
            [*command, "--watch-seconds", "0.5"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            ((host, port),) = re.findall(r"http://([\d.]+):(\d+)", server.stdout.readline())
            targets = [options.package.resolve(), other]
            figures = asyncio.run(load(options, (host, int(port)), request, link, targets))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
    print(json.dumps(figures, indent=2))
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
