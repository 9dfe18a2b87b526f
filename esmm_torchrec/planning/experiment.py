"""A scenario with its estimates, and their presentation as plain text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esmm_torchrec.planning.estimates import Estimate, Placed
from esmm_torchrec.planning.scenario import STRATEGIES, Scenario, Strategy
from esmm_torchrec.sharding.plan_text import aligned
from esmm_torchrec.sharding.search import gib


@dataclass(frozen=True)
class Experiment:
    """A scenario and its estimates."""

    scenario: Scenario
    estimates: tuple[Estimate, ...]

    @property
    def counts(self) -> list[int]:
        """Numbers of ranks, in ascending order."""
        return sorted({estimate.world_size for estimate in self.estimates})

    @property
    def strategies(self) -> list[Strategy]:
        """Strategies, in the order of `STRATEGIES`."""
        tried = {estimate.strategy for estimate in self.estimates}
        return [strategy for strategy in STRATEGIES if strategy in tried]

    @property
    def noun(self) -> str:
        """Word for a rank: "GPU" or "rank"."""
        return "GPU" if self.scenario.hardware.device == "cuda" else "rank"

    def ranks(self, count: int) -> str:
        """Formats a number of ranks, as in "1 GPU" or "8 GPUs"."""
        return f"{count} {self.noun}" if count == 1 else f"{count} {self.noun}s"

    def of(self, strategy: str, count: int) -> Estimate:
        """Returns the estimate of a strategy on a number of ranks."""
        return next(e for e in self.estimates if e.strategy == strategy and e.world_size == count)

    def fastest(self, count: int) -> Estimate | None:
        """Returns the estimate with the shortest step on a number of ranks, if any fits."""
        feasible = [e for e in self.estimates if e.placed and e.world_size == count]
        return min(feasible, key=lambda e: e.step_ms, default=None)

    @property
    def misfits(self) -> dict[tuple[Strategy, str, tuple[str, ...]], list[int]]:
        """(strategy, reason, remedies) → numbers of ranks without a plan."""
        counts: dict[tuple[Strategy, str, tuple[str, ...]], list[int]] = {}
        for e in self.estimates:
            if e.reason is not None:
                counts.setdefault((e.strategy, e.reason, e.remedies), []).append(e.world_size)
        return counts


def milliseconds(value: float) -> str:
    """Formats a time in milliseconds; an infinite one as "no plan"."""
    if math.isinf(value):
        return "no plan"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def rate(value: float) -> str:
    """Formats impressions per second in thousands (k/s) or millions (M/s)."""
    return f"{value / 1e6:,.1f} M/s" if value >= 1e6 else f"{value / 1e3:,.0f} k/s"


def comparison(experiment: Experiment) -> str:
    """Formats the estimates as a plain-text table, one per line."""
    noun = experiment.noun
    header = (f"{noun}s", "strategy", "step", "impressions", f"memory per {noun}")
    lines: list[tuple[str, ...]] = [(*header, "imbalance", "tables")]
    for count in experiment.counts:
        fastest = experiment.fastest(count)
        for strategy in experiment.strategies:
            estimate = experiment.of(strategy, count)
            mark = " *" if estimate is fastest else ""
            if estimate.placed is None:
                lines.append((str(count), strategy, "no plan", "", "", "", ""))
                continue
            placed = estimate.placed
            lines.append(
                (
                    str(count),
                    strategy + mark,
                    milliseconds(estimate.step_ms),
                    rate(estimate.impressions_per_second),
                    f"{gib(estimate.fullest_rank_bytes)} of {gib(estimate.capacity.total)}",
                    f"{placed.memory_imbalance:.2f} memory, {placed.time_imbalance:.2f} time",
                    placements(placed),
                )
            )
    return aligned(lines)


def placements(placed: Placed) -> str:
    """Formats the number of tables with each sharding type and kernel."""
    return "; ".join(f"{number} {kind}" for kind, number in placed.placements.items())
