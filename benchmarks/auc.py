"""Seconds and memory of the exact AUCs over a test split as large as Ali-CCP's.

    python benchmarks/auc.py [--impressions 43000000] [--report] [--out auc.json]

Scores are drawn with Ali-CCP's rates (3.9 % clicks, 0.5 % conversions among them), float32 logits
and int8 labels as the evaluator keeps them. `--report` measures every figure of metrics.json as
well, including grouped AUC over users of 58 impressions on average.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from alternate import publish

from esmm_torchrec.metrics.probability import Prediction
from esmm_torchrec.metrics.ranking import auc
from esmm_torchrec.metrics.report import measure
from esmm_torchrec.metrics.scored import ScoredImpressions

CLICK_RATE = 0.039
CONVERSION_RATE = 0.0054
IMPRESSIONS_PER_USER = 58
GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    impressions: int = 43_000_000
    """Rows of the split."""
    report: bool = False
    """Measure the whole report too, with group ids."""
    seed: int = 0
    """Seed of the drawn scores."""
    out: Path | None = None
    """Output file for the figures, as JSON."""


def draw(options: Options) -> ScoredImpressions:
    """Draws impressions whose scores are informative of their labels."""
    random = np.random.default_rng(options.seed)
    n = options.impressions
    click = (random.random(n, np.float32) < CLICK_RATE).astype(np.int8)
    conversion = (random.random(n, np.float32) < CONVERSION_RATE).astype(np.int8) * click
    # In place, so that drawing takes no more memory than the scores themselves.
    click_logit = random.standard_normal(n, np.float32)
    click_logit += 0.5 * click - 3.2
    conversion_logit = random.standard_normal(n, np.float32)
    conversion_logit += 0.7 * conversion - 5.2
    ctcvr_score = click_logit + conversion_logit
    users = random.integers(0, max(n // IMPRESSIONS_PER_USER, 1), n) if options.report else None
    return ScoredImpressions(
        labels={"click": click, "conversion": conversion},
        scores={
            "ctr": Prediction(click_logit, "logit"),
            "cvr": Prediction(conversion_logit, "logit"),
            "ctcvr": Prediction(ctcvr_score, "logit"),
        },
        group_id=users,
    )


def peak_bytes() -> int:
    """Returns the process's peak resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Row = dict[str, Any]


def timed(figure: str, call: Callable[[], object]) -> tuple[object, Row]:
    """Returns the result of the call, and a row with its time and memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {
        "figure": figure,
        "value": result if isinstance(result, float) else None,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_bytes(),
    }


def main(options: Options) -> None:
    scored = draw(options)
    click_logit, conversion_logit, ctcvr_logit = (score.values for score in scored.scores.values())
    columns = peak_bytes()
    click, conversion = scored.labels.values()
    clicked = click == 1
    rows = [
        timed("ctr_auc", lambda: auc(click_logit, click))[1],
        timed("cvr_auc", lambda: auc(conversion_logit[clicked], conversion[clicked]))[1],
        timed("ctcvr_auc", lambda: auc(ctcvr_logit, conversion))[1],
    ]
    if options.report:
        report, row = timed("measure()", lambda: measure(scored))
        rows.append(row)
        assert isinstance(report, dict)
        print(json.dumps(report["test"], indent=2))

    clicks, conversions = int(click.sum()), int(conversion.sum())
    print(f"{options.impressions:,} impressions, {clicks:,} clicks, {conversions:,} conversions")
    print(f"columns in memory: peak {columns / GIB:.2f} GiB while drawing")
    print(f"{'figure':12}{'value':>10}{'seconds':>10}{'CPU s':>10}{'peak GiB':>10}")
    for row in rows:
        value = "" if row["value"] is None else f"{row['value']:.6f}"
        print(
            f"{row['figure']:12}{value:>10}{row['seconds']:>10.2f}{row['cpu_seconds']:>10.2f}"
            f"{row['peak_bytes'] / GIB:>10.2f}"
        )
    counts = {"impressions": options.impressions, "clicks": clicks, "conversions": conversions}
    publish(counts | {"figures": rows}, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
