"""The prepared data set: the one form between raw logs and batches. Write it, open it, check it.

A folder:

    dataset.json                         what is in it, how it was made, a checksum of each file
    vocabulary/<table>.parquet           raw_id, row, count
    rare/<table>.parquet                 raw_id, count of the ids that have no row
    train/ test/ impressions-*.parquet   labels, ids, weights; one row an impression
    train/ test/ shared-*.parquet        features that many impressions share, one row for all
    days/<day>/                          what `prepare append` added: a data set of its own, whose
                                         files dataset.json names beside those above

An impression's `shared_row` is a row over all shared files of its split, in the order in which
dataset.json lists them. Ids are table rows, 0 (unknown)
to num_embeddings - 1. A missing value of a single-valued feature is null, of a multi-valued one the
empty list. Weights are as in the raw data.

On a disk, a data set is written beside its final name and renamed last. In an object store, its
files have random names and dataset.json is written last. Either way, whatever opens is whole. So is
a day, which belongs to the data set once dataset.json is replaced by one that names it.
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
    """A prepared data set that has been opened: its description is valid."""

    root: Location
    """The folder."""
    fingerprint: str
    """sha256 of dataset.json; as that holds every checksum, it identifies the whole data set."""

    @classmethod
    def open(cls, path: Location | Path | str, *, data_files: bool = True) -> PreparedDataSet:
        """Opens a data set by its description, which says what each file holds.

        On a disk, the presence and the size of each file are checked, too; in a store, a missing
        file is found when it is read. `vocabulary`, `checked_rows` and `verify` look at the values.

        Args:
            path: the folder, or its URI.
            data_files: False if the files of the splits need not be there, as in a copy of the
                description and the vocabularies alone (`data.encoding.copy_preprocessing`).

        Raises:
            DataError: `path` is not a prepared data set, is of another format version, or a file
                is missing or is not what the description says.
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
        """The folder on this machine.

        Raises:
            DataError: it is in a store.
        """
        if self.root.local is None:
            raise DataError(
                f"{self.root} is not on this machine, but this operation needs a mapped copy; "
                "stream it (`read` stream), or copy it to a disk and give the path of the copy"
            )
        return self.root.local

    def description(self) -> bytes:
        """The content of dataset.json.

        Raises:
            OSError: it cannot be read any more.
        """
        return (self.root / DESCRIPTION).read_bytes()

    @checks_choices
    def impression_files(self, split: SplitName) -> list[Path]:
        """Files of the impressions of a split, in the order of their rows."""
        return [self.path / part.file for part in self.splits[split].impression_parts]

    @checks_choices
    def shared_files(self, split: SplitName) -> list[Path]:
        """Files of the shared rows of a split; `shared_row` counts through them in this order."""
        return [self.path / part.file for part in self.splits[split].shared_parts]

    def row_of_ids(self, table: str) -> Vocabulary | HashedIds:
        """What gives the ids of a table their rows.

        Raises:
            DataError: as `vocabulary`.
        """
        of_table = self.statistics.tables[table]
        if of_table.hash_rows is not None:
            return HashedIds(of_table.kind, of_table.hash_rows)
        return self.vocabulary(table)

    def vocabulary(self, table: str) -> Vocabulary:
        """The vocabulary of a table whose ids are not hashed; features that share a table share it.

        Raises:
            DataError: the file cannot be read or is not the one that was written.
        """
        file = self.vocabulary_file(table)
        self.check_checksum(file)
        return Vocabulary.read(self.root / file)

    def rare_ids(self, table: str) -> pa.Table:
        """raw_id and count of the ids of a table that were counted and have no row.

        Raises:
            DataError: as `vocabulary`, or an earlier version of this library made the data set.
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
        """All rows of one kind of a split, block by block, each checked before it is given: the
        checksums of the files, every id in its table's range, labels 0 or 1, none without
        the one before it, `shared_row` in range, every weight and dense value finite.

        Raises:
            DataError: names the file, the column and the row of the first thing that is wrong.
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
        """A row group of a file of a split, from the disk or, in several attempts, from the store.

        Args:
            part: the file.
            group: its place in the file.
            columns: that the file has.
            only: columns to read; None: all.
            use_threads: whether columns are decoded in parallel.

        Raises:
            DataError: the file is missing, broken, cannot be read, or is not what the description
                says.
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
        """Reads every file as `checked_rows` does, the vocabularies, too. Training does it once,
        when it lays the splits out for random access; this is for a data set that was copied.

        Raises:
            DataError: names the file, the column and the row of the first thing that is wrong.
        """
        for split in SPLITS:
            for kind in get_args(RowKind):
                for _ in self.checked_rows(split, kind):
                    pass
        for table in self.vocabulary_tables:
            self.vocabulary(table)

    def check_checksum(self, name: str) -> None:
        """Compares a file with what was written.

        Raises:
            DataError: it is another file.
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
    """What a file of a data set of version 2 holds, by its footer."""
    file = root / name
    return Part(file=name, row_groups=_footer(file), bytes=file.size() or 0)


def _footer(file: Location) -> tuple[int, ...]:
    """Rows of each row group of a Parquet file."""
    with (
        reading(file, PREPARE_AGAIN),
        file.open_input() as source,
        pq.ParquetFile(source) as parquet,
    ):
        return _row_groups(parquet)


def _row_groups(parquet: pq.ParquetFile) -> tuple[int, ...]:
    metadata = parquet.metadata
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
