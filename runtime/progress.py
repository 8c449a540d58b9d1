"""How a long job says where it is; silent here, the command line shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """What a workflow reports to; the base class is silent."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def note(self, text: str) -> None:
        """A decision or fact worth one line."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass ``items`` through, one step each."""
        yield from items
