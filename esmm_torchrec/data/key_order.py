"""Sorts rows by a 64-bit hash in bounded memory: divides them on disk, then sorts each piece.

If a data set is stored by a hash of the user, every stretch of it is a random sample of users with
all their impressions, as a reader that shuffles within a window of consecutive rows requires.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

PIECE_BITS = 6
"""Number of leading bits of the hash by which rows are divided, here into 2^6 pieces."""

_HASH = "key_hash"


class KeyOrder:
    """Sorts rows by their hashes; rows with the same hash keep their order.

    Args:
        folder: folder to create for the pieces.
        columns: Arrow schema of the rows.
    """

    def __init__(self, folder: Path, columns: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self._columns = columns
        self._files = [folder / f"{piece}.arrow" for piece in range(1 << PIECE_BITS)]
        kind = columns.append(pa.field(_HASH, pa.uint64()))
        self._writers = [pa.ipc.new_file(str(file), kind) for file in self._files]

    def append(self, rows: pa.Table, hashes: np.ndarray) -> None:
        """Appends rows with their hashes, uint64 (n,)."""
        pieces = (hashes >> np.uint64(64 - PIECE_BITS)).astype(np.int64)
        order = np.argsort(pieces, kind="stable")
        divided = rows.append_column(_HASH, pa.array(hashes)).take(order)
        ends = np.cumsum(np.bincount(pieces, minlength=1 << PIECE_BITS)).tolist()
        start = 0
        for writer, end in zip(self._writers, ends, strict=True):
            if end > start:
                writer.write_table(divided.slice(start, end - start))
            start = end

    def sorted(self) -> Iterator[pa.Table]:
        """Yields all rows in order, piece by piece, and deletes the pieces."""
        self.close()
        for file in self._files:
            with pa.memory_map(str(file)) as source:
                rows = pa.ipc.open_file(source).read_all()
                if len(rows):
                    order = np.argsort(rows.column(_HASH).to_numpy(), kind="stable")
                    yield rows.drop_columns([_HASH]).take(order).cast(self._columns)
            file.unlink()

    def close(self) -> None:
        """Closes the files of the pieces; `sorted` can still read them."""
        for writer in self._writers:
            writer.close()
