"""Time of one request, raw values in and scores out, in one thread.

    python benchmarks/serving.py [--tower 360 200 80] [--turns 9] [--out serving.json]

A model of 16 single-valued features (2 of them text), 2 lists and 4 dense columns, with the default
towers of `train` unless --tower is given. A request has 1 or 512 impressions as columns. The
contenders take turns:

    TorchRec module    the run's own model, from encoded ids and lengths (no raw values, no scores)
    eager program      `Predictor` of the run
    plain program      `Predictor` of a package of --format export
    compiled program   `Predictor` of a package of --format aoti
    encoding           raw values to tensors alone

CPU time per request is the figure that other work on the machine affects least.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from alternate import alternate, publish  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402

from esmm_torchrec import Predictor  # noqa: E402
from esmm_torchrec.batch import BatchFeatures  # noqa: E402
from esmm_torchrec.cli.main import main as command  # noqa: E402
from esmm_torchrec.models.methods import build_train_task  # noqa: E402
from esmm_torchrec.runs.run_folder import RunFolder  # noqa: E402

SINGLE, TEXTS, LISTS, DENSE = 14, 2, 2, 4
BATCHES = (1, 512)


@dataclass(frozen=True)
class Options:
    """Measure requests."""

    turns: int = 9
    """Number of turns of every contender."""
    requests: int = 100
    """Requests of one impression per turn; there are a fifth as many of 512."""
    rows: int = 20_000
    """Number of impressions to train on."""
    tower: tuple[int, ...] = (360, 200, 80)
    """Widths of the hidden layers of each tower."""
    out: Path | None = None
    """JSON file for the figures."""


def impressions(rows: int, seed: int) -> pd.DataFrame:
    """Draws rows in the form that a ranker has them."""
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        f"id_{n}": random.integers(0, 4000, rows) ** 2 // 4000 for n in range(SINGLE)
    }
    for n in range(TEXTS):
        columns[f"text_{n}"] = [f"shop {value}" for value in random.integers(0, 500, rows)]
    for n in range(LISTS):
        columns[f"list_{n}"] = [
            random.integers(0, 1000, size).tolist() for size in random.integers(0, 8, rows)
        ]
    for n in range(DENSE):
        columns[f"dense_{n}"] = random.lognormal(2, n / 2, rows)
    click = random.random(rows) < 0.3
    columns["click"] = click.astype(int)
    columns["conversion"] = (click & (random.random(rows) < 0.2)).astype(int)
    return pd.DataFrame(columns)


def prepared_models(
    folder: Path, rows: int, tower: tuple[int, ...], *train: str
) -> dict[str, Path]:
    """Trains for one pass, with further options of `train`; returns the run and its packages."""
    impressions(rows, 0).to_parquet(folder / "train.parquet")
    impressions(2000, 1).to_parquet(folder / "test.parquet")
    names = [name for name in impressions(1, 0) if name not in ("click", "conversion")]
    ids = [name for name in names if not name.startswith("dense")]
    dense = [name for name in names if name.startswith("dense")]
    halves = ["--train", str(folder / "train.parquet"), "--test", str(folder / "test.parquet")]
    labels = ["--click", "click", "--conversion", "conversion"]
    data, run = str(folder / "data"), str(folder / "run")
    command(["prepare", "table", data, *halves, *labels, "--id", *ids, "--dense", *dense])
    shape = ["--tower", *map(str, tower), "--epochs", "1", *train]
    command(["train", "--data", data, "--out", run, *shape])
    command(["export", run, str(folder / "plain")])
    command(["export", run, str(folder / "compiled"), "--format", "aoti"])
    return {name: folder / name for name in ("run", "plain", "compiled")}


def torchrec_module(run: Path, predictor: Predictor, request: dict[str, Any]) -> Callable[[], Any]:
    """Returns a call of the run's model in TorchRec, on encoded inputs."""
    folder = RunFolder.open(run)
    task = build_train_task(folder.schema, folder.model_options, embedding_device="cpu").eval()
    inputs = predictor.encode(request)
    values, lengths = [], []
    collections = folder.schema.collections
    assert set(collections) == {"sparse_features"}
    for feature in collections["sparse_features"]:
        if feature.multi_valued:
            values.append(inputs.arrays[f"{feature.name}.values"])
            lengths.append(inputs.arrays[f"{feature.name}.lengths"])
        else:
            values.append(inputs.arrays[feature.name])
            lengths.append(np.ones(inputs.size, np.int64))
    bags = KeyedJaggedTensor(
        [feature.name for feature in collections["sparse_features"]],
        torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )
    dense = torch.from_numpy(inputs.arrays["dense"]).float()
    features = BatchFeatures(sparse_features=bags, dense_features=dense)

    def forward() -> Any:
        with torch.inference_mode():
            return task.model(features)

    return forward


def main(options: Options) -> None:
    """Measures, prints and writes the figures."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = prepared_models(folder, options.rows, options.tower)
        torch.set_num_threads(1)  # training set its own number
        predictors = {name: Predictor(path) for name, path in models.items()}
        compiled = predictors["compiled"]
        rows = pd.read_parquet(folder / "test.parquet")[list(compiled.encoder.raw_columns)]
        for size in BATCHES:
            taken = rows.head(size)
            request: dict[str, Any] = {
                name: [one.tolist() if isinstance(one, np.ndarray) else one for one in taken[name]]
                if name.startswith(("list", "text"))
                else np.asarray(taken[name])
                for name in taken
            }
            if size == 1:
                request = {name: values[0] for name, values in request.items()}
                request |= {n: v.item() for n, v in request.items() if isinstance(v, np.generic)}
            calls: dict[str, Callable[[], Any]] = {
                "TorchRec module": torchrec_module(models["run"], compiled, request),
                "eager program": lambda r=request: predictors["run"].predict(r),
                "plain program": lambda r=request: predictors["plain"].predict(r),
                "compiled program": lambda r=request: compiled.predict(r),
                "encoding": lambda r=request: compiled.encode(r),
            }
            number = options.requests if size == 1 else options.requests // 5

            def repeated(call: Callable[[], Any], number: int = number) -> Callable[[], int]:
                call()

                def work() -> int:
                    for _ in range(number):
                        call()
                    return number

                return work

            timings = alternate(
                {name: repeated(call) for name, call in calls.items()}, turns=options.turns
            )
            print(f"\n{size} impressions per request")
            print(timings.table("TorchRec module", unit="requests/s"))
            for name, seconds in timings.cpu_seconds.items():
                print(f"{name:18} {statistics.median(seconds):8.0f} µs of CPU time per request")
            figures[str(size)] = timings.to_dict("TorchRec module")
        sizes = {
            name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
            for name, path in models.items()
        }
        print(", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))
        figures["megabytes"] = sizes
    publish(figures, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
