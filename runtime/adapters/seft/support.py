"""The kept positions of a compressed weight as they evolve: looked up, rewritten in place, and undone bit for bit.

A position is flat, row * n + column. The base layer holds the evolved weight and nothing else; what it takes to go back
is a record of the removed weights and of the grown positions, whose base value is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.adapters.effective import Block, Weight
from sparse_rt.formats import get_format


@dataclass(frozen=True)
class Evolution:
    """How a mask differs from the one it started with; positions int32, ascending.

    ``removed``, with the original ``values``, counts as not kept whatever grows there later: a removed position in
    ``grown`` is kept again with the base value 0.
    """

    removed: Tensor
    values: Tensor
    grown: Tensor

    @classmethod
    def none(cls, values: Tensor) -> Evolution:
        empty = torch.empty(0, dtype=torch.int32, device=values.device)
        return cls(empty, values.detach().flatten()[:0], empty)

    @property
    def excess(self) -> int:
        """Kept weights above the number the mask started with."""
        return self.grown.numel() - self.removed.numel()

    def to(self, device: torch.device) -> Evolution:
        return Evolution(self.removed.to(device), self.values.to(device), self.grown.to(device))


def contains(ascending: Tensor, positions: Tensor) -> Tensor:
    """bool: which ``positions`` are in ``ascending``."""
    if ascending.numel() == 0:
        return torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
    ascending = ascending.to(positions.dtype)
    at = torch.searchsorted(ascending, positions).clamp_(max=ascending.numel() - 1)
    return ascending[at] == positions


def union(*positions: Tensor) -> Tensor:
    """All of them once, ascending."""
    return torch.unique(torch.cat([part.to(positions[0].dtype) for part in positions]))


def without(positions: Tensor, ascending: Tensor) -> Tensor:
    return positions[~contains(ascending, positions)]


def slots(weight: Weight, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(int32 index into the flattened values, bool kept) of ascending ``positions``; the index of others means nothing.

    Temporaries of one block of rows.
    """
    index = torch.zeros(positions.shape, dtype=torch.int32, device=positions.device)
    kept = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
    for block, (begin, end) in _parts(weight, positions):
        mask = _mask(weight, block).flatten()
        inside = positions[begin:end].long() - block.start * weight.n
        kept[begin:end] = mask[inside]
        index[begin:end] = mask.cumsum(0, dtype=torch.int32)[inside] + (block.begin - 1)
    return index, kept


def positions_at(weight: Weight, index: Tensor) -> Tensor:
    """int32 positions of the kept values with these ascending indexes."""
    found = torch.empty(index.shape, dtype=torch.int32, device=index.device)
    limits = torch.tensor([block.end for block in weight.blocks], device=index.device)
    ends = torch.searchsorted(index.long(), limits).tolist()
    for block, begin, end in zip(weight.blocks, [0, *ends], ends, strict=False):
        if begin < end:
            kept = _mask(weight, block).flatten().nonzero().squeeze(-1)
            found[begin:end] = (kept[index[begin:end].long() - block.begin] + block.start * weight.n).to(torch.int32)
    return found


def rewrite(weight: Weight, now: Evolution, removed: Tensor, grown: Tensor) -> tuple[Tensor, Tensor, Evolution]:
    """(values, metadata, evolution) of a weight that evolved to ``now`` and shall have ``removed`` and ``grown``.

    Values that neither ends nor begins to be kept are copied bit for bit. Temporaries: one dense block of rows; the
    old and the new values of this weight exist together.
    """
    back = without(now.removed, union(removed, grown))
    new = without(removed, now.removed)
    index, _ = slots(weight, new)
    taken = weight.values.detach().flatten()[index.long()]
    originals = torch.cat([now.values[contains(removed, now.removed)], taken])
    order = torch.cat([now.removed[contains(removed, now.removed)], new]).argsort()
    clear = union(now.grown, new)
    put = torch.cat([grown, back])
    put_values = torch.cat([taken.new_zeros(grown.numel()), now.values[contains(back, now.removed)]])
    by_position = put.argsort()
    values, metadata = _replace(weight, clear, put[by_position], put_values[by_position])
    return values, metadata, Evolution(removed, originals[order], grown)


def _replace(weight: Weight, clear: Tensor, put: Tensor, put_values: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of ``clear`` are not kept any more, those of ``put`` are kept with ``put_values``."""
    fmt, n = get_format(weight.pattern), weight.n
    flat, old = weight.values.detach().flatten(), weight.metadata.detach()
    pieces, rows = [], []
    cleared = dict(_parts(weight, clear))
    written = dict(_parts(weight, put))
    for block in weight.blocks:
        part, meta = flat[block.begin : block.end], old[block.start : block.stop]
        if block in cleared or block in written:
            mask = _mask(weight, block)
            dense = part.new_zeros(mask.shape).masked_scatter_(mask, part)
            (a, b), (c, d) = cleared.get(block, (0, 0)), written.get(block, (0, 0))
            mask.view(-1)[clear[a:b].long() - block.start * n] = False
            at = put[c:d].long() - block.start * n
            mask.view(-1)[at] = True
            dense.view(-1)[at] = put_values[c:d]
            part, meta = dense[mask], fmt.pack_mask(mask)
        pieces.append(part)
        rows.append(meta)
    values = torch.cat(pieces)
    return values.view(fmt.values_shape(weight.m, n, values.numel())), torch.cat(rows)


def _mask(weight: Weight, block: Block) -> Tensor:
    metadata = weight.metadata.detach()[block.start : block.stop]
    return get_format(weight.pattern).unpack_mask(metadata, block.stop - block.start, weight.n)


def _parts(weight: Weight, positions: Tensor) -> list[tuple[Block, tuple[int, int]]]:
    """The blocks that hold any of the ascending ``positions``, and which."""
    if positions.numel() == 0:
        return []
    limits = torch.tensor([block.stop * weight.n for block in weight.blocks], device=positions.device)
    ends = torch.searchsorted(positions.long(), limits).tolist()
    found = zip(weight.blocks, zip([0, *ends], ends, strict=False), strict=True)
    return [(block, (begin, end)) for block, (begin, end) in found if begin < end]
