"""Parts and methods by name, of this library and of packages that extend it.

A package adds its own through entry points, and the command line knows them once it is installed:

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
    """Built-in entries and, behind them in the order of their names, those of entry points.

    An entry point is loaded when it is first asked for. Looking up a name that does not exist
    raises OptionError with the names that do.

    Args:
        kind: what an entry is, for error messages.
        group: of the entry points.
        built_in: entries of this library.
        of_type: what an entry must be: a subclass of it, or an instance.
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
        """Adds an entry in this process; an installed package uses an entry point instead.

        Raises:
            OptionError: it is not what this registry holds.
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
        """The name under which an entry is registered.

        Raises:
            OptionError: it is not registered.
        """
        for name in self:
            if self[name] is entry:
                return name
        raise OptionError(
            f"{entry!r} is not a registered {self.kind}; add an entry point to {self._group}"
        )


def part_to_dict(registry: Registry[Any], part: Any) -> dict[str, Any]:
    """A part and its options as plain values for JSON; `part_from_dict` is its inverse.

    Raises:
        OptionError: the part's class is not registered.
    """
    return {"name": registry.name_of(type(part)), **asdict(part)}


def part_from_dict(registry: Registry[Any], values: Mapping[str, Any]) -> Any:
    """The part that `part_to_dict` wrote.

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
