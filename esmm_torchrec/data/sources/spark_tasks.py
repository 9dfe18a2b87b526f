"""Pieces of rows for Spark tasks, and the replies of the tasks to the driver.

pyspark is imported only where a session is used, and nothing here needs torch.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from esmm_torchrec.errors import DataError, OptionError

Session = Any
"""A pyspark.sql.SparkSession; Any, because pyspark need not be installed."""

MAX_TASKS = 20_000


def session() -> Session:
    """Returns the session of this process: that of spark-submit, or one on all local cores.

    Raises:
        OptionError: pyspark is not installed.
    """
    try:
        from pyspark.sql import SparkSession  # noqa: PLC0415  # pyright: ignore
    except ModuleNotFoundError:
        raise OptionError(
            "`engine` spark needs pyspark and Java 17; pip install 'esmm_torchrec[spark]'"
        ) from None
    # The tasks do not use pandas.
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
    builder = SparkSession.builder.appName("esmm_torchrec")
    if not {"PYSPARK_GATEWAY_PORT", "PYSPARK_SUBMIT_ARGS"} & os.environ.keys():
        # Without spark-submit, which chooses the Python of a cluster, everything is in one JVM, for
        # which Spark's default of 1 GB is too little.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        builder = builder.config("spark.driver.memory", f"{max(1024, memory // 4)}m")
    return builder.getOrCreate()


class Failure(NamedTuple):
    """A user error in a task. The driver raises it, because it knows which came first."""

    sentence: str


def pieces_on(spark: Session, number: int) -> Any:
    """Returns a data frame with a row for each piece; contiguous pieces share a task."""
    return spark.range(0, number, 1, max(1, min(number, MAX_TASKS)))


def numbers_of(batches: Iterable[pa.RecordBatch]) -> Iterator[int]:
    """Yields the numbers of the pieces of a task."""
    for batch in batches:
        yield from batch.column(0).to_pylist()


def states_of(rows: Iterable[Any]) -> list[Any]:
    """Returns the replies of the tasks, in the order of their rows.

    Raises:
        DataError: a task failed.
    """
    states = [pickle.loads(state) for _, state in sorted((row[0], bytes(row[1])) for row in rows)]
    for state in states:
        if isinstance(state, Failure):
            raise DataError(state.sentence)
    return states
