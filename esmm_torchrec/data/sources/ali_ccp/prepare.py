"""The raw Ali-CCP files → a prepared data set.

Impressions are joined to their common rows by number, never by copying. The training split waits
as raw ids in scratch files until all of it is counted and the vocabularies are known; the test
split is encoded as it is read. Threads parse blocks while this one reads, counts and writes, in
the order of the files. Memory holds a few blocks, and what grows with distinct ids and common
rows; nothing grows with impressions.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from esmm_torchrec.choices import checks_choices
from esmm_torchrec.data.counting import SharedRowUse
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, SplitName, impression_columns, shared_columns
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.ali_ccp.fields import COMMON, FIELDS, INDEX, SKELETON, USER, Layout
from esmm_torchrec.data.sources.ali_ccp.files import (
    Archive,
    Folder,
    RawFile,
    common_file,
    locate,
    read_blocks,
    skeleton_file,
)
from esmm_torchrec.data.sources.ali_ccp.lines import (
    BadRow,
    Block,
    ParsedLines,
    array_of,
    parse_block,
    with_values,
)
from esmm_torchrec.data.sources.ali_ccp.shared_rows import CommonRows
from esmm_torchrec.data.sources.ali_ccp.truth import Truth
from esmm_torchrec.data.sources.raw_tables import MAX_EXAMPLES, BadRows
from esmm_torchrec.data.vocabulary import IdCounter, Vocabulary
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
    IdFeature,
)

UnclickedPurchases = Literal["drop", "keep", "error"]

UNCLICKED_CONVERSIONS = "conversions without a click"
"""What such rows are called among the dropped ones."""

BLOCK_BYTES = 16 << 20
_MAX_WORKERS = 8

T = TypeVar("T")


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Block], T], blocks: Iterator[Block], ahead: int
) -> Iterator[tuple[Block, T]]:
    """Results of `work` in the order of the blocks, at most `ahead` of them in memory."""
    waiting: deque[tuple[Block, Future[T]]] = deque()
    try:
        for block in blocks:
            waiting.append((block, pool.submit(work, block)))
            if len(waiting) > ahead:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
    finally:
        for _, result in waiting:
            result.cancel()


def _narrowed(table: pa.Table, features: Sequence[IdFeature]) -> pa.Table:
    """Ids as uint32 if they fit: half the scratch space."""
    for feature in features:
        column = array_of(table, feature.name)
        ids = column.flatten() if feature.multi_valued else column
        highest = pc.call_function("max", [ids]).as_py()
        if highest is not None and highest >= 2**32:
            continue
        ids = ids.cast(pa.uint32())
        if feature.multi_valued:
            ids = with_values(column, ids)
        table = table.set_column(table.column_names.index(feature.name), feature.name, ids)
    return table


def _encoded(
    table: pa.Table, features: Sequence[IdFeature], vocabularies: Mapping[str, Vocabulary]
) -> pa.Table:
    """The table with rows of the embedding tables in place of raw ids."""
    for feature in features:
        column = array_of(table, feature.name)
        vocabulary = vocabularies[feature.table]
        if feature.multi_valued:
            column = with_values(column, pa.array(vocabulary.encode(column.flatten())))
        else:
            mask = column.is_null().to_numpy(False) if column.null_count else None
            column = pa.array(vocabulary.encode(column), mask=mask)
        table = table.set_column(table.column_names.index(feature.name), feature.name, column)
    return table


def _read_scratch(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


@dataclass(frozen=True)
class _Impressions:
    """A block of a skeleton, joined."""

    table: pa.Table
    bad: list[BadRow]
    unclicked_conversions: int
    first_unclicked_conversion: int
    """Its line; 0 if there is none."""


@dataclass
class _Preparation:
    """State of one run; `prepare_ali_ccp` says what it does."""

    writer: PreparedWriter
    pool: ThreadPoolExecutor
    workers: int
    unclicked_purchases: UnclickedPurchases
    bad_rows: BadRows
    block_bytes: int
    min_count: int
    truth: Path | None
    progress: bool
    counters: dict[str, IdCounter] = field(
        default_factory=lambda: {feature.table: IdCounter("integer") for feature in FIELDS}
    )
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    shared_row_use: SharedRowUse = field(default_factory=SharedRowUse)
    """By training impressions."""
    scratch_files: dict[str, list[Path]] = field(
        default_factory=lambda: {"impressions": [], "shared": []}
    )

    def run(self, sources: Mapping[SplitName, Folder | Archive]) -> dict[SplitName, int]:
        """Reads both splits; gives the purchases without a click of each."""
        counts: dict[SplitName, int] = {}
        for split in SPLITS:
            common = self._read_common(sources[split], split)
            counts[split] = self._read_skeleton(sources[split], split, common)
            sources[split].close()
            if split == "train":
                self._count_shared_ids()
                for table, counter in self.counters.items():
                    self.vocabularies[table] = counter.vocabulary(self.min_count)
                    self.writer.write_vocabulary(table, self.vocabularies[table])
                self.counters = {}
                self._encode_training_split()
        return counts

    def _finished(self, table: pa.Table, features: Sequence[IdFeature]) -> pa.Table:
        """What a worker does last: encode if the vocabularies are known."""
        if self.vocabularies:
            return _encoded(table, features, self.vocabularies)
        return _narrowed(table, features)

    def _each_block(
        self, source: Folder | Archive, name: str, work: Callable[[Block], T]
    ) -> Generator[tuple[RawFile, T], None, None]:
        with (
            source.open(name) as file,
            progress_bar(name, file.size, "B", disable=not self.progress) as bar,
        ):
            blocks = read_blocks(file, self.block_bytes)
            for block, result in _in_order(self.pool, work, blocks, self.workers):
                yield file, result
                bar.update(len(block.text))

    def _note_bad(self, split: SplitName, layout: Layout, file: RawFile, bad: list[BadRow]) -> None:
        if not bad:
            return
        allowed = self.bad_rows.skip(len(bad))
        if allowed < len(bad):
            raise self.bad_rows.error(f"{file.path}, line {bad[allowed].line}: {bad[allowed].what}")
        room = MAX_EXAMPLES - len(self.bad_rows.examples)
        # These go into the data set, where no path of this machine belongs.
        examples = [f"{file.name}, line {row.line}: {row.what}" for row in bad[:room]]
        for sentence in examples:
            self.bad_rows.note(sentence)
        self.writer.record_dropped(split, layout.reason, len(bad), examples)

    def _count(self, table: pa.Table) -> None:
        """Counts the ids of training impressions, and how many of these use each shared row."""
        for feature in SKELETON.features:
            column = array_of(table, feature.name)
            self.counters[feature.table].add(column.flatten() if feature.multi_valued else column)
        self.shared_row_use.add(array_of(table, SHARED_ROW).to_numpy())

    def _count_shared_ids(self) -> None:
        """Counts the ids of shared rows once for each training impression that uses the row."""
        first = 0
        for path in self.scratch_files["shared"]:
            table = _read_scratch(path)
            impressions = self.shared_row_use.impressions(first + len(table))[first:]
            first += len(table)
            for feature in COMMON.features:
                column, times = array_of(table, feature.name), impressions
                if feature.multi_valued:
                    times = np.repeat(times, column.value_lengths().to_numpy())
                    column = column.flatten()
                self.counters[feature.table].add(column, times)

    def _store(
        self, split: SplitName, kind: Literal["impressions", "shared"], table: pa.Table
    ) -> None:
        if split == "train":
            if kind == "impressions":
                self._count(table)
            files = self.scratch_files[kind]
            files.append(self.writer.scratch / f"{kind}-{len(files)}.arrow")
            with pa.OSFile(str(files[-1]), "wb") as file, pa.ipc.new_file(file, table.schema) as to:
                to.write_table(table)
        else:
            self._write(split, kind, table)

    def _write(
        self, split: SplitName, kind: Literal["impressions", "shared"], table: pa.Table
    ) -> None:
        if kind == "shared":
            names = shared_columns(self.writer.schema).names
            self.writer.write_shared(split, table.select(names))
        else:
            names = impression_columns(self.writer.schema, self.writer.columns).names
            self.writer.write_impressions(split, table.select(names))

    def _read_common(self, source: Folder | Archive, split: SplitName) -> CommonRows:
        most_bad = self.bad_rows.limit

        def work(block: Block) -> tuple[pa.Table, ParsedLines]:
            parsed = parse_block(block, COMMON, most_bad)
            kept = parsed._replace(table=parsed.table.select([INDEX, USER]))
            features = parsed.table.drop_columns([INDEX])
            return self._finished(features, COMMON.features), kept

        common = CommonRows(common_file(split))
        with contextlib.closing(self._each_block(source, common_file(split), work)) as blocks:
            for file, (table, parsed) in blocks:
                common.path = file.path
                self._note_bad(split, COMMON, file, parsed.bad)
                common.add(parsed.table, parsed.lines)
                self._store(split, "shared", table)
        common.close()
        return common

    def _read_skeleton(self, source: Folder | Archive, split: SplitName, common: CommonRows) -> int:
        def work(block: Block) -> _Impressions:
            return self._join(parse_block(block, SKELETON, self.bad_rows.limit), common)

        unclicked = 0
        with contextlib.ExitStack() as stack:
            truth = None
            if self.truth is not None:
                truth = stack.enter_context(contextlib.closing(Truth(self.truth, split)))
            blocks = self._each_block(source, skeleton_file(split), work)
            for file, impressions in stack.enter_context(contextlib.closing(blocks)):
                self._note_bad(split, SKELETON, file, impressions.bad)
                if impressions.unclicked_conversions:
                    self._note_unclicked(split, file, impressions)
                    unclicked += impressions.unclicked_conversions
                table = impressions.table
                if truth is not None:
                    probabilities = truth.take(array_of(table, SAMPLE_ID).to_numpy())
                    for column, values in probabilities.items():
                        table = table.append_column(column, pa.array(values))
                self._store(split, "impressions", table)
        return unclicked

    def _note_unclicked(self, split: SplitName, file: RawFile, impressions: _Impressions) -> None:
        if self.unclicked_purchases == "error":
            line = impressions.first_unclicked_conversion
            raise DataError(
                f"{file.path}, line {line}: a purchase without a click; "
                "drop such rows or keep them as unclicked with `unclicked_purchases` drop or keep"
            )
        if self.unclicked_purchases == "drop":
            count = impressions.unclicked_conversions
            self.writer.record_dropped(split, UNCLICKED_CONVERSIONS, count)

    def _join(self, parsed: ParsedLines, common: CommonRows) -> _Impressions:
        table, lines, bad = parsed
        shared_row = common.find(array_of(table, INDEX).to_numpy())
        click = array_of(table, CLICK).to_numpy()
        conversion = array_of(table, CONVERSION).to_numpy()
        lost = shared_row < 0
        if lost.any():
            index = array_of(table, INDEX).to_numpy()
            bad = bad + [
                BadRow(int(line), f"{INDEX} {index_of:016x} is not in {common.name}")
                for line, index_of in zip(
                    lines[lost][: self.bad_rows.limit + 1],
                    index[lost][: self.bad_rows.limit + 1],
                    strict=True,
                )
            ]
            bad.sort()
        unclicked = (conversion > click) & ~lost
        keep = ~lost
        if self.unclicked_purchases == "drop":
            keep &= ~unclicked
        table = table.set_column(
            table.column_names.index(CONVERSION), CONVERSION, pa.array(conversion & click)
        ).drop_columns([INDEX])
        table = table.append_column(SHARED_ROW, pa.array(shared_row))
        if not keep.all():
            table = table.filter(pa.array(keep)).combine_chunks()
            shared_row = shared_row[keep]
        table = table.append_column(GROUP_ID, pa.array(common.group_of[shared_row]))
        return _Impressions(
            table=self._finished(table, SKELETON.features),
            bad=bad,
            unclicked_conversions=int(unclicked.sum()),
            first_unclicked_conversion=int(lines[unclicked][0]) if unclicked.any() else 0,
        )

    def _encode_training_split(self) -> None:
        """Scratch files → the training split. Impressions and shared rows are files of their own,
        so a thread for each."""
        stop = threading.Event()
        lock = threading.Lock()
        total = sum(path.stat().st_size for paths in self.scratch_files.values() for path in paths)

        def encode(kind: Literal["impressions", "shared"]) -> None:
            features = (COMMON if kind == "shared" else SKELETON).features
            for path in self.scratch_files[kind]:
                if stop.is_set():
                    return
                size = path.stat().st_size
                table = _read_scratch(path)
                self._write("train", kind, _encoded(table, features, self.vocabularies))
                path.unlink()
                with lock:
                    bar.update(size)

        with progress_bar("encode train", total, "B", disable=not self.progress) as bar:
            running = [self.pool.submit(encode, "shared"), self.pool.submit(encode, "impressions")]
            try:
                for each in running:
                    each.result()
            finally:
                stop.set()


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

    group_id of an impression is its user (field 101); impressions of a common row without a user
    are a group of their own, whose number is negative and made of the row's index.

    Args:
        raw: holds `sample_skeleton_{train,test}.csv` and `common_features_{train,test}.csv`, here
            or one folder down, or `sample_{train,test}.tar.gz`. Its `truth.parquet` (sample_id,
            split, true_ctr, true_cvr) is joined if present.
        out: the folder to make.
        min_count: in how many training impressions an id must occur to have a row of its own.
        max_bad_rows: broken rows to skip, over all files, before giving up.
        unclicked_purchases: what becomes of impressions with a purchase and no click, a fault of
            the logging: "drop" leaves them out, "keep" keeps them as neither clicked nor
            converted, "error" stops.
        block_bytes: text parsed at a time. It has no influence on the result.
        progress: show bars.

    Returns:
        The data set, opened. What was dropped is in its `dropped` and `dropped_rows`.

    Raises:
        DataError: a file is missing, empty or broken; more rows are bad than allowed; `out`
            exists; training has no click or no conversion.
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
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with (
        PreparedWriter(
            out, id_features=FIELDS, columns=columns, source=source, min_count=min_count
        ) as writer,
        ThreadPoolExecutor(max(workers, 2)) as pool,
    ):
        preparation = _Preparation(
            writer=writer,
            pool=pool,
            workers=workers,
            unclicked_purchases=unclicked_purchases,
            bad_rows=BadRows(max_bad_rows),
            block_bytes=block_bytes,
            min_count=min_count,
            truth=truth if truth.exists() else None,
            progress=progress,
        )
        try:
            writer.source["unclicked_conversion_rows"] = preparation.run(sources)
        finally:
            for each in sources.values():
                each.close()
    return PreparedDataSet.open(out)
