"""Command-line options of the parts of a method.

Which options exist depends on the chosen parts, which may come from a package that extends this
library. So the options of a command are completed once its arguments are known:

    --method esmm --objective.detach-click            an option of the method's own objective
    --method esmm --architecture separate             another architecture, with its options
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from esmm_torchrec.models.methods import METHODS, PARTS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Mixin for the options of a command that trains one method."""

    @classmethod
    def for_arguments(cls: type[T], arguments: Sequence[str]) -> type[T]:
        """Returns this class with the fields of the chosen parts.

        Args:
            arguments: unparsed arguments of the command. A name that does not exist is left for
                the parser to reject.
        """
        method = _value(arguments, "method") or "esmm"
        preset = METHODS[method] if method in METHODS else METHODS["esmm"]
        names = tuple(METHODS)
        fields: list[tuple[str, Any, Any]] = [
            ("method", Annotated[Literal[names], tyro.conf.arg(metavar="NAME")], "esmm")
        ]
        for part, registry in PARTS.items():
            chosen = _value(arguments, part)
            default = getattr(preset, part)
            if chosen is not None and chosen in registry:
                default = registry[chosen]()
            fields += [
                (part, type(default), field(default=default)),
                (
                    f"{part}_name",
                    Annotated[
                        Literal[tuple(registry)],  # pyright: ignore[reportInvalidTypeForm]
                        tyro.conf.arg(name=part, help=f"Override the {part} of the method."),
                    ],
                    registry.name_of(type(default)),
                ),
            ]
        return make_dataclass(
            cls.__name__,
            fields,
            bases=(cls,),
            frozen=True,
            kw_only=True,
            namespace={"__doc__": cls.__doc__},
        )


def _value(arguments: Sequence[str], option: str) -> str | None:
    """Returns the last value given for an option, or None."""
    value = None
    for place, argument in enumerate(arguments):
        name, equals, given = argument.partition("=")
        if name != f"--{option}":
            continue
        if equals:
            value = given
        elif place + 1 < len(arguments):
            value = arguments[place + 1]
    return value
