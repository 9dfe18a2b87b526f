"""An exported model over HTTP: in this process, and in a separate process that is stopped or gets
other models while it answers."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from esmm_torchrec.serving.batching import _size
from esmm_torchrec.serving.predictor import Predictor
from esmm_torchrec.serving.server import ARROW, ServedModel, ServerOptions
from tests.unit.serving.conftest import COLUMNS, ROWS, SCORES, serve


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    options = ServerOptions(max_rows=200, max_body_bytes=100_000, watch_seconds=0)
    with serve(folder / "package", options) as client:
        yield client


def _assert_same(scores: Any, expected: pd.DataFrame) -> None:
    for name in SCORES:
        np.testing.assert_allclose(np.asarray(scores[name]), expected[name], rtol=0, atol=2e-7)


def test_http_scores_as_score_does(
    client: httpx.Client, columns: dict[str, list[Any]], expected: pd.DataFrame
) -> None:
    ages = [None if age is None or np.isnan(age) else age for age in columns["age"]]
    columns = columns | {"age": ages}
    answer = client.post("/score", json={"columns": columns})
    assert answer.status_code == 200
    _assert_same(answer.json()["scores"], expected)
    assert answer.json()["model"] == answer.headers["x-model"]
    rows = [{name: columns[name][row] for name in COLUMNS} for row in range(ROWS)]
    _assert_same(client.post("/score", json={"rows": rows}).json()["scores"], expected)

    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body, kind = sink.getvalue().to_pybytes(), {"content-type": ARROW}
    answer = client.post("/score", content=body, headers=kind)
    assert answer.headers["content-type"] == ARROW
    _assert_same(pa.ipc.open_stream(answer.content).read_pandas(), expected)


@pytest.mark.parametrize(
    ("status", "sentence", "sent"),
    [
        (400, "the body is not of the form that /openapi.json gives", {"content": b"{"}),
        (400, "Object contains unknown field `row`", {"json": {"row": []}}),
        (400, 'give either "rows" or "columns"', {"json": {}}),
        (
            400,
            "the body is not an Arrow stream",
            {"content": b"x", "headers": {"content-type": ARROW}},
        ),
        (413, "the body has more than 100000 bytes", {"content": b" " * 100_001}),
        (413, "the request has 201 impressions", {"json": {"columns": {"user": [1] * 201}}}),
        (415, "content type 'text/plain' is neither", {"headers": {"content-type": "text/plain"}}),
        (422, "there is no feature 'usr'; did you mean 'user'?", {"json": {"rows": [{"usr": 1}]}}),
        (
            422,
            "row 1, column 'user': 'x' is not",
            {"json": {"rows": [{"user": "1"}, {"user": "x"}]}},
        ),
    ],
)
def test_what_cannot_be_scored_is_told(
    client: httpx.Client, status: int, sentence: str, sent: dict[str, Any]
) -> None:
    answer = client.post("/score", **sent)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]


def test_health_model_and_metrics(client: httpx.Client, folder: Path) -> None:
    served = client.get("/model").json()
    assert client.get("/healthz").json() == {"status": "ok", "model": served["model"]}
    assert (served["columns"], served["scores"]) == (COLUMNS, SCORES)
    client.post("/score", json={"rows": [{"user": 1}, {"user": 2}]})
    shown = client.get("/metrics").text
    answered = re.search(r'esmm_requests_total\{status="200"\} (\d+)', shown)
    assert answered is not None
    assert int(answered[1]) >= 1
    assert "esmm_requests_waiting 0.0" in shown
    assert json.loads((folder / "package" / "package.json").read_text())["step"] == served["step"]


def test_a_queue_that_is_full_is_told(folder: Path) -> None:
    options = ServerOptions(max_waiting=0, watch_seconds=0)
    with serve(folder / "package", options) as client:
        answer = client.post("/score", json={"rows": [{}]})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_requests_of_one_batch_have_their_own_answers(folder: Path) -> None:
    """All requests come in one window, with and without an invalid one."""
    package = folder / "package"
    predictor = Predictor(package)
    good: list[list[dict[str, Any]]] = [
        [{"user": 1}, {"user": 2, "tags": [1, 2]}],
        [{}, {}],
        [],
        [{"shop": "Rome"}],
    ]
    options = ServerOptions(batch_window_seconds=0.4, watch_seconds=0)
    with serve(package, options) as client, ThreadPoolExecutor(5) as threads:

        def post(rows: list[dict[str, Any]]) -> httpx.Response:
            return client.post("/score", json={"rows": rows})

        for wrong in ([], [[{"user": "x"}]]):
            answers = list(threads.map(post, [*good, *wrong]))
            assert [one.status_code for one in answers] == [200] * 4 + [422] * len(wrong)
            for rows, answer in zip(good, answers, strict=False):
                scores = answer.json()["scores"]
                for name, expected in predictor.predict(rows).items():
                    np.testing.assert_allclose(scores[name], expected, rtol=0, atol=2e-7)
        shown = client.get("/metrics").text
    assert "esmm_batch_impressions_count 2.0" in shown
    assert "esmm_impressions_total 10.0" in shown


def test_batches_have_at_most_the_rows_of_a_request(folder: Path) -> None:
    """Requests of 2 impressions each come in one window, and a batch has at most 3 impressions."""
    package = folder / "package"
    rows = [{"user": 1, "tags": 3}, {"user": 2, "tags": 5}]
    options = ServerOptions(batch_window_seconds=0.4, max_rows=3, watch_seconds=0)
    with serve(package, options) as client, ThreadPoolExecutor(5) as threads:

        def post(request: list[dict[str, Any]]) -> Any:
            return client.post("/score", json={"rows": request}).json()["scores"]["pctr"]

        expected = Predictor(package).predict(rows)["pctr"]
        for answer in threads.map(post, [rows] * 5):
            np.testing.assert_allclose(answer, expected, rtol=0, atol=2e-7)
        shown = client.get("/metrics").text
        assert "esmm_batch_impressions_count 5.0" in shown
        # Requests of one impression share a batch.
        for answer, value in zip(threads.map(post, [[row] for row in rows]), expected, strict=True):
            np.testing.assert_allclose(answer, [value], rtol=0, atol=2e-7)
        assert "esmm_batch_impressions_count 6.0" in client.get("/metrics").text


def test_an_arrow_column_counts_as_its_rows() -> None:
    assert _size({"user": pa.array([1, 2, 3]), "shop": "Rome"}) == 3
    assert _size({"user": pa.chunked_array([[1], [2]])}) == 2
    assert _size([{}, {}]) == 2
    assert _size({"shop": "Rome"}) == 1


def test_a_model_that_cannot_be_loaded_once_is_loaded_later(
    folder: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps checking for a new model after any error."""
    link = tmp_path / "current"
    link.symlink_to(folder / "package")
    with serve(link, ServerOptions(watch_seconds=0.05)) as client:
        before = client.get("/model").json()["model"]
        tries = []
        load = ServedModel._load

        def fail_once(model: ServedModel) -> Predictor:
            tries.append(model)
            if len(tries) == 1:
                raise MemoryError("no room")
            return load(model)

        monkeypatch.setattr(ServedModel, "_load", fail_once)
        link.unlink()
        link.symlink_to(compiled)
        deadline = time.monotonic() + 60
        while client.get("/model").json()["model"] == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(tries) >= 2
        assert 'esmm_reloads_total{outcome="failed"} 1.0' in client.get("/metrics").text


def test_requests_made_from_the_schema_have_the_answers_it_says(client: httpx.Client) -> None:
    described = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/score", "/healthz", "/model"}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25 if operation.path == "/score" else 1,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def one(case: schemathesis.Case) -> None:
            case.call_and_validate(
                checks=[
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ]
            )

        one()


def _another(package: Path, out: Path, note: int) -> Path:
    """Copies a model to a package with another fingerprint."""
    shutil.copytree(package, out)
    described = json.loads((out / "package.json").read_text())
    (out / "package.json").write_text(json.dumps(described | {"note": note}))
    return out


def _link(link: Path, target: Path) -> None:
    new = link.with_name("new-link")
    new.symlink_to(target)
    new.replace(link)


def test_no_request_is_lost_while_models_are_exchanged_or_the_server_stops(
    folder: Path, tmp_path: Path
) -> None:
    packages = [_another(folder / "package", tmp_path / f"{n}", n) for n in range(3)]
    _link(tmp_path / "model", packages[0])
    command = [sys.executable, "-m", "esmm_torchrec", "serve", str(tmp_path / "model")]
    server = subprocess.Popen(
        [*command, "--port", "0", "--watch-seconds", "0.2", "--batch-window-ms", "200"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        (url,) = re.findall(r"http://\S+", server.stdout.readline())
        statuses: list[int] = []
        models: set[str] = set()
        done = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=url, timeout=60) as client:
                while not done.is_set():
                    answer = client.post("/score", json={"rows": [{"user": 3}]})
                    statuses.append(answer.status_code)
                    models.add(answer.headers.get("x-model", ""))

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        # The last one is not a package.
        for number, package in enumerate([*packages[1:], tmp_path]):
            _link(tmp_path / "model", package)
            if number == 1:
                server.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 60
            while len(models) < min(number + 2, 3) and time.monotonic() < deadline:
                time.sleep(0.05)
        done.set()
        for asker in askers:
            asker.join()
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(4) as threads:
            post = partial(client.post, "/score", json={"rows": [{"user": 3}]})
            all_wait = False
            while not all_wait:
                last = [threads.submit(post) for _ in range(4)]
                while not (all_wait or all(one.done() for one in last)):
                    all_wait = "esmm_requests_waiting 4.0" in client.get("/metrics").text
                if all_wait:
                    server.send_signal(signal.SIGTERM)
                statuses += [one.result().status_code for one in last]
        said, _ = server.communicate(timeout=150)
    finally:
        server.kill()
    assert set(statuses) == {200}
    assert len(models) == 3
    assert said == "stopped\n"
    assert server.returncode == 0
