"""One ``ActivationStats`` for all linears that are called with the same tensor: query, key and value, gate and up."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from sparse_rt.errors import SparseRTError
from sparse_rt.pruning.statistics import ActivationStats


class _Group:
    """Linears with one input, in the order in which they were first called, and the input of this moment.

    ``called``: those that were called with it. ``settled``: a member that has left its group takes this input along.
    """

    def __init__(self, stats: ActivationStats, name: str):
        self.stats, self.names = stats, [name]
        self.last: tuple[Tensor, int] | None = None
        self.called: set[str] = set()
        self.settled = False

    def add(self, name: str, x: Tensor) -> None:
        if self.settled and self.holds(x):
            self.settled = False
        elif name == self.names[0] and not self.settled:
            self.stats.add(x)
            self.last, self.called = (x, x._version), set()
        elif not self.holds(x):
            raise SparseRTError(
                f"{name} was called with the input of {self.names[0]} for some calibration sequences and with another "
                "one for this; leave one of them dense with --ignore"
            )
        self.called.add(name)

    def holds(self, x: Tensor) -> bool:
        return self.last is not None and self.last[0] is x and self.last[1] == x._version

    def alone(self) -> list[_Group]:
        """A group for every member, each with a copy of what it has seen so far."""
        groups = [self]
        for name in self.names[1:]:
            group = _Group(copy.deepcopy(self.stats), name)
            group.last, group.settled = self.last, name not in self.called
            groups.append(group)
        del self.names[1:]
        return groups


class _Observer:
    def __init__(self, owner: SharedStats, name: str):
        self.add = lambda x: owner.add(name, x)


class SharedStats:
    """Statistics by the name of a linear; ``make(name)`` builds those of a group, ``observers`` feed them.

    Linears belong together when their first call finds the very tensor that another one has just been called with for
    the first time too. They cost one X^T X then instead of several, in memory and in time. One that is called twice for
    a sequence (DeBERTa projects relative positions with the layers of query and key) goes its own way from then on, and
    so do those that it was with; ``begin`` says that a sequence follows.
    """

    def __init__(self, names: list[str], make: Callable[[str], ActivationStats]):
        self.observers = {name: _Observer(self, name) for name in names}
        self._make = make
        self._group: dict[str, _Group] = {}

    def begin(self) -> None:
        """The inputs of the next sequence follow."""
        for group in self._group.values():
            group.called = set()

    def add(self, name: str, x: Tensor) -> None:
        group = self._group.get(name)
        if group is None:
            group = next((g for g in self._group.values() if g.stats.sequences == 1 and g.holds(x)), None)
            if group is None:
                group = _Group(self._make(name), name)
            else:
                group.names.append(name)
            self._group[name] = group
        elif name in group.called and len(group.names) > 1:
            self._group |= {alone.names[0]: alone for alone in group.alone()}
            group = self._group[name]
        group.add(name, x)

    def finish(self) -> None:
        """No more inputs follow: those of the last call are not kept."""
        for group in self._group.values():
            group.last = None

    def groups(self) -> list[list[str]]:
        """Names that share statistics."""
        return [group.names for group in dict.fromkeys(self._group.values())]

    def join(self, names: list[str]) -> ActivationStats:
        """Those of a group; new ones, and linears new to the group, where other processes have called them only."""
        group = next((self._group[name] for name in names if name in self._group), None)
        if group is None:
            group = _Group(self._make(names[0]), names[0])
        group.names = list(names)
        self._group |= dict.fromkeys(names, group)
        return group.stats

    def get(self, name: str) -> ActivationStats | None:
        """Those of ``name`` to be changed: no other linear has them any more. None when it was never called."""
        group = self._group.get(name)
        if group is not None and len(group.names) > 1:
            group.names.remove(name)
            group = self._group[name] = _Group(copy.deepcopy(group.stats), name)
        return None if group is None else group.stats

    def pop(self, name: str) -> ActivationStats | None:
        """Those of ``name``, None when it was never called; forgotten with the last linear of a group."""
        group = self._group.pop(name, None)
        return None if group is None else group.stats
