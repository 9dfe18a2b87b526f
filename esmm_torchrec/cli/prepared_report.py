"""Summary of a prepared data set, which the `prepare` commands print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote

from esmm_torchrec.cli.terminal import aligned, percentage
from esmm_torchrec.data.prepared import PreparedDataSet
from esmm_torchrec.data.prepared_form import SPLITS, SplitName
from esmm_torchrec.schema import IdFeature

MIN_ROWS_FOR_RANKS = 500_000
"""Number of training rows from which two ranks are suggested. Two ranks start some seconds later
than one process (benchmarks/ranks_by_rows.py) and train 1.3 times as fast
(benchmarks/two_ranks.py); with fewer rows, the slower start does not pay off."""


def report(
    data_set: PreparedDataSet, *, unclicked_conversions: str, continues: bool = False
) -> str:
    """Summarises counts, dropped rows, tables, missing and unknown values, and says how to train.

    Args:
        data_set: a new data set; its `source` has "unclicked_conversion_rows" by split.
        unclicked_conversions: how those rows were treated.
        continues: whether to suggest continuing a run on earlier data.
    """
    schema = data_set.schema
    columns = {name: _counts(data_set, name, unclicked_conversions) for name in SPLITS}
    labels = dict.fromkeys(label for name in SPLITS for label in columns[name])
    counts = [
        ["", *SPLITS],
        *([label, *(columns[name].get(label, "0") for name in SPLITS)] for label in labels),
    ]
    statistics = data_set.statistics
    tables = [["table", "rows", "distinct ids", "id features"]]
    for table in schema.tables:
        features = [feature for feature in schema.id_features if feature.table == table.name]
        tables.append(
            [
                table.name,
                f"{table.num_embeddings:,}",
                f"{statistics.tables[table.name].distinct_ids:,}"
                if table.name in data_set.vocabulary_tables
                else "hashed",
                ", ".join(map(_described, features)),
            ]
        )

    def shares(of_splits: Mapping[SplitName, float]) -> list[str]:
        return [f"{of_splits[name]:.1%}" for name in SPLITS]

    missing = [f"missing in {name}" for name in SPLITS]
    ids = [["id feature", *missing, *(f"unknown in {name}" for name in SPLITS)]]
    for feature in schema.id_features:
        of_feature = statistics.missing[feature.name], statistics.unknown[feature.name]
        ids.append([feature.name, *shares(of_feature[0]), *shares(of_feature[1])])
    sections = [aligned(counts), aligned(tables), aligned(ids)]
    if schema.dense_features:
        dense = [["dense feature", "method", "mean", "std", *missing]]
        for name, of in statistics.dense.items():
            numbers = [f"{of.mean:.6g}", f"{of.std:.6g}"]
            dense.append([name, of.method, *numbers, *shares(statistics.missing[name])])
        sections.append(aligned(dense))
    examples = [sentence for name in SPLITS for sentence in data_set.dropped_rows[name]]
    if examples:
        sections.append(["skipped, the first of them:", *(f"  {text}" for text in examples)])
    out, run = quote(str(data_set.root)), quote(str(Path("runs", Path(data_set.root.path).name)))
    many = data_set.splits["train"].impressions >= MIN_ROWS_FOR_RANKS
    launcher = "torchrun --nproc-per-node 2 -m esmm_torchrec" if many else "esmm-torchrec"
    command = f"{launcher} train --data {out} --out {run}"
    never = [name for name, count in data_set.splits["train"].happened.items() if not count]
    if never:
        sections.append([f"warning: the training split has no {' or '.join(never)} to learn from"])
        command += " --method ctr"
    leaked = data_set.source.get("files_of_both_splits", [])
    if leaked:
        sections.append(
            [
                f"warning: {leaked[0]} is both a training and a test file, so the metrics of the "
                "test split are too optimistic"
            ]
        )
    forms = data_set.source.get("text_forms", [])
    sections.append(
        [
            *(f"text was read with {form}" for form in forms),
            f"prepared data set: {data_set.root}",
            f"next: {command}{' --from EARLIER_RUN' if continues else ''}",
        ]
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def _counts(
    data_set: PreparedDataSet, name: SplitName, unclicked_conversions: str
) -> dict[str, str]:
    """Returns the counts of a split by label, dropped rows last."""
    split, tasks = data_set.splits[name], data_set.schema.tasks
    counts = {"impressions": f"{split.impressions:,}"}
    for task in tasks:
        happened = split.happened[task.name]
        space = split.impressions if task.given is None else split.happened[task.given]
        rate = f"{task.name} of {task.given or 'impressions'}"
        counts[f"{task.name}s"] = f"{happened:,}"
        counts[{"ctr": "CTR", "cvr": "CVR of clicks"}.get(task.rate, rate)] = percentage(
            happened, space
        )
    if data_set.schema.has_shared_features:
        counts["shared rows"] = f"{split.shared_rows:,}"
    unclicked = data_set.source["unclicked_conversion_rows"][name]
    counts[f"{tasks.out_of_order} ({unclicked_conversions})"] = f"{unclicked:,}"
    for reason, rows in data_set.dropped[name].items():
        counts[f"dropped: {reason}"] = f"{rows:,}"
    return counts


def _described(feature: IdFeature) -> str:
    notes = [
        note
        for note, holds in (("list", feature.multi_valued), ("weighted", feature.weighted))
        if holds
    ]
    return f"{feature.name} ({', '.join(notes)})" if notes else feature.name
