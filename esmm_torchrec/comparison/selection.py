"""How tuning chooses a trial and a number of passes, and how the choice is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from esmm_torchrec.comparison.options import CLICK_NETWORK, Trial


@dataclass(frozen=True)
class Chosen:
    """What tuning chose for a method."""

    trial: Trial
    epochs: int
    score: float
    """Of the held-out users, by which it was chosen."""


def selection_score(method: str, figures: Mapping[str, float | None]) -> float | None:
    """What tuning chooses by, higher being better; None where the held-out users allow none."""
    names = ("ctr_auc",) if method == CLICK_NETWORK else ("cvr_auc", "ctcvr_auc_common_ctr")
    values = [figures[name] for name in names]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def described(chosen: Chosen, tried: Sequence[Chosen]) -> dict[str, Any]:
    """What was chosen and what was tried, for results.json."""

    def values(choice: Chosen) -> dict[str, Any]:
        return asdict(choice.trial.setting) | {
            "rate": choice.trial.rate,
            "epochs": choice.epochs,
            "score": choice.score,
        }

    return {"chosen": values(chosen), "tried": [values(choice) for choice in tried]}


def at_edge(chosen: Chosen, tried: Sequence[Chosen]) -> list[str]:
    """What was chosen at the end of what was tried of it, beyond which better may lie: "epochs" at
    the most passes; a learning rate, weight decay or rate at its lowest or highest."""
    edges = []
    if chosen.epochs == max(other.epochs for other in tried):
        edges.append("epochs")
    for name in ("sparse_lr", "dense_lr", "weight_decay"):
        values = {getattr(other.trial.setting, name) for other in tried}
        # Below no weight decay there is none.
        lowest = min(values) if name != "weight_decay" or min(values) else None
        if getattr(chosen.trial.setting, name) in (lowest, max(values)):
            edges.append(name)
    rates = {other.trial.rate for other in tried if other.trial.rate is not None}
    if rates and chosen.trial.rate in (min(rates), max(rates)):
        edges.append("rate")
    return edges


def tuned_line(name: str, chosen: Chosen) -> str:
    """What was chosen, for a terminal."""
    rate = "" if chosen.trial.rate is None else f", rate {chosen.trial.rate:g}"
    setting = chosen.trial.setting
    return (
        f"tuned {name}: tables {setting.sparse_lr:g}, towers {setting.dense_lr:g}, weight decay "
        f"{setting.weight_decay:g}{rate}, {chosen.epochs} epochs (score {chosen.score:.4f})"
    )
