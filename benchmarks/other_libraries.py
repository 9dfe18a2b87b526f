"""Speed of training against torch-rechub and DeepCTR-Torch, each used as its documentation shows.

    python benchmarks/other_libraries.py [--turns 5] [--out other_libraries.json]

The other libraries are installed into a separate virtual environment (`--environment`, created
once). Impressions, tables, towers and batch size are the same for all; each library uses its
default optimiser, which for the other two is Adam over all rows of all tables. They train in
separate processes, which wait without a spinning thread while another contender has its turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from alternate import Timings, alternate, publish  # noqa: E402
from impressions import write_impressions  # noqa: E402
from training_speed import Options as TrainingSpeed  # noqa: E402
from training_speed import library  # noqa: E402

from esmm_torchrec.data.mapped import MappedSplit  # noqa: E402
from esmm_torchrec.data.reader import ImpressionReader  # noqa: E402
from esmm_torchrec.models.methods import DtypeOption  # noqa: E402
from esmm_torchrec.sharding.process_group import Ranks, process_group  # noqa: E402

OTHERS = {"torch-rechub": "0.9.0", "deepctr-torch": "0.3.0"}
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Options:
    """Measure the speed of training against other libraries."""

    turns: int = 5
    """Number of turns of every contender."""
    steps: int = 8
    """Steps per turn."""
    batch_size: int = 4096
    """Impressions per step."""
    environment: Path = Path("bench/other-libraries")
    """Virtual environment with the other libraries; created if it does not exist."""
    out: Path | None = None
    """JSON file for the figures."""


def install(folder: Path) -> Path:
    """Returns the Python interpreter of an environment with the other libraries."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        print(f"installing {', '.join(OTHERS)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        wanted = OTHERS | {name: version(name).partition("+")[0] for name in ("torch", "numpy")}
        pinned = [f"{name}=={number}" for name, number in wanted.items()]
        pinned.append("requests")  # a dependency that DeepCTR-Torch does not declare
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned], check=True)
        done.touch()
    return python


def write_arrays(train: MappedSplit, folder: Path) -> None:
    """Writes the impressions and the tables in the form that the worker loads."""
    whole = ImpressionReader(train, batch_size=train.impressions, shuffle=False)
    features = next(iter(whole)).features.sparse_features
    assert features is not None
    columns: dict[str, Any] = {name: train.scalars[name] for name in ("click", "conversion")}
    for name, column in features.to_dict().items():
        columns[name] = column.values().long().numpy()
    np.savez(folder / "impressions.npz", **columns)
    tables = {table.name: table.num_embeddings for table in train.schema.tables}
    (folder / "tables.json").write_text(json.dumps(tables))


@contextmanager
def worker(
    python: Path, library: str, folder: Path, options: Options
) -> Iterator[Callable[[int], int]]:
    """Starts a process that trains with another library: steps → impressions trained."""
    script = Path(__file__).with_name("other_libraries_worker.py")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [python, script, library, folder, str(options.batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def take(steps: int) -> int:
            with suppress(BrokenPipeError):
                print(steps, file=asked, flush=True)
            if not answers.readline():
                log.seek(0)
                raise SystemExit(f"{library} failed: {log.read().decode()[-2000:]}")
            return steps * options.batch_size

        try:
            yield take
        finally:
            asked.close()
            process.wait()


def measure(options: Options, ranks: Ranks, folder: Path, python: Path) -> dict[str, Any]:
    """Lets all contenders take turns."""
    steps = WARM_UP_STEPS + options.turns * options.steps
    dataset = write_impressions(
        folder / "prepared", train=(steps + 1) * options.batch_size, test=options.batch_size
    )
    train = MappedSplit.open(dataset, "train")
    write_arrays(train, folder)
    with ExitStack() as stack:
        others = {
            name: stack.enter_context(worker(python, name, folder, options)) for name in OTHERS
        }
        dtypes: dict[str, DtypeOption] = {
            "esmm_torchrec, float32": "float32",
            "esmm_torchrec, bfloat16": "bfloat16",
        }
        contenders = dict(others)
        for name, dtype in dtypes.items():
            _, own = library(
                train,
                train,
                ranks,
                TrainingSpeed(batch_size=options.batch_size),
                dtype=dtype,
            )
            contenders[name] = lambda steps, own=own: own.take(steps) * options.batch_size
        for take in contenders.values():
            take(WARM_UP_STEPS)
        timings = alternate(
            {name: partial(take, options.steps) for name, take in contenders.items()},
            turns=options.turns,
        )

    print(f"{'':26}{'impressions/s':>14}{'ratio to torch-rechub':>26}{'to DeepCTR-Torch':>26}")
    for name in timings.rates:
        print(
            f"{name:26}{timings.rate(name):>14,.0f}"
            + "".join(f"{_ratio(timings, name, other):>26}" for other in OTHERS)
        )
    before, after = timings.load_average
    print(f"\nload {before:.1f} before, {after:.1f} after")
    return timings.to_dict("torch-rechub")


def _ratio(timings: Timings, name: str, baseline: str) -> str:
    ratios = timings.ratios(name, baseline)
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(options: Options) -> None:
    python = install(options.environment.absolute())
    with tempfile.TemporaryDirectory() as folder, process_group("cpu") as ranks:
        figures = measure(options, ranks, Path(folder), python)
    publish(figures, options.out, **OTHERS)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
