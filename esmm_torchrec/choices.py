"""Runtime checks of Literal types and ranges, so that values passed from Python are checked like
those from the command line.

A dataclass calls `check_choices(self)` in its `__post_init__`, and also `check_ranges` if any of
its fields is annotated with a `Range`. Functions and methods with Literal parameters are decorated
with `checks_choices`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, wraps
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from esmm_torchrec.errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Range of valid values of a field, as metadata of an `Annotated` type."""

    words: str
    """Description of the valid values, for the error message."""
    holds: Callable[[Any], bool]
    """Predicate that is true for valid values."""


NotNegative = Annotated[float, Range("0 or more", lambda value: value >= 0)]
Positive = Annotated[int, Range("1 or more", lambda value: value >= 1)]


def check_choices(options: object) -> None:
    """Checks every field of a dataclass whose type contains a Literal.

    Args:
        options: an instance of the dataclass.

    Raises:
        OptionError: the value of a field is not one of its choices.
    """
    hints = _hints_with_choices(type(options))
    for field in fields(options):  # pyright: ignore[reportArgumentType]
        if field.name in hints:
            _check(field.name, getattr(options, field.name), hints[field.name])


def check_ranges(options: object, *, of: str) -> None:
    """Checks every field of a dataclass whose type has a `Range`.

    Args:
        options: an instance of the dataclass.
        of: prefix of field names in messages: "objective" for "objective.click_loss_weight".

    Raises:
        OptionError: the value of a field is outside its range.
    """
    for name, hint in _hints(type(options)).items():
        for note in getattr(hint, "__metadata__", ()):
            value = getattr(options, name)
            if isinstance(note, Range) and not note.holds(value):
                raise OptionError(f"`{of}.{name}` {value} is out of range; give {note.words}")


def check_positive(**values: int) -> None:
    """Checks options that must be 1 or more.

    Raises:
        OptionError: a value is below 1.
    """
    for name, value in values.items():
        if value < 1:
            raise OptionError(f"`{name}` {value} is not positive; give at least 1")


def checks_choices(function: F) -> F:
    """Decorates a function so that its Literal parameters are checked on each call.

    Raises:
        OptionError: an argument of a call is not one of the choices.
    """
    parameters = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        hints = _hints_with_choices(function)
        for name, value in (*zip(parameters, arguments, strict=False), *named.items()):
            if name in hints:
                _check(name, value, hints[name])
        return function(*arguments, **named)

    return checked  # pyright: ignore[reportReturnType]


@cache
def _hints(owner: Any) -> Mapping[str, Any]:
    hints: dict[str, Any] = {}
    for part in reversed(owner.__mro__) if isinstance(owner, type) else [owner]:
        # Annotations of a program run by `runpy` may not resolve; those of its base classes do.
        with suppress(NameError):
            hints |= get_type_hints(part, include_extras=True)
    hints.pop("return", None)
    return hints


@cache
def _hints_with_choices(owner: Any) -> Mapping[str, Any]:
    return {name: hint for name, hint in _hints(owner).items() if _choices(hint)}


def _choices(hint: Any) -> tuple[Any, ...]:
    """Returns all choices of the Literals in a type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


def _check(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        given = value
        if isinstance(value, tuple | list):
            given = next(one for one in value if one not in _choices(hint))
        choices = ", ".join(map(str, _choices(hint)))
        raise OptionError(f"`{name}` {given!r} is not one of {choices}")


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is compatible with a type, judging by the type's Literals only."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value is part or value == part for part in parts)
    if origin is Annotated:
        return _fits(value, parts[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if not _choices(hint):
        return isinstance(value, hint) if isinstance(hint, type) and origin is None else True
    if isinstance(value, tuple | list):
        return all(_fits(one, parts[0]) for one in value)
    return False
