"""Durable writes: a file or folder gets its final name only once all of it is on disk."""

from __future__ import annotations

import os
from pathlib import Path


def publish(partial: Path, final: Path) -> None:
    """Synchronises the content of a folder to disk and renames it, so that a power failure leaves
    either the whole folder or none."""
    for folder, _, files in os.walk(partial):
        for name in files:
            synchronise(Path(folder, name))
        synchronise(Path(folder))
    partial.rename(final)
    synchronise(final.parent)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Replaces the content of a file atomically and durably: readers see the old or the new one."""
    partial = partial_file(path)
    write_durably(partial, content)
    partial.rename(path)
    synchronise(path.parent)


def partial_file(path: Path) -> Path:
    """Returns the path to which `replace_file` writes before it renames."""
    return path.with_name(f"{path.name}.partial")


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Writes a file and waits until it is on disk."""
    path.write_bytes(content)
    synchronise(path)


def synchronise(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
