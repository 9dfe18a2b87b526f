"""Appending impressions to a prepared data set, whose ids keep their rows.

Each call of `append_table` adds one day: a prepared data set of its own in `days/<day>` below the
original one. Then dataset.json is replaced by a version that also lists the files of the day. So
the same folder serves to continue a model on the day alone and to train another one on all days.
"""

from __future__ import annotations

import fcntl
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pyarrow as pa

from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import (
    DAYS,
    DESCRIPTION,
    PREPARE_AGAIN,
    Description,
    Split,
    SplitName,
    Statistics,
)
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.bad_rows import MAX_EXAMPLES
from esmm_torchrec.data.sources.feature_columns import RawReading
from esmm_torchrec.data.sources.raw_ids import IdKind
from esmm_torchrec.data.sources.raw_tables import Frame
from esmm_torchrec.data.sources.spark_tasks import Session
from esmm_torchrec.data.sources.table_columns import TableColumns
from esmm_torchrec.data.sources.table_passes import count_training_rows, write_rows
from esmm_torchrec.data.sources.table_preparation import Preparation
from esmm_torchrec.data.sources.table_rows import TableRows, UnclickedConversions
from esmm_torchrec.data.storage import Location
from esmm_torchrec.data.vocabulary import IdCounter, Vocabulary
from esmm_torchrec.durable import replace_file
from esmm_torchrec.errors import DataError, OptionError


def append_table(
    data_set: Path | str,
    *,
    train: Frame | Sequence[Frame],
    test: Frame | Sequence[Frame] | None = None,
    day: str | None = None,
    engine: Session | None = None,
    progress: bool = False,
) -> PreparedDataSet:
    """Adds impressions to a data set made by `prepare_table`, read in the same way.

    Existing ids keep their rows. An id that has occurred `min_count` times over all days gets the
    next row; in the impressions of earlier days it remains row 0. Dense values are encoded with the
    statistics of the first day. If the process is killed, the data set is unchanged.

    Example::

        today = append_table("prepared", train="2026-11-02.parquet", test="2026-11-03.parquet")
        train(today.path, "runs/2026-11-02", TrainOptions(start_from="runs/2026-11-01"), ranks)

    Args:
        data_set: folder of the data set, or its URI.
        train: training impressions, in the forms that `prepare_table` accepts.
        test: impressions that replace the test split; None keeps the test split.
        day: name of the added day, made of letters, digits and ._-; None numbers it.
        engine: SparkSession whose tasks do the work, as in `prepare_table`.
        progress: show a progress bar.

    Returns:
        The added day, as a data set of its own with the vocabularies of all days. For the data set
        of all days, reopen `data_set`.

    Raises:
        DataError: `data_set` cannot be appended to or already has that day; also for the reasons
            listed in `prepare_table`.
        OptionError: `day` is not a valid folder name.
    """
    root = Location.of(data_set)
    if day is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?<!\.partial)", day):
        raise OptionError(
            f"`day` {day!r} is not a name of letters, digits and ._-, such as 2026-11-02"
        )
    PreparedDataSet.open(root)
    with _locked(root):
        whole = PreparedDataSet.open(root)
        made = _Made.of(whole)
        numbers = (f"{number:04d}" for number in itertools.count(len(whole.days) + 1))
        day = day or next(name for name in numbers if name not in whole.days)
        if day in whole.days:
            raise DataError(f"{root} already has the day {day}; append each day once")
        left = root / DAYS / day / DESCRIPTION
        if root.local is None and left.size() is not None:  # left by a killed process
            left.delete()
        reading = made.reading
        rows = TableRows(
            train,
            test,
            text_format=reading.text_format,
            columns=made.columns,
            unclicked_conversions=made.unclicked_conversions,
            max_bad_rows=made.max_bad_rows,
            first_train_row=made.train_rows,
        )
        preparation = Preparation(
            rows,
            made.columns,
            list_separator=None,
            min_count=1,  # ids that are rare on this day may occur on other days
            features=reading.features,
            group_kinds=made.group_kinds,
        )
        counted = count_training_rows(preparation, engine, progress=progress)
        source = {**whole.source, **rows.files}
        with PreparedWriter(
            root / DAYS / day,
            id_features=whole.schema.id_features,
            dense_features=tuple(whole.statistics.dense),
            columns=whole.columns,
            source=source,
            min_count=whole.min_count,
            tasks=whole.schema.tasks,
            key=made.columns.key,
        ) as writer:
            write_rows(
                writer,
                preparation,
                _grown(whole, counted.vocabularies),
                whole.statistics.dense,
                engine,
                progress=progress,
            )
            if test is None:
                _copy_test(whole, writer)
        added = PreparedDataSet.open(root / DAYS / day)
        together = _together(whole, added, day, new_test=test is not None).encode()
        if root.local is not None:
            replace_file(root.local / DESCRIPTION, together)
        elif PreparedDataSet.open(root).fingerprint != whole.fingerprint:
            raise DataError(f"another process has appended to {root} in the meantime; append again")
        else:
            (root / DESCRIPTION).write_bytes(together)
    return added


@dataclass(frozen=True)
class _Made:
    """Settings with which a data set was made, as recorded in its `source`."""

    columns: TableColumns
    reading: RawReading
    group_kinds: dict[str, IdKind]
    unclicked_conversions: UnclickedConversions
    max_bad_rows: int
    train_rows: int

    @classmethod
    def of(cls, data_set: PreparedDataSet) -> _Made:
        source = data_set.source
        if source.get("kind") != "table":
            raise DataError(
                f"{data_set.root} was not made by 'prepare table', and no other data set can be "
                "appended to; prepare all its days together"
            )
        try:
            return msgspec.convert(source, cls)
        except msgspec.ValidationError as error:
            raise DataError(
                f"{data_set.root} was made by an earlier version of this library and cannot be "
                f"appended to ({error}); {PREPARE_AGAIN}"
            ) from None


@contextmanager
def _locked(root: Location) -> Iterator[None]:
    """Locks a local data set, and removes what a killed process left; a store cannot be locked."""
    if root.local is None:
        yield
        return
    folder = root.local / DAYS
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is appending to {root}; wait until it is done"
            ) from None
        days = PreparedDataSet.open(root).days
        for left in folder.iterdir():
            if left.is_dir() and left.name not in days:
                shutil.rmtree(left)
        yield


def _grown(
    whole: PreparedDataSet, of_day: Mapping[str, Vocabulary | HashedIds]
) -> dict[str, Vocabulary | HashedIds]:
    """Returns the id-to-row mapping of each table over all days; `of_day` has every id of the new
    day."""
    rows_of_ids = {table.name: whole.row_of_ids(table.name) for table in whole.schema.tables}
    for table, known in rows_of_ids.items():
        further = of_day[table]
        if isinstance(known, Vocabulary) and isinstance(further, Vocabulary):
            rare = whole.rare_ids(table)
            counter = IdCounter(known.kind)
            counter.add(rare["raw_id"], rare["count"].to_numpy())
            counter.add(further.raw_ids, further.counts)
            rows_of_ids[table] = known.grown(*counter.counts(), whole.min_count)
    return rows_of_ids


def _copy_test(whole: PreparedDataSet, writer: PreparedWriter) -> None:
    """Copies the test split unchanged; its ids keep their rows."""
    for batch in whole.checked_rows("test", "impressions"):
        writer.write_impressions("test", pa.Table.from_batches([batch]))
    impressions = whole.splits["test"].impressions
    for name in whole.statistics.dense:
        share = whole.statistics.missing[name]["test"]
        writer.record_missing_dense("test", name, round(share * impressions))
    for reason, count in whole.dropped["test"].items():
        writer.record_dropped("test", reason, count)
    unclicked = whole.source["unclicked_conversion_rows"]["test"]
    writer.source["unclicked_conversion_rows"]["test"] = unclicked
    writer.source["files"]["test"] = whole.source["files"].get("test", [])


def _together(
    whole: PreparedDataSet, added: PreparedDataSet, day: str, *, new_test: bool
) -> Description:
    """Returns the description of the data set with the day added."""
    of_day: dict[SplitName, Split] = {
        name: replace(
            split,
            impression_parts=tuple(
                replace(part, file=f"{DAYS}/{day}/{part.file}") for part in split.impression_parts
            ),
        )
        for name, split in added.splits.items()
    }
    before, after = whole.splits["train"], of_day["train"]
    train = Split(
        impressions=before.impressions + after.impressions,
        happened={name: count + after.happened[name] for name, count in before.happened.items()},
        shared_rows=0,
        impression_parts=before.impression_parts + after.impression_parts,
        shared_parts=(),
    )
    last = added if new_test else whole
    dropped = Counter(whole.dropped["train"]) + Counter(added.dropped["train"])
    unclicked, of_source = "unclicked_conversion_rows", dict(added.source)
    of_source[unclicked] = {
        "train": whole.source[unclicked]["train"] + added.source[unclicked]["train"],
        "test": last.source[unclicked]["test"],
    }
    of_source["files"] = {
        "train": [*whole.source["files"]["train"], *added.source["files"]["train"]],
        "test": last.source["files"].get("test", []),
    }
    together = Description(
        source=of_source,
        min_count=whole.min_count,
        schema=added.schema,
        splits={"train": train, "test": of_day["test"] if new_test else whole.splits["test"]},
        columns=whole.columns,
        statistics=_statistics(whole, added, last),
        dropped={"train": dropped, "test": last.dropped["test"]},
        dropped_rows={
            "train": (whole.dropped_rows["train"] + added.dropped_rows["train"])[:MAX_EXAMPLES],
            "test": last.dropped_rows["test"],
        },
        checksums={},
        key=whole.key,
        days=(*whole.days, day),
    )
    named = [part.file for of in together.splits.values() for part in of.impression_parts]
    for table in together.vocabulary_tables:
        named += [together.vocabulary_file(table), together.rare_file(table)]
    below = {f"{DAYS}/{day}/{file}": checksum for file, checksum in added.checksums.items()}
    checksums = {**whole.checksums, **below}
    return replace(together, checksums={file: checksums[file] for file in named})


def _statistics(
    whole: PreparedDataSet, added: PreparedDataSet, last: PreparedDataSet
) -> Statistics:
    """Combines the training statistics of both parts; the test statistics are those of `last`."""
    parts = [(part.statistics, part.splits["train"].impressions) for part in (whole, added)]

    def mean(values: Sequence[float], counts: Sequence[float]) -> float:
        return sum(v * n for v, n in zip(values, counts, strict=True)) / (sum(counts) or 1)

    rows = [count for _, count in parts]
    bags, missing, unknown = {}, {}, {}
    for name in whole.statistics.missing:
        missing[name] = {
            "train": mean([of.missing[name]["train"] for of, _ in parts], rows),
            "test": last.statistics.missing[name]["test"],
        }
    for name in whole.statistics.mean_values_per_bag:
        ids = [of.mean_values_per_bag[name] * count for of, count in parts]
        bags[name] = sum(ids) / sum(rows)
        unknown[name] = {
            "train": mean([of.unknown[name]["train"] for of, _ in parts], ids),
            "test": last.statistics.unknown[name]["test"],
        }
    return replace(added.statistics, mean_values_per_bag=bags, missing=missing, unknown=unknown)
