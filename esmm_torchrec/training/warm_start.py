"""Warm start: a run that starts with the weights and the optimiser state of another run.

The data may contain ids that the other run did not have: tables may have more rows, as long as the
known ids keep their rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from esmm_torchrec.checkpoints.files import model_checkpoint
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.errors import OptionError, RunError
from esmm_torchrec.runs.run_folder import RunFolder
from esmm_torchrec.schema import Schema, Table
from esmm_torchrec.training.options import TrainOptions


def source_checkpoint(path: Path, dataset: PreparedDataSet, options: TrainOptions) -> Path:
    """Returns the checkpoint with the model of a run that a new run starts from.

    Raises:
        RunError: the other run has another model or optimiser, no checkpoint yet, or incompatible
            features or vocabularies.
        DataError: the other run's description of its data cannot be read.
    """
    run = RunFolder.open(path)
    differs = run.difference(
        {
            **options.model.to_dict(),
            "sparse_optimizer": options.sparse_optimizer,
            "history_weights": options.history_weights,
        }
    )
    if differs:
        raise RunError(f"{path} has {differs}; give the same option to start from it")
    _check_features(run, dataset)
    checkpoint = model_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise RunError(f"{path} has no checkpoint yet; wait for its first one")
    return checkpoint


def with_table_rows(dataset: PreparedDataSet, options: TrainOptions) -> PreparedDataSet:
    """Returns the data set with the tables enlarged to `table_rows` and to the sizes in the run to
    start from.

    Raises:
        OptionError: `table_rows` names a table that does not exist, or has too few rows for it.
        RunError: the run to start from cannot be read.
    """
    rows = {table.name: table.num_embeddings for table in dataset.schema.tables}
    needed_by = dict.fromkeys(rows, str(dataset.root))
    if options.start_from is not None:
        for table in RunFolder.open(options.start_from).schema.tables:
            if table.num_embeddings > rows.get(table.name, table.num_embeddings):
                rows[table.name] = table.num_embeddings
                needed_by[table.name] = str(options.start_from)
    for name, count in options.table_rows.items():
        if name not in rows:
            raise OptionError(
                f"`table_rows` names the table {name!r}, and {dataset.root} has "
                f"{', '.join(map(repr, rows))}"
            )
        if count < rows[name]:
            raise OptionError(
                f"`table_rows` {name}={count} is too few: {needed_by[name]} has {rows[name]} rows "
                "in this table; give at least as many"
            )
        rows[name] = count
    tables = tuple(Table(name, count) for name, count in rows.items())
    return replace(dataset, schema=replace(dataset.schema, tables=tables))


def _check_features(run: RunFolder, dataset: PreparedDataSet) -> None:
    """Checks that every id known to the run has the same table row in the data."""
    if _without_sizes(run.schema) != _without_sizes(dataset.schema):
        raise _other_data(run, dataset, "has other features than")
    run.check_preprocessing()
    earlier = PreparedDataSet.open(run.preprocessing, data_files=False)
    if earlier.statistics.dense != dataset.statistics.dense:
        raise _other_data(run, dataset, "standardised its dense features differently from")
    for table in run.schema.tables:
        hashed = [of.statistics.tables[table.name].hash_rows for of in (earlier, dataset)]
        if hashed[0] != hashed[1]:
            raise _other_data(run, dataset, f"gives ids of table {table.name!r} other rows than")
        if hashed[0] is not None:
            continue
        known = earlier.vocabulary(table.name).raw_ids
        here = dataset.vocabulary(table.name).raw_ids
        if known.type != here.type or not here.slice(0, len(known)).equals(known):
            raise _other_data(run, dataset, f"gives ids of table {table.name!r} other rows than")


def _without_sizes(schema: Schema) -> Schema:
    tables = tuple(replace(table, num_embeddings=1) for table in schema.tables)
    return replace(schema, tables=tables)


def _other_data(run: RunFolder, dataset: PreparedDataSet, differs: str) -> RunError:
    return RunError(
        f"{dataset.root} {differs} the data of {run.path}; to start from that run, give data whose "
        "vocabularies begin with those of the run"
    )
