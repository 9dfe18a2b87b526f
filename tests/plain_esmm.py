"""ESMM in a few lines of plain PyTorch, against which the library is compared.

It shares nothing with the library but names: it reads the prepared Parquet files with pandas, pools
bag by bag, multiplies the probabilities in float64, and updates tables by the textbook formulas.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from esmm_torchrec.data.prepared import PreparedDataSet


def read_frame(dataset: PreparedDataSet, split: str) -> pd.DataFrame:
    """All impressions of a split with their shared features, indexed by sample_id."""
    impressions = pd.concat(
        [pd.read_parquet(Path(file)) for file in dataset.impression_files(split)],  # pyright: ignore
        ignore_index=True,
    )
    shared = pd.concat(
        [pd.read_parquet(Path(file)) for file in dataset.shared_files(split)],  # pyright: ignore
        ignore_index=True,
    )
    return impressions.join(shared, on="shared_row").set_index("sample_id")


class PlainEsmm:
    """Tables and towers as plain tensors, float64."""

    def __init__(self, dataset: PreparedDataSet, state: dict[str, torch.Tensor]) -> None:
        self.schema = dataset.schema
        self.tables = {
            key.split(".")[-2]: value.double().requires_grad_()
            for key, value in state.items()
            if ".embedding_bags." in key
        }
        self.towers = {
            name: [
                (state[f"{prefix}.weight"].double(), state[f"{prefix}.bias"].double())
                for prefix in self._layers(state, name)
            ]
            for name in ("click", "conversion")
        }
        for layers in self.towers.values():
            for weight, bias in layers:
                weight.requires_grad_()
                bias.requires_grad_()

    @staticmethod
    def _layers(state: dict[str, torch.Tensor], tower: str) -> list[str]:
        names = [key.removesuffix(".weight") for key in state if f"towers.{tower}." in key]
        names = [name for name in names if not name.endswith(".bias")]
        return sorted(names, key=lambda name: ("logit" in name, name))

    def pooled(self, rows: pd.DataFrame) -> torch.Tensor:
        """(rows, F), features in the order in which the library's collections declare them."""
        parts: list[torch.Tensor] = []
        for features in self.schema.collections.values():
            in_order: dict[str, list[str]] = {}
            for feature in features:
                in_order.setdefault(feature.table, []).append(feature.name)
            kinds = {feature.name: feature for feature in features}
            for table, names in in_order.items():
                for name in names:
                    parts.append(self._feature(rows, kinds[name], self.tables[table]))
        dense = rows[list(self.schema.dense_features)].to_numpy(np.float64, copy=True)
        return torch.cat([*parts, torch.from_numpy(dense)], dim=1)

    @staticmethod
    def _feature(rows: pd.DataFrame, feature, table: torch.Tensor) -> torch.Tensor:
        bags = []
        weights = rows[f"{feature.name}__weight"] if feature.weighted else [None] * len(rows)
        for value, weight in zip(rows[feature.name], weights, strict=True):
            if feature.multi_valued:
                ids = torch.tensor(np.array(value, np.int64))
            else:
                ids = torch.tensor([] if pd.isna(value) else [int(value)], dtype=torch.long)
            vectors = table[ids]
            if weight is not None and len(ids):
                scale = torch.tensor(np.atleast_1d(weight).astype(np.float64))
                if feature.multi_valued:
                    scale = scale / scale.abs().sum()
                vectors = vectors * scale[:, None]
            bags.append(vectors.sum(dim=0))
        return torch.stack(bags)

    def probabilities(self, rows: pd.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
        """pCTR and pCVR, float64 (rows,)."""
        features = self.pooled(rows)
        outputs = []
        for layers in self.towers.values():
            hidden = features
            for weight, bias in layers[:-1]:
                hidden = F.relu(hidden @ weight.T + bias)
            weight, bias = layers[-1]
            outputs.append(torch.sigmoid(hidden @ weight.T + bias).squeeze(1))
        return outputs[0], outputs[1]

    def loss(self, rows: pd.DataFrame) -> torch.Tensor:
        """Equation 2 of the paper, as a mean."""
        pctr, pcvr = self.probabilities(rows)
        click = torch.tensor(rows["click"].to_numpy(np.float64))
        both = click * torch.tensor(rows["conversion"].to_numpy(np.float64))
        return F.binary_cross_entropy(pctr, click) + F.binary_cross_entropy(pctr * pcvr, both)


class TableUpdate:
    """Textbook updates of the tables."""

    def __init__(self, optimizer: str, lr: float, eps: float = 1e-8) -> None:
        self.optimizer = optimizer
        self.lr = lr
        self.eps = eps
        self.sums: dict[str, torch.Tensor] = {}

    def step(self, tables: dict[str, torch.Tensor]) -> None:
        """Updates every table by its gradient, which it then forgets."""
        for name, table in tables.items():
            assert table.grad is not None
            grad = table.grad
            with torch.no_grad():
                if self.optimizer == "sgd":
                    table.sub_(self.lr * grad)
                else:
                    square = grad.square()
                    if self.optimizer == "rowwise_adagrad":
                        square = square.mean(dim=1, keepdim=True)
                    self.sums[name] = self.sums.get(name, 0) + square
                    table.sub_(self.lr * grad / (self.sums[name].sqrt() + self.eps))
            table.grad = None
