"""`esmm-torchrec serve`: serves an exported model over HTTP."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from esmm_torchrec.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve an exported model over HTTP, until SIGTERM or Ctrl-C.

    POST /score takes {"rows": [{...}]}, {"columns": {...}} or an Arrow stream of raw values, and
    /docs describes it. A new model at the same path is loaded automatically, or at once on SIGHUP.
    One process uses few cores; start several behind a load balancer to use more.
    """

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]]
    """Package that 'export' wrote, or a symbolic link to it."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all addresses of this machine."""
    port: int = 8000
    """Port to listen on; 0: any free port."""
    threads: int = 1
    """Number of threads for matrix products; other loops of a compiled program use one thread."""
    batch_window_ms: float = 1.0
    """Milliseconds that a request waits for others to share its batch."""
    max_rows: int = 4096
    """Maximum number of impressions per request and per batch."""
    max_body_mb: float = 16.0
    """Maximum size of the body of a request, in megabytes."""
    max_waiting: int = 1024
    """Maximum number of waiting requests; further requests get status 503."""
    watch_seconds: float = 5.0
    """Seconds between checks whether MODEL has changed; 0: never check."""
    graceful_seconds: int = 30
    """Seconds that requests in progress may take to finish when the server stops."""

    def __post_init__(self) -> None:
        for name in ("threads", "max_rows", "max_body_mb", "max_waiting"):
            if getattr(self, name) <= 0:
                raise OptionError(f"`{name}` must be positive")
        if not 0 <= self.port < 1 << 16:
            raise OptionError(f"`port` {self.port} is not from 0 to 65535")


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket.

    Raises:
        OptionError: the address does not exist or is in use.
    """
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OptionError(
            f"cannot listen on `host` {host}, `port` {port} ({reason}); choose others"
        ) from None


def run(options: Options) -> None:
    """Serves until a signal arrives, then prints that the server has stopped."""
    try:
        import uvicorn  # noqa: PLC0415

        from esmm_torchrec.serving.server import (  # noqa: PLC0415
            ServedModel,
            ServerOptions,
            create_app,
            keep_out_of_collections,
        )
    except ModuleNotFoundError as error:
        raise OptionError(
            f"the command serve needs {error.name}, which is not installed; "
            "pip install 'esmm_torchrec[serve]'"
        ) from None
    import torch  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    model = ServedModel(options.model)
    app = create_app(
        model,
        ServerOptions(
            batch_window_seconds=options.batch_window_ms / 1000,
            max_rows=options.max_rows,
            max_body_bytes=int(options.max_body_mb * 1e6),
            max_waiting=options.max_waiting,
            watch_seconds=options.watch_seconds,
        ),
    )
    keep_out_of_collections()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=options.graceful_seconds,
    )
    with listen(options.host, options.port) as listening:
        host, port = listening.getsockname()[:2]
        print(f"serving {options.model} at http://{host}:{port} (/docs, /metrics)", flush=True)
        # A signal is the normal end; uvicorn raises it again once all requests are answered.
        with suppress(KeyboardInterrupt, SystemExit):
            uvicorn.Server(config).run(sockets=[listening])
    print("stopped")
