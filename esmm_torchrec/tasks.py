"""Chain of the tasks that a model learns, as data.

Events follow an impression in order: a click, and a conversion after a click. A task is one link
of such a chain. The chain determines the label columns of a data set, the logits of a model, the
products trained over the entire space, and the names of scores and metrics; label names are
defined nowhere else in the library.

    impression → click → conversion                          DEFAULT_TASKS
    impression → click → cart → order                        a user-defined chain of three
    impression → click → cart                                a chain that branches: an order with
                       → order                               or without a cart
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar, overload

from esmm_torchrec.errors import OptionError

Values = TypeVar("Values", bound=Any)
"""An array or a tensor."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Task:
    """One link of a chain.

    Example::

        Task("order", label="order", given="cart")
    """

    name: str
    """Name of the event, such as "click"; lower-case letters, digits and underscores."""
    label: str
    """Column of the prepared data set, 1 if the event happened and 0 if not."""
    given: str | None = None
    """Earlier task of the chain, without which this one cannot happen; None for the first."""
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
    """A probability with a name in scores and metrics."""

    name: str
    """Name in metrics: "ctr", "cvr", "ctcvr"."""
    column: str
    """Column in scores: "pctr", "pcvr", "pctcvr"."""
    task: Task
    """Task whose probability it is, together with all tasks between `given` and this one."""
    given: Task | None
    """Task that defines the space of the metrics: the impressions with it; None: all."""


RESERVED_NAMES = ("impression",)
"""Names that tasks cannot have; metrics.json counts "impressions" next to "clicks"."""


@dataclass(frozen=True)
class TaskChain(Sequence[Task]):
    """Tasks in the order in which they happen.

    A task is usually conditional on the task before it. If it is conditional on an earlier task,
    the chain branches: either or both of the two tasks may follow that earlier one.

    Example::

        chain = TaskChain(
            (Task("click", "click"), Task("cart", "cart", given="click"),
             Task("order", "order", given="cart"))
        )

    Raises:
        OptionError: there are no tasks, a name or label is malformed or occurs twice, the first
            task is conditional on another, or a later task is not conditional on an earlier one.
    """

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise OptionError("a chain needs at least one task")
        seen: set[str] = set()
        labels: set[str] = set()
        for task in self.tasks:
            for what, name in (("name", task.name), ("label", task.label)):
                if not _NAME.fullmatch(name):
                    raise OptionError(
                        f"task {what} {name!r} is not made of lower-case letters, digits and "
                        "underscores, with a letter first; rename it"
                    )
            if (task.given is None) != (not seen) or (seen and task.given not in seen):
                raise OptionError(
                    f"task {task.name!r} is given {task.given!r}, which is not before it in the "
                    "chain; order the tasks as they happen"
                )
            if task.name in RESERVED_NAMES:
                raise OptionError(
                    f"a task cannot be called {task.name!r}, because metrics count impressions; "
                    "rename it"
                )
            if task.name in seen or task.label in labels:
                raise OptionError(f"task {task.name!r} or its label occurs twice in the chain")
            seen.add(task.name)
            labels.add(task.label)

    @classmethod
    def of(cls, *names: str) -> TaskChain:
        """Builds a chain of tasks from their names; each label has the name of its task.

        Args:
            names: names in order; "order:click" is conditional on "click" instead of the task
                before it.

        Example::

            TaskChain.of("click", "cart", "order")

        Returns:
            `DEFAULT_TASKS` for "click" and "conversion".

        Raises:
            OptionError: the chain is not valid, see the class.
        """
        if names == DEFAULT_TASKS.names:
            return DEFAULT_TASKS
        tasks: list[Task] = []
        for text in names:
            name, _, given = text.partition(":")
            tasks.append(Task(name, name, given=given or (tasks[-1].name if tasks else None)))
        return cls(tuple(tasks))

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...
    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label columns, in order. A label is at most the label of its task's `given`."""
        return tuple(task.label for task in self.tasks)

    @property
    def links(self) -> tuple[tuple[Task, Task], ...]:
        """Pairs (task, the task it is conditional on) for all tasks after the first, in order."""
        return tuple((task, self.task(task.given)) for task in self.tasks if task.given is not None)

    def task(self, name: str) -> Task:
        """Returns the task called `name`; raises KeyError if it does not exist."""
        return {task.name: task for task in self.tasks}[name]

    def given(self, task: Task) -> Task | None:
        """Returns the task that `task` is conditional on, or None for the first."""
        return None if task.given is None else self.task(task.given)

    def prefix(self, task: Task) -> tuple[Task, ...]:
        """Returns all tasks that `task` is conditional on, directly or indirectly, in order, and
        `task` itself: the tasks whose probabilities multiply to its joint probability."""
        before = self.given(task)
        return (task,) if before is None else (*self.prefix(before), task)

    def happened(self, labels: Mapping[str, Values]) -> dict[str, Values]:
        """Returns, by task name, whether a task and all others of its prefix happened: the product
        of their labels, because a task does not count without the tasks it is conditional on.

        Args:
            labels: label → booleans, or numbers 0 and 1.
        """
        found: dict[str, Values] = {}
        for task in self.tasks:
            own = labels[task.label]
            found[task.name] = own if task.given is None else found[task.given] * own
        return found

    @property
    def probabilities(self) -> tuple[TaskProbability, ...]:
        """P(task | given) and then P(task and all tasks before it), task by task."""
        found = []
        for task in self.tasks:
            found.append(TaskProbability(task.rate, task.score, task, self.given(task)))
            if task.given is not None:
                found.append(TaskProbability(task.joint, task.joint_score, task, None))
        return tuple(found)

    def describe(self, probability: TaskProbability) -> str:
        """Describes a probability for tables and plots: "click", "conversion if click", "click and
        conversion"."""
        task, given = probability.task, probability.given
        if given is not None:
            return f"{task.name} if {given.name}"
        return " and ".join(other.name for other in self.prefix(task))

    @property
    def out_of_order(self) -> str:
        """Description of rows in which a task happened without the task it is conditional on."""
        return ", ".join(f"{task.name}s without a {before.name}" for task, before in self.links)

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the tasks as plain values for JSON; `from_list` is the inverse."""
        return [asdict(task) for task in self.tasks]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> TaskChain:
        """Restores a chain from the values of `to_list`."""
        return cls(tuple(Task(**task) for task in values))


DEFAULT_TASKS = TaskChain(
    (
        Task("click", "click", short="ctr"),
        Task("conversion", "conversion", given="click", short="cvr", joint_short="ctcvr"),
    )
)
"""The chain impression → click → conversion, with the literature's CTR, CVR and CTCVR."""
