"""The gradient dY^T X at chosen positions of a weight, and block by block; the whole of it never exists (SEFT).

On a GPU a kernel keeps K floats of every tile (``triton/gradient_epilogues.py``) or the largest entries
(``triton/growth.py``); everywhere else the gradient is formed for one block of rows at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_rt.kernels import low_rank
from sparse_rt.kernels.triton import dispatch

# Elements of G that exist at once: 4 MB of float32 stay in a core's cache, a GPU wants fewer and larger products.
TILE_ELEMENTS = {"cpu": 1 << 20}
TILE_ELEMENTS_ACCELERATOR = 1 << 24


@dataclass(frozen=True)
class Chosen:
    """Positions of a weight (m, n): flat, ascending, none twice. Keep it as long as the positions stay."""

    positions: Tensor
    pattern: str
    m: int
    n: int
    # What the GPU kernel needs, made at its first call.
    cache: dict[str, Any] = field(default_factory=dict)

    def rows_of_tiles(self, rows: int) -> list[int]:
        """Where the positions of each block of ``rows`` rows begin, and the end."""
        if rows not in self.cache:
            starts = torch.arange(0, self.m + rows, rows, device=self.positions.device).clamp_(max=self.m) * self.n
            self.cache[rows] = torch.searchsorted(self.positions, starts.to(self.positions.dtype)).tolist()
        return self.cache[rows]


@torch.no_grad()
def gradient(dy: Tensor, x: Tensor, chosen: Chosen) -> Tensor:
    """dY^T X at the chosen positions: dy [..., m], x [..., n] -> [K], float32 (float64 of float64)."""
    m, n = chosen.m, chosen.n
    if refusal(dy, x, chosen.pattern, m, n) is None:
        from sparse_rt.kernels.triton import gradient_epilogues

        if "fast" not in chosen.cache:
            rows, columns = chosen.positions // n, chosen.positions % n
            chosen.cache["fast"] = gradient_epilogues.positions_index(rows, columns, m, n)
        return gradient_epilogues.positions_grad(dy, x, chosen.cache["fast"], m, n)
    result = torch.empty(chosen.positions.shape, dtype=_accumulate(dy), device=dy.device)
    bounds = chosen.rows_of_tiles(tile_rows(n, dy.device))
    wanted = [bool(end - begin) for begin, end in itertools.pairwise(bounds)]
    for index, (start, _, tile) in enumerate(tiles(dy, x, m, n, wanted)):
        if tile is not None:
            part = slice(bounds[index], bounds[index + 1])
            torch.take(tile, chosen.positions[part].long() - start * n, out=result[part])
    return result


def tiles(
    dy: Tensor, x: Tensor, m: int, n: int, wanted: list[bool] | None = None
) -> Iterator[tuple[int, int, Tensor | None]]:
    """(start, stop, rows start to stop of dY^T X) from top to bottom; None instead of blocks that nobody wants."""
    accumulate = _accumulate(dy)
    dy, x = dy.reshape(-1, m).to(accumulate), x.reshape(-1, n).to(accumulate)
    rows = tile_rows(n, dy.device)
    for index, start in enumerate(range(0, m, rows)):
        stop = min(start + rows, m)
        yield start, stop, dy[:, start:stop].T @ x if wanted is None or wanted[index] else None


def largest(
    dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, count: int, pruned: bool
) -> Tensor | None:
    """Flat positions, ascending, of the ``count`` largest |dY^T X| among the kept positions, or with ``pruned`` among
    all, by the GPU kernel; None where it does not run. Ties go to the lower position, zeros are left out.
    """
    if refusal(dy, x, pattern, m, n) is not None:
        return None
    from sparse_rt.kernels.triton import growth

    found = [
        growth.largest_gradients(dy, x, metadata, pattern, m, n, count, where)
        for where in (("kept", "pruned") if pruned else ("kept",))
    ]
    positions = torch.cat([entries.rows.long() * n + entries.columns for entries in found])
    size = torch.cat([entries.gradient.abs() for entries in found])
    order = positions.argsort()
    positions, size = positions[order], size[order]
    return positions[torch.sort(size, descending=True, stable=True).indices[:count].sort().values]


def refusal(dy: Tensor, x: Tensor, pattern: str, m: int, n: int) -> str | None:
    """Why the GPU kernels do not take this gradient; None: they do. The sparsity of the weight does not matter."""
    reason = low_rank.refusal(pattern, m, n, dy, x)
    if reason is None:
        dtype = dy.dtype if dy.dtype == x.dtype else torch.float32
        if x.numel() // max(1, n) not in dispatch.limits("positions_grad", pattern, m, n, 0.0, dtype, x.device):
            return dispatch.refusal("positions_grad")
    return reason


def tile_rows(n: int, device: torch.device) -> int:
    return max(1, TILE_ELEMENTS.get(device.type, TILE_ELEMENTS_ACCELERATOR) // max(n, 1))


def _accumulate(dy: Tensor) -> torch.dtype:
    return torch.float64 if dy.dtype == torch.float64 else torch.float32
