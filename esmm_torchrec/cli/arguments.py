"""Parses the options of a command and turns each parsing error into one sentence.

tyro does the parsing. It prints errors in a box of several lines and exposes them to programs only
through a private module that may change in any release. So the box is parsed here; a box of an
unknown shape is kept as it is, on one line.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import TypeVar, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from esmm_torchrec.errors import OptionError

T = TypeVar("T")

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _optional(
    info: PrimitiveTypeInfo,
) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """Makes `int | None` accept the same text as int: nobody writes '--max-steps None'."""
    types = get_args(info.type)
    if NoneType not in types or len(types) != 2:
        return None
    inner = next(kind for kind in types if kind is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner, info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: (
            ["none"] if value is None else spec.str_from_instance(value)
        ),
    )


@_REGISTRY.primitive_rule
def _counts_by_name(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Makes `Mapping[str, int]` accept NAME=N any number of times."""
    if info.type != Mapping[str, int]:
        return None

    def read(texts: list[str]) -> dict[str, int]:
        counts = {}
        for text in texts:
            name, _, count = text.rpartition("=")
            if not name or not (count.isascii() and count.isdigit()) or name in counts:
                raise ValueError(f"{text!r} is not of the form NAME=N, with each name once")
            counts[name] = int(count)
        return counts

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=N [NAME=N ...]]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{name}={count}" for name, count in value.items()],
    )


def read_options(options: type[T], prog: str, arguments: Sequence[str]) -> T:
    """Parses the options of a command; prints the help and exits if the arguments request it.

    Args:
        options: a dataclass whose docstrings are the help texts.
        prog: name of the command.
        arguments: arguments that follow the name.

    Raises:
        OptionError: an argument is missing, unknown or invalid.
    """
    if hasattr(options, "for_arguments"):
        options = options.for_arguments(arguments)  # pyright: ignore[reportAttributeAccessIssue]
    help_text, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(help_text):
            return tyro.cli(options, prog=prog, args=list(arguments), registry=_REGISTRY)
    except SystemExit as stop:
        if stop.code in (0, None):
            print(wrapped(help_text.getvalue(), shutil.get_terminal_size().columns), end="")
            raise
        if isinstance(stop.__context__, OptionError):
            raise stop.__context__ from None
        raise OptionError(f"{_sentence(complaint.getvalue())}; see '{prog} --help'") from None


def wrapped(help_text: str, width: int) -> str:
    """Rewraps the paragraphs and option texts of a help text from tyro, which keeps the line breaks
    of the docstrings."""
    lines: list[str] = []
    for block in _blocks(help_text.splitlines()):
        first, *others = block
        column = _indent(others[0]) if others else _indent(first)
        name, text = first, ""
        if (
            first[max(0, column - 2) : column].isspace() or not column
        ):  # the text begins on the same line
            name, text = first[:column], first[column:]
        if name.strip() and not text:
            lines.append(name.rstrip())
            name = " " * column
        paragraph = " ".join([text, *(line.strip() for line in others)])
        lines += textwrap.wrap(
            paragraph.strip(),
            width,
            initial_indent=name,
            subsequent_indent=" " * column,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if not paragraph.strip() and not name.strip():
            lines.append("")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yields blank lines, titles and rules one by one, and each paragraph or option as a block."""
    block: list[str] = []
    for line in lines:
        goes_on = (
            line.strip()
            and block
            and block[0].strip()
            and (_indent(line) >= 8 or _indent(line) == _indent(block[0]) == 0)
            and not block[0].startswith("usage:")
        )
        if block and not goes_on:
            yield block
            block = []
        block.append(line)
    if block:
        yield block


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _sentence(box: str) -> str:
    """Returns the message in one of tyro's error boxes as a sentence."""
    text = " ".join(" ".join(_without_frame(line) for line in box.splitlines()).split())
    text = text.partition(" For full helptext")[0]
    for shape, say in (
        (r"Required options Missing from .*?: (.*?)(?: Unrecognized options: (.*))?$", _missing),
        (r"Unrecognized options Unrecognized options: (.*?)(?: Perhaps .*?(--\S+).*)?$", _unknown),
        (r"Value error Error parsing (\S+): (.*?) Argument helptext: (.*)$", _wrong_value),
        # A check of an option group, whose message names the option.
        (r"Value error Error parsing \S+: (`.*?)\.?$", str),
        (r"Invalid choice invalid choice '(.*)' for argument '(.*)'\. .*\((.*)\)", _wrong_choice),
        (r"Missing argument Missing value for argument '(.*)'\.", _without_value),
    ):
        found = re.match(shape, text)
        if found is not None:
            return say(*found.groups())
    return text.rstrip(".")


def _without_frame(line: str) -> str:
    """Returns the text of a line of a box; the frame's characters depend on the terminal."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    if re.fullmatch(r"[╭╰+][─-].*[╮╯+]", line):
        return line.strip("╭╮╰╯+─- ")
    if re.fullmatch(r"[│|].*[│|]", line):
        line = line[1:-1].strip()
    return "" if set(line) <= set("─-") else line


def _missing(entries: str, unknown: str | None) -> str:
    # Each entry consists of a name, a form, a help text and "(required)".
    names = [entry.split()[0] for entry in entries.split("(required)") if entry.strip()]
    needed = f"{' and '.join(names)} must be given"
    return needed if unknown is None else f"{_unknown(unknown, None)}, and {needed}"


def _unknown(tokens: str, similar: str | None) -> str:
    words = tokens.replace(", ", " ").split()
    names = [word for word in words if word.startswith("-")]
    if not names:
        return f"unexpected argument {words[0]}"
    hint = f" (did you mean {similar}?)" if similar else ""
    return f"there is no option {names[0]}{hint}"


def _wrong_value(option: str, reason: str, form: str) -> str:
    given = re.search(r"\[(.*?)\]|('.*')", reason)
    number = re.search(r"\[?(INT|FLOAT)\b", form)
    if given is None or number is None:
        return f"{option}: {reason}"
    kind = {"INT": "whole number", "FLOAT": "number"}[number.group(1)]
    kind = f"{kind}s" if number.group(0).startswith("[") else f"a {kind}"
    value = (given.group(1) or given.group(2)).replace("', '", " ").strip("'")
    return f"{option} takes {kind}, not '{value}'"


def _wrong_choice(value: str, option: str, choices: str) -> str:
    return f"{option} '{value}' is not one of {choices.replace(chr(39), '').rstrip(',')}"


def _without_value(option: str) -> str:
    return f"{option} needs a value"
