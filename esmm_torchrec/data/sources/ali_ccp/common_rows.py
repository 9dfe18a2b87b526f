"""The common rows of a split, by their common_feature_index."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from esmm_torchrec.data.sources.ali_ccp.fields import INDEX, USER
from esmm_torchrec.data.sources.ali_ccp.lines import array_of
from esmm_torchrec.errors import DataError


class CommonRows:
    """Index → common row, and the user of each.

    Args:
        path: of the file, for errors.
        table: index and user, in the order of the file.
        lines: int64, of each row in the file.

    Raises:
        DataError: an index occurs twice.
    """

    def __init__(self, path: str, table: pa.Table, lines: np.ndarray) -> None:
        index, user = array_of(table, INDEX).to_numpy(), array_of(table, USER)
        self._rows = pd.Index(index)
        if not self._rows.is_unique:
            again = int(self._rows.duplicated().argmax())
            first = int((index == index[again]).argmax())
            raise DataError(
                f"{path}, line {lines[again]}: {INDEX} {index[again]:016x} is already in line "
                f"{lines[first]}; remove one of them"
            )
        # Users have no negative ids: a row without a user is a group of its own.
        alone = (index | np.uint64(1 << 63)).view(np.int64)
        self.group_of = np.where(
            user.is_valid().to_numpy(False), user.fill_null(0).to_numpy(), alone
        )
        """int64, of each row."""

    def find(self, index: np.ndarray) -> np.ndarray:
        """int32 row of each index, -1 if there is none."""
        return self._rows.get_indexer(pd.Index(index)).astype(np.int32)
