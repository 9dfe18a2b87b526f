"""Two nodes of one rank, joined by a c10d rendezvous, train like one node of two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esmm_torchrec.sharding.process_group import process_group
from esmm_torchrec.training.options import TrainOptions
from esmm_torchrec.training.run import train
from tests.prepared_data import write_data_set
from tests.ranks import run_on_ranks

OPTIONS = TrainOptions(
    batch_size=32,
    embedding_dim=8,
    tower=(16, 8),
    epochs=1,
    sharding="table_wise",
    device="cpu",
    seed=3,
)
WORDS = ["--batch-size", "32", "--embedding-dim", "8", "--tower", "16", "8"]
WORDS += ["--epochs", "1", "--sharding", "table_wise", "--device", "cpu", "--seed", "3"]
"""Options of both trainings."""

NODE_SECONDS = 150


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _train(data: Path, out: Path) -> dict[str, Any]:
    with process_group("cpu") as ranks:
        return train(data, out, OPTIONS, ranks)


def _on_two_nodes(arguments: list[str]) -> None:
    """Starts torchrun twice, as on two machines, and waits for both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-id", "two-nodes", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"localhost:{_free_port()}", "--local-addr", "localhost"]
    nodes = [
        subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    try:
        for node in nodes:
            printed, _ = node.communicate(timeout=NODE_SECONDS)
            assert node.returncode == 0, printed
    finally:
        for node in nodes:
            # torchrun ends its ranks on SIGTERM.
            node.terminate()
            node.wait()


def _figures(run: Path) -> dict[str, float]:
    figures = json.loads((run / "metrics.json").read_text())["test"]
    assert figures.pop("reasons") == {}
    return figures


def test_two_nodes_train_as_one_node_of_two_ranks(tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "prepared", train=2000, test=500).path
    paths = ["--data", str(data), "--out", str(tmp_path / "two-nodes")]
    _on_two_nodes(["-m", "esmm_torchrec", "train", *paths, *WORDS])
    run_on_ranks(2, _train, data, tmp_path / "one-node")

    two, one = _figures(tmp_path / "two-nodes"), _figures(tmp_path / "one-node")
    assert two["impressions"] == 500
    assert two["ctr_auc"] > 0.55
    assert two == pytest.approx(one, rel=1e-5)
    plans = [
        json.loads((tmp_path / run / "plan.json").read_text()) for run in ("two-nodes", "one-node")
    ]
    assert [(plan["world_size"], plan["local_world_size"]) for plan in plans] == [(2, 1), (2, 2)]
    # Both nodes have tables, so embeddings were exchanged between them.
    ranks = {rank for table in plans[0]["tables"].values() for rank in table["ranks"]}
    assert ranks == {0, 1}
