"""What decoder blocks are called with besides the activations: masks and rotations, kept once however often they come.

All sequences of one length are called alike, and so are most blocks. Equal tensors are kept once and equal calls too,
so a sequence costs a reference a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple, dict[str, Any]]  # args and kwargs


class Calls:
    """``add`` a call for every block of every sequence; ``of`` gives it back."""

    def __init__(self):
        self._of: list[list[Call]] = []
        self._known: dict[tuple, Call] = {}
        self._pool: dict[tuple, list[Tensor]] = {}  # by shape, dtype and sum
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # of this sequence: id -> (tensor, its equal in the pool)

    def begin(self) -> None:
        """The calls of the next sequence follow."""
        self._of.append([])
        self._seen = {}

    def end(self) -> None:
        """All calls of the sequence were added."""
        self._seen = {}

    def add(self, args: tuple, kwargs: dict[str, Any]) -> None:
        call = self._shared(args), self._shared(kwargs)
        signature = _signature(call)
        if signature is not None:
            call = self._known.setdefault(signature, call)
        self._of[-1].append(call)

    def of(self, sequence: int, block: int) -> Call:
        return self._of[sequence][block]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are kept."""
        return [tensor for equals in self._pool.values() for tensor in equals]

    def _shared(self, value: Any) -> Any:
        """``value`` with every tensor replaced by an equal one seen before."""
        if isinstance(value, Tensor):
            return self._shared_tensor(value)
        if isinstance(value, tuple | list):
            return type(value)(self._shared(part) for part in value)
        if isinstance(value, dict):
            return {key: self._shared(part) for key, part in value.items()}
        return value

    def _shared_tensor(self, tensor: Tensor) -> Tensor:
        """Blocks of one forward pass hand on the same objects, so most are known without a look at their data."""
        if id(tensor) not in self._seen:
            total = str(float(tensor.sum(dtype=torch.float64))) if not tensor.is_complex() else ""
            equals = self._pool.setdefault((tensor.shape, tensor.dtype, total), [])
            known = next((known for known in equals if torch.equal(known, tensor)), None)
            if known is None:
                known = tensor
                equals.append(known)
            self._seen[id(tensor)] = tensor, known
        return self._seen[id(tensor)][1]


def _signature(value: Any) -> Any:
    """Hashable, equal for calls that are alike; None where an argument is of another kind than the usual ones."""
    if isinstance(value, Tensor):
        return "tensor", id(value)
    if isinstance(value, tuple | list):
        parts = [_signature(part) for part in value]
        return None if None in parts else (type(value), *parts)
    if isinstance(value, dict):
        parts = [_signature(part) for part in value.values()]
        return None if None in parts else ("dict", *zip(value, parts, strict=True))
    return (type(value), value) if value is None or isinstance(value, bool | int | float | str) else None
