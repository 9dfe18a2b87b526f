"""An S3 server on the loopback interface, for tests of what is kept in object stores."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.fs as pafs

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Store:
    """A server that can fail on request, and what it was asked."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, range) of each request."""
        self.failures: dict[str, int] = {}
        """Method → how many of its next requests are answered with 503."""
        self.address = ""

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.requests.append((method, environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        if self.failures.get(method, 0) > 0:
            self.failures[method] -= 1
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"]
        return self._application(environ, start)

    def uri(self, path: str) -> str:
        """The URI of a path, "bucket/folder"."""
        query = f"scheme=http&endpoint_override={self.address}&region=us-east-1"
        return f"s3://{path}?{query}&allow_bucket_creation=true"

    def filesystem(self) -> pafs.FileSystem:
        """The file system of the server."""
        return pafs.FileSystem.from_uri(self.uri("bucket"))[0]


@contextmanager
def serve() -> Iterator[Store]:
    """A server with an empty bucket, `bucket`; requests need CREDENTIALS in the environment."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - takes a second

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        store = Store(server._server.app)
        server._server.app = store
        host, port = server.get_host_and_port()
        store.address = f"{host}:{port}"
        os.environ |= CREDENTIALS
        store.filesystem().create_dir("bucket")
        yield store
    finally:
        server.stop()
