"""Arrays in files of a folder, mapped into memory, with checksums.

    layout.json    dtype, shape and XXH3-64 of each array
    checked.json   change time of each file when its checksum was last verified
    NAME           the bytes of an array

Checksums are verified when a folder is first opened, and again after a file has changed, for
example because the folder was copied. Otherwise only sizes and change times are compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

LAYOUT = "layout.json"

_CHECKED = "checked.json"
_CHUNK_BYTES = 1 << 24


class ArrayFile(msgspec.Struct, frozen=True):
    """Dtype, shape and checksum of an array stored in a file."""

    dtype: str
    shape: tuple[int, ...]
    xxh3: str
    """XXH3-64 of the bytes, in hex."""

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class Layout(msgspec.Struct, frozen=True):
    """The arrays of a folder, and what they were made from."""

    version: int
    fingerprint: str
    """Fingerprint of the data that the arrays were made from."""
    arrays: dict[str, ArrayFile]

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """Reads the layout of a folder.

        Raises:
            OSError, ValueError: the file is missing, or its content is not what was written.
        """
        file = msgspec.json.decode((folder / LAYOUT).read_bytes(), type=_LayoutFile)
        if xxhash.xxh3_64_hexdigest(file.layout) != file.xxh3:
            raise ValueError(f"{LAYOUT} does not match its checksum")
        return msgspec.json.decode(file.layout, type=cls)

    def write(self, folder: Path) -> None:
        """Writes the layout to a folder."""
        content = msgspec.json.encode(self)
        file = _LayoutFile(msgspec.Raw(content), xxhash.xxh3_64_hexdigest(content))
        (folder / LAYOUT).write_bytes(msgspec.json.encode(file))

    def map(self, folder: Path, name: str) -> np.ndarray:
        """Maps an array of the folder into memory, read-only."""
        file = self.arrays[name]
        if 0 in file.shape:
            return np.empty(file.shape, file.dtype)
        mapped = np.memmap(folder / name, dtype=file.dtype, mode="r", shape=file.shape)
        return np.asarray(mapped)


class _LayoutFile(msgspec.Struct):
    layout: msgspec.Raw
    xxh3: str


class ArrayWriter:
    """Appends blocks to the arrays of a folder.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._forms: dict[str, tuple[str, list[int]]] = {}
        self._checksums: dict[str, xxhash.xxh3_64] = {}

    def extend(self, name: str, values: np.ndarray) -> None:
        """Appends rows to an array; the first call creates it.

        Raises:
            OSError: the rows cannot be written.
        """
        if name not in self._forms:
            self._forms[name] = str(values.dtype), [0, *values.shape[1:]]
            self._checksums[name] = xxhash.xxh3_64()
        dtype, shape = self._forms[name]
        assert str(values.dtype) == dtype
        # As bytes, because files and checksums reject empty multidimensional arrays.
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with (self._folder / name).open("ab") as file:
            file.write(content.data)
        self._checksums[name].update(content.data)
        shape[0] += len(values)

    @property
    def arrays(self) -> dict[str, ArrayFile]:
        """The arrays written so far, by name."""
        return {
            name: ArrayFile(dtype, tuple(shape), self._checksums[name].hexdigest())
            for name, (dtype, shape) in self._forms.items()
        }


def is_intact(folder: Path, layout: Layout, *, read: bool) -> bool:
    """Returns whether the arrays of a folder are unchanged since they were written.

    Args:
        folder: folder of the arrays.
        layout: layout of the folder.
        read: whether files may be read to verify their checksums. If not, False is returned
            unless every file was verified after its last change.
    """
    try:
        if any(
            (folder / name).stat().st_size != file.nbytes for name, file in layout.arrays.items()
        ):
            return False
        changed = {name: (folder / name).stat().st_ctime_ns for name in layout.arrays}
        if _checked(folder) == changed:
            return True
        if not read:
            return False
        if any(_checksum(folder / name) != file.xxh3 for name, file in layout.arrays.items()):
            return False
    except OSError:
        return False
    with suppress(OSError):  # a read-only folder is checked on every start
        partial = folder / f"{_CHECKED}.partial"
        partial.write_text(json.dumps(changed))
        partial.rename(folder / _CHECKED)
    return True


def _checked(folder: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads((folder / _CHECKED).read_text())
    except (OSError, ValueError):
        return None


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum.update(chunk)
    return checksum.hexdigest()
