"""Common rows of a split, looked up by their common_feature_index."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from esmm_torchrec.data.prepared_form import array_of
from esmm_torchrec.data.sources.ali_ccp.fields import INDEX
from esmm_torchrec.data.sources.ali_ccp.files import RawFile
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import GROUP_ID


class CommonRows:
    """Common row of each index, and the group of each common row.

    Args:
        file: file of the common rows.
        table: index and group, in the order of the file.
        lines: int64, line of each row in the file.

    Raises:
        DataError: an index occurs twice.
    """

    def __init__(self, file: RawFile, table: pa.Table, lines: np.ndarray) -> None:
        self.name = file.name
        index = array_of(table, INDEX).to_numpy()
        self._rows = pd.Index(index)
        if not self._rows.is_unique:
            again = int(self._rows.duplicated().argmax())
            first = int((index == index[again]).argmax())
            raise DataError(
                f"{file.path}, line {lines[again]}: {INDEX} {index[again]:016x} is already in line "
                f"{lines[first]}; remove one of them"
            )
        self.group_of = array_of(table, GROUP_ID).to_numpy()
        """int64, group of each row."""

    def find(self, index: np.ndarray) -> np.ndarray:
        """Returns the row of each index, int32, -1 if there is none."""
        return self._rows.get_indexer(pd.Index(index)).astype(np.int32)
