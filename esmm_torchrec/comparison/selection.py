"""Selection of a trial and a number of passes in tuning, and its form in results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from esmm_torchrec.comparison.options import CLICK_NETWORK, Setting, Trial
from esmm_torchrec.errors import OptionError
from esmm_torchrec.models.methods import METHODS


@dataclass(frozen=True)
class Chosen:
    """Result of tuning a method."""

    trial: Trial
    epochs: int
    score: float
    """Score on the held-out users, by which the trial was chosen."""


def selection_score(method: str, figures: Mapping[str, float | None]) -> float | None:
    """Returns the score by which tuning chooses, higher being better; None if the held-out users
    leave a figure undefined."""
    names = ("ctr_auc",) if method == CLICK_NETWORK else ("cvr_auc", "ctcvr_auc_common_ctr")
    values = [figures[name] for name in names]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Tried:
    """A trial after some passes of a round of tuning."""

    round: int
    """Number of the round, from 0."""
    trial: Trial
    epochs: int
    score: float | None
    """Score on the held-out users; None if they leave a figure undefined."""


def best(tried: Sequence[Tried], number: int) -> list[Tried]:
    """Returns the best `number` trials of a round, each after its best number of passes, best
    first. Ties go to the earlier trial, so that the order of trials decides and not rounding."""
    of_trial: dict[Trial, Tried] = {}
    for one in tried:
        known = of_trial.get(one.trial)
        if one.score is not None and (known is None or one.score > (known.score or 0.0)):
            of_trial[one.trial] = one
    return sorted(of_trial.values(), key=lambda one: -(one.score or 0.0))[:number]


def described(chosen: Chosen, tried: Sequence[Tried]) -> dict[str, Any]:
    """Returns what was chosen and what was tried, for results.json."""
    return {
        "chosen": _values(chosen.trial) | {"epochs": chosen.epochs, "score": chosen.score},
        "tried": [
            {"round": one.round} | _values(one.trial) | {"epochs": one.epochs, "score": one.score}
            for one in tried
        ],
        "at_edge": at_edge(chosen, tried),
    }


def chosen_in(results: Mapping[str, Any]) -> dict[str, Chosen]:
    """Returns the tuning results of a comparison, by method, from its results.json.

    Raises:
        OptionError: they are not the results of a comparison, or are of another version.
    """
    titles = {METHODS[method].title: method for method in METHODS}
    chosen: dict[str, Chosen] = {}
    if "tuning" not in results:
        raise OptionError("the settings are not those of a comparison; compare again")
    for title, tuning in results["tuning"].items():
        found = dict(tuning["chosen"])
        try:
            setting = Setting(**{field.name: found[field.name] for field in fields(Setting)})
            trial = Trial(setting, tuple(found["own"].items()))
        except KeyError as missing:
            raise OptionError(
                f"the settings of {title} have no {missing}; they are of another version: "
                "compare again"
            ) from missing
        chosen[titles[title]] = Chosen(trial, found["epochs"], found["score"])
    return chosen


def _values(trial: Trial) -> dict[str, Any]:
    return asdict(trial.setting) | {"own": dict(trial.own)}


def at_edge(chosen: Chosen, tried: Sequence[Tried]) -> list[str]:
    """Returns the names of chosen values at the end of their searched range, beyond which better
    ones may lie: "epochs" at the maximum number of passes; a setting or an option of the method at
    its lowest or highest value."""
    edges = []
    if chosen.epochs == max(one.epochs for one in tried):
        edges.append("epochs")
    for name, value in _flat(chosen.trial).items():
        values = {_flat(one.trial)[name] for one in tried}
        if not all(isinstance(one, int | float) for one in values):
            continue  # strings have no order
        lowest = min(values)
        # Nothing lies below a weight decay of 0 or a count of 1.
        natural = NATURAL_ENDS.get(name)
        if len(values) > 1 and ((value == lowest and value != natural) or value == max(values)):
            edges.append(name)
    return edges


NATURAL_ENDS = {"weight_decay": 0.0, "min_count": 1}


def _flat(trial: Trial) -> dict[str, Any]:
    return asdict(trial.setting) | dict(trial.own)


def shown(value: Any) -> str:
    """Formats the value of a method's option."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def tuned_line(name: str, chosen: Chosen) -> str:
    """Formats a tuning result as a line for a terminal."""
    own = "".join(f", {option} {shown(value)}" for option, value in chosen.trial.own)
    setting = chosen.trial.setting
    return (
        f"tuned {name}: tables {setting.sparse_lr:g}, towers {setting.dense_lr:g}, weight decay "
        f"{setting.weight_decay:g}, min count {setting.min_count}, init scale "
        f"{setting.init_scale:g}{own}, {chosen.epochs} passes (score {chosen.score:.4f})"
    )
