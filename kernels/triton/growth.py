"""The largest entries of G = dY^T X, found without G: where a sparse weight should grow (SEFT).

Two kernels form the same tiles: one counts the entries whose magnitude reaches a threshold, one writes those that
reach it, in storage order. Thresholds are narrowed on the bits of a float32, which order as the magnitudes do: every
counting pass tries 32 of them at once. Each pass costs one product dY^T X, so this belongs to the steps, one in many,
at which positions change; the search reads counts on the host.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels.triton import gradient
from sparse_rt.kernels.triton.configs import Spec
from sparse_rt.kernels.triton.gradient import gradient_tile, tile_of
from sparse_rt.kernels.triton.language import BLOCK, load_mask
from sparse_rt.kernels.triton.tiles import TileArguments, on_device, tile_arguments

Where = Literal["pruned", "kept"]

THRESHOLDS = 32  # 5 bits a pass
INFINITY_BITS = 0x7F800000
# More entries than asked for that may be sorted instead of another pass: the share, and a floor for small counts.
SURPLUS, SURPLUS_FLOOR = 0.25, 4096


@triton.jit
def growth_tile(
    dy_ptr,
    x_ptr,
    meta_ptr,
    rows,
    row_mask,
    block,
    tokens,
    n,
    dy_stride,
    x_stride,
    meta_stride,
    NIBBLES: tl.constexpr,
    PRUNED: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """A tile of G and its magnitudes, -1 where a position may not be chosen."""
    acc = gradient_tile(dy_ptr, x_ptr, rows, row_mask, block, tokens, n, dy_stride, x_stride, BM, BT)
    kept = load_mask(meta_ptr, rows, row_mask, block, n, meta_stride, BM, NIBBLES)
    if PRUNED:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        allowed = (kept == 0) & row_mask[:, None] & (columns < n)[None, :]
    else:
        allowed = kept
    return acc, tl.where(allowed, tl.abs(acc), -1.0)


@triton.jit
def growth_count_kernel(
    dy_ptr,
    x_ptr,
    meta_ptr,
    thresholds_ptr,
    counts_ptr,
    thresholds,
    tokens,
    m,
    n,
    dy_stride,
    x_stride,
    meta_stride,
    NIBBLES: tl.constexpr,
    PRUNED: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """counts uint8 [thresholds, m, blocks]: entries of a row and block (at most 128) that reach each threshold."""
    blocks = tl.cdiv(n, BLOCK)
    tile, block = tile_of(tl.program_id(0), tl.cdiv(m, BM), blocks, GROUP)
    rows = tile * BM + tl.arange(0, BM)
    row_mask = rows < m
    _, size = growth_tile(
        dy_ptr,
        x_ptr,
        meta_ptr,
        rows,
        row_mask,
        block,
        tokens,
        n,
        dy_stride,
        x_stride,
        meta_stride,
        NIBBLES,
        PRUNED,
        BM,
        BT,
    )
    counts_at = counts_ptr + rows.to(tl.int64) * blocks + block
    step = tl.cast(m, tl.int64) * blocks
    for index in range(0, thresholds):
        reached = size >= tl.load(thresholds_ptr + index)
        tl.store(counts_at, tl.sum(reached.to(tl.int32), axis=1).to(tl.uint8), mask=row_mask)
        counts_at += step


@triton.jit
def growth_select_kernel(
    dy_ptr,
    x_ptr,
    meta_ptr,
    threshold_ptr,
    begins_ptr,
    rows_ptr,
    columns_ptr,
    out_ptr,
    tokens,
    m,
    n,
    dy_stride,
    x_stride,
    meta_stride,
    NIBBLES: tl.constexpr,
    PRUNED: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Entries that reach the threshold: row, column and signed value, those of a row and block from ``begins`` on."""
    blocks = tl.cdiv(n, BLOCK)
    tile, block = tile_of(tl.program_id(0), tl.cdiv(m, BM), blocks, GROUP)
    rows = tile * BM + tl.arange(0, BM)
    row_mask = rows < m
    acc, size = growth_tile(
        dy_ptr,
        x_ptr,
        meta_ptr,
        rows,
        row_mask,
        block,
        tokens,
        n,
        dy_stride,
        x_stride,
        meta_stride,
        NIBBLES,
        PRUNED,
        BM,
        BT,
    )
    reached = size >= tl.load(threshold_ptr)
    one = reached.to(tl.int32)
    begins = tl.load(begins_ptr + rows.to(tl.int64) * blocks + block, mask=row_mask, other=0)
    at = tl.cumsum(one, axis=1) - one
    columns = block * BLOCK + tl.arange(0, BLOCK)
    tl.store((rows_ptr + begins)[:, None] + at, tl.broadcast_to(rows[:, None], (BM, BLOCK)), mask=reached)
    tl.store((columns_ptr + begins)[:, None] + at, tl.broadcast_to(columns[None, :], (BM, BLOCK)), mask=reached)
    tl.store((out_ptr + begins)[:, None] + at, acc, mask=reached)


class Entries(NamedTuple):
    """Entries of G in storage order: row and column int32 [k], value float32 [k]."""

    rows: Tensor
    columns: Tensor
    gradient: Tensor


@torch.no_grad()
def largest_gradients(
    dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, count: int, where: Where = "pruned"
) -> Entries:
    """The ``count`` entries of dY^T X with the largest magnitude among the pruned (or the kept) positions.

    Ties go to the lower position. Entries that are zero or not a number are never chosen, so there may be fewer.
    Beside the result: a byte for every 4 weights while it searches, and up to 1.25 ``count`` entries.
    """
    if where not in ("pruned", "kept") or count < 0:
        raise UserError(f"largest_gradients takes where='pruned' or 'kept' and count >= 0, got {where!r} and {count}")
    search = _Search.of(dy, x, metadata, pattern, m, n, where)
    if search is None or count == 0:
        empty = torch.empty(0, dtype=torch.int32, device=x.device)
        return Entries(empty, empty.clone(), torch.empty(0, device=x.device))
    found = search.select(search.threshold(count))
    order = torch.sort(found.gradient.abs(), descending=True, stable=True).indices[:count].sort().values
    return Entries(*(tensor[order] for tensor in found))


class _Search(NamedTuple):
    given: gradient.Inputs
    weight: TileArguments
    m: int
    n: int
    pruned: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, dy, x, metadata, pattern: str, m: int, n: int, where: Where) -> _Search | None:
        given = gradient.inputs(dy, x, m, n)
        if given.tokens == 0:
            return None
        chosen = gradient.options("growth", given.x, m, n, given.tokens)
        return cls(given, tile_arguments(metadata, pattern, m, n), m, n, where == "pruned", chosen)

    def threshold(self, count: int) -> Tensor:
        """float32 [1]: a magnitude that ``count`` entries reach and few more, or the smallest one above zero."""
        low, high = 1, INFINITY_BITS + 1  # bits of magnitudes: fewer than ``count`` reach the second
        allowed = max(int(count * (1 + SURPLUS)), count + SURPLUS_FLOOR)
        while high - low > 1:
            bits = sorted({low + (high - low) * part // THRESHOLDS for part in range(THRESHOLDS)})
            reached = self.counts(_magnitudes(bits, self.given.x.device)).sum((1, 2), dtype=torch.int64).tolist()
            best = max((index for index, number in enumerate(reached) if number >= count), default=None)
            if best is None:
                break
            low, high = bits[best], (*bits, high)[best + 1]
            if reached[best] <= allowed:
                break
        return _magnitudes([low], self.given.x.device)

    def counts(self, thresholds: Tensor) -> Tensor:
        """uint8 [thresholds, m, blocks]."""
        shape = thresholds.shape[0], self.m, triton.cdiv(self.n, BLOCK.value)
        counts = torch.empty(shape, dtype=torch.uint8, device=thresholds.device)
        with on_device(counts):
            growth_count_kernel[gradient.grid(self.m, self.n, self.options["BM"])](
                *(self.given.dy, self.given.x, self.weight.meta, thresholds, counts, thresholds.shape[0]),
                *self._numbers(),
                NIBBLES=self.weight.nibbles,
                PRUNED=self.pruned,
                **self.options,
            )
        return counts

    def select(self, threshold: Tensor) -> Entries:
        counts = self.counts(threshold).flatten().long()
        ends = counts.cumsum(0)
        total = int(ends[-1])
        rows, columns = (torch.empty(total, dtype=torch.int32, device=counts.device) for _ in range(2))
        values = torch.empty(total, dtype=torch.float32, device=counts.device)
        with on_device(counts):
            growth_select_kernel[gradient.grid(self.m, self.n, self.options["BM"])](
                *(self.given.dy, self.given.x, self.weight.meta, threshold, ends - counts, rows, columns, values),
                *self._numbers(),
                NIBBLES=self.weight.nibbles,
                PRUNED=self.pruned,
                **self.options,
            )
        return Entries(rows, columns, values)

    def _numbers(self) -> tuple[int, ...]:
        strides = self.given.dy.stride(0), self.given.x.stride(0), self.weight.meta_stride
        return self.given.tokens, self.m, self.n, *strides


def _magnitudes(bits: list[int], device: torch.device) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)


def compile_specs() -> list[Spec]:
    """Both kernels, both kinds of metadata, in the default and shipped configurations."""
    count = {"thresholds_ptr": "*fp32", "counts_ptr": "*u8", "thresholds": "i32"}
    select = {"threshold_ptr": "*fp32", "begins_ptr": "*i64", "rows_ptr": "*i32", "columns_ptr": "*i32"}
    select |= {"out_ptr": "*fp32"}
    flags = {"PRUNED": True}
    return [
        *gradient.specs(growth_count_kernel, "growth_count", constants=flags, config_name="growth", **count),
        *gradient.specs(growth_select_kernel, "growth_select", constants=flags, config_name="growth", **select),
    ]
