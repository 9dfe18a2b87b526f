"""The first model on a log: `train` at its defaults against scikit-learn on the same columns.

python benchmarks/first_model.py --logs FOLDER --out bench/first-model

For each set, the AUC on the test split of clicks (all rows), conversions (clicked rows) and clicks
with a conversion (all rows), as a mean over seeds. `first_model_sets` generates sets,
`first_model_logs` reads real ones, `first_model_references` fits the models of scikit-learn. Writes
results.json and table.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from esmm_torchrec.cli.main import configure_threads

configure_threads()

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.first_model_logs import real_sets  # noqa: E402
from benchmarks.first_model_references import KINDS, reference_aucs  # noqa: E402
from benchmarks.first_model_sets import (  # noqa: E402
    LARGE,
    TABLES,
    WORLDS,
    LogSet,
    generated_table,
    table_set,
    world_set,
)
from esmm_torchrec.sharding.process_group import process_group  # noqa: E402
from esmm_torchrec.training.options import TrainOptions  # noqa: E402
from esmm_torchrec.training.run import train  # noqa: E402

FIGURES = ("ctr", "cvr", "ctcvr")
MARGIN = 0.005
"""Maximum shortfall of an AUC from that of the better reference."""


@dataclass(frozen=True)
class Options:
    """Compare the defaults of `train` with logistic regression and gradient boosting."""

    out: Path = Path("bench/first-model")
    """Folder for the sets, the runs and the results; finished parts are not repeated."""
    logs: tuple[Path, ...] = ()
    """Folders with real logs, as published; `first_model_logs.LOGS` lists the file names."""
    sets: tuple[str, ...] = ()
    """Names of the sets to compare on; all if empty."""
    seeds: int = 3
    full: bool = False
    """Add a table of 5 million rows."""
    ranks: tuple[int, ...] = (1,)
    """Numbers of ranks to train on."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of `train`, to try something other than the defaults."""


def log_sets(options: Options, folder: Path) -> Iterator[LogSet]:
    """Yields the sets of the options."""
    for name, make in real_sets(options.logs, folder):
        if _wanted(options, name):
            yield make()
    for shape in (*TABLES, *(LARGE if options.full else ())):
        if _wanted(options, shape.name):
            ids = tuple(f"id{column}" for column in range(len(shape.ids)))
            dense = tuple(f"dense{column}" for column in range(shape.dense))
            frame = generated_table(shape, seed=0)
            yield table_set(shape.name, frame, folder, ids=ids, dense=dense)
    for name, world in WORLDS.items():
        if _wanted(options, name):
            yield world_set(name, world, folder)


def _wanted(options: Options, name: str) -> bool:
    return not options.sets or name in options.sets


def our_aucs(log: LogSet, options: Options, *, ranks: int, seed: int) -> dict[str, float]:
    """Returns the AUCs that `train` reaches at its defaults."""
    out = options.out / "runs" / f"{log.name}-{ranks}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    if ranks == 1 and not options.options:
        with process_group("cpu") as group:
            metrics = train(log.prepared, out, replace(TrainOptions(), seed=seed), group)
    else:
        command = [sys.executable, "-m"]
        if ranks > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command += ["-m"]
        command += ["esmm_torchrec", "train", "--data", str(log.prepared), "--out", str(out)]
        command += ["--device", "cpu", "--seed", str(seed)]
        for name, value in options.options.items():
            command += [f"--{name}", *value.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((out / "metrics.json").read_text())
    config = json.loads((out / "config.json").read_text())
    shutil.rmtree(out)
    return {name: metrics["test"][f"{name}_auc"] for name in FIGURES} | {
        "epochs": config["options"]["epochs"],
        "train_seconds": metrics["throughput"]["train_seconds"],
    }


def main(options: Options) -> None:
    """Compares on every set, and writes the results so far after each."""
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for log in log_sets(options, options.out / "sets"):
        found = results.setdefault(log.name, {})
        found["rows"] = len(log.train)
        found["clicks"] = int(log.train.click.sum())
        found["conversions"] = int((log.train.click & log.train.conversion).sum())
        for seed in range(options.seeds):
            for kind in KINDS:
                runs = found.setdefault(kind, [])
                if len(runs) <= seed:
                    # The regression does not depend on its seed.
                    known = runs[0] if runs and kind == "logistic regression" else None
                    runs.append(known or reference_aucs(kind, log, seed))
            for ranks in options.ranks:
                runs = found.setdefault(f"ours, {ranks} {'rank' if ranks == 1 else 'ranks'}", [])
                if len(runs) <= seed:
                    runs.append(our_aucs(log, options, ranks=ranks, seed=seed))
            file.write_text(json.dumps(results, indent=2) + "\n")
        (options.out / "table.md").write_text(table(results))
        print(table({log.name: found}), flush=True)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Formats mean AUCs of every set and differences from the better reference as Markdown."""
    kinds = sorted({kind for found in results.values() for kind in found if _is_kind(kind)})
    lines = [
        "| set (training rows, clicks, conversions) | "
        + " | ".join(f"{kind}: CTR / CVR / CTCVR" for kind in kinds)
        + " | passes | difference from the better reference |",
        "|" + "---|" * (len(kinds) + 3),
    ]
    differences = []
    for name, found in results.items():
        means = {kind: _means(found[kind]) for kind in kinds if found.get(kind)}
        cells = [
            " / ".join(f"{v:.3f}" for v in means[kind]) if kind in means else "" for kind in kinds
        ]
        ours = next((kind for kind in means if kind.startswith("ours")), None)
        gap = ""
        passes = ""
        if ours is not None:
            passes = " ".join(str(run["epochs"]) for run in found[ours])
            best = np.max([means[kind] for kind in KINDS if kind in means], axis=0)
            differences.append(np.array(means[ours]) - best)
            gap = " / ".join(f"{value:+.3f}" for value in differences[-1])
        counts = f"{found['rows']:,}, {found['clicks']:,}, {found['conversions']:,}"
        lines.append(f"| {name} ({counts}) | {' | '.join(cells)} | {passes} | {gap} |")
    if len(differences) > 1:
        mean = " / ".join(f"{value:+.3f}" for value in np.mean(differences, axis=0))
        missed = int((np.array(differences) < -MARGIN).sum())
        lines.append(
            f"\nMean difference from the better reference {mean}. Figures more than {MARGIN} below "
            f"it: {missed} of {3 * len(differences)}."
        )
    lines += [""] if apart(results) else []
    lines += [
        f"{name}: {' / '.join(f'{value:.4f}' for value in values)} between numbers of ranks"
        for name, values in apart(results).items()
    ]
    return "\n".join(lines) + "\n"


def apart(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns set → largest difference of CTR, CVR and CTCVR AUC between runs of one seed on
    different numbers of ranks."""
    found = {}
    for name, of_set in results.items():
        runs = [of_set[kind] for kind in of_set if kind.startswith("ours")]
        if len(runs) > 1:
            aucs = [
                [[run[key] for key in FIGURES] for run in of_kind]
                for of_kind in zip(*runs, strict=False)
            ]
            found[name] = np.ptp(np.array(aucs), axis=1).max(axis=0)
    return found


def _is_kind(name: str) -> bool:
    return name in KINDS or name.startswith("ours")


def _means(runs: list[dict[str, float]]) -> list[float]:
    return [float(np.mean([run[name] for run in runs])) for name in FIGURES]


if __name__ == "__main__":
    main(tyro.cli(Options))
