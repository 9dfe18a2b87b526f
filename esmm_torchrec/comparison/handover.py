"""Options and command with which `train` repeats a method with its tuned settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from esmm_torchrec.comparison.options import ComparisonOptions
from esmm_torchrec.comparison.selection import Chosen
from esmm_torchrec.models.methods import METHODS, PARTS
from esmm_torchrec.training.options import TrainOptions


def chosen_options(
    options: ComparisonOptions, method: str, chosen: Chosen, *, batch_size: int
) -> TrainOptions:
    """Returns the options with which `train` repeats the first seed of a method.

    Args:
        options: options of the comparison.
        method: name in `METHODS`.
        chosen: result of tuning the method.
        batch_size: rows per step, which the comparison derived from the updates per pass.
    """
    return replace(
        options.train(method, chosen.trial, seed=0, epochs=chosen.epochs), batch_size=batch_size
    )


def batch_size_on_all_rows(record: Mapping[str, Any]) -> int:
    """Returns the rows per step with which a pass over all training rows of a method takes as many
    updates as in tuning.

    Args:
        record: record of one training of the method, on any fraction.
    """
    return max(1, round(record["batch_size"] / record["fraction"]))


def train_command(options: TrainOptions, data: str) -> str:
    """Returns the command that trains with these options, leaving out defaults."""
    words = ["esmm-torchrec", "train", "--data", data, "--out", "RUN", "--method", options.method]
    for field in fields(TrainOptions):
        value = getattr(options, field.name)
        if field.name in (*PARTS, "method") or value in (field.default, None, {}):
            continue
        name = field.name.replace("_", "-")
        words += [f"--no-{name}"] if value is False else [f"--{name}", *_words(value)]
    preset = METHODS[options.method]
    for part, registry in PARTS.items():
        chosen, default = getattr(options, part), getattr(preset, part)
        if chosen is None:
            continue
        if type(chosen) is not type(default):
            words += [f"--{part}", registry.name_of(type(chosen))]
            default = type(chosen)()
        for field in fields(chosen):
            value = getattr(chosen, field.name)
            if value != getattr(default, field.name, MISSING):
                words += [f"--{part}.{field.name.replace('_', '-')}", *_words(value)]
    return shlex.join(words)


def _words(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{name}={item}" for name, item in value.items()]
    return [str(item) for item in value] if isinstance(value, tuple | list) else [str(value)]


def best_method(chosen: Mapping[str, Chosen]) -> str:
    """Returns the method with the best score on the held-out users; the test split is not used.

    Args:
        chosen: method → result of tuning.
    """
    return max(chosen, key=lambda method: chosen[method].score)
