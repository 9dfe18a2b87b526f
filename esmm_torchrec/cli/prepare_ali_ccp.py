"""esmm-torchrec prepare ali-ccp: the raw Ali-CCP files → a prepared data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from esmm_torchrec.data.ali_ccp import prepare_ali_ccp
from esmm_torchrec.data.prepared import SPLITS, PreparedDataSet


@dataclass(frozen=True)
class Options:
    """Turn the raw Ali-CCP files into a prepared data set."""

    raw: tyro.conf.Positional[Path]
    """Folder that holds sample_skeleton_{train,test}.csv and common_features_{train,test}.csv, or
    sample_{train,test}.tar.gz. Its truth.parquet is joined if present."""

    out: tyro.conf.Positional[Path]
    """Folder to make."""

    min_count: int = 10
    """How often an id must occur in training to have an embedding of its own; rarer ids share
    one. Ids of the common features count once for each common row."""

    max_bad_rows: int = 0
    """Broken rows to skip, over all files, before giving up. What is skipped is reported."""

    unclicked_purchases: Literal["drop", "keep", "error"] = "drop"
    """Impressions with a purchase and no click, a fault of the logging: drop them, keep them as
    neither clicked nor converted, or stop. Their number is reported."""


def report(data_set: PreparedDataSet) -> str:
    """What was read, for a person."""
    splits = data_set.splits
    rows: list[tuple[str, list[str]]] = [
        ("impressions", [f"{splits[name].impressions:,}" for name in SPLITS]),
        ("clicks", [f"{splits[name].clicks:,}" for name in SPLITS]),
        ("CTR", [_rate(splits[name].clicks, splits[name].impressions) for name in SPLITS]),
        ("conversions", [f"{splits[name].conversions:,}" for name in SPLITS]),
        (
            "CVR of clicks",
            [_rate(splits[name].conversions, splits[name].clicks) for name in SPLITS],
        ),
        ("shared rows", [f"{splits[name].shared_rows:,}" for name in SPLITS]),
    ]
    unclicked = data_set.source["unclicked_purchase_rows"]
    dropped = data_set.dropped
    label = f"purchases without a click ({data_set.source['unclicked_purchases']})"
    rows.append((label, [f"{unclicked[name]:,}" for name in SPLITS]))
    for reason in dict.fromkeys(reason for name in SPLITS for reason in dropped[name]):
        counts = [f"{dropped[name].get(reason, 0):,}" for name in SPLITS]
        rows.append((f"dropped: {reason}", counts))
    lines = _table(["", *SPLITS], rows)
    tables = [(t.name, [f"{t.num_embeddings:,}"]) for t in data_set.schema.tables]
    lines += ["", *_table(["table", "rows"], tables)]
    examples = [sentence for name in SPLITS for sentence in data_set.dropped_rows[name]]
    if examples:
        lines += ["", "skipped, the first of them:", *(f"  {sentence}" for sentence in examples)]
    lines += [
        "",
        f"prepared data set: {data_set.path}",
        f"next: esmm-torchrec train --data {data_set.path} --out runs/ali-ccp",
    ]
    return "\n".join(lines)


def _rate(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if whole else "-"


def _table(header: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    lines = [header, *([name, *cells] for name, cells in rows)]
    first, *rest = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "  ".join([f"{name:<{first}}", *(f"{c:>{w}}" for c, w in zip(cells, rest, strict=True))])
        for name, *cells in lines
    ]


def run(options: Options) -> None:
    """Prepares, then prints what is in the data set."""
    data_set = prepare_ali_ccp(
        options.raw,
        options.out,
        min_count=options.min_count,
        max_bad_rows=options.max_bad_rows,
        unclicked_purchases=options.unclicked_purchases,
        progress=True,
    )
    print(report(data_set))
