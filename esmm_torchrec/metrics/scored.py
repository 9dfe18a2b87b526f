"""Impressions with their labels and a model's scores, the input of metrics and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from esmm_torchrec.errors import OptionError
from esmm_torchrec.metrics.probability import Prediction, product
from esmm_torchrec.tasks import DEFAULT_TASKS, Task, TaskChain, Values

Scores = NDArray[np.floating]

_OPTIONAL = ("weight", "group_id", "common_ctr_logit", "true_ctr", "true_cvr")


@dataclass(frozen=True)
class ScoredImpressions:
    """n impressions with labels, a model's scores and further columns; every column is (n,),
    without padding, in any order.

    Scores that the model does not compute are absent (a conversion network alone has no click
    score); figures that need them are reported as None, with the reason.

    Raises:
        OptionError: a label is missing, columns differ in length, a label is neither 0 nor 1,
            scores are not floating-point, or only one of the true probabilities is given.
    """

    labels: Mapping[str, NDArray[np.integer]]
    """Label → int8, 0 or 1; used only if the label of the task before is 1."""
    scores: Mapping[str, Prediction]
    """`TaskProbability.name` ("ctr", "cvr", "ctcvr") → its prediction."""
    tasks: TaskChain = DEFAULT_TASKS
    weight: Scores | None = None
    """float32, weight of each impression, not negative; None: all 1."""
    group_id: NDArray[np.integer] | None = None
    """int64, groups of gauc_*."""
    common_ctr_logit: Scores | None = None
    """float32, logit of the pCTR of a network common to the methods compared."""
    true_ctr: Scores | None = None
    """float32, true probability of a click."""
    true_cvr: Scores | None = None
    """float32, true probability of a conversion given a click."""

    def __post_init__(self) -> None:
        missing = [label for label in self.tasks.labels if label not in self.labels]
        if missing:
            raise OptionError(f"labels has no {missing[0]!r}; give every label of the tasks")
        floating = {name: score.values for name, score in self.scores.items()} | {
            name: getattr(self, name)
            for name in ("weight", "common_ctr_logit", "true_ctr", "true_cvr")
        }
        columns = {**self.labels, "group_id": self.group_id, **floating}
        for name, column in columns.items():
            if column is None:
                continue
            if column.shape != (self.size,):
                raise OptionError(
                    f"{name} has shape {column.shape}, not ({self.size},): one value per impression"
                )
            if name in floating and column.dtype not in (np.float32, np.float64):
                raise OptionError(f"{name} must be float32, not {column.dtype}")
        for label in self.tasks.labels:
            values = self.labels[label]
            if not ((values == 0) | (values == 1)).all():
                raise OptionError(f"{label} must be 0 or 1 for every impression")
        if (self.true_ctr is None) != (self.true_cvr is None):
            raise OptionError("give both true_ctr and true_cvr, or neither")

    @property
    def size(self) -> int:
        """Number of impressions, n."""
        return len(self.labels[self.tasks.labels[0]])

    def of(self, rows: NDArray[np.bool_]) -> ScoredImpressions:
        """Returns some of the impressions.

        Args:
            rows: bool (n,).
        """
        columns = {name: getattr(self, name) for name in _OPTIONAL}
        return ScoredImpressions(
            {label: column[rows] for label, column in self.labels.items()},
            {name: score[rows] for name, score in self.scores.items()},
            self.tasks,
            **{name: None if c is None else c[rows] for name, c in columns.items()},
        )

    def space(self, task: Task, given: Task | None) -> Space:
        """Returns the impressions with the task `given`, or all, and whether each has `task`."""
        rows = slice(None) if given is None else self.happened(given.name)
        weights = None if self.weight is None else self.weight[rows]
        return Space(task, given, rows, self.happened(task.name)[rows], weights)

    def happened(self, task: str) -> NDArray[np.bool_]:
        """Returns bool (n,), the impressions with the task called `task` and all before it."""
        return self._happened[task]

    @cached_property
    def _happened(self) -> dict[str, NDArray[np.bool_]]:
        return self.tasks.happened({label: self.labels[label] == 1 for label in self.tasks.labels})

    @cached_property
    def groups(self) -> NDArray[np.integer] | None:
        """Groups of `group_id`, numbered from 0, int (n,)."""
        if self.group_id is None:
            return None
        return np.unique(self.group_id, return_inverse=True)[1]

    @cached_property
    def ctcvr_common_ctr(self) -> Prediction | None:
        """pCTCVR from the common network's pCTR and the model's own pCVR."""
        cvr = self.scores.get("cvr")
        if self.common_ctr_logit is None or cvr is None:
            return None
        return product(Prediction(self.common_ctr_logit, "logit"), cvr)


@dataclass(frozen=True)
class Space:
    """The m of n impressions over which the figures of a probability are computed."""

    task: Task
    given: Task | None
    rows: NDArray[np.bool_] | slice
    """Rows of the m impressions among the n."""
    label: NDArray[np.bool_]
    """(m,), whether each impression has the task."""
    weights: Scores | None
    """(m,); None: all 1."""

    def of(self, column: Values) -> Values:
        """Selects these impressions from a `Prediction` or an array (n,); None stays None."""
        return cast(Any, column if column is None else column[self.rows])

    @cached_property
    def one_class(self) -> str:
        """Result of `one_class_reason` for this space."""
        weighs = self.weights is None or bool(
            self.weights[self.label].any() and self.weights[~self.label].any()
        )
        size, happened = self.label.size, int(self.label.sum())
        return one_class_reason(self.task, self.given, size=size, happened=happened, weighs=weighs)


def one_class_reason(
    task: Task, given: Task | None, *, size: int, happened: int, weighs: bool
) -> str:
    """Returns why labels allow no comparison of classes; empty if they do.

    Args:
        task: task of the labels.
        given: task that all of the impressions have; None: the space is all impressions.
        size: number of impressions.
        happened: number of impressions with the label.
        weighs: whether both classes have a weight above 0.
    """
    within = "" if given is None else f" with {given.name} = 1"
    if size == 0:
        return f"there are no impressions{within}"
    if happened in (0, size):
        return f"{task.name} is {int(happened > 0)} for all {size} impressions{within}"
    return "" if weighs else f"all impressions{within} of one class of {task.name} have weight 0"


def concatenated(parts: Sequence[ScoredImpressions]) -> ScoredImpressions:
    """Concatenates several sets of impressions, which have the same columns."""
    first = parts[0]
    together: dict[str, NDArray[np.generic] | None] = {}
    for name in _OPTIONAL:
        columns = [getattr(part, name) for part in parts]
        together[name] = None if columns[0] is None else np.concatenate(columns)
    return ScoredImpressions(
        {label: np.concatenate([part.labels[label] for part in parts]) for label in first.labels},
        {
            name: Prediction(np.concatenate([part.scores[name].values for part in parts]), of.form)
            for name, of in first.scores.items()
        },
        first.tasks,
        **together,  # pyright: ignore[reportArgumentType]
    )
