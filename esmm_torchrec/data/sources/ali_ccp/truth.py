"""True probabilities of generated impressions, joined to them by sample_id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from esmm_torchrec.data.prepared_form import SplitName, array_of
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import SAMPLE_ID, TRUE_CTR, TRUE_CVR


class Truth:
    """`truth.parquet` of one split, read alongside the impressions. Memory use is small if both are
    in the same order; the result is right in any order."""

    _COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
        (SAMPLE_ID, pa.int64()),
        ("split", pa.string()),
        (TRUE_CTR, pa.float32()),
        (TRUE_CVR, pa.float32()),
    )

    def __init__(self, path: Path, split: SplitName) -> None:
        self._path = path
        self._split: SplitName = split
        self._file = self.open(path)
        self._batches = self._file.iter_batches(columns=[name for name, _ in self._COLUMNS])
        self._ids = np.zeros(0, np.int64)
        self._values = np.zeros((0, 2), np.float32)

    @classmethod
    def open(cls, path: Path) -> pq.ParquetFile:
        """Opens the file and checks its columns."""
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowException:
            raise DataError(f"{path} is not a Parquet file; remove it or create it again") from None
        for name, kind in cls._COLUMNS:
            if name not in file.schema_arrow.names:
                raise DataError(f"{path} lacks the column {name!r}; remove it or create it again")
            is_kind = file.schema_arrow.field(name).type
            if pa.types.is_floating(kind) and pa.types.is_floating(is_kind):
                continue
            if is_kind != kind and not (kind == pa.string() and pa.types.is_large_string(is_kind)):
                raise DataError(f"{path} has {is_kind} in column {name!r} instead of {kind}")
        return file

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def take(self, sample_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns true_ctr and true_cvr of these impressions, float32.

        Raises:
            DataError: the file has no row for one of them, or a value is not a probability.
        """
        while True:
            order = np.argsort(self._ids, kind="stable")
            self._ids, self._values = self._ids[order], self._values[order]
            places = np.searchsorted(self._ids, sample_ids)
            inside = np.minimum(places, max(len(self._ids) - 1, 0))
            known = self._ids[inside] == sample_ids if len(self._ids) else inside < 0
            if known.all():
                break
            if not self._read_more():
                lost = sample_ids[~known][0]
                raise DataError(
                    f"{self._path} has no row for sample_id {lost} of the {self._split} split; "
                    "remove the file or create it again"
                )
        values = self._values[places]
        left = np.ones(len(self._ids), np.bool_)
        left[places] = False
        self._ids, self._values = self._ids[left], self._values[left]
        return {TRUE_CTR: values[:, 0], TRUE_CVR: values[:, 1]}

    def _read_more(self) -> bool:
        batch = next(self._batches, None)
        if batch is None:
            return False
        table = pa.Table.from_batches([batch]).filter(pc.field("split") == self._split)
        ids = array_of(table, SAMPLE_ID).to_numpy(zero_copy_only=False)
        columns = [array_of(table, name).cast(pa.float32()) for name in (TRUE_CTR, TRUE_CVR)]
        values = np.stack([column.fill_null(np.nan).to_numpy() for column in columns], axis=1)
        wrong = ~((values >= 0) & (values <= 1)).all(axis=1)
        if wrong.any():
            raise DataError(
                f"{self._path}, sample_id {ids[wrong.argmax()]} of the {self._split} split: "
                "true_ctr or true_cvr is not a probability; remove the file or create it again"
            )
        self._ids = np.concatenate([self._ids, ids])
        self._values = np.concatenate([self._values, values])
        return True
