"""The gradients of one window: candidates from its first micro-batch, their signed sums afterwards.

A window holds 4 floats and 2 positions for each candidate, at most two candidates a delta (three in ``nm_swap``); the
gradient itself exists for one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.adapters.effective import Weight
from sparse_rt.adapters.seft import support
from sparse_rt.adapters.seft.rules import highest, lowest
from sparse_rt.formats import get_format
from sparse_rt.formats.selection import keep_highest
from sparse_rt.kernels import positions as gradients

# What a checkpoint holds of a window.
SAVED = ("positions", "grow", "prune", "out", "into", "total", "squares")


@dataclass
class Window:
    """The candidates of one weight and their gradients.

    ``total`` and ``squares`` [W] sum over optimizer steps the gradient of a step and its square; ``micro`` sums over
    the micro-batches of the step in progress. ``out`` and ``into`` (indexes, one pair a group) belong to ``nm_swap``.
    """

    mode: str
    steps: int = 0
    positions: Tensor | None = None
    grow: Tensor | None = None
    prune: Tensor | None = None
    out: Tensor | None = None
    into: Tensor | None = None
    total: Tensor | None = None
    squares: Tensor | None = None
    micro: Tensor | None = None
    # All that a pass over the gradient gathers, and where the deltas and the candidates are in it.
    chosen: gradients.Chosen | None = None
    places: tuple[Tensor, Tensor] | None = None
    # On several processes: the first micro-batch, which counts as every process's.
    first: Tensor | None = None

    def observe(
        self, dy: Tensor, x: Tensor, weight: Weight, deltas: Tensor, count: int, values: Callable[[int, int], Tensor]
    ) -> Tensor:
        """The gradient at the positions ``deltas``; takes note of the candidates' on the way.

        ``values(begin, end)`` is a part of the values with the deltas, float32; ``count`` candidates are chosen.
        """
        if self.positions is None:
            self._choose(dy, x, weight, count, values)
        if self.chosen is None:
            together = support.union(deltas, self.positions)
            self.chosen = gradients.Chosen(together, weight.pattern, weight.m, weight.n)
            self.places = tuple(torch.searchsorted(together, part) for part in (deltas, self.positions))
        found = gradients.gradient(dy, x, self.chosen)
        of_deltas, of_candidates = self.places
        self.micro += found[of_candidates].float()
        return found[of_deltas]

    def _choose(self, dy: Tensor, x: Tensor, weight: Weight, count: int, values: Callable[[int, int], Tensor]) -> None:
        m, n, everywhere = weight.m, weight.n, self.mode == "unstructured"
        fast = gradients.largest(dy, x, weight.metadata, weight.pattern, m, n, count, pruned=everywhere)
        seekers: list[_Seeker] = [] if fast is not None else [_Largest(count, everywhere, dy.device)]
        if everywhere:
            seekers.append(_LeastSensitive(count, dy.device))
        if self.mode == "nm_swap":
            seekers.append(_BestPairs(count, get_format(weight.pattern).group, dy.device))
        if seekers:
            _search(dy, x, weight, values, seekers)
        growing = seekers.pop(0).positions if fast is None else fast.to(torch.int32)
        self._take(growing, *seekers)

    def _take(self, growing: Tensor, *others: _Seeker) -> None:
        extra = [part for other in others for part in other.parts()]
        self.positions = support.union(growing, *extra)
        self.grow = support.contains(growing, self.positions)
        self.prune = torch.zeros_like(self.grow)
        self.out = self.into = torch.empty(0, dtype=torch.int32, device=growing.device)
        for other in others:
            if isinstance(other, _BestPairs):
                self.out, self.into = (torch.searchsorted(self.positions, p, out_int32=True) for p in other.parts())
            else:
                self.prune = support.contains(other.positions, self.positions)
        self.reset()

    def reset(self) -> None:
        """Zero sums for the present candidates."""
        self.total, self.squares, self.micro = (
            torch.zeros(self.positions.shape, device=self.positions.device) for _ in range(3)
        )

    def close_step(self, gradient: Tensor) -> None:
        """Count the gradient of a whole optimizer step."""
        self.total += gradient
        self.squares.addcmul_(gradient, gradient)
        self.micro.zero_()
        self.steps += 1

    def state(self) -> dict:
        return {"steps": self.steps, "mode": self.mode, **{name: getattr(self, name) for name in SAVED}}

    @classmethod
    def of(cls, state: dict, device: torch.device) -> Window:
        tensors = {name: state[name].to(device) for name in SAVED if state[name] is not None}
        window = cls(state["mode"], state["steps"], **tensors)
        if window.positions is not None:
            window.micro = torch.zeros_like(window.total)
        return window


class _Seeker:
    """Looks at every block of rows of the gradient and keeps the best ``count`` of what it looks for."""

    def __init__(self, count: int, device: torch.device):
        self.count = count
        self.positions = torch.empty(0, dtype=torch.int32, device=device)
        self.scores = torch.empty(0, device=device)

    def parts(self) -> list[Tensor]:
        return [self.positions]

    def look(self, first: int, tile: Tensor, mask: Tensor, kept: Tensor) -> None:
        """tile, mask [rows, n]: gradient and kept positions; kept: the weights there; first: the first position."""
        raise NotImplementedError

    def keep(self, best: Tensor) -> None:
        self.positions, self.scores = self.positions[best], self.scores[best]


class _Largest(_Seeker):
    """The largest |gradient|, of all or of the kept positions; zeros are never chosen."""

    def __init__(self, count: int, everywhere: bool, device: torch.device):
        super().__init__(count, device)
        self.everywhere = everywhere

    def look(self, first: int, tile: Tensor, mask: Tensor, kept: Tensor) -> None:
        size = tile.abs().flatten()
        size = size if self.everywhere else torch.where(mask.flatten(), size, 0)
        own = highest(size, size > 0, self.count).nonzero().squeeze(-1)  # at most count, before what is kept grows
        self.positions = torch.cat([self.positions, (own + first).to(torch.int32)])
        self.scores = torch.cat([self.scores, size[own]])
        self.keep(keep_highest(self.scores, min(self.count, self.scores.numel())))


class _LeastSensitive(_Seeker):
    """The smallest |weight * gradient| of the kept positions."""

    def look(self, first: int, tile: Tensor, mask: Tensor, kept: Tensor) -> None:
        sensitivity = (tile[mask] * kept).abs()
        own = lowest(sensitivity, self.count)
        where = mask.flatten().nonzero().squeeze(-1)[own]
        self.positions = torch.cat([self.positions, (where + first).to(torch.int32)])
        self.scores = torch.cat([self.scores, sensitivity[own]])
        self.keep(lowest(self.scores, self.count))


class _BestPairs(_Seeker):
    """In every group the pruned position with the largest |gradient| and the kept one with the smallest
    |weight * gradient|; the groups with the best g_in^2 / |w_out g_out|."""

    def __init__(self, count: int, group: int, device: torch.device):
        super().__init__(count, device)
        self.group, self.into = group, self.positions

    def parts(self) -> list[Tensor]:
        return [self.positions, self.into]

    def look(self, first: int, tile: Tensor, mask: Tensor, kept: Tensor) -> None:
        group = self.group
        weight = torch.zeros_like(tile).masked_scatter_(mask, kept)
        groups, kept_here = tile.reshape(-1, group), mask.reshape(-1, group)
        gain = torch.where(kept_here, -1.0, groups.abs())
        cost = torch.where(kept_here, (groups * weight.view(-1, group)).abs(), torch.inf)
        best, into = _first(gain, gain.amax(1))
        least, out = _first(cost, cost.amin(1))
        ratio = torch.where(best > 0, best.square() / least, 0)
        own = highest(ratio, ratio > 0, self.count)
        start = first + torch.arange(groups.shape[0], device=tile.device)[own] * group
        self.positions = torch.cat([self.positions, (start + out[own]).to(torch.int32)])
        self.into = torch.cat([self.into, (start + into[own]).to(torch.int32)])
        self.scores = torch.cat([self.scores, ratio[own]])
        self.keep(keep_highest(self.scores, min(self.count, self.scores.numel())))

    def keep(self, best: Tensor) -> None:
        super().keep(best)
        self.into = self.into[best]


def _first(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` and the first column of ``rows`` that holds them: argmax does not promise the first of equals."""
    return values, (rows == values[:, None]).to(torch.uint8).cumsum(1).eq(0).sum(1)


def _search(
    dy: Tensor, x: Tensor, weight: Weight, values: Callable[[int, int], Tensor], seekers: list[_Seeker]
) -> None:
    """Show every block of rows of dY^T X to the seekers."""
    fmt, n = get_format(weight.pattern), weight.n
    begin = 0
    for start, stop, tile in gradients.tiles(dy, x, weight.m, n):
        mask = fmt.unpack_mask(weight.metadata.detach()[start:stop], stop - start, n)
        end = begin + int(mask.sum())
        kept = values(begin, end)
        for seeker in seekers:
            seeker.look(start * n, tile, mask, kept)
        begin = end
