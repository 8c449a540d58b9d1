"""More of what is kept of the tiles of G = dY^T X: chosen positions, and the gradients of a low-rank factor pair.

positions_grad   G at K given positions (SEFT), a float32 each; adds to what is there if asked to
rank_products    dA = s B^T (G . mask), dB = s (G . mask) A^T of W' = W + s (B A) . mask (MaskLoRA)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels import scratch
from sparse_rt.kernels.triton import gradient
from sparse_rt.kernels.triton.configs import Spec
from sparse_rt.kernels.triton.gradient import gradient_tile, tile_of
from sparse_rt.kernels.triton.language import BLOCK, load_mask
from sparse_rt.kernels.triton.tiles import on_device, tile_arguments

# Positions of a row and block of columns that are taken at once. With K of 0.3% to 2.5% of the weights (the parameters
# of LoRA with r 8 to 64) 0.4 to 3.2 of 128 columns are chosen on average.
ENTRIES = 4
# Ranks that are multiplied at once, the least that tensor cores take.
RANKS = 16
# Partial sums of the low-rank products: rows are treated in bands so that they fit.
PARTIAL_BYTES = 64 << 20


@triton.jit
def positions_grad_kernel(
    dy_ptr,
    x_ptr,
    columns_ptr,
    ends_ptr,
    out_ptr,
    tokens,
    m,
    n,
    dy_stride,
    x_stride,
    ADD: tl.constexpr,
    ENTRIES: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The chosen positions of one tile; ends[row, block + 1] is where those of a row and block end."""
    blocks = tl.cdiv(n, BLOCK)
    tile, block = tile_of(tl.program_id(0), tl.cdiv(m, BM), blocks, GROUP)
    rows = tile * BM + tl.arange(0, BM)
    row_mask = rows < m
    acc = gradient_tile(dy_ptr, x_ptr, rows, row_mask, block, tokens, n, dy_stride, x_stride, BM, BT)
    ends_at = ends_ptr + rows.to(tl.int64) * blocks + block
    start = tl.load(ends_at, mask=row_mask, other=0)
    stop = tl.load(ends_at + 1, mask=row_mask, other=0)
    most = tl.max(stop - start, axis=0)
    for done in tl.range(0, most, ENTRIES, num_stages=1):
        entry = start[:, None] + done + tl.arange(0, ENTRIES)[None, :]
        inside = entry < stop[:, None]
        column = tl.load(columns_ptr + entry, mask=inside, other=block * BLOCK) - block * BLOCK
        found = tl.gather(acc, column, 1)
        if ADD:
            found += tl.load(out_ptr + entry, mask=inside, other=0.0)
        tl.store(out_ptr + entry, found, mask=inside)


@triton.jit
def rank_products_kernel(
    dy_ptr,
    x_ptr,
    meta_ptr,
    a_ptr,
    b_ptr,
    part_a_ptr,
    part_b_ptr,
    tokens,
    m,
    n,
    rank,
    dy_stride,
    x_stride,
    meta_stride,
    NIBBLES: tl.constexpr,
    RANKS: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of one tile: part_a [tiles, rank, n] = B^T G, part_b [blocks, m, rank] = G A^T at the kept positions."""
    tile, block = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BLOCK), GROUP)
    rows = tile * BM + tl.arange(0, BM)
    row_mask = rows < m
    acc = gradient_tile(dy_ptr, x_ptr, rows, row_mask, block, tokens, n, dy_stride, x_stride, BM, BT)
    kept = load_mask(meta_ptr, rows, row_mask, block, n, meta_stride, BM, NIBBLES)
    acc = tl.where(kept, acc, 0.0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < n
    half = tl.arange(0, BLOCK // 2)
    left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BLOCK // 2)), (0, 2, 1)))
    part_a_at = part_a_ptr + tile.to(tl.int64) * rank * n
    part_b_at = part_b_ptr + (block.to(tl.int64) * m + rows)[None, :] * rank
    for first in tl.range(0, rank, RANKS, num_stages=1):
        index = first + tl.arange(0, RANKS)
        ranked = (index < rank)[:, None]
        a_rows = index.to(tl.int64)[:, None] * n
        b = tl.load(
            b_ptr + rows.to(tl.int64)[None, :] * rank + index[:, None], mask=ranked & row_mask[None, :], other=0.0
        )
        of_a = _dot_float32(b, acc, tl.zeros((RANKS, BLOCK), dtype=tl.float32))
        tl.store(part_a_at + a_rows + columns[None, :], of_a, mask=ranked & column_mask[None, :])
        # In two halves: for the whole row of ``a`` a program has too few registers.
        column = block * BLOCK + half
        a = tl.load(a_ptr + a_rows + column[None, :], mask=ranked & (column < n)[None, :], other=0.0)
        of_b = _dot_float32(a, tl.trans(left), tl.zeros((RANKS, BM), dtype=tl.float32))
        column += BLOCK // 2
        a = tl.load(a_ptr + a_rows + column[None, :], mask=ranked & (column < n)[None, :], other=0.0)
        of_b = _dot_float32(a, tl.trans(right), of_b)
        tl.store(part_b_at + index[:, None], of_b, mask=ranked & row_mask[None, :])


@triton.jit
def _dot_float32(a, b, acc):
    """acc + a @ b of float32 as three TF32 products: errors about as of one float32 product, on tensor cores."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


class Positions(NamedTuple):
    """K positions of a weight in storage order, and where those of a row and block of 128 columns end."""

    columns: Tensor  # int32 [K]
    ends: Tensor  # int32 [m * blocks + 1]; the first is 0


def positions_index(rows: Tensor, columns: Tensor, m: int, n: int) -> Positions:
    """rows, columns: integers [K], ascending by row and then by column, no position twice (not checked).

    4 bytes a position and 0.03 a weight; to be kept as long as the positions stay.
    """
    if rows.shape != columns.shape or rows.dim() != 1 or rows.shape[0] >= 2**31:
        raise UserError(f"positions are fewer than 2^31 rows and columns, got {rows.shape} and {columns.shape}")
    blocks = triton.cdiv(n, BLOCK.value)
    tile = rows.long() * blocks + columns // BLOCK.value
    limits = torch.arange(m * blocks + 1, device=rows.device)
    return Positions(columns.to(torch.int32).contiguous(), torch.searchsorted(tile, limits, out_int32=True))


@torch.no_grad()
def positions_grad(dy: Tensor, x: Tensor, positions: Positions, m: int, n: int, add_to: Tensor | None = None) -> Tensor:
    """sum_t dY[t, row] X[t, column] at every position: float32 [K]; added to ``add_to`` where it is given."""
    given = gradient.inputs(dy, x, m, n)
    result = torch.empty(positions.columns.shape, device=x.device) if add_to is None else add_to
    if result.shape != positions.columns.shape or result.dtype != torch.float32 or not result.is_contiguous():
        raise UserError(
            f"gradients of {positions.columns.numel()} positions are contiguous float32 of that many, "
            f"got {result.dtype} {tuple(result.shape)}"
        )
    if given.tokens == 0 or result.numel() == 0:
        return result.zero_() if add_to is None else result
    chosen = gradient.options("positions_grad", given.x, m, n, given.tokens)
    with on_device(x):
        positions_grad_kernel[gradient.grid(m, n, chosen["BM"])](
            *(given.dy, given.x, positions.columns, positions.ends, result, given.tokens, m, n),
            *(given.dy.stride(0), given.x.stride(0)),
            ADD=add_to is not None,
            ENTRIES=ENTRIES,
            **chosen,
        )
    return result


@torch.no_grad()
def rank_products(
    dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of a [r, n] and b [m, r], float32, of y = x W'^T with W' = W + scale (b a) at the kept positions.

    Beside the results: partial sums of at most ``PARTIAL_BYTES`` (or one band of rows), in a buffer of all layers.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != n or b.shape[0] != m or a.shape[0] != b.shape[1]:
        raise UserError(f"a low-rank update of a ({m}, {n}) weight is [r, {n}] and [{m}, r], got {a.shape}, {b.shape}")
    given = gradient.inputs(dy, x, m, n)
    a, b, rank = a.detach().float().contiguous(), b.detach().float().contiguous(), a.shape[0]
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    if given.tokens == 0 or a.numel() == 0 or b.numel() == 0:
        return da, db
    chosen = gradient.options("rank_products", given.x, m, n, given.tokens)
    rows, blocks = chosen["BM"], triton.cdiv(n, BLOCK.value)
    weight = tile_arguments(metadata, pattern, m, n)
    for start, stop in _bands(m, n, rank, rows):
        part_a = scratch.buffer("rank_a", (triton.cdiv(stop - start, rows), rank, n), torch.float32, x.device)
        part_b = scratch.buffer("rank_b", (blocks, stop - start, rank), torch.float32, x.device)
        with on_device(x):
            rank_products_kernel[gradient.grid(stop - start, n, rows)](
                *(given.dy[:, start:stop], given.x, weight.meta[start:stop]),
                *(a, b[start:stop], part_a, part_b, given.tokens, stop - start, n, rank),
                *(given.dy.stride(0), given.x.stride(0), weight.meta_stride),
                NIBBLES=weight.nibbles,
                RANKS=RANKS,
                **chosen,
            )
        da += part_a.sum(0)
        torch.sum(part_b, 0, out=db[start:stop])
    return da.mul_(scale), db.mul_(scale)


def _bands(m: int, n: int, rank: int, rows: int) -> list[tuple[int, int]]:
    """Ranges of rows, multiples of ``rows`` but for the end, whose partial sums take PARTIAL_BYTES."""
    of_tile = 4 * rank * (n + triton.cdiv(n, BLOCK.value) * rows)
    step = max(1, PARTIAL_BYTES // of_tile) * rows
    return [(start, min(start + step, m)) for start in range(0, m, step)]


def compile_specs() -> list[Spec]:
    """Every kernel in its default and shipped configurations."""
    float32 = dict.fromkeys(("a_ptr", "b_ptr", "part_a_ptr", "part_b_ptr"), "*fp32")
    return [
        *gradient.specs(
            positions_grad_kernel,
            "positions_grad",
            (None,),
            {"ADD": True, "ENTRIES": ENTRIES},
            columns_ptr="*i32",
            ends_ptr="*i32",
            out_ptr="*fp32",
        ),
        *gradient.specs(rank_products_kernel, "rank_products", constants={"RANKS": RANKS}, rank="i32", **float32),
    ]
