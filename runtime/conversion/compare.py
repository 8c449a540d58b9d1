"""Two models side by side: are the masks the same, and how far apart are the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_rt.checkpoint import Checkpoint, is_sparse_checkpoint, resolve_model
from sparse_rt.conversion.source import Source, open_source
from sparse_rt.errors import UserError
from sparse_rt.formats import get_format
from sparse_rt.progress import Progress

IDENTICAL, SAME_COUNT, SUBSET, DIFFERENT = "identical", "same count", "subset", "different"


class Side(Protocol):
    """A model whose weights are looked at by name; ``kind`` says how they are stored."""

    kind: str

    def compressed(self) -> list[str]: ...

    def others(self) -> set[str]: ...

    def weight(self, name: str) -> tuple[Tensor, Tensor | None]: ...

    def tensor(self, name: str) -> Tensor: ...


class SparseSide:
    """A sparse-rt folder."""

    kind = "sparse-rt"

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def compressed(self) -> list[str]:
        return list(self.checkpoint.weights)

    def others(self) -> set[str]:
        return set(self.checkpoint.dense_tensors())

    def weight(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(dense weight, mask); no mask for a weight stored dense, nor for a product with a wrapper: no zeros."""
        entry = self.checkpoint.weights.get(name)
        if entry is None:
            return self.tensor(f"{name}.weight"), None
        if entry.wrapper is not None:
            return self.checkpoint.load_dense(name), None
        fmt = get_format(entry.pattern)
        values, metadata = self.checkpoint.load_weight(name)
        mask = fmt.unpack_mask(metadata, entry.m, entry.n)
        return values.new_zeros(mask.shape).masked_scatter_(mask, values.flatten()), mask

    def tensor(self, name: str) -> Tensor:
        return self.checkpoint.load(name)


class DenseSide:
    """Anything ``convert`` reads: masks exist only where compressed-tensors stores them."""

    def __init__(self, source: Source):
        self.source, self.kind = source, source.kind

    def compressed(self) -> list[str]:
        return []

    def others(self) -> set[str]:
        return set(self.source.tensors)

    def weight(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.source.load(f"{name}.weight"), self.source.stored_mask(f"{name}.weight")

    def tensor(self, name: str) -> Tensor:
        return self.source.load(name)


def open_side(model: str | Path) -> Side:
    folder = resolve_model(model)
    return SparseSide(Checkpoint.open(folder)) if is_sparse_checkpoint(folder) else DenseSide(open_source(folder))


def mask_state(mine: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> str:
    """How the kept positions of ``mine`` relate to those of ``other``, each (dense weight, mask or None).

    Where one side stores no mask, its nonzeros stand in; an explicit zero of the other side then agrees with a zero.
    """
    (a, mask_a), (b, mask_b) = mine, other
    kept_a, kept_b = (a != 0 if mask_a is None else mask_a), (b != 0 if mask_b is None else mask_b)
    nonzero_equal = (mask_a is None or mask_b is None) and torch.equal(a != 0, b != 0)
    if torch.equal(kept_a, kept_b) or nonzero_equal:
        return IDENTICAL
    if int(kept_a.sum()) == int(kept_b.sum()):
        return SAME_COUNT
    inside = kept_a if mask_b is not None else kept_a & (a != 0)
    return SUBSET if not bool((inside & ~kept_b).any()) else DIFFERENT


def compare(mine: Side, other: Side, progress: Progress) -> dict[str, Any]:
    """Masks and values of every weight that is compressed on either side, then the tensors that are dense on both.

    ``failed`` names the weights whose kept count differs; a mask inside a weight of a dense model does not count, that
    is what pruning makes. Raises ``UserError`` when a weight is missing on one side or has another shape.
    """
    names = list(dict.fromkeys([*mine.compressed(), *other.compressed()]))
    weights: dict[str, dict[str, Any]] = {}
    failed = []
    for name in progress.track(names, "comparing weights", total=len(names)):
        pair = [_weight(side, name) for side in (mine, other)]
        (a, mask), (b, other_mask) = pair
        if a.shape != b.shape:
            raise UserError(f"{name} has shape {tuple(a.shape)} here and {tuple(b.shape)} there; compare two versions")
        state = mask_state(*pair)
        difference = (a.float() - b.float()).abs()
        largest = float((difference if mask is None else difference[mask]).max()) if difference.numel() else 0.0
        weights[name] = {"mask": state, "values_equal": largest == 0, "max_abs_difference": largest}
        if state == DIFFERENT or (state == SUBSET and other_mask is not None):
            failed.append(name)
    compressed_tensors = {f"{name}.weight" for name in names}
    common = sorted((mine.others() & other.others()) - compressed_tensors)
    differing = [name for name in common if not torch.equal(mine.tensor(name), other.tensor(name))]
    states = (IDENTICAL, SAME_COUNT, SUBSET, DIFFERENT)
    return {
        "kind": other.kind,
        "weights": weights,
        "masks": {state: sum(w["mask"] == state for w in weights.values()) for state in states},
        "values_equal": sum(w["values_equal"] for w in weights.values()),
        "max_abs_difference": max((w["max_abs_difference"] for w in weights.values()), default=0.0),
        "other_tensors": {"compared": len(common), "different": differing},
        "failed": failed,
    }


def _weight(side: Side, name: str) -> tuple[Tensor, Tensor | None]:
    try:
        return side.weight(name)
    except UserError as error:
        raise UserError(f"{name} cannot be compared: {error}") from error
