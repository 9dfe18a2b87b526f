"""Load on `esmm-torchrec serve` over loopback, with and without exchange of the model.

    python benchmarks/serve_load.py PACKAGE [--seconds 20] [--clients 32] [--reloads 20]

Clients send requests of `--rows` impressions each one after the other over connections that stay
open, from one process beside the server. While they do, a link is pointed to a copy of the package
and back, `--reloads` times; every request must be answered 200.
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
from typing import Annotated, Any

import httpx
import numpy as np
import tyro
from alternate import publish


@dataclass(frozen=True)
class Options:
    """Put a load on a server."""

    package: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="PACKAGE")]]
    """An exported model."""
    seconds: float = 20.0
    """How long requests are sent for the figures."""
    clients: int = 32
    """Connections."""
    rows: int = 1
    """Impressions per request."""
    reloads: int = 20
    """Times that the model is exchanged under load, afterwards."""
    out: Path | None = None
    """JSON file for the figures."""


async def ask(
    client: httpx.AsyncClient, body: bytes, until: asyncio.Event, seen: list[tuple[float, int, str]]
) -> None:
    """Sends requests one after the other."""
    headers = {"content-type": "application/json"}
    while not until.is_set():
        start = time.perf_counter()
        try:
            answer = await client.post("/score", content=body, headers=headers)
            status, model = answer.status_code, answer.headers.get("x-model", "")
        except httpx.HTTPError:
            status, model = 0, ""
        seen.append((time.perf_counter() - start, status, model))


async def load(options: Options, url: str, body: bytes, link: Path, targets: list[Path]) -> Any:
    """Both parts."""
    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        until, seen = asyncio.Event(), []
        clients = [
            asyncio.create_task(ask(client, body, until, seen)) for _ in range(options.clients)
        ]
        await asyncio.sleep(2)  # to warm up
        seen.clear()
        start = time.perf_counter()
        await asyncio.sleep(options.seconds)
        measured, elapsed = list(seen), time.perf_counter() - start
        seen.clear()
        for number in range(options.reloads):
            new = link.with_name("new")
            new.symlink_to(targets[(number + 1) % 2])
            new.replace(link)
            before = seen[-1][2] if seen else ""
            while not seen or seen[-1][2] in ("", before):
                await asyncio.sleep(0.05)
        until.set()
        await asyncio.gather(*clients)
    seconds = np.array([one[0] for one in measured])
    return {
        "requests_per_second": len(measured) / elapsed,
        "p50_ms": float(np.quantile(seconds, 0.5) * 1e3),
        "p99_ms": float(np.quantile(seconds, 0.99) * 1e3),
        "statuses": dict(Counter(str(one[1]) for one in measured)),
        "reloads": options.reloads,
        "requests_during_reloads": len(seen),
        "lost_during_reloads": sum(one[1] != 200 for one in seen),
    }


def main(options: Options) -> None:
    """Starts the server, measures, prints and writes."""
    request = json.loads((options.package / "example.json").read_text())["request"]
    row = {name: values[0] for name, values in request.items()}
    body = json.dumps({"rows": [row] * options.rows}).encode()
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
            (url,) = re.findall(r"http://\S+", server.stdout.readline())
            targets = [options.package.resolve(), other]
            figures = asyncio.run(load(options, url, body, link, targets))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)
    print(json.dumps(figures, indent=2))
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
