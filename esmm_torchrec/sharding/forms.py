"""Validation of files that users edit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec

from esmm_torchrec.errors import PlanError

T = TypeVar("T")

NonNegativeInt = Annotated[int, msgspec.Meta(ge=0)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]


class Form(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """Base class of the content of a file. An unknown field is an error."""


def checked(values: Any, form: type[T], where: str) -> T:
    """Converts plain values to a form.

    Args:
        values: the parsed JSON or YAML.
        form: a `Form` or a dataclass.
        where: start of error messages: the file and the entry in it.

    Raises:
        PlanError: the values do not match the form; the sentence names the field.
    """
    try:
        return msgspec.convert(values, form)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        name = path.removesuffix("`").removeprefix(".")
        if message.startswith("Invalid enum value"):
            choices = get_args(get_type_hints(form, include_extras=True).get(name))
            message += f"; use {either(choices)}" if choices else ""
        if message.startswith("Object contains unknown field"):
            message += f"; use {either(get_type_hints(form))}"
        message = message[0].lower() + message[1:].replace("`", "'")
        raise PlanError(f"{where}: {f'{name}: ' if name else ''}{message}") from None


def either(values: Iterable[Any]) -> str:
    """Joins values to a list of alternatives: "a, b or c"."""
    names = [str(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
