"""A weight times a factor of its row and one of its column group (SPP), on a GPU; kernels/factors.py has the formula.

``apply_factors`` forms the values of W', ``factors_grad`` the gradients of the factors in one pass over tiles of
dY^T X: a tile times the weights of its positions is summed over its columns (for b) and, group by group, over its rows
(for a). Groups may begin anywhere in a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels import scratch
from sparse_rt.kernels.triton import configs, gradient
from sparse_rt.kernels.triton.configs import Spec
from sparse_rt.kernels.triton.gradient import gradient_tile, tile_of
from sparse_rt.kernels.triton.language import BLOCK, cast, load_tile, load_words, store_tile
from sparse_rt.kernels.triton.tiles import on_device, tile_arguments

APPLY_DEFAULTS: dict[str, Any] = {"BM": 16, "num_warps": 4, "num_stages": 1}
SUM_COLUMNS = 512


@triton.jit
def factors_grad_kernel(
    dy_ptr,
    x_ptr,
    values_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    a_ptr,
    b_ptr,
    part_a_ptr,
    part_b_ptr,
    tokens,
    m,
    n,
    group_rows,
    dy_stride,
    x_stride,
    meta_stride,
    NIBBLES: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sums of one tile: part_b [blocks, m], and part_a [tile + group, n] for every group that the tile touches.

    tile + group is another row for every pair of them: from one pair to the next in a walk down the rows at least one
    of the two grows by one.
    """
    tile, block = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BLOCK), GROUP)
    rows = tile * BM + tl.arange(0, BM)
    row_mask = rows < m
    acc = gradient_tile(dy_ptr, x_ptr, rows, row_mask, block, tokens, n, dy_stride, x_stride, BM, BT)
    weights = load_tile(
        values_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BM, NIBBLES
    ).to(tl.float32)
    product = tl.where(weights != 0, acc * weights, 0.0)  # not Inf * 0 where nothing is kept

    columns = block * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < n
    group = rows // group_rows
    first = tile * BM // group_rows
    last = (tl.minimum(tile * BM + BM, m) - 1) // group_rows
    b = tl.load(b_ptr + rows, mask=row_mask, other=0.0)
    a_at = a_ptr + first.to(tl.int64) * n + columns
    part_at = part_a_ptr + (tile + first).to(tl.int64) * n + columns
    of_rows = tl.zeros((BM,), dtype=tl.float32)
    for index in tl.range(first, last + 1, num_stages=1):
        a = tl.load(a_at, mask=column_mask, other=0.0)
        mine = tl.where((group == index)[:, None], product, 0.0)
        of_rows += tl.sum(mine * a[None, :], axis=1)
        tl.store(part_at, tl.sum(mine * b[:, None], axis=0), mask=column_mask)
        a_at += n
        part_at += n
    tl.store(part_b_ptr + block.to(tl.int64) * m + rows, of_rows, mask=row_mask)


@triton.jit
def factors_sum_kernel(part_ptr, out_ptr, n, group_rows, scale, BM: tl.constexpr, BN: tl.constexpr):
    """out [groups, n] = scale times the sum of the rows of part_a that belong to a group."""
    group = tl.program_id(0)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    column_mask = columns < n
    first = group * group_rows // BM
    last = ((group + 1) * group_rows - 1) // BM
    part_at = part_ptr + (first + group).to(tl.int64) * n + columns
    total = tl.zeros((BN,), dtype=tl.float32)
    for _ in range(first, last + 1):
        total += tl.load(part_at, mask=column_mask, other=0.0)
        part_at += n
    tl.store(out_ptr + group.to(tl.int64) * n + columns, total * scale, mask=column_mask)


@triton.jit
def factors_apply_kernel(
    values_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    scale,
    base,
    m,
    n,
    group_rows,
    meta_stride,
    NIBBLES: tl.constexpr,
    BM: tl.constexpr,
):
    """values (base + scale b a) of one tile, in float32, rounded once to the dtype of ``out``."""
    blocks = tl.cdiv(n, BLOCK)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = tile * BM + tl.arange(0, BM)
    row_mask = rows < m
    a_rows = a_ptr + (rows // group_rows).to(tl.int64) * n
    b = tl.load(b_ptr + rows, mask=row_mask, other=0.0) * scale
    if NIBBLES:  # every value knows its column: two bits a value
        words = load_words(meta_ptr, rows, row_mask, block, meta_stride)
        fields = words[:, :, None] >> (tl.arange(0, 16) * 2).to(tl.uint32)[None, None, :]
        value = tl.arange(0, BLOCK // 2)
        columns = (block * BLOCK + value // 2 * 4)[None, :] + (tl.reshape(fields, (BM, BLOCK // 2)) & 3).to(tl.int32)
        index = block * (BLOCK // 2) + value
        inside = row_mask[:, None] & (index < n // 2)[None, :]
        position = (rows.to(tl.int64) * (n // 2))[:, None] + index[None, :]
        values = tl.load(values_ptr + position, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_rows[:, None] + columns, mask=inside, other=0.0)
        result = values * (base + b[:, None] * a)
        tl.store(out_ptr + position, cast(result, out_ptr.dtype.element_ty), mask=inside)
    else:
        values = load_tile(
            values_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BM, NIBBLES
        ).to(tl.float32)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(a_rows[:, None] + columns[None, :], mask=row_mask[:, None] & (columns < n)[None, :], other=0.0)
        result = cast(values * (base + b[:, None] * a), out_ptr.dtype.element_ty)
        store_tile(
            result, out_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BM, NIBBLES
        )


@torch.no_grad()
def factors_grad(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    pattern: str,
    m: int,
    n: int,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of a [groups, n] and b [m], float32, of y = x W'^T with W' as in ``apply_factors``.

    The gradient of the values never exists. Beside the results: n / 128 floats a row and one row of n floats for every
    BM rows and every group, in buffers that all layers share.
    """
    a, b, values = _factors(values, m, n, a, b)
    given = gradient.inputs(dy, x, m, n)
    da, db = torch.empty_like(a), torch.empty_like(b)
    if given.tokens == 0 or values.numel() == 0 or da.numel() == 0:
        return da.zero_(), db.zero_()
    chosen = gradient.options("factors_grad", given.x, m, n, given.tokens)
    groups, rows, blocks = a.shape[0], chosen["BM"], triton.cdiv(n, BLOCK.value)
    part_a = scratch.buffer("factors_a", (triton.cdiv(m, rows) + groups - 1, n), torch.float32, x.device)
    part_b = scratch.buffer("factors_b", (blocks, m), torch.float32, x.device)
    words, starts, offsets, stride, nibbles = tile_arguments(metadata, pattern, m, n)
    with on_device(x):
        factors_grad_kernel[gradient.grid(m, n, rows)](
            *(given.dy, given.x, values, words, starts, offsets, a, b, part_a, part_b),
            *(given.tokens, m, n, m // groups, given.dy.stride(0), given.x.stride(0), stride),
            NIBBLES=nibbles,
            **chosen,
        )
        factors_sum_kernel[(groups, triton.cdiv(n, SUM_COLUMNS))](
            part_a, da, n, m // groups, scale, BM=rows, BN=SUM_COLUMNS
        )
    torch.sum(part_b, 0, out=db)
    return da, db.mul_(scale)


@torch.no_grad()
def apply_factors(
    out: Tensor,
    values: Tensor,
    metadata: Tensor,
    pattern: str,
    m: int,
    n: int,
    a: Tensor,
    b: Tensor,
    scale: float,
    with_base: bool = True,
) -> Tensor:
    """out = values (1 + scale b[i] a[g(i), j]), or without the 1; a [groups, n], b [m], g(i) = i // (m / groups).

    ``out`` is contiguous, of the shape of the values and of bfloat16, float16 or float32; computed in float32, rounded
    once.
    """
    a, b, values = _factors(values, m, n, a, b)
    if out.dtype not in gradient.DTYPES or not out.is_contiguous() or out.numel() != values.numel():
        raise UserError(
            f"factors need a contiguous result of {values.numel()} bfloat16, float16 or float32 values, "
            f"got {out.dtype} {tuple(out.shape)}"
        )
    if values.numel() == 0:
        return out
    chosen = configs.config("factors_apply", m, n, 0, out.device, **APPLY_DEFAULTS)
    words, starts, offsets, stride, nibbles = tile_arguments(metadata, pattern, m, n)
    with on_device(out):
        factors_apply_kernel[gradient.grid(m, n, chosen["BM"])](
            *(values, words, starts, offsets, a, b, out, scale, float(with_base), m, n, m // a.shape[0], stride),
            NIBBLES=nibbles,
            **chosen,
        )
    return out


def _factors(values: Tensor, m: int, n: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.dim() != 2 or a.shape[1] != n or tuple(b.shape) != (m,) or a.shape[0] < 1 or m % a.shape[0] != 0:
        raise UserError(
            f"factors of a ({m}, {n}) weight are a [groups, {n}] and b [{m}] with groups a divisor of {m}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if values.dtype not in gradient.DTYPES:
        raise UserError(f"factors apply to bfloat16, float16 and float32 values, not {values.dtype}")
    return a.detach().float().contiguous(), b.detach().float().contiguous(), values.detach().contiguous()


def compile_specs() -> list[Spec]:
    """Every kernel, both kinds of metadata, every default and shipped configuration in bfloat16."""
    pointers = {"a_ptr": "*fp32", "b_ptr": "*fp32"}
    parts = {"part_a_ptr": "*fp32", "part_b_ptr": "*fp32", "values_ptr": "*bf16", "group_rows": "i32"}
    found = gradient.specs(factors_grad_kernel, "factors_grad", **pointers, **parts)
    found.append(
        Spec(
            name="factors_sum",
            kernel=factors_sum_kernel,
            signature={"part_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "group_rows": "i32", "scale": "fp32"},
            constexprs={"BM": gradient.DEFAULTS["BM"], "BN": SUM_COLUMNS},
        )
    )
    numbers = {"scale": "fp32", "base": "fp32", "m": "i32", "n": "i32", "group_rows": "i32", "meta_stride": "i32"}
    shipped = configs.shipped("factors_apply")
    for chosen in shipped if APPLY_DEFAULTS in shipped else [*shipped, APPLY_DEFAULTS]:
        for nibbles in (False, True):
            tile = {"meta_ptr": "*i32", "starts_ptr": "*i32" if nibbles else "*i64", "offsets_ptr": "*i32"}
            found.append(
                Spec(
                    name=f"factors_apply[bf16,{'2:4' if nibbles else 'bitmask'},{chosen['BM']}w{chosen['num_warps']}]",
                    kernel=factors_apply_kernel,
                    signature={**tile, **pointers, **numbers, "values_ptr": "*bf16", "out_ptr": "*bf16"},
                    constexprs={**configs.constexprs(chosen), "NIBBLES": nibbles},
                    num_warps=chosen["num_warps"],
                    num_stages=chosen["num_stages"],
                    config="factors_apply" if chosen in shipped else "",
                    divisible=(*tile, *pointers, "values_ptr", "out_ptr", "m", "n", "meta_stride"),
                )
            )
    return found
