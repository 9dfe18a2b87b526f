"""The shared rows of a split, by their common_feature_index."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.sources.ali_ccp.fields import INDEX, USER
from esmm_torchrec.data.sources.ali_ccp.lines import array_of
from esmm_torchrec.errors import DataError


@dataclass
class CommonRows:
    """index → shared row, and the user of each shared row."""

    name: str
    """Of the file, for what goes into the data set."""
    path: str = ""
    """Of the file, for errors."""
    indices: list[np.ndarray] = field(default_factory=list)
    lines: list[np.ndarray] = field(default_factory=list)
    groups: list[np.ndarray] = field(default_factory=list)
    ordered: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    group_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, table: pa.Table, lines: np.ndarray) -> None:
        """Takes the index and user columns of a block and the line of each row."""
        index = array_of(table, INDEX).to_numpy()
        user = array_of(table, USER)
        # Users have no negative ids: a row without a user is a group of its own.
        alone = (index | np.uint64(1 << 63)).view(np.int64)
        self.groups.append(
            np.where(user.is_valid().to_numpy(False), user.fill_null(0).to_numpy(), alone)
        )
        self.indices.append(index)
        self.lines.append(lines)

    def close(self) -> None:
        """Sorts; DataError if an index occurs twice."""
        indices = np.concatenate(self.indices)
        order = np.argsort(indices, kind="stable")
        self.ordered, self.rows = indices[order], order.astype(np.int32)
        self.group_of = np.concatenate(self.groups)
        (again,) = np.nonzero(self.ordered[1:] == self.ordered[:-1])
        if len(again):
            lines = np.concatenate(self.lines)[order]
            first = again[np.argmin(lines[again + 1])]
            raise DataError(
                f"{self.path}, line {lines[first + 1]}: {INDEX} {self.ordered[first]:016x} is "
                f"already in line {lines[first]}; remove one of them"
            )
        self.indices, self.lines, self.groups = [], [], []

    def find(self, index: np.ndarray) -> np.ndarray:
        """int32 shared row of each index, -1 where there is none."""
        if len(index) == 0 or len(self.ordered) == 0:
            return np.full(len(index), -1, np.int32)
        # Impressions that share a row are adjacent: one search for each run of them.
        starts = np.concatenate([[True], index[1:] != index[:-1]])
        distinct = index[starts]
        places = np.minimum(np.searchsorted(self.ordered, distinct), len(self.ordered) - 1)
        found = np.where(self.ordered[places] == distinct, self.rows[places], np.int32(-1))
        return found[np.cumsum(starts) - 1]
