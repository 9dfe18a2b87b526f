"""The chain of tasks that a model learns, as data.

What may happen to an impression happens in order: it is clicked, and a clicked one converts. A
task is one link of such a chain. From the chain follow the label columns of a data set, the logits
of a model, the products that are trained over the entire space, and the names of scores and
metrics; no other part of the library names a label by itself.

    impression → click → conversion                          DEFAULT_TASKS
    impression → click → cart → order                        a chain of three, defined by its user
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, overload

from esmm_torchrec.errors import OptionError

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Task:
    """One link of a chain.

    Example::

        Task("order", label="order", given="cart")
    """

    name: str
    """What happens: "click". Lower-case letters, digits and underscores."""
    label: str
    """Column of the prepared data set, 1 if it happened and 0 if not."""
    given: str | None = None
    """The task before it in the chain, without which it cannot happen; None for the first."""
    short: str | None = None
    """Established name of P(task | given), such as "ctr"; None: derived from the names."""
    joint_short: str | None = None
    """Established name of P(task and all tasks before it), such as "ctcvr"; None: derived."""

    @property
    def rate(self) -> str:
        """Name of P(task | given) in metrics: "ctr", "cvr", "order_given_cart"."""
        if self.short is not None:
            return self.short
        return self.name if self.given is None else f"{self.name}_given_{self.given}"

    @property
    def joint(self) -> str:
        """Name of P(task and all tasks before it) in metrics: "ctr", "ctcvr", "order"."""
        if self.given is None:
            return self.rate
        return self.joint_short or self.name

    @property
    def score(self) -> str:
        """Column of P(task | given) in scores: "pctr", "pcvr", "p_order_given_cart"."""
        return f"p{self.rate}" if self.short is not None else f"p_{self.rate}"

    @property
    def joint_score(self) -> str:
        """Column of P(task and all tasks before it) in scores: "pctcvr", "p_order"."""
        if self.given is None:
            return self.score
        return f"p{self.joint}" if self.joint_short is not None else f"p_{self.joint}"


class TaskProbability(NamedTuple):
    """A probability that scores and metrics have a name for."""

    name: str
    """In metrics: "ctr", "cvr", "ctcvr"."""
    column: str
    """In scores: "pctr", "pcvr", "pctcvr"."""
    task: Task
    """What it is the probability of, and of all tasks between `given` and it."""
    given: Task | None
    """Impressions with this task are the space of the metrics; None: all impressions."""


@dataclass(frozen=True)
class TaskChain(Sequence[Task]):
    """Tasks in the order in which they happen.

    Example::

        chain = TaskChain(
            (Task("click", "click"), Task("cart", "cart", given="click"),
             Task("order", "order", given="cart"))
        )

    Raises:
        OptionError: there is no task, a name or label is malformed or occurs twice, or a task is
            not given the one before it.
    """

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise OptionError("a chain needs at least one task")
        before: str | None = None
        seen: set[str] = set()
        for task in self.tasks:
            for what, name in (("name", task.name), ("label", task.label)):
                if not _NAME.fullmatch(name):
                    raise OptionError(
                        f"task {what} {name!r} is not made of lower-case letters, digits and "
                        "underscores, with a letter first; rename it"
                    )
            if task.given != before:
                raise OptionError(
                    f"task {task.name!r} is given {task.given!r}, but {before!r} is before it in "
                    "the chain; order the tasks as they happen"
                )
            if task.name in seen or task.label in {other.label for other in self._before(task)}:
                raise OptionError(f"task {task.name!r} or its label occurs twice in the chain")
            seen.add(task.name)
            before = task.name

    def _before(self, task: Task) -> tuple[Task, ...]:
        return self.tasks[: self.tasks.index(task)]

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...
    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in order. A label is at most the one before it."""
        return tuple(task.label for task in self.tasks)

    def task(self, name: str) -> Task:
        """The task called `name`; KeyError if there is none."""
        return {task.name: task for task in self.tasks}[name]

    def given(self, task: Task) -> Task | None:
        """The task before `task`, None before the first."""
        return None if task.given is None else self.task(task.given)

    def prefix(self, task: Task) -> tuple[Task, ...]:
        """The tasks up to and including `task`, whose probabilities multiply to its joint one."""
        return (*self._before(task), task)

    @property
    def probabilities(self) -> tuple[TaskProbability, ...]:
        """Task by task, P(task | given), then P(task and all tasks before it)."""
        found = []
        for task in self.tasks:
            found.append(TaskProbability(task.rate, task.score, task, self.given(task)))
            if task.given is not None:
                found.append(TaskProbability(task.joint, task.joint_score, task, None))
        return tuple(found)

    def describe(self, probability: TaskProbability) -> str:
        """For tables and plots: "click", "conversion if click", "click and conversion"."""
        task, given = probability.task, probability.given
        if given is not None:
            return f"{task.name} if {given.name}"
        return " and ".join(other.name for other in self.prefix(task))

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values for JSON; `from_list` is its inverse."""
        return [asdict(task) for task in self.tasks]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> TaskChain:
        """The chain that `to_list` wrote."""
        return cls(tuple(Task(**task) for task in values))


DEFAULT_TASKS = TaskChain(
    (
        Task("click", "click", short="ctr"),
        Task("conversion", "conversion", given="click", short="cvr", joint_short="ctcvr"),
    )
)
"""impression → click → conversion, with the literature's names: CTR, CVR and CTCVR."""
