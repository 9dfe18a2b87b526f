"""The prepared data set, the format between raw logs and batches: opening and checking it.

It is a folder:

    dataset.json                         content, origin, and a checksum of each file
    vocabulary/<table>.parquet           raw_id, row, count
    rare/<table>.parquet                 raw_id, count; ids without a row
    train/ test/ impressions-*.parquet   labels, ids, weights; one row per impression
    train/ test/ shared-*.parquet        features that many impressions share, stored once
    days/<day>/                          added by `prepare append`: a data set of its own, whose
                                         files dataset.json lists along with those above

The `shared_row` of an impression is a position across all shared files of its split, in the
order of dataset.json. Ids are table rows, from 0 (unknown) to num_embeddings - 1. A missing value
is null in a single-valued feature and an empty list in a multi-valued one. Weights are as in
the raw data.

On a disk, a data set is written under a temporary name and renamed at the end. In an object store,
its files have random names and dataset.json is written last. Either way, a data set that can be
opened is complete. So is a day, which belongs to the data set once dataset.json lists it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared_form import (
    DESCRIPTION,
    PREPARE_AGAIN,
    READABLE_VERSIONS,
    SPLITS,
    Description,
    Part,
    RowKind,
    SplitName,
    check_values,
    impression_columns,
    partial_folder,
    refuse,
    same_columns,
    shared_columns,
)
from esmm_torchrec.data.storage import Location, reading
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError
from esmm_torchrec.schema import SHARED_ROW


@dataclass(frozen=True, kw_only=True)
class PreparedDataSet(Description):
    """An open prepared data set, whose description is valid."""

    root: Location
    """Folder of the data set."""
    fingerprint: str
    """SHA-256 of dataset.json, which contains every checksum and so identifies the data set."""

    @classmethod
    def open(cls, path: Location | Path | str, *, data_files: bool = True) -> PreparedDataSet:
        """Opens a data set by its description, which lists the content of each file.

        On a disk, the presence and the size of each file are also checked; in a store, a missing
        file is detected when it is read. `vocabulary`, `checked_rows` and `verify` check values.

        Args:
            path: the folder, or its URI.
            data_files: False if the files of the splits may be absent, as in a copy of only the
                description and the vocabularies (`data.encoding.copy_preprocessing`).

        Raises:
            DataError: `path` is not a prepared data set or has another format version; or a file is
                missing or differs from the description.
        """
        root = Location.of(path)
        try:
            content = (root / DESCRIPTION).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            hint = "create one with 'esmm-torchrec prepare'"
            if root.local is not None and partial_folder(root.local).exists():
                hint = f"its preparation was interrupted: {PREPARE_AGAIN}"
            raise DataError(
                f"{root} is not a prepared data set ({DESCRIPTION} is missing); {hint}"
            ) from None
        except OSError as error:
            raise DataError(
                f"{root / DESCRIPTION} cannot be read ({error}); check the address and the "
                "permissions"
            ) from None
        data_set = cls._decode(root, content, data_files=data_files)
        if root.local is not None:
            data_set._check_vocabularies()
            if data_files:
                data_set._check_sizes()
        return data_set

    @classmethod
    def _decode(cls, root: Location, content: bytes, *, data_files: bool) -> PreparedDataSet:
        def part_of(name: str) -> Part | None:
            return _part_of(root, name) if data_files else None

        try:
            version = msgspec.json.decode(content, type=_Version).format_version
            if version in READABLE_VERSIONS:
                described = Description.decode(content, part_of)
                return cls(
                    **{field.name: getattr(described, field.name) for field in fields(described)},
                    root=root,
                    fingerprint=hashlib.sha256(content).hexdigest(),
                )
        except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).replace("`", "'")
            raise DataError(f"{root / DESCRIPTION} is broken ({reason}); {PREPARE_AGAIN}") from None
        raise DataError(
            f"{root} is a prepared data set of format version {version}, but this library reads "
            f"versions {' and '.join(map(str, READABLE_VERSIONS))}; {PREPARE_AGAIN}"
        )

    @property
    def path(self) -> Path:
        """Folder of the data set on this machine.

        Raises:
            DataError: the data set is in a store.
        """
        if self.root.local is None:
            raise DataError(
                f"{self.root} is not on this machine, but this operation needs a mapped copy; "
                "stream it (`read` stream), or copy it to a disk and give the path of the copy"
            )
        return self.root.local

    def description(self) -> bytes:
        """Returns the content of dataset.json.

        Raises:
            OSError: the file can no longer be read.
        """
        return (self.root / DESCRIPTION).read_bytes()

    @checks_choices
    def impression_files(self, split: SplitName) -> list[Path]:
        """Returns the files of a split's impressions, in row order."""
        return [self.path / part.file for part in self.splits[split].impression_parts]

    @checks_choices
    def shared_files(self, split: SplitName) -> list[Path]:
        """Returns the files of a split's shared rows; `shared_row` is a position across them."""
        return [self.path / part.file for part in self.splits[split].shared_parts]

    def row_of_ids(self, table: str) -> Vocabulary | HashedIds:
        """Returns the mapping from a table's raw ids to its rows.

        Raises:
            DataError: same as `vocabulary`.
        """
        of_table = self.statistics.tables[table]
        if of_table.hash_rows is not None:
            return HashedIds(of_table.kind, of_table.hash_rows)
        return self.vocabulary(table)

    def vocabulary(self, table: str) -> Vocabulary:
        """Returns the vocabulary of a table whose ids are not hashed; features that share a table
        share it.

        Raises:
            DataError: the file cannot be read, or was changed after it was written.
        """
        file = self.vocabulary_file(table)
        self.check_checksum(file)
        return Vocabulary.read(self.root / file)

    def rare_ids(self, table: str) -> pa.Table:
        """Returns raw_id and count of a table's ids that were counted but have no row.

        Raises:
            DataError: same as `vocabulary`; or the data set is from an earlier version of this
                library.
        """
        file = self.rare_file(table)
        self.check_checksum(file)
        return Vocabulary.read_rare(self.root / file)

    @property
    def impression_columns(self) -> pa.Schema:
        """Names and types of the columns of the impression files."""
        return impression_columns(self.schema, self.columns)

    @property
    def shared_columns(self) -> pa.Schema:
        """Names and types of the columns of the shared files."""
        return shared_columns(self.schema)

    def _check_vocabularies(self) -> None:
        for table in self.vocabulary_tables:
            file = self.root / self.vocabulary_file(table)
            rows, expected = sum(_footer(file)), self.schema.table(table).num_embeddings - 1
            if rows != expected:
                raise DataError(
                    f"{file} has {rows} ids, but {DESCRIPTION} says {expected}; {PREPARE_AGAIN}"
                )

    def _check_sizes(self) -> None:
        for split in self.splits.values():
            for part in (*split.impression_parts, *split.shared_parts):
                file = self.root / part.file
                size = file.size()
                if size is None:
                    raise DataError(f"{file} is missing; {PREPARE_AGAIN}")
                if size != part.bytes:
                    raise _cut_short(file, size, part)

    @checks_choices
    def checked_rows(self, split: SplitName, kind: RowKind) -> Iterator[pa.RecordBatch]:
        """Yields all rows of one kind of a split in blocks, after checking them: checksums of the
        files, ids in the range of their table, labels 0 or 1 and none without the one before it,
        `shared_row` in range, weights and dense values finite.

        Raises:
            DataError: a check failed; the message names the file, the column and the row.
        """
        expected = self.impression_columns if kind == "impressions" else self.shared_columns
        of_split = self.splits[split]
        parts = of_split.impression_parts if kind == "impressions" else of_split.shared_parts
        for part in parts:
            self.check_checksum(part.file)
            for group in range(len(part.row_groups)):
                table = self.read_group(part, group, expected, use_threads=True)
                where = f"{self.root / part.file}, row group {group}"
                check_values(table, self.schema, expected, where=where)
                if SHARED_ROW in expected.names:
                    rows, total = table.column(SHARED_ROW).to_numpy(), of_split.shared_rows
                    outside = f"{{}} is outside the {total} shared rows of the split"
                    bad = (rows < 0) | (rows >= total)
                    refuse(bad, outside, rows, where=where, column=SHARED_ROW)
                yield from table.to_batches()

    def read_group(
        self,
        part: Part,
        group: int,
        columns: pa.Schema,
        *,
        only: Sequence[str] | None = None,
        use_threads: bool = False,
    ) -> pa.Table:
        """Reads a row group of a file, with retries if it is in a store.

        Args:
            part: the file.
            group: index of the row group.
            columns: expected columns of the file.
            only: columns to read; None: all.
            use_threads: whether to decode columns in parallel.

        Raises:
            DataError: the file is missing, broken or unreadable, or differs from the description.
        """
        file = self.root / part.file

        def read() -> pa.Table:
            with file.filesystem.open_input_file(file.path) as source:
                if source.size() != part.bytes:
                    raise _cut_short(file, source.size(), part)
                with pq.ParquetFile(
                    source, pre_buffer=True, page_checksum_verification=True
                ) as parquet:
                    wrong, rows = same_columns(parquet.schema_arrow, columns), _row_groups(parquet)
                    if wrong:
                        raise DataError(f"{file} {wrong}; {PREPARE_AGAIN}")
                    if rows != part.row_groups:
                        raise DataError(
                            f"{file} has {sum(rows)} rows in {len(rows)} row groups, but "
                            f"{DESCRIPTION} says {part.rows} in {len(part.row_groups)}; "
                            f"{PREPARE_AGAIN}"
                        )
                    return parquet.read_row_group(group, columns=only, use_threads=use_threads)

        remedy = f"once it can be read, resume the run from its last checkpoint, or {PREPARE_AGAIN}"
        with reading(file, remedy):
            return file.retried(read)

    def verify(self) -> None:
        """Checks every file, as `checked_rows` does, and the vocabularies. Training does so when it
        makes the mapped copy; use this method for a data set that was copied.

        Raises:
            DataError: a check failed; the message names the file, the column and the row.
        """
        for split in SPLITS:
            for kind in get_args(RowKind):
                for _ in self.checked_rows(split, kind):
                    pass
        for table in self.vocabulary_tables:
            self.vocabulary(table)

    def check_checksum(self, name: str) -> None:
        """Compares the checksum of a file with the one recorded when it was written.

        Raises:
            DataError: they differ, the file cannot be read, or no checksum was recorded.
        """
        if name not in self.checksums:
            raise DataError(f"{self.root / DESCRIPTION} has no checksum of {name}; {PREPARE_AGAIN}")
        file = self.root / name
        with reading(file, PREPARE_AGAIN):
            checksum = file.sha256()
        if checksum != self.checksums[name]:
            raise DataError(
                f"{file} was changed after it was written (its checksum differs); "
                f"restore it from a copy or {PREPARE_AGAIN}"
            )


@dataclass(frozen=True)
class _Version:
    format_version: int


def _cut_short(file: Location, size: int, part: Part) -> DataError:
    return DataError(
        f"{file} has {size} bytes, but {DESCRIPTION} says {part.bytes}: it is broken or was cut "
        f"short; restore it from a copy or {PREPARE_AGAIN}"
    )


def _part_of(root: Location, name: str) -> Part:
    """Returns the summary of a file of a version 2 data set, from its Parquet footer."""
    file = root / name
    return Part(file=name, row_groups=_footer(file), bytes=file.size() or 0)


def _footer(file: Location) -> tuple[int, ...]:
    """Returns the number of rows in each row group of a Parquet file."""
    with (
        reading(file, PREPARE_AGAIN),
        file.open_input() as source,
        pq.ParquetFile(source) as parquet,
    ):
        return _row_groups(parquet)


def _row_groups(parquet: pq.ParquetFile) -> tuple[int, ...]:
    metadata = parquet.metadata
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
