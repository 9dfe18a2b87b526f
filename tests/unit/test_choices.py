"""Words that are not one of the choices are refused from Python as from the command line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

import esmm_torchrec
from esmm_torchrec.choices import check_choices, checks_choices
from esmm_torchrec.errors import OptionError

PACKAGE = Path(esmm_torchrec.__file__).parent
NO_CHOICE = "no such choice"
MADE_BY_THE_LIBRARY = {"Exposure", "Estimate", "Input", "PlannedTable", "TableStatistics"}
"""Dataclasses that no caller fills in. Those that are read from files are checked by msgspec."""


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


def _with_choices(owner: Any) -> dict[str, Any]:
    return {
        name: hint
        for name, hint in get_type_hints(owner).items()
        if name != "return" and _choices(hint)
    }


def _dataclasses() -> Iterator[type]:
    """Every dataclass of the library that has a field with choices, those of commands apart: the
    command line checks them itself, and the classes that they are handed on to check again."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if "cli" in parts or "commands" in parts or parts[-1].startswith("__"):
            continue
        module = importlib.import_module(".".join((PACKAGE.name, *parts)))
        for _, found in inspect.getmembers(module, inspect.isclass):
            if found.__module__ != module.__name__ or not is_dataclass(found):
                continue
            if found.__name__.startswith("_") or found.__name__ in MADE_BY_THE_LIBRARY:
                continue
            hints = _with_choices(found)
            if any(
                field.name in hints and not _is_mapping(hints[field.name])
                for field in fields(found)
            ):
                yield found


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _functions() -> Iterator[tuple[str, Any, str]]:
    """Public functions, constructors and methods with parameters that have choices."""
    for name in esmm_torchrec.__all__:
        public = getattr(esmm_torchrec, name)
        found = {name: public}
        if inspect.isclass(public):
            found = {} if is_dataclass(public) else {f"{name}.__init__": public.__init__}
            found |= {
                f"{name}.{method}": getattr(public, method)
                for method, value in vars(public).items()
                if not method.startswith("_")
                and (inspect.isfunction(value) or isinstance(value, classmethod))
            }
        for where, function in found.items():
            if not callable(function) or not hasattr(function, "__annotations__"):
                continue
            for parameter, hint in _with_choices(function).items():
                if "Mapping" not in str(hint):  # methods of columns, checked by name elsewhere
                    yield where, function, parameter


def test_dataclasses_check_their_choices() -> None:
    seen = set()
    for kind in _dataclasses():
        seen.add(kind.__name__)
        hints = _with_choices(kind)
        for name, hint in hints.items():
            if _is_mapping(hint):
                continue
            instance = kind.__new__(kind)
            for field in fields(kind):
                value = _choices(hints[field.name])[0] if field.name in hints else None
                several = field.name in hints and get_origin(hints[field.name]) is tuple
                object.__setattr__(instance, field.name, (value,) if several else value)
            object.__setattr__(instance, name, NO_CHOICE)
            with pytest.raises(OptionError, match=f"^`{name}` '{NO_CHOICE}' is not one of "):
                instance.__post_init__()
    assert {"TrainOptions", "ModelOptions", "ComparisonOptions", "Scenario"} <= seen


def test_public_functions_check_their_choices() -> None:
    seen = set()
    for where, function, parameter in _functions():
        seen.add(where)
        with pytest.raises(OptionError, match=f"^`{parameter}` '{NO_CHOICE}' is not one of "):
            function(**{parameter: NO_CHOICE})
    assert {"prepare_table", "make_plan", "MappedSplit.open", "ImpressionReader.__init__"} <= seen


@dataclass(frozen=True)
class Options:
    colour: Literal["red", "blue"]
    size: int | Literal["auto"] = "auto"
    kinds: tuple[Literal["a", "b"], ...] = ()
    shape: Annotated[Literal["round"] | None, "a note"] = None

    def __post_init__(self) -> None:
        check_choices(self)


def test_what_choices_allow() -> None:
    Options("red")
    Options("blue", 3, ("a", "b"), "round")
    for wrong, sentence in (
        ({"colour": "Red"}, "`colour` 'Red' is not one of red, blue"),
        ({"colour": None}, "`colour` None is not one of red, blue"),
        ({"colour": "red", "size": "big"}, "`size` 'big' is not one of auto"),
        ({"colour": "red", "kinds": ("a", "c")}, "`kinds` 'c' is not one of a, b"),
        ({"colour": "red", "kinds": "a"}, "`kinds` 'a' is not one of a, b"),
        ({"colour": "red", "shape": "square"}, "`shape` 'square' is not one of round"),
    ):
        with pytest.raises(OptionError) as told:
            Options(**wrong)  # type: ignore[arg-type]
        assert str(told.value) == sentence


def test_a_checked_function_stays_what_it_was() -> None:
    @checks_choices
    def paint(what: str, colour: Literal["red", "blue"] = "red") -> str:
        """Paints."""
        return f"{colour} {what}"

    assert paint("door") == "red door"
    assert paint("door", "blue") == "blue door"
    assert paint.__doc__ == "Paints."
    with pytest.raises(OptionError, match="`colour` 'green' is not one of red, blue"):
        paint("door", "green")  # type: ignore[arg-type]
