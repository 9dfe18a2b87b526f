"""Trains the ESMM of another library; run by `other_libraries.py` in that library's environment.

    python other_libraries_worker.py torch-rechub|deepctr-torch FOLDER BATCH_SIZE

FOLDER contains impressions.npz, one array per column, and tables.json, the rows of each feature's
table. The library is used as its own documentation uses it: its data loader, its trainer, Adam.
Each input line is a number of steps to train; the reply is a line with the loss.
"""

# ruff: noqa: PLC0415 - only the library under test is imported
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EMBEDDING_DIM = 16
TOWER = (360, 200, 80)


def torch_rechub(tables: dict[str, int], batch_size: int) -> Callable[..., object]:
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.multi_task import ESMM
    from torch_rechub.trainers import MTLTrainer
    from torch_rechub.utils.data import DataGenerator

    features = [SparseFeature(name, rows, EMBEDDING_DIM) for name, rows in tables.items()]
    half = len(features) // 2
    towers: list[dict[str, Any]] = [{"dims": list(TOWER), "activation": "relu"} for _ in range(2)]
    model = ESMM(features[:half], features[half:], *towers)
    trainer = MTLTrainer(model, ["classification"] * 3)

    def train(ids: dict[str, np.ndarray], click: np.ndarray, conversion: np.ndarray) -> object:
        # The library's labels: conversion tower, click tower, both; the first has no loss.
        labels = np.stack([conversion, click, conversion], axis=1)
        loader, *_ = DataGenerator(ids, labels).generate_dataloader(
            x_val=ids, y_val=labels, x_test=ids, y_test=labels, batch_size=batch_size
        )
        return trainer.train_one_epoch(loader)

    return train


def deepctr_torch(tables: dict[str, int], batch_size: int) -> Callable[..., object]:
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import ESMM

    columns = [SparseFeat(name, rows, embedding_dim=EMBEDDING_DIM) for name, rows in tables.items()]
    model = ESMM(columns, tower_dnn_hidden_units=TOWER)
    model.compile("adam", loss=["binary_crossentropy"] * 2, metrics=[])

    def train(ids: dict[str, np.ndarray], click: np.ndarray, conversion: np.ndarray) -> object:
        labels = np.stack([click, conversion], axis=1)
        return model.fit(ids, labels, batch_size=batch_size, epochs=1, verbose=0).history["loss"]

    return train


LIBRARIES = {"torch-rechub": torch_rechub, "deepctr-torch": deepctr_torch}


def main(library: str, folder: Path, batch_size: int) -> None:
    tables = json.loads((folder / "tables.json").read_text())
    data = dict(np.load(folder / "impressions.npz"))
    click, conversion = data.pop("click"), data.pop("conversion")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for replies only
        train = LIBRARIES[library](tables, batch_size)
    first = 0
    for line in sys.stdin:
        size = int(line) * batch_size
        if first + size > len(click):
            first = 0
        rows = slice(first, first + size)
        first += size
        with contextlib.redirect_stdout(sys.stderr):
            ids = {name: column[rows] for name, column in data.items()}
            loss = train(ids, click[rows], conversion[rows])
        print(loss, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
