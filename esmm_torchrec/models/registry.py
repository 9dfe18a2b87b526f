"""Registries of parts and methods by name, from this library and packages that extend it.

A package adds its own through entry points; once installed, they are available on the command line:

    [project.entry-points."esmm_torchrec.rows"]
    [project.entry-points."esmm_torchrec.architectures"]
    [project.entry-points."esmm_torchrec.interactions"]
    [project.entry-points."esmm_torchrec.objectives"]
    focal = "my_package.focal:FocalObjective"            # a subclass of the part

    [project.entry-points."esmm_torchrec.methods"]
    focal-esmm = "my_package.focal:FOCAL_ESMM"           # a models.methods.Method
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from esmm_torchrec.errors import OptionError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Built-in entries followed by those of entry points, sorted by name.

    An entry point is loaded on first use. Looking up a name that does not exist raises an
    OptionError that lists the existing names.

    Args:
        kind: kind of the entries, for error messages.
        group: group of the entry points.
        built_in: entries of this library.
        of_type: class that every entry must be a subclass or an instance of.
    """

    def __init__(self, kind: str, *, group: str, built_in: Mapping[str, T], of_type: type) -> None:
        self.kind = kind
        self._group = group
        points = sorted(entry_points(group=group), key=lambda point: point.name)
        self._entries: dict[str, T | EntryPoint] = dict(built_in)
        self._entries |= {p.name: p for p in points if p.name not in built_in}
        self._of_type = of_type

    def __getitem__(self, name: str) -> T:
        entry: Any = self._entries.get(name)
        if entry is None:
            raise OptionError(f"there is no {self.kind} {name!r}; choose from {', '.join(self)}")
        if isinstance(entry, EntryPoint):
            entry = entry.load()
            self.register(name, entry)
        return entry

    def register(self, name: str, entry: T) -> None:
        """Adds an entry in this process; installed packages use an entry point instead.

        Raises:
            OptionError: the entry is not of this registry's type.
        """
        kind = entry if isinstance(entry, type) else type(entry)
        if not issubclass(kind, self._of_type):
            raise OptionError(f"{self.kind} {name!r} is not a {self._of_type.__name__}: {entry!r}")
        self._entries[name] = entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name_of(self, entry: object) -> str:
        """Returns the name under which an entry is registered.

        Raises:
            OptionError: the entry is not registered.
        """
        for name in self:
            if self[name] is entry:
                return name
        raise OptionError(
            f"{entry!r} is not a registered {self.kind}; add an entry point to {self._group}"
        )


def part_to_dict(registry: Registry[Any], part: Any) -> dict[str, Any]:
    """Returns a part and its options as plain values for JSON; `part_from_dict` is the inverse.

    Raises:
        OptionError: the part's class is not registered.
    """
    return {"name": registry.name_of(type(part)), **asdict(part)}


def part_from_dict(registry: Registry[Any], values: Mapping[str, Any]) -> Any:
    """Restores a part from the values of `part_to_dict`.

    Raises:
        OptionError: no part of that name is installed, or it does not have these options.
    """
    options = dict(values)
    part = registry[options.pop("name")]
    unknown = set(options) - {field.name for field in fields(part)}
    if unknown:
        raise OptionError(f"{registry.kind} {values['name']!r} has no option {min(unknown)!r}")
    # JSON has no tuples.
    return part(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
