"""esmm-torchrec generate: impressions with known probabilities, in raw Ali-CCP form."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from esmm_torchrec.cli.terminal import percentage
from esmm_torchrec.comparison.worlds import GeneratedWorld, World, generate


@dataclass(frozen=True, kw_only=True)
class Options(World):
    """Write impressions whose p(click) and p(conversion) are known, in raw Ali-CCP form.

    Writes the four raw files to OUT, along with truth.parquet (the two probabilities of every
    impression, and whether a click on it would have led to a conversion) and world.json (settings
    and counts).
    """

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Folder to create."""


def report(generated: GeneratedWorld, out: Path, seconds: float) -> str:
    """Returns a human-readable summary of the generated files."""
    train, test = generated.train, generated.test
    rows = [
        ("impressions", f"{train.impressions:,}", f"{test.impressions:,}"),
        ("clicks", f"{train.clicks:,}", f"{test.clicks:,}"),
        (
            "CTR",
            percentage(train.clicks, train.impressions),
            percentage(test.clicks, test.impressions),
        ),
        ("conversions", f"{train.conversions:,}", f"{test.conversions:,}"),
        (
            "CVR of clicks",
            percentage(train.conversions, train.clicks),
            percentage(test.conversions, test.clicks),
        ),
        ("common rows", f"{train.common_rows:,}", f"{test.common_rows:,}"),
        ("AUC of the truth: clicks", _figure(train.ctr_auc), _figure(test.ctr_auc)),
        ("  conversions, clicked", _figure(train.cvr_auc), _figure(test.cvr_auc)),
        (
            "  conversions, entire space",
            _figure(train.cvr_auc_entire_space),
            _figure(test.cvr_auc_entire_space),
        ),
    ]
    lines = [
        f"{name:<28}{left:>12}{right:>12}" for name, left, right in [("", "train", "test"), *rows]
    ]
    megabytes = sum(generated.file_bytes.values()) / 1e6
    rate = generated.world.impressions / seconds
    lines += [
        "",
        f"{generated.users:,} users, {generated.items:,} items; {megabytes:,.1f} MB in "
        f"{seconds:.1f} s, {rate:,.0f} impressions/s",
        f"raw files and their truth: {out}",
        f"next: esmm-torchrec prepare ali-ccp {out} {out}-prepared",
    ]
    return "\n".join(lines)


def run(options: Options) -> None:
    """Writes the world and prints a summary."""
    world = World(**{field.name: getattr(options, field.name) for field in fields(World)})
    start = time.perf_counter()
    generated = generate(world, options.out)
    print(report(generated, options.out, time.perf_counter() - start))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
