"""One registry for every kind of plug-in: formats, pruners, adapters, exporters.

Duplicate names raise and name both owners, unknown names raise with the known ones, and packages outside
the project join through entry points of the group ``sparse_rt.<kind>s``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from sparse_rt.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> object of one kind; members are imported on the first look-up, never at import of the package."""

    def __init__(self, kind: str, modules: Iterable[str]):
        self.kind = kind
        self._modules = tuple(modules)
        self._members: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, member: T) -> T:
        """Add ``member``; the same definition imported twice is harmless, another owner raises ``UserError``."""
        known = self._members.get(name)
        if known is not None and _owner(known) != _owner(member):
            raise UserError(
                f"{self.kind} {name!r} is defined by {_owner(known)} and by {_owner(member)}; rename or remove one"
            )
        self._members[name] = member
        return member

    def get(self, name: str) -> T:
        """The member called ``name``; ``UserError`` lists the known names otherwise."""
        self._load()
        if name not in self._members:
            raise UserError(f"Unknown {self.kind} {name!r}; known are {', '.join(self.names())}")
        return self._members[name]

    def names(self) -> list[str]:
        self._load()
        return sorted(self._members)

    def __iter__(self) -> Iterator[T]:
        self._load()
        return iter(list(self._members.values()))

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for module in self._modules:
            importlib.import_module(module)
        for entry in entry_points(group=f"sparse_rt.{self.kind.replace(' ', '_')}s"):
            entry.load()


def _owner(member: object) -> str:
    cls = member if isinstance(member, type) or callable(member) else type(member)
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}"
