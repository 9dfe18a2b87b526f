"""Serves an exported model over HTTP.

    POST /score      impressions in, scores out: JSON or an Arrow stream
    GET  /model      description of the model
    GET  /healthz    200 while the server runs
    GET  /metrics    metrics for Prometheus

A new model is loaded while the current one serves; each request is scored entirely by one of them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from esmm_torchrec.data.storage import Location
from esmm_torchrec.errors import DataError, EsmmTorchrecError
from esmm_torchrec.serving.batching import Batcher, Overloaded
from esmm_torchrec.serving.inputs import TooManyRows
from esmm_torchrec.serving.package import DESCRIPTION, Package
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.serving.request_schema import request_schema, response_schema

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the server."""

    batch_window_seconds: float = 0.001
    """Seconds that a request waits for others to share its batch."""
    max_rows: int = 4096
    """Maximum number of impressions per request and per batch."""
    max_body_bytes: int = 16 << 20
    """Maximum size of the body of a request, in bytes."""
    max_waiting: int = 1024
    """Maximum number of waiting requests; further requests get status 503."""
    watch_seconds: float = 5.0
    """Seconds between checks whether the package has changed; 0: never check."""


class ServedModel:
    """The current model, which can be replaced by another one.

    Args:
        path: the package, or a symbolic link to it.

    Raises:
        RunError: `path` is not a package or cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.predictor = self._load()

    def _load(self) -> Predictor:
        # A link may change its target before all files are read.
        return Predictor(self.path.resolve())

    @property
    def package(self) -> Package:
        """Package of the current model."""
        assert self.predictor.package is not None
        return self.predictor.package

    def reload(self) -> bool:
        """Loads the model now at `path` if it is a different one; returns whether it is.

        Raises:
            EsmmTorchrecError: it cannot be loaded; the current model continues to serve.
        """
        try:
            found = Location.of(self.path / DESCRIPTION).sha256()
        except OSError:  # being replaced
            return False
        if found == self.package.fingerprint:
            return False
        self.predictor = self._load()
        keep_out_of_collections()
        return True


def keep_out_of_collections() -> None:
    """Collects unused objects, then excludes all loaded ones from full collections, which would
    otherwise stall requests."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class _ScoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[dict[str, Any]] | None = None
    columns: dict[str, Any] | None = None


class _Metrics:
    """Metrics for /metrics."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "esmm_requests", "Requests to /score", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "esmm_request_seconds",
            "From a request to its answer",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self.registry,
        )
        self.rows = Counter("esmm_impressions", "Impressions scored", registry=self.registry)
        self.batch_rows = Histogram(
            "esmm_batch_impressions",
            "Impressions scored together",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
            registry=self.registry,
        )
        self.reloads = Counter("esmm_reloads", "Models loaded", ["outcome"], registry=self.registry)
        Gauge("esmm_requests_waiting", "Requests that wait", registry=self.registry).set_function(
            waiting
        )

    def observe(self, rows: int) -> None:
        """Counts the impressions of a batch."""
        self.rows.inc(rows)
        self.batch_rows.observe(rows)


def create_app(model: ServedModel, options: ServerOptions) -> FastAPI:
    """Creates the application with the endpoints of this module."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher = Batcher(
            lambda: model.predictor,
            window_seconds=options.batch_window_seconds,
            max_rows=options.max_rows,
            max_waiting=options.max_waiting,
            observe=metrics.observe,
        )
        app.state.batcher = batcher
        asked = asyncio.Event()
        watching = asyncio.create_task(_watch(model, metrics, asked, options.watch_seconds))
        loop = asyncio.get_running_loop()
        with suppress(RuntimeError, ValueError):  # not in the main thread
            loop.add_signal_handler(signal.SIGHUP, asked.set)
        async with batcher:
            yield
        watching.cancel()
        with suppress(RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGHUP)

    app = FastAPI(title="esmm_torchrec", lifespan=lifespan)
    metrics = _Metrics(lambda: app.state.batcher.waiting)

    @app.post("/score", summary="Score impressions", responses=_RESPONSES)
    async def score(request: Request) -> Response:
        start = time.perf_counter()
        response = await _scored(request)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.seconds.observe(time.perf_counter() - start)
        return response

    async def _scored(request: Request) -> Response:
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind not in (JSON, ARROW):
            return _error(415, f"content type {kind!r} is neither {JSON} nor {ARROW}")
        body = await _body(request, options.max_body_bytes)
        if body is None:
            return _error(413, f"the body has more than {options.max_body_bytes} bytes; divide it")
        try:
            given = _from_json(body) if kind == JSON else _from_arrow(body)
        except ValueError as error:
            return _error(400, str(error))
        try:
            answer = await app.state.batcher.score(given)
        except TooManyRows as error:
            return _error(413, str(error))
        except DataError as error:
            return _error(422, str(error))
        except Overloaded as error:
            return _error(503, str(error), {"retry-after": "1"})
        headers = {"x-model": answer.model}
        if kind == ARROW:
            return Response(_to_arrow(answer.scores), media_type=ARROW, headers=headers)
        scores = {name: one.tolist() for name, one in answer.scores.items()}
        content = msgspec.json.encode({"scores": scores, "model": answer.model})
        return Response(content, media_type=JSON, headers=headers)

    @app.get("/healthz", summary="200 while it serves")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": model.package.fingerprint}

    @app.get("/model", summary="What is served")
    async def served() -> dict[str, Any]:
        package = model.package
        return {
            "model": package.fingerprint,
            "method": package.method,
            "step": package.step,
            "form": package.form,
            "columns": list(model.predictor.encoder.raw_columns),
            "scores": list(package.signature.outputs),
        }

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def openapi() -> dict[str, Any]:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        operation = described["paths"]["/score"]["post"]
        operation["requestBody"] = {
            "required": True,
            "content": {
                JSON: {"schema": request_schema(model.predictor.encoder)},
                ARROW: {"schema": {"type": "string", "format": "binary"}},
            },
        }
        operation["responses"]["200"]["content"] = {
            JSON: {"schema": response_schema(model.package.signature.outputs)},
            ARROW: {"schema": {"type": "string", "format": "binary"}},
        }
        return described

    app.openapi = openapi  # pyright: ignore[reportAttributeAccessIssue]
    return app


async def _watch(
    model: ServedModel, metrics: _Metrics, asked: asyncio.Event, seconds: float
) -> None:
    """Reloads the model in another thread, every `seconds` seconds and when `asked` is set."""
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), seconds if seconds > 0 else None)
        asked.clear()
        try:
            is_other = await asyncio.to_thread(model.reload)
        except Exception as error:  # after any error, the next attempt may succeed
            expected = isinstance(error, (EsmmTorchrecError, OSError))
            metrics.reloads.labels("failed").inc()
            log.error("the current model continues to serve: %s", error, exc_info=not expected)
            continue
        if is_other:
            metrics.reloads.labels("loaded").inc()
            log.info("serving model %s", model.package.fingerprint)


_ERROR = {
    "content": {
        JSON: {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {"error": {"type": "string"}},
            }
        }
    }
}

_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, **_ERROR}
    for status, meaning in {
        400: "the body is not JSON or Arrow of this form",
        413: "the body or the number of impressions is too large",
        415: "another content type",
        422: "a feature is unknown or a value cannot be used",
        503: "too many requests wait",
    }.items()
}


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    content = msgspec.json.encode({"error": sentence})
    return Response(content, status_code=status, media_type=JSON, headers=headers)


async def _body(request: Request, limit: int) -> bytes | None:
    """Reads the body of a request; None if it is longer than `limit` bytes."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        return None
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def _from_json(body: bytes) -> Any:
    try:
        given = msgspec.json.decode(body, type=_ScoreRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the body is not of the form that /openapi.json gives: {error}") from None
    if (given.rows is None) == (given.columns is None):
        raise ValueError('give either "rows" or "columns"')
    return given.rows if given.columns is None else given.columns


def _from_arrow(body: bytes) -> Any:
    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the body is not an Arrow stream: {reason}") from None
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError("the table has two columns of one name")
    return dict(zip(table.column_names, table.columns, strict=True))


def _to_arrow(scores: Mapping[str, Any]) -> bytes:
    table = pa.table(dict(scores))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
