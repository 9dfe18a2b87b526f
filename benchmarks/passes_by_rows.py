"""Held-out figures after each pass, by training rows: when is one pass enough?

    python benchmarks/passes_by_rows.py --out bench/passes-by-rows

Two kinds of logs: worlds in Ali-CCP's form, whose users have about a hundred impressions each, and
tables whose number of ids grows with their rows. A tenth of the users (of the rows, in tables) is
held out; `train` takes a fixed number of passes at its other defaults. The figure is the one that
the search for the number of passes minimises: the mean of the normalised entropies of click,
conversion given a click, and both.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from esmm_torchrec.cli.main import configure_threads

configure_threads()  # before torch is imported

from benchmarks.first_model_sets import TableShape, generated_table, table_set  # noqa: E402
from esmm_torchrec.comparison.worlds import World, generate  # noqa: E402
from esmm_torchrec.data.sources.ali_ccp.prepare import prepare_ali_ccp  # noqa: E402
from esmm_torchrec.sharding.process_group import process_group  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402
from esmm_torchrec.training.run import train  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Measure the benefit of further passes."""

    out: Path = Path("bench/passes-by-rows")
    """Folder for the logs and the figures; finished parts are not repeated."""
    rows: tuple[int, ...] = (125_000, 250_000, 500_000, 1_000_000)
    """Numbers of training rows, held-out ones included."""
    passes: int = 3


def world(folder: Path, rows: int) -> Path:
    """Returns a prepared world."""
    prepared = folder / f"world-{rows}"
    if not prepared.exists():
        raw = folder / f"world-{rows}-raw"
        generate(World(impressions=2 * rows), raw)
        prepare_ali_ccp(raw, prepared)
        shutil.rmtree(raw)
    return prepared


def table(folder: Path, rows: int) -> Path:
    """Returns a prepared table."""
    ids = (rows // 20, rows // 120, 100, 12)
    name = f"table-{rows}"
    shape = TableShape(name, 2 * rows, dense=8, heavy=3, ids=ids, ctr=0.06, match=0.5)
    if not (folder / name).exists():
        columns = generated_table(shape, seed=0)
        table_set(
            name,
            columns,
            folder,
            ids=tuple(column for column in columns if column.startswith("id")),
            dense=tuple(column for column in columns if column.startswith("dense")),
        )
    return folder / name


MAKERS: dict[str, Callable[[Path, int], Path]] = {"world": world, "table": table}


def main(options: Options) -> None:
    """Trains on every log."""
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "passes_by_rows.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    chosen = TrainOptions(epochs=options.passes, validation_share=0.1, device="cpu")
    for rows in options.rows:
        for kind, make in MAKERS.items():
            name = f"{kind}-{rows}"
            if name not in found:
                run = options.out / "run"
                shutil.rmtree(run, ignore_errors=True)
                with process_group("cpu") as ranks:
                    found[name] = train(make(options.out, rows), run, chosen, ranks)["validation"]
                file.write_text(json.dumps(found, indent=2) + "\n")
            ended = [one for one in found[name]["curve"] if one["epoch"] == round(one["epoch"])]
            figures = [mean(one[f"{task}_ne"] for task in ("ctr", "cvr", "ctcvr")) for one in ended]
            print(f"| {kind} | {rows:,} | " + " | ".join(f"{one:.4f}" for one in figures) + " |")


if __name__ == "__main__":
    main(tyro.cli(Options))
