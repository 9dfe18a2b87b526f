"""A run with every kind of feature, its package, and rows to score."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import uvicorn

from esmm_torchrec.cli.main import main
from esmm_torchrec.serving.server import ServedModel, ServerOptions, create_app

ROWS = 120
COLUMNS = ["user", "shop", "tags", "history", "history_weight", "age", "price"]
SCORES = ["pctr", "pcvr", "pctcvr"]


def impressions(rows: int, seed: int) -> pd.DataFrame:
    """Ids as integers, text and lists; weights; dense values with gaps and a heavy tail."""
    random = np.random.default_rng(seed)
    user, shop = random.integers(0, 40, rows), random.choice(["Oslo", "Rome", "Bonn"], rows)
    click = random.random(rows) < 0.2 + 0.5 * (user % 3 == 0)
    lengths = random.integers(0, 4, rows)
    return pd.DataFrame(
        {
            "user": user,
            "shop": np.where(random.random(rows) < 0.1, None, shop),
            "tags": [random.integers(0, 9, size).tolist() for size in lengths],
            "history": [random.integers(0, 20, size).tolist() for size in lengths[::-1]],
            "history_weight": [(0.1 + random.random(size)).tolist() for size in lengths[::-1]],
            "age": np.where(random.random(rows) < 0.1, np.nan, random.normal(40, 9, rows)),
            "price": random.lognormal(2, 2, rows),
            "click": click.astype(int),
            "buy": (click & (random.random(rows) < 0.2 + 0.6 * (shop == "Rome"))).astype(int),
            "impression": 1000 + 7 * np.arange(rows),
        }
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its package, raw rows, and their scores from `score`."""
    folder = tmp_path_factory.mktemp("roads")
    impressions(400, 0).to_parquet(folder / "train.parquet")
    impressions(ROWS, 1).to_parquet(folder / "test.parquet")
    data, run = str(folder / "data"), str(folder / "run")
    halves = ["--train", str(folder / "train.parquet"), "--test", str(folder / "test.parquet")]
    labels = ["--click", "click", "--conversion", "buy", "--sample-id", "impression"]
    ids = ["--id", "user", "shop", "tags", "history", "--weights", "history:history_weight"]
    dense = ["--dense", "age", "price:log", "--min-count", "2"]
    main(["prepare", "table", data, *halves, *labels, *ids, *dense])
    shape = ["--embedding-dim", "8", "--tower", "16", "--batch-size", "64", "--sparse-lr", "0.5"]
    main(["train", "--data", data, "--out", run, *shape])
    main(["score", run, "--data", data, "--out", str(folder / "scores.parquet")])
    main(["export", run, str(folder / "package")])
    return folder


@pytest.fixture(scope="session")
def expected(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "scores.parquet")


@pytest.fixture(scope="session")
def columns(folder: Path) -> dict[str, list[Any]]:
    """The test rows as a request."""
    table = pq.read_table(folder / "test.parquet", columns=COLUMNS)
    return table.to_pydict()


@pytest.fixture(scope="session")
def compiled(folder: Path) -> Path:
    """A compiled package of the run, with a model repository for Triton."""
    main(["export", str(folder / "run"), str(folder / "compiled"), "--format", "triton"])
    return folder / "compiled"


@contextmanager
def serve(package: Path, options: ServerOptions) -> Iterator[httpx.Client]:
    """Yields a client of a server that runs in a thread of this process."""
    config = uvicorn.Config(create_app(ServedModel(package), options), log_level="error")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()
