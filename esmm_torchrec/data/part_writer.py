"""Writes one file of a split: row groups as they come, counted and hashed on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.prepared_form import Part
from esmm_torchrec.data.storage import HashedOutput, Location
from esmm_torchrec.schema import weight_column
from esmm_torchrec.tasks import TaskChain

ROWS_PER_GROUP = {"impressions": 1 << 17, "shared": 1 << 13}
"""Rows of a Parquet row group. A shared row holds hundreds of ids, an impression a few dozen."""

ROW_GROUPS_PER_FILE = 16


class WrittenPart(NamedTuple):
    """A file that is whole."""

    part: Part
    checksum: str
    """sha256, in hex."""


class PartWriter:
    """Writes a file of impressions or of shared rows.

    Only the description of the data set, which is written last, makes the file a part of it. So a
    task that is repeated writes another file, and the first one is of no consequence.

    Args:
        root: the data set.
        name: of the file, relative to the data set.
        columns: `impression_columns` or `shared_columns` of the schema.
        tasks: the chain whose labels the impressions have; None: the rows are shared rows.
        first_shared_row: as in `Part`.
    """

    def __init__(
        self,
        root: Location,
        name: str,
        columns: pa.Schema,
        *,
        tasks: TaskChain | None,
        first_shared_row: int = 0,
    ) -> None:
        self.name = name
        self._first_shared_row = first_shared_row
        self._groups: list[int] = []
        self._tasks = () if tasks is None else tuple(tasks)
        self._happened = {task.name: 0 for task in self._tasks}
        self._file = HashedOutput(root / name)
        self._writer = pq.ParquetWriter(
            self._file, columns, compression="zstd", write_page_checksum=True, **_encodings(columns)
        )

    @property
    def num_row_groups(self) -> int:
        """Written so far."""
        return len(self._groups)

    def write_group(self, rows: pa.Table) -> None:
        """Writes a row group: all of `rows`, which have been checked."""
        self._writer.write_table(rows.combine_chunks(), row_group_size=max(1, len(rows)))
        self._groups.append(len(rows))
        for task in self._tasks:
            labels = rows.column(task.label).to_numpy()
            self._happened[task.name] += int(np.count_nonzero(labels))

    def close(self) -> WrittenPart:
        """Ends the file."""
        self._writer.close()
        self._file.close()
        part = Part(
            file=self.name,
            row_groups=tuple(self._groups),
            bytes=self._file.bytes,
            happened=self._happened,
            first_shared_row=self._first_shared_row,
        )
        return WrittenPart(part, self._file.checksum)


def _encodings(columns: pa.Schema) -> dict[str, Any]:
    # Weights repeat and suit a dictionary. Ids use few of their four bytes: one byte plane after
    # another they are half as fast again to write, and smaller, than with a dictionary.
    leaves = {
        f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name: column
        for column in columns
    }
    dictionary = [
        leaf
        for leaf, column in leaves.items()
        if pa.types.is_int8(column.type) or column.name.endswith(weight_column(""))
    ]
    byte_planes = [leaf for leaf in leaves if leaf not in dictionary]
    return {
        "use_dictionary": dictionary,
        "column_encoding": dict.fromkeys(byte_planes, "BYTE_STREAM_SPLIT"),
    }
