"""A folder appears under its name only when all of it is on the disk."""

from __future__ import annotations

import os
from pathlib import Path


def publish(partial: Path, final: Path) -> None:
    """Renames a folder, its content synchronised first, so that a power failure leaves either the
    whole folder or none."""
    for folder, _, files in os.walk(partial):
        for name in files:
            _synchronise(Path(folder, name))
        _synchronise(Path(folder))
    partial.rename(final)
    _synchronise(final.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Gives a file a new content; whoever opens it reads the old one or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    _synchronise(partial)
    partial.rename(path)
    _synchronise(path.parent)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
