"""Finished trainings of a comparison on disk: a stopped comparison resumes and ends the same.

trials/<code>/<name>-<hash>.json    figures of a finished training, keyed by its configuration
trials/<code>/<name>-<hash>.npz     scores that other trainings need

<code> is a hash of the sources that figures depend on and of the versions of the libraries below
them. Results of other code are ignored, with a notice: mixing them would compare code, not methods.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import fbgemm_gpu
import numpy as np

from esmm_torchrec.sharding.process_group import Ranks

DECIDES_FIGURES = ("comparison.trial", "comparison.data", "models")
"""Modules that figures depend on, along with everything that they import from the package. For a
package, all of its modules count, since methods are found by name."""


def code_identity(package: Path | None = None) -> str:
    """Returns a hash of the code that figures depend on, 12 hexadecimal digits.

    Args:
        package: folder of the sources; None: this package.
    """
    root = package or Path(str(files("esmm_torchrec")))
    digest = sha256()
    for path in sorted(_import_closure(root)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    libraries = {name: version(name) for name in ("numpy", "torch", "torchrec")}
    libraries["fbgemm_gpu"] = fbgemm_gpu.__version__
    digest.update(json.dumps(libraries, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _import_closure(root: Path) -> set[Path]:
    """Returns the sources of `DECIDES_FIGURES` and of all that they import from the package."""
    found: set[Path] = set()
    waiting: list[Path] = []
    for name in DECIDES_FIGURES:
        folder = root.joinpath(*name.split("."))
        waiting += folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        for module in _imported_modules(path):
            stem = root.joinpath(*module.split(".")[1:])
            waiting += [stem.with_suffix(".py"), stem / "__init__.py"]
    # The package's __init__ imports lazily; following it would reach every module.
    return found - {root / "__init__.py"}


def _imported_modules(path: Path) -> Iterator[str]:
    """Yields the modules of the package that a source imports, and names that may be modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.startswith("esmm_torchrec."))


class Network(NamedTuple):
    """Scores of a network that trainings of methods need."""

    name: str
    """Stem of its file, which identifies it."""
    scores: np.ndarray
    seconds: float
    """Time taken to train it and to score with it."""


class TrialStore:
    """Stores results by their whole configuration; every rank calls it, rank 0 reads and writes."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder / ranks.from_first(code_identity)
        self._ranks = ranks
        self._common: dict[str, Any] = {"ranks": ranks.world_size, "device": ranks.device.type}

    @property
    def left_aside(self) -> int:
        """Number of finished trainings of other code in the folder, on rank 0."""
        beside = self._folder.parent.rglob("*.json")
        return sum(path.parent != self._folder for path in beside)

    def of_record(self, name: str, key: Mapping[str, Any]) -> Path:
        """Returns the path for the record of a training.

        Args:
            name: start of the file name; letters, digits and dashes.
            key: everything that the result depends on.
        """
        return self._path(name, key, "json")

    def of_network(self, name: str, key: Mapping[str, Any]) -> Path:
        """Returns the path for the scores of a network that trainings of methods need."""
        return self._path(name, key, "npz")

    def record(self, path: Path) -> dict[str, Any]:
        """Returns an existing record, on every rank."""
        return self._ranks.from_first(lambda: json.loads(path.read_text()))

    def network(self, path: Path) -> Network:
        """Returns existing scores of a network, on every rank."""

        def read() -> Network:
            with np.load(path) as found:
                return Network(path.stem, found["scores"], float(found["seconds"]))

        return self._ranks.from_first(read)

    def keep_record(
        self, path: Path, key: Mapping[str, Any], work: Callable[[], dict[str, Any] | None]
    ) -> None:
        """Runs `work` and saves the record that it returns on rank 0."""
        made = work()

        def write() -> None:
            assert made is not None
            content = json.dumps(made | {"configuration": dict(key)}) + "\n"
            partial = path.with_suffix(".partial")
            partial.write_text(content)
            partial.rename(path)

        self._ranks.from_first(write)

    def keep_network(self, path: Path, work: Callable[[], np.ndarray | None]) -> None:
        """Runs `work` and saves the scores of a network that it returns on rank 0."""
        started = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - started

        def write() -> None:
            assert made is not None
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, scores=made, seconds=seconds)
            partial.rename(path)

        self._ranks.from_first(write)

    def _path(self, name: str, key: Mapping[str, Any], suffix: str) -> Path:
        text = json.dumps(self._common | dict(key), sort_keys=True)
        return self._folder / f"{name}-{sha256(text.encode()).hexdigest()[:12]}.{suffix}"
