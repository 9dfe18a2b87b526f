"""What a comparison has done already, on disk: a stopped one goes on and ends the same.

trials/<name>-<hash>.json    a finished training: its figures, by all that decided them
trials/<name>-<hash>.npy     scores that other trainings need
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from esmm_torchrec.sharding.process_group import Ranks

_FORMAT = 1


class TrialStore:
    """Remembers results by their whole configuration; every rank calls, rank 0 reads and writes."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        self._ranks = ranks
        self._common: dict[str, Any] = {
            "format": _FORMAT,
            "ranks": ranks.world_size,
            "device": ranks.device.type,
            **{name: version(name) for name in ("esmm_torchrec", "torch", "torchrec")},
        }

    def has(self, name: str, key: Mapping[str, Any]) -> bool:
        """Whether a record is there."""
        return self._ranks.from_first(self._path(name, key, "json").exists)

    def record(
        self, name: str, key: Mapping[str, Any], work: Callable[[], dict[str, Any] | None]
    ) -> dict[str, Any]:
        """The record of a training, made by `work` where it is not there.

        Args:
            name: for the file; letters, digits and dashes.
            key: everything that decides the result.
            work: called on every rank; gives the record on rank 0.
        """
        path = self._path(name, key, "json")

        def read() -> dict[str, Any] | None:
            return json.loads(path.read_text()) if path.exists() else None

        found = self._ranks.from_first(read)
        if found is not None:
            return found
        made = work()

        def write() -> dict[str, Any]:
            assert made is not None
            self._write(path, (json.dumps(made | {"configuration": dict(key)}) + "\n").encode())
            return json.loads(path.read_text())

        return self._ranks.from_first(write)

    def array(
        self, name: str, key: Mapping[str, Any], work: Callable[[], np.ndarray | None]
    ) -> np.ndarray:
        """As `record`, for an array; it is given to every rank."""
        path = self._path(name, key, "npy")
        found = self._ranks.from_first(lambda: np.load(path) if path.exists() else None)
        if found is not None:
            return found
        made = work()

        def write() -> np.ndarray:
            assert made is not None
            partial = path.with_suffix(".partial.npy")
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(partial, made)
            partial.rename(path)
            return made

        return self._ranks.from_first(write)

    def _path(self, name: str, key: Mapping[str, Any], suffix: str) -> Path:
        text = json.dumps(self._common | dict(key), sort_keys=True)
        return self._folder / f"{name}-{sha256(text.encode()).hexdigest()[:12]}.{suffix}"

    def _write(self, path: Path, content: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.rename(path)
