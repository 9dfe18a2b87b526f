"""Preparation of the raw Ali-CCP files.

Impressions are joined to their common rows by number, without copying. The training split is stored
as raw ids in scratch files until it has been counted and the vocabularies are known; the test split
is encoded as it is read. Threads parse blocks while the main thread reads, counts and writes, in
the order of the files. Memory holds a few blocks and grows with the distinct ids and common rows,
not with the impressions.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.data.in_order import in_order
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import (
    SPLITS,
    SplitName,
    array_of,
    impression_columns,
    shared_columns,
)
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.ali_ccp.fields import COMMON, FIELDS, INDEX, SKELETON, USER, Layout
from esmm_torchrec.data.sources.ali_ccp.files import (
    Archive,
    Folder,
    RawFile,
    locate,
    read_blocks,
)
from esmm_torchrec.data.sources.ali_ccp.lines import (
    BadRow,
    Block,
    ParsedLines,
    parse_block,
)
from esmm_torchrec.data.sources.ali_ccp.shared_rows import CommonRows
from esmm_torchrec.data.sources.ali_ccp.truth import Truth
from esmm_torchrec.data.sources.ali_ccp.waiting_rows import FEATURES, WaitingRows, encoded
from esmm_torchrec.data.sources.bad_rows import BadRows
from esmm_torchrec.data.split_writer import RowKind
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.errors import DataError, OptionError
from esmm_torchrec.progress import progress_bar
from esmm_torchrec.schema import (
    CLICK,
    CONVERSION,
    GROUP_ID,
    SAMPLE_ID,
    SHARED_ROW,
    TRUE_CTR,
    TRUE_CVR,
)

UnclickedPurchases = Literal["drop", "keep", "error"]

UNCLICKED_CONVERSIONS = "conversions without a click"
"""Reason under which such rows are recorded as dropped."""

BLOCK_BYTES = 16 << 20


class _Rows(NamedTuple):
    """Usable rows of a block."""

    table: pa.Table
    """Common rows with their index and group, or impressions joined to common rows."""
    lines: np.ndarray
    """int64: the lines of common rows; for impressions, the lines of purchases without a click."""
    bad: list[BadRow]


@dataclass
class _Preparation:
    """State of one call of `prepare_ali_ccp`."""

    writer: PreparedWriter
    unclicked_purchases: UnclickedPurchases
    bad_rows: BadRows
    block_bytes: int
    min_count: int
    truth: Path | None
    progress: bool
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)

    def run(self, sources: Mapping[SplitName, Folder | Archive]) -> dict[SplitName, int]:
        """Prepares both splits; returns the number of purchases without a click in each."""
        waiting = WaitingRows(self.writer.scratch)
        train = self._read_split(sources["train"], "train", waiting.add)
        self.vocabularies = waiting.vocabularies(self.min_count)
        for table, vocabulary in self.vocabularies.items():
            self.writer.write_vocabulary(table, vocabulary)
        total = waiting.num_rows
        with progress_bar("encode train", total, "rows", disable=not self.progress) as bar:
            for kind in FEATURES:
                for table in in_order(partial(self._encoded, kind), waiting.take(kind)):
                    self._write("train", kind, table)
                    bar.update(len(table))
        test = self._read_split(sources["test"], "test", partial(self._write, "test"))
        return {"train": train, "test": test}

    def _encoded(self, kind: RowKind, table: pa.Table) -> pa.Table:
        """Encodes a table if the vocabularies are known; otherwise returns it unchanged."""
        return encoded(table, kind, self.vocabularies) if self.vocabularies else table

    def _write(self, split: SplitName, kind: RowKind, table: pa.Table) -> None:
        if kind == "shared":
            names = shared_columns(self.writer.schema).names
            self.writer.write_shared(split, table.select(names))
        else:
            names = impression_columns(self.writer.schema, self.writer.columns).names
            self.writer.write_impressions(split, table.select(names))

    def _read_split(
        self,
        source: Folder | Archive,
        split: SplitName,
        store: Callable[[RowKind, pa.Table], None],
    ) -> int:
        """Passes the rows of a split to `store`; returns the number of purchases without a
        click."""
        with contextlib.closing(source):
            common = self._read_common(source, split, store)
            return self._read_skeleton(source, split, store, common)

    def _read(
        self,
        source: Folder | Archive,
        split: SplitName,
        layout: Layout,
        finish: Callable[[ParsedLines], _Rows],
    ) -> Generator[tuple[RawFile, _Rows], None, None]:
        """Yields each block of a file after threads have applied `finish` to it; counts its bad
        rows."""

        def work(block: Block) -> tuple[_Rows, int]:
            return finish(parse_block(block, layout, self.bad_rows.limit)), len(block.text)

        name = layout.file(split)
        with (
            source.open(name) as file,
            progress_bar(name, file.size, "B", disable=not self.progress) as bar,
            contextlib.closing(in_order(work, read_blocks(file, self.block_bytes))) as blocks,
        ):
            for rows, size in blocks:
                self._note_bad(split, layout, file, rows.bad)
                yield file, rows
                bar.update(size)

    def _note_bad(self, split: SplitName, layout: Layout, file: RawFile, bad: list[BadRow]) -> None:
        noted = len(self.bad_rows.examples)
        # Messages are stored in the data set and must not contain a path of this machine.
        self.bad_rows.skip(
            len(bad), lambda row: f"{file.name}, line {bad[row].line}: {bad[row].what}"
        )
        if bad:
            examples = self.bad_rows.examples[noted:]
            self.writer.record_dropped(split, layout.reason, len(bad), examples)

    def _read_common(
        self,
        source: Folder | Archive,
        split: SplitName,
        store: Callable[[RowKind, pa.Table], None],
    ) -> CommonRows:
        parts: list[tuple[RawFile, pa.Table, np.ndarray]] = []
        with contextlib.closing(self._read(source, split, COMMON, self._grouped)) as blocks:
            for file, rows in blocks:
                parts.append((file, rows.table.select([INDEX, GROUP_ID]), rows.lines))
                store("shared", rows.table.drop_columns([INDEX, GROUP_ID]))
        files, keys, lines = zip(*parts, strict=True)
        return CommonRows(files[0], pa.concat_tables(keys), np.concatenate(lines))

    def _grouped(self, parsed: ParsedLines) -> _Rows:
        table, lines, bad = parsed
        index, user = array_of(table, INDEX).to_numpy(), array_of(table, USER)
        # Users have no negative ids: a row without a user is a group of its own.
        alone = (index | np.uint64(1 << 63)).view(np.int64)
        group = np.where(user.is_valid().to_numpy(False), user.fill_null(0).to_numpy(), alone)
        table = table.append_column(GROUP_ID, pa.array(group))
        return _Rows(self._encoded("shared", table), lines, bad)

    def _read_skeleton(
        self,
        source: Folder | Archive,
        split: SplitName,
        store: Callable[[RowKind, pa.Table], None],
        common: CommonRows,
    ) -> int:
        unclicked = 0
        with contextlib.ExitStack() as stack:
            truth = None
            if self.truth is not None:
                truth = stack.enter_context(contextlib.closing(Truth(self.truth, split)))
            join = partial(self._join, common)
            blocks = self._read(source, split, SKELETON, join)
            for file, rows in stack.enter_context(contextlib.closing(blocks)):
                if len(rows.lines):
                    self._note_unclicked(split, file, rows.lines)
                    unclicked += len(rows.lines)
                table = rows.table
                if truth is not None:
                    probabilities = truth.take(array_of(table, SAMPLE_ID).to_numpy())
                    for column, values in probabilities.items():
                        table = table.append_column(column, pa.array(values))
                store("impressions", table)
        return unclicked

    def _note_unclicked(self, split: SplitName, file: RawFile, lines: np.ndarray) -> None:
        if self.unclicked_purchases == "error":
            raise DataError(
                f"{file.path}, line {lines[0]}: a purchase without a click; "
                "drop such rows or keep them as unclicked with `unclicked_purchases` drop or keep"
            )
        if self.unclicked_purchases == "drop":
            self.writer.record_dropped(split, UNCLICKED_CONVERSIONS, len(lines))

    def _join(self, common: CommonRows, parsed: ParsedLines) -> _Rows:
        table, lines, bad = parsed
        index = array_of(table, INDEX).to_numpy()
        click, conversion = (array_of(table, name).to_numpy() for name in (CLICK, CONVERSION))
        shared_row = common.find(index)
        lost = shared_row < 0
        if lost.any():
            named = zip(lines[lost].tolist(), index[lost], strict=True)
            bad = bad + [
                BadRow(line, f"{INDEX} {of_line:016x} is not in {common.name}")
                for line, of_line in itertools.islice(named, self.bad_rows.limit + 1)
            ]
            bad.sort()
        unclicked = (conversion > click) & ~lost
        keep = ~(lost | unclicked) if self.unclicked_purchases == "drop" else ~lost
        columns = dict(zip(table.column_names, table.columns, strict=True))
        del columns[INDEX]
        columns |= {CONVERSION: conversion & click, SHARED_ROW: shared_row}
        table = pa.table(columns)
        if not keep.all():
            table = table.filter(pa.array(keep)).combine_chunks()
        group = common.group_of[shared_row[keep]]
        table = table.append_column(GROUP_ID, pa.array(group))
        return _Rows(self._encoded("impressions", table), lines[unclicked], bad)


@checks_choices
def prepare_ali_ccp(
    raw: Path | str,
    out: Path | str,
    *,
    min_count: int = 10,
    max_bad_rows: int = 0,
    unclicked_purchases: UnclickedPurchases = "drop",
    block_bytes: int = BLOCK_BYTES,
    progress: bool = False,
) -> PreparedDataSet:
    """Prepares the raw Ali-CCP files of the folder `raw` into the new folder `out`.

    The group_id of an impression is its user (field 101). The impressions of a common row without a
    user form their own group, with a negative number derived from the index of the row.

    Args:
        raw: folder of `sample_skeleton_{train,test}.csv` and `common_features_{train,test}.csv`,
            directly or one folder down, or of `sample_{train,test}.tar.gz`. A `truth.parquet` in it
            (sample_id, split, true_ctr, true_cvr) is joined if present.
        out: folder to create.
        min_count: minimum number of training impressions in which an id must occur to have its own
            row.
        max_bad_rows: maximum number of bad rows, over all files, to skip.
        unclicked_purchases: treatment of impressions with a purchase but no click, a logging fault:
            "drop" leaves them out, "keep" keeps them as neither clicked nor converted, "error"
            raises.
        block_bytes: size of the text parsed at a time. It does not influence the result.
        progress: show progress bars.

    Returns:
        The data set, opened. Its `dropped` and `dropped_rows` describe what was dropped.

    Raises:
        DataError: a file is missing, empty or broken; more rows are bad than allowed; `out` exists;
            training has no click or no conversion.
        OptionError: `min_count` is below 1 or `max_bad_rows` below 0.
    """
    raw, out = Path(raw), Path(out)
    if min_count < 1:
        raise OptionError(f"`min_count` must be 1 or more, not {min_count}")
    if max_bad_rows < 0:
        raise OptionError(f"`max_bad_rows` must be 0 or more, not {max_bad_rows}")
    if not raw.is_dir():
        raise DataError(f"{raw} is not a folder; name the one that holds the raw Ali-CCP files")
    sources: dict[SplitName, Folder | Archive] = {split: locate(raw, split) for split in SPLITS}
    truth = raw / "truth.parquet"
    columns = [GROUP_ID]
    files = [name for source in sources.values() for name in source.names]
    if truth.exists():
        Truth.open(truth).close()
        columns += [TRUE_CTR, TRUE_CVR]
        files.append(truth.name)
    source: dict[str, Any] = {
        "kind": "ali-ccp",
        "files": files,
        "max_bad_rows": max_bad_rows,
        "unclicked_purchases": unclicked_purchases,
    }
    with PreparedWriter(
        out, id_features=FIELDS, columns=columns, source=source, min_count=min_count
    ) as writer:
        preparation = _Preparation(
            writer=writer,
            unclicked_purchases=unclicked_purchases,
            bad_rows=BadRows(max_bad_rows),
            block_bytes=block_bytes,
            min_count=min_count,
            truth=truth if truth.exists() else None,
            progress=progress,
        )
        writer.source["unclicked_conversion_rows"] = preparation.run(sources)
    return PreparedDataSet.open(out)
