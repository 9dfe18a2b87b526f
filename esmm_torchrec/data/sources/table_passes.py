"""The two passes over the rows of a table, in this process or in Spark tasks: the first counts
training rows, the second encodes and writes all rows."""

from __future__ import annotations

from collections.abc import Mapping

from tqdm import tqdm

from esmm_torchrec.data.dense import DenseTransform
from esmm_torchrec.data.encoding import RowEncoder
from esmm_torchrec.data.hashing import HashedIds
from esmm_torchrec.data.prepared_writer import PreparedWriter
from esmm_torchrec.data.sources.spark_counting import count_table
from esmm_torchrec.data.sources.spark_tasks import Session
from esmm_torchrec.data.sources.spark_writing import write_table_on_spark
from esmm_torchrec.data.sources.table_blocks import Counted, write_table
from esmm_torchrec.data.sources.table_preparation import Preparation
from esmm_torchrec.data.vocabulary import Vocabulary
from esmm_torchrec.progress import progress_bar


def count_training_rows(
    preparation: Preparation, engine: Session | None, *, progress: bool
) -> Counted:
    """Counts the training rows, and starts again if lists or texts appear unexpectedly."""
    preparation.rows.find_last_train_time()
    with progress_bar("count train", None, "rows", disable=not progress) as bar:
        while (counted := _try_to_count(preparation, engine, bar)) is None:
            bar.reset()
    preparation.check_test_kinds()
    return counted


def _try_to_count(preparation: Preparation, engine: Session | None, bar: tqdm) -> Counted | None:
    if engine is not None:
        return count_table(engine, preparation)
    count = preparation.count_rows(preparation.rows, bar.update)
    if count is None:
        return None
    vocabularies = {
        table: counter.vocabulary(preparation.min_count)
        for table, counter in count.counters.items()
    }
    return Counted(vocabularies | preparation.hashed, count.fitter)


def write_rows(
    writer: PreparedWriter,
    preparation: Preparation,
    vocabularies: Mapping[str, Vocabulary | HashedIds],
    dense: Mapping[str, DenseTransform],
    engine: Session | None,
    *,
    progress: bool,
) -> None:
    """Writes the vocabularies, by table, and all rows; the transforms encode dense values, by
    feature."""
    for table, vocabulary in vocabularies.items():
        writer.write_vocabulary(table, vocabulary)
    for name, transform in dense.items():
        writer.record_dense(name, transform)
    encoder = RowEncoder(preparation.features, vocabularies, dense, tasks=writer.schema.tasks)
    if engine is not None:
        write_table_on_spark(engine, writer, preparation.rows, encoder, dense)
    else:
        write_table(writer, preparation.rows, encoder, progress=progress)
