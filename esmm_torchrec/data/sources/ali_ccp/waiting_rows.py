"""Rows with raw ids, stored in scratch files until the ids of a split are counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from esmm_torchrec.data.counting import SharedRowUse, count_raw_ids
from esmm_torchrec.data.encoding import encode_ids
from esmm_torchrec.data.prepared_form import array_of
from esmm_torchrec.data.sources.ali_ccp.fields import COMMON, FIELDS, SKELETON
from esmm_torchrec.data.split_writer import RowKind
from esmm_torchrec.data.vocabulary import IdCounter, Vocabulary
from esmm_torchrec.schema import SHARED_ROW, IdFeature

FEATURES: Mapping[RowKind, tuple[IdFeature, ...]] = {
    "impressions": SKELETON.features,
    "shared": COMMON.features,
}


class WaitingRows:
    """Rows of a split, and the number of impressions in which each of their ids occurs.

    Args:
        folder: folder of the scratch files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[RowKind, list[Path]] = {kind: [] for kind in FEATURES}
        self._counters = {feature.table: IdCounter("integer") for feature in FIELDS}
        self._use = SharedRowUse()
        self.num_rows = 0
        """Number of rows of both kinds."""

    def add(self, kind: RowKind, table: pa.Table) -> None:
        """Appends rows. The columns of raw ids and weights have the names of the fields; other
        columns are kept."""
        if kind == "impressions":
            self._count(kind, table)
            self._use.add(array_of(table, SHARED_ROW).to_numpy())
        files = self._files[kind]
        files.append(self._folder / f"{kind}-{len(files)}.arrow")
        # Ids compress well, because their high bytes are zeros.
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(str(files[-1]), "wb") as file,
            pa.ipc.new_file(file, table.schema, options=options) as writer,
        ):
            writer.write_table(table)
        self.num_rows += len(table)

    def vocabularies(self, min_count: int) -> dict[str, Vocabulary]:
        """Returns the vocabulary of each table: ids that occur in `min_count` impressions or
        more."""
        first = 0
        for path in self._files["shared"]:
            table = _read(path)
            # A shared row counts once for each impression that uses it.
            impressions = self._use.impressions(first + len(table))[first:]
            self._count("shared", table, impressions)
            first += len(table)
        return {table: counter.vocabulary(min_count) for table, counter in self._counters.items()}

    def _count(self, kind: RowKind, table: pa.Table, impressions: np.ndarray | None = None) -> None:
        ids = {feature.name: array_of(table, feature.name) for feature in FEATURES[kind]}
        count_raw_ids(self._counters, FEATURES[kind], ids, impressions)

    def take(self, kind: RowKind) -> Iterator[pa.Table]:
        """Yields the added tables of a kind in order, and deletes their files."""
        for path in self._files[kind]:
            yield _read(path)
            path.unlink()


def _read(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def encoded(table: pa.Table, kind: RowKind, vocabularies: Mapping[str, Vocabulary]) -> pa.Table:
    """Returns the table with rows of the embedding tables in place of raw ids."""
    columns = dict(zip(table.column_names, table.columns, strict=True))
    for feature in FEATURES[kind]:
        ids = array_of(table, feature.name)
        columns[feature.name] = encode_ids(ids, vocabularies[feature.table])
    return pa.table(columns)
