"""ESMM on generated worlds, against ESMM in plain PyTorch, BASE and the oracle.

For each seed, a separate world is generated, prepared and split by time. Three models of the same
shape are trained for one epoch on its training split: ESMM by this library, ESMM in plain PyTorch
(below; it shares no code with the library and reads the Parquet files itself), and BASE, the
conversion tower with its embeddings on clicked impressions alone.

    python benchmarks/ground_truth.py --out bench/ground-truth

With --defaults, the library trains at the defaults of its command line on two ranks, and plain
PyTorch with Adam at 1e-3 for tables and towers and batches of 1,024:

    python benchmarks/ground_truth.py --out bench/4m --impressions 4000000 --seeds 0 --defaults
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import tyro
from sklearn.metrics import roc_auc_score
from torch import nn

FIGURES = {
    "ctr_auc": ("test", "click AUC, all impressions"),
    "cvr_auc": ("test", "conversion AUC, clicked impressions"),
    "ctcvr_auc": ("test", "click-and-conversion AUC, all impressions"),
    "cvr_auc_entire_space": ("truth", "conversion AUC, entire space"),
    "cvr_pcoc_entire_space": ("truth", "predicted / true conversions, entire space"),
}


@dataclass(frozen=True)
class Options:
    """Train ESMM, a plain-PyTorch ESMM and BASE on generated worlds."""

    out: Path
    """Folder for worlds, runs and ground_truth.json; existing parts are reused."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, one world each."""
    impressions: int = 1_000_000
    """Impressions per world, half of them to train on."""
    batch_size: int = 4096
    """Batch size of all three models."""
    tower: tuple[int, ...] = (360, 200, 80)
    """Widths of the hidden layers of each tower, in all three models."""
    defaults: bool = False
    """Use the library at its defaults on two ranks; plain PyTorch with Adam and small batches."""


class Feature(NamedTuple):
    """Bags of all rows, in the form of nn.EmbeddingBag."""

    ids: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None

    def rows(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns ids, offsets and weights of some rows."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        ends = np.cumsum(lengths)
        index = np.repeat(starts - ends + lengths, lengths) + np.arange(lengths.sum())
        weights = None if self.weights is None else torch.from_numpy(self.weights[index])
        return torch.from_numpy(self.ids[index]), torch.from_numpy(ends - lengths), weights


class PlainEsmm(nn.Module):
    """One EmbeddingBag per feature, two multi-layer perceptrons, nothing else."""

    def __init__(
        self, rows: Mapping[str, int], dim: int, tower: tuple[int, ...], priors: tuple[float, float]
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {name: nn.EmbeddingBag(n, dim, mode="sum") for name, n in rows.items()}
        )
        for table in self.tables.values():
            assert isinstance(table, nn.EmbeddingBag)
            bound = table.num_embeddings**-0.5
            nn.init.uniform_(table.weight, -bound, bound)
        widths = [dim * len(rows), *tower]
        self.towers = nn.ModuleList()
        for prior in priors:
            layers: list[nn.Module] = []
            for before, after in pairwise(widths):
                layers += [nn.Linear(before, after), nn.ReLU()]
            last = nn.Linear(widths[-1], 1)
            nn.init.constant_(last.bias, float(np.log(prior / (1 - prior))))
            self.towers.append(nn.Sequential(*layers, last))

    def forward(self, bags: Mapping[str, tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """Returns the logits of pCTR and pCVR."""
        pooled = [
            table(ids, offsets, per_sample_weights=weights)
            for (ids, offsets, weights), table in zip(
                bags.values(), self.tables.values(), strict=True
            )
        ]
        features = torch.cat(pooled, dim=1)
        return [tower(features).squeeze(1) for tower in self.towers]


def read_split(folder: Path, split: str) -> tuple[pa.Table, dict[str, Feature], np.ndarray]:
    """Returns impressions, features, and the shared row of each impression."""
    description = json.loads((folder / "dataset.json").read_text())
    tables = {
        kind: pa.concat_tables(
            [pq.read_table(file) for file in sorted((folder / split).glob(f"{kind}*.parquet"))]
        )
        for kind in ("impression", "shared")
    }
    features: dict[str, Feature] = {}
    for feature in description["schema"]["id_features"]:
        table = tables["shared" if feature["shared"] else "impression"]
        ids = table.column(feature["name"]).combine_chunks()
        weights = None
        if feature["weighted"]:
            weights = table.column(f"{feature['name']}__weight").combine_chunks()
        if feature["multi_valued"]:
            lengths = ids.value_lengths().to_numpy()
            ids = ids.flatten().to_numpy()
            if weights is not None:
                weights = weights.flatten().to_numpy()
                bag = np.repeat(np.arange(len(lengths)), lengths)
                total = np.bincount(bag, weights=weights, minlength=len(lengths))
                weights = (weights / total[bag]).astype(np.float32)
        else:
            lengths = ids.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
            ids = ids.drop_null().to_numpy()
            weights = None if weights is None else weights.drop_null().to_numpy()
        offsets = np.r_[0, np.cumsum(lengths, dtype=np.int64)]
        features[feature["name"]] = Feature(ids.astype(np.int64), offsets, weights)
    impressions = tables["impression"]
    return impressions, features, impressions.column("shared_row").to_numpy()


def plain_run(folder: Path, options: Options, seed: int) -> dict[str, float]:
    """Trains the plain model for an epoch and measures it on the test split with scikit-learn."""
    torch.manual_seed(seed)
    description = json.loads((folder / "dataset.json").read_text())
    sizes = {table["name"]: table["num_embeddings"] for table in description["schema"]["tables"]}
    kinds = {feature["name"]: feature for feature in description["schema"]["id_features"]}
    train = description["splits"]["train"]
    happened = train["happened"]
    model = PlainEsmm(
        {name: sizes[feature["table"]] for name, feature in kinds.items()},
        16,
        options.tower,
        (happened["click"] / train["impressions"], happened["conversion"] / happened["click"]),
    )
    towers = torch.optim.Adam(model.towers.parameters(), lr=1e-3)
    tables = (
        torch.optim.Adam(model.tables.parameters(), lr=1e-3)
        if options.defaults
        else torch.optim.Adagrad(model.tables.parameters(), lr=0.05, eps=1e-8)
    )
    batch_size = 1024 if options.defaults else options.batch_size

    def batches(
        split: str, rng: np.random.Generator | None
    ) -> Iterator[tuple[pa.Table, np.ndarray, list[torch.Tensor]]]:
        impressions, features, owner = read_split(folder, split)
        order = np.arange(len(owner)) if rng is None else rng.permutation(len(owner))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            bags = {
                name: feature.rows(owner[rows] if kinds[name]["shared"] else rows)
                for name, feature in features.items()
            }
            yield impressions, rows, model(bags)

    for impressions, rows, (a, b) in batches("train", np.random.default_rng(seed)):
        click = torch.from_numpy(impressions.column("click").to_numpy()[rows]).float()
        both = torch.from_numpy(impressions.column("conversion").to_numpy()[rows]).float()
        product = torch.sigmoid(a) * torch.sigmoid(b)
        loss = F.binary_cross_entropy_with_logits(a, click) + F.binary_cross_entropy(product, both)
        for optimizer in (tables, towers):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (tables, towers):
            optimizer.step()

    scores: list[torch.Tensor] = []
    impressions = pa.table({})
    with torch.no_grad():
        for table, _, logits in batches("test", None):
            impressions = table
            scores.append(torch.stack(logits).double().sigmoid())
    pctr, pcvr = torch.cat(scores, dim=1).numpy()
    click, conversion, true_cvr = (
        impressions.column(name).to_numpy() for name in ("click", "conversion", "true_cvr")
    )
    clicked = click == 1
    # Each row counts once as a positive and once as a negative, weighted by its true
    # probability.
    twice = np.r_[np.ones(len(pcvr)), np.zeros(len(pcvr))]
    return {
        "ctr_auc": float(roc_auc_score(click, pctr)),
        "cvr_auc": float(roc_auc_score(conversion[clicked], pcvr[clicked])),
        "ctcvr_auc": float(roc_auc_score(conversion, pctr * pcvr)),
        "cvr_auc_entire_space": float(
            roc_auc_score(twice, np.r_[pcvr, pcvr], sample_weight=np.r_[true_cvr, 1 - true_cvr])
        ),
        "cvr_pcoc_entire_space": float(pcvr.sum() / true_cvr.sum(dtype=np.float64)),
    }


def library_run(folder: Path, out: Path, options: Options, seed: int, method: str) -> dict:
    """Returns metrics.json of the library's training, on one rank or, at its defaults, on two."""
    arguments = ["train", "--data", folder, "--out", out, "--method", method, "--seed", seed]
    if not options.defaults:
        arguments += ["--batch-size", options.batch_size, "--tower", *options.tower]
        arguments += ["--epochs", 1, "--no-first-order"]
    _command(*arguments, ranks=2 if options.defaults else 1)
    return json.loads((out / "metrics.json").read_text())


def _command(*arguments: object, ranks: int = 1) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    program = [sys.executable, "-m", *(launcher if ranks > 1 else []), "esmm_torchrec"]
    subprocess.run([*program, *map(str, arguments)], check=True)


def run(options: Options) -> dict[str, Any]:
    """Returns the figures of each model, one per seed."""
    runs: dict[str, list[dict[str, float | None]]] = {
        name: [] for name in ("ESMM", "ESMM in plain PyTorch", "BASE", "the data's own oracle")
    }
    for seed in options.seeds:
        raw, prepared = (options.out / f"{kind}-{seed}" for kind in ("raw", "prepared"))
        if not raw.exists():
            _command("generate", raw, "--impressions", options.impressions, "--seed", seed)
        if not prepared.exists():
            _command("prepare", "ali-ccp", raw, prepared)
        for name, method in (("ESMM", "esmm"), ("BASE", "base")):
            if method == "base" and options.defaults:
                continue
            metrics = library_run(prepared, options.out / f"{method}-{seed}", options, seed, method)
            runs[name].append({key: metrics[part].get(key) for key, (part, _) in FIGURES.items()})
            oracle = metrics["truth"]["oracle"] | {"cvr_pcoc_entire_space": 1.0}
        runs["the data's own oracle"].append({key: oracle[key] for key in FIGURES})
        runs["ESMM in plain PyTorch"].append(dict(plain_run(prepared, options, seed)))
    runs = {name: of_model for name, of_model in runs.items() if of_model}
    return {"seeds": list(options.seeds), "impressions": options.impressions, "runs": runs}


def format_table(results: Mapping[str, Any]) -> str:
    """Formats mean ± standard deviation over the seeds as Markdown."""
    runs = results["runs"]
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
    for key, (_, label) in FIGURES.items():
        cells = []
        for of_model in runs.values():
            values = [figures[key] for figures in of_model if figures[key] is not None]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.4f}{spread}" if values else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    chosen.out.mkdir(parents=True, exist_ok=True)
    found = run(chosen)
    (chosen.out / "ground_truth.json").write_text(json.dumps(found, indent=2) + "\n")
    print(format_table(found))
