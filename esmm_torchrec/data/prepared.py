"""The prepared data set: the one form between raw logs and batches. Write it, open it, check it.

A folder:

    dataset.json                         what is in it, how it was made, a checksum of each file
    vocabulary/<table>.parquet           raw_id, row, count
    rare/<table>.parquet                 raw_id, count of the ids that have no row
    train/ test/ impressions-*.parquet   labels, ids, weights; one row an impression
    train/ test/ shared-*.parquet        features that many impressions share, one row for all

An impression's `shared_row` is a row over all shared files of its split, in the order of their
names. Ids are table rows, 0 (unknown) to num_embeddings - 1. A missing value of a single-valued
feature is null, of a multi-valued one the empty list. Weights are as in the raw data.

    days/<day>/                          what `prepare append` added: a data set of its own, whose
                                         files dataset.json names beside those above

A data set is written beside its final name and renamed last: whatever opens is whole. So is a day,
which belongs to the data set once dataset.json is replaced by one that names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.data.prepared_form import (
    DESCRIPTION,
    PREPARE_AGAIN,
    READABLE_VERSIONS,
    SPLITS,
    Description,
    SplitName,
    check_values,
    first_true,
    impression_columns,
    partial_folder,
    same_columns,
    sha256_of,
    shared_columns,
)
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import SHARED_ROW


@dataclass(frozen=True, kw_only=True)
class PreparedDataSet(Description):
    """A prepared data set that has been opened: its description is valid, its files are there."""

    path: Path
    fingerprint: str
    """sha256 of dataset.json; as that holds every checksum, it stands for the whole data set."""

    @classmethod
    def open(cls, path: Path | str, *, data_files: bool = True) -> PreparedDataSet:
        """Opens a data set after cheap checks: the description, and the presence, columns and
        number of rows of every file. `vocabulary`, `checked_rows` and `verify` look at the values.

        Args:
            path: the folder.
            data_files: False if the files of the splits need not be there, as in a copy of the
                description and the vocabularies alone (`data.encoding.copy_preprocessing`).

        Raises:
            DataError: `path` is not a prepared data set, is of another format version, or a file
                is missing or is not what the description says.
        """
        path = Path(path)
        try:
            content = (path / DESCRIPTION).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            hint = "create one with 'esmm-torchrec prepare'"
            if partial_folder(path).exists():
                hint = f"its preparation was interrupted: {PREPARE_AGAIN}"
            raise DataError(
                f"{path} is not a prepared data set ({DESCRIPTION} is missing); {hint}"
            ) from None
        data_set = cls._decode(path, content)
        data_set._check_vocabularies()
        if data_files:
            data_set._check_data_files()
        return data_set

    @classmethod
    def _decode(cls, path: Path, content: bytes) -> PreparedDataSet:
        try:
            version = msgspec.json.decode(content, type=_Version).format_version
            if version in READABLE_VERSIONS:
                described = Description.decode(content)
                return cls(
                    **{field.name: getattr(described, field.name) for field in fields(described)},
                    path=path,
                    fingerprint=hashlib.sha256(content).hexdigest(),
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path / DESCRIPTION} is broken ({error}); {PREPARE_AGAIN}") from None
        raise DataError(
            f"{path} is a prepared data set of format version {version}, and this library reads "
            f"versions {' and '.join(map(str, READABLE_VERSIONS))}; {PREPARE_AGAIN}"
        )

    def impression_files(self, split: SplitName) -> list[Path]:
        """Files of the impressions of a split, in the order of the source."""
        return [self.path / name for name in self.splits[split].impression_files]

    def shared_files(self, split: SplitName) -> list[Path]:
        """Files of the shared rows of a split; `shared_row` counts through them in this order."""
        return [self.path / name for name in self.splits[split].shared_files]

    def vocabulary(self, table: str) -> Vocabulary:
        """The vocabulary of a table; features that share a table share it.

        Raises:
            DataError: the file cannot be read or is not the one that was written.
        """
        file = self.vocabulary_file(table)
        self.check_checksum(file)
        return Vocabulary.read(self.path / file)

    def rare_ids(self, table: str) -> pa.Table:
        """raw_id and count of the ids of a table that were counted and have no row.

        Raises:
            DataError: as `vocabulary`, or an earlier version of this library made the data set.
        """
        file = self.rare_file(table)
        self.check_checksum(file)
        return Vocabulary.read_rare(self.path / file)

    @property
    def impression_columns(self) -> pa.Schema:
        """Names and types of the columns of the impression files."""
        return impression_columns(self.schema, self.columns)

    @property
    def shared_columns(self) -> pa.Schema:
        """Names and types of the columns of the shared files."""
        return shared_columns(self.schema)

    def _check_vocabularies(self) -> None:
        for table in self.schema.tables:
            file = self.path / self.vocabulary_file(table.name)
            rows = _parquet_rows(file, None)
            if rows != table.num_embeddings - 1:
                raise DataError(
                    f"{file} has {rows} ids where {DESCRIPTION} says {table.num_embeddings - 1}; "
                    f"{PREPARE_AGAIN}"
                )

    def _check_data_files(self) -> None:
        for name in SPLITS:
            split = self.splits[name]
            for kind, files, expected_rows, columns in (
                (
                    "impression",
                    self.impression_files(name),
                    split.impressions,
                    self.impression_columns,
                ),
                ("shared", self.shared_files(name), split.shared_rows, self.shared_columns),
            ):
                rows = sum(_parquet_rows(file, columns) for file in files)
                if rows != expected_rows:
                    raise DataError(
                        f"{self.path / name} has {rows} rows in its {kind} files where "
                        f"{DESCRIPTION} says {expected_rows}; {PREPARE_AGAIN}"
                    )

    def checked_rows(
        self, split: SplitName, kind: Literal["impressions", "shared"]
    ) -> Iterator[pa.RecordBatch]:
        """All rows of one kind of a split, block by block, each checked before it is given: the
        checksums of the files, every id in its table's range, labels 0 or 1, none without
        the one before it, `shared_row` in range, every weight and dense value finite.

        Raises:
            DataError: names the file, the column and the row of the first thing that is wrong.
        """
        expected = self.impression_columns if kind == "impressions" else self.shared_columns
        of_split = self.splits[split]
        names = of_split.impression_files if kind == "impressions" else of_split.shared_files
        for name in names:
            self.check_checksum(name)
            with pq.ParquetFile(self.path / name) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    where = f"{self.path / name}, row group {group}"
                    check_values(table, self.schema, expected, where=where)
                    if SHARED_ROW in expected.names:
                        _check_shared_row(table, of_split.shared_rows, where=where)
                    yield from table.to_batches()

    def verify(self) -> None:
        """Reads every file as `checked_rows` does, the vocabularies, too. Training does it once,
        when it lays the splits out for random access; this is for a data set that was copied.

        Raises:
            DataError: names the file, the column and the row of the first thing that is wrong.
        """
        for split in SPLITS:
            for _ in chain(
                self.checked_rows(split, "impressions"), self.checked_rows(split, "shared")
            ):
                pass
        for table in self.schema.tables:
            self.vocabulary(table.name)

    def check_checksum(self, name: str) -> None:
        """Compares a file with what was written.

        Raises:
            DataError: it is another file.
        """
        if name not in self.checksums:
            raise DataError(f"{self.path / DESCRIPTION} has no checksum of {name}; {PREPARE_AGAIN}")
        try:
            checksum = sha256_of(self.path / name)
        except OSError as error:
            raise DataError(
                f"{self.path / name} cannot be read ({error.strerror}); {PREPARE_AGAIN}"
            ) from None
        if checksum != self.checksums[name]:
            raise DataError(
                f"{self.path / name} was changed after it was written (its checksum differs); "
                f"restore it from a copy or {PREPARE_AGAIN}"
            )


@dataclass(frozen=True)
class _Version:
    format_version: int


def _check_shared_row(table: pa.Table, shared_rows: int, *, where: str) -> None:
    rows = table.column(SHARED_ROW).to_numpy()
    bad = first_true((rows < 0) | (rows >= shared_rows))
    if bad is not None:
        raise DataError(
            f"{where}, column {SHARED_ROW!r}, row {bad}: {rows[bad]} is outside the {shared_rows} "
            "shared rows of the split"
        )


def _parquet_rows(file: Path, columns: pa.Schema | None) -> int:
    try:
        with pq.ParquetFile(file) as parquet:
            wrong = None if columns is None else same_columns(parquet.schema_arrow, columns)
            rows = parquet.metadata.num_rows
    except FileNotFoundError:
        raise DataError(f"{file} is missing; {PREPARE_AGAIN}") from None
    except (pa.ArrowException, OSError, ValueError):
        raise DataError(f"{file} is broken or cut short; {PREPARE_AGAIN}") from None
    if wrong:
        raise DataError(f"{file} {wrong}; {PREPARE_AGAIN}")
    return rows
