"""Tiles of G = dY^T X, and what is kept of them: the gradient of the kept values.

A program forms one tile of G (BM rows of the weight by 128 columns) in registers, with float32 sums over all tokens,
and an epilogue takes what it needs; G itself is never written. This file holds the tile and the simplest epilogue,
the others are in ``gradient_epilogues`` (positions, low rank), ``growth`` (largest entries) and ``factors`` (SPP).

Nothing is added with atomics: what several tiles contribute to goes through a buffer of partial sums, so results are
the same in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels.triton import configs
from sparse_rt.kernels.triton.configs import Spec
from sparse_rt.kernels.triton.language import BLOCK, cast, dot, store_tile
from sparse_rt.kernels.triton.tiles import on_device, rows_contiguous, tile_arguments

# Where no measured file says otherwise. Taller tiles read dY and X from L2 less often (64 instead of 43 operations a
# byte), but with them the larger epilogues run out of registers, and small weights have too few to fill a GPU.
DEFAULTS: dict[str, Any] = {"BM": 64, "BT": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
TALL: dict[str, Any] = {**DEFAULTS, "BM": 128}
TALL_KERNELS = ("values_grad", "positions_grad")
TALL_TILES = 256
# Tiles of float32 inputs take twice the shared memory: less of the token loop.
FLOAT32_DEFAULTS: dict[str, Any] = {**DEFAULTS, "BT": 16, "num_stages": 2}

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def tile_of(program, row_tiles, blocks, GROUP: tl.constexpr):
    """(row tile, block of columns) of a program: GROUP tiles a column, so that neighbours share dY and X in L2."""
    width = GROUP * blocks
    first = program // width * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % width
    return first + inside % height, inside // height


@triton.jit
def gradient_tile(
    dy_ptr,
    x_ptr,
    rows,
    row_mask,
    block,
    tokens,
    n,
    dy_stride,
    x_stride,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """float32 [BM, 128]: sum over t of dY[t, rows] X[t, columns of ``block``]; 0 outside of the weight."""
    token = tl.arange(0, BT)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < n
    dy_at = dy_ptr + token.to(tl.int64)[:, None] * dy_stride + rows[None, :]
    x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride + columns[None, :]
    dy_step = tl.full((), BT, tl.int64) * dy_stride
    x_step = tl.full((), BT, tl.int64) * x_stride
    acc = tl.zeros((BM, BLOCK), dtype=tl.float32)
    for start in range(0, tokens, BT):
        inside = token < tokens - start
        dy = tl.load(dy_at, mask=inside[:, None] & row_mask[None, :], other=0.0)
        x = tl.load(x_at, mask=inside[:, None] & column_mask[None, :], other=0.0)
        acc = dot(tl.trans(dy), x, acc)
        dy_at += dy_step
        x_at += x_step
    return acc


@triton.jit
def values_grad_kernel(
    dy_ptr,
    x_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    out_ptr,
    tokens,
    m,
    n,
    dy_stride,
    x_stride,
    meta_stride,
    NIBBLES: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The kept positions of one tile, rounded once to the dtype of ``out``."""
    tile, block = tile_of(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BLOCK), GROUP)
    rows = tile * BM + tl.arange(0, BM)
    row_mask = rows < m
    acc = gradient_tile(dy_ptr, x_ptr, rows, row_mask, block, tokens, n, dy_stride, x_stride, BM, BT)
    tile_values = cast(acc, out_ptr.dtype.element_ty)
    store_tile(
        tile_values, out_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BM, NIBBLES
    )


class Inputs(NamedTuple):
    """dY [tokens, m] and X [tokens, n] of one dtype, neighbouring columns next to each other; no tokens: as given."""

    dy: Tensor
    x: Tensor
    tokens: int


def inputs(dy: Tensor, x: Tensor, m: int, n: int) -> Inputs:
    """dy [..., m] and x [..., n] as the kernels read them; ``UserError`` where they do not belong together."""
    if dy.shape[-1] != m or x.shape[-1] != n:
        raise UserError(f"dy {tuple(dy.shape)} and x {tuple(x.shape)} do not fit a weight ({m}, {n})")
    if dy.device != x.device:
        raise UserError(f"dy is on {dy.device} and x on {x.device}")
    dtype = dy.dtype if dy.dtype == x.dtype else torch.float32
    for name, tensor in (("dy", dy), ("x", x)):
        if tensor.dtype not in DTYPES:
            raise UserError(f"{name} is {tensor.dtype}; the Triton kernels take bfloat16, float16 and float32")
    if dy.shape[:-1].numel() != x.shape[:-1].numel():
        raise UserError(f"dy has {dy.shape[:-1].numel()} tokens and x has {x.shape[:-1].numel()}")
    tokens = x.shape[:-1].numel()
    if tokens == 0 or m == 0 or n == 0:
        return Inputs(dy, x, 0)
    return Inputs(rows_contiguous(dy.detach().to(dtype), m), rows_contiguous(x.detach().to(dtype), n), tokens)


def options(kernel: str, x: Tensor, m: int, n: int, tokens: int) -> dict[str, Any]:
    """Block sizes and launch options of a gradient kernel."""
    if x.dtype == torch.float32:  # the files are measured with 16-bit inputs
        return dict(FLOAT32_DEFAULTS)
    tall = kernel in TALL_KERNELS and grid(m, n, TALL["BM"])[0] >= TALL_TILES
    return configs.config(kernel, m, n, tokens, x.device, **(TALL if tall else DEFAULTS))


def grid(m: int, n: int, rows: int) -> tuple[int]:
    """One program a tile."""
    return (triton.cdiv(m, rows) * triton.cdiv(n, BLOCK.value),)


def values_grad(dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """As the op of this name: dy [..., m], x [..., n] -> shape and dtype of ``values_like``, rounded once."""
    given = inputs(dy, x, m, n)
    result = torch.empty(values_like.shape, dtype=values_like.dtype, device=x.device)
    if given.tokens == 0 or result.numel() == 0:
        return result.zero_()
    chosen = options("values_grad", given.x, m, n, given.tokens)
    words, starts, offsets, stride, nibbles = tile_arguments(metadata, pattern, m, n)
    with on_device(x):
        values_grad_kernel[grid(m, n, chosen["BM"])](
            *(given.dy, given.x, words, starts, offsets, result, given.tokens, m, n),
            *(given.dy.stride(0), given.x.stride(0), stride),
            NIBBLES=nibbles,
            **chosen,
        )
    return result


# Of the weights in models m and n are multiples of 16; other sizes and strides compile from the same source.
DIVISIBLE = ("m", "n", "dy_stride", "x_stride")
NUMBERS = ("tokens", "m", "n", "dy_stride", "x_stride")
TENSOR_CORES = ("HMMA|HGMMA|UTCHMMA",)


def signature(dtype: str, nibbles: bool | None, **more: str) -> dict[str, str]:
    """Arguments that every kernel with a gradient tile has; ``nibbles`` None: it reads no metadata."""
    found = {"dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"} | dict.fromkeys(NUMBERS, "i32")
    if nibbles is not None:
        # Launches with 2:4 pass the metadata for the index that they do not read.
        found |= {"meta_ptr": "*i32", "starts_ptr": "*i32" if nibbles else "*i64", "offsets_ptr": "*i32"}
        found |= {"meta_stride": "i32"}
    return found | more


def specs(
    kernel: Any,
    name: str,
    kinds: tuple[bool | None, ...] = (False, True),
    constants: dict[str, Any] | None = None,
    config_name: str = "",
    **more: str,
) -> list[Spec]:
    """A Spec of a kernel with a gradient tile for every default and shipped configuration in bfloat16."""
    config_name = config_name or name
    found, shipped = [], configs.shipped(config_name)
    defaults = [DEFAULTS, TALL] if name in TALL_KERNELS else [DEFAULTS]
    for chosen in shipped + [options for options in defaults if options not in shipped]:
        for nibbles in kinds:
            arguments = {
                key: kind for key, kind in signature("bf16", nibbles, **more).items() if key in kernel.arg_names
            }
            kind = "" if nibbles is None else (",2:4" if nibbles else ",bitmask")
            flags = {**(constants or {}), **({"NIBBLES": nibbles} if "NIBBLES" in kernel.arg_names else {})}
            found.append(
                Spec(
                    name=f"{name}[bf16{kind},{chosen['BM']}x{chosen['BT']}w{chosen['num_warps']}]",
                    kernel=kernel,
                    signature=arguments,
                    constexprs={**configs.constexprs(chosen), **flags},
                    num_warps=chosen["num_warps"],
                    num_stages=chosen["num_stages"],
                    weights_per_iteration=chosen["BM"] * BLOCK.value,
                    expects=TENSOR_CORES,
                    config=config_name if chosen in shipped else "",
                    divisible=tuple(key for key, kind in arguments.items() if kind[0] == "*" or key in DIVISIBLE),
                )
            )
    return found


def compile_specs() -> list[Spec]:
    """Both kinds of metadata, every default and shipped configuration in bfloat16; float32 once."""
    wide = Spec(
        name="values_grad[fp32,bitmask]",
        kernel=values_grad_kernel,
        signature=signature("fp32", False, out_ptr="*fp32"),
        constexprs={**configs.constexprs(FLOAT32_DEFAULTS), "NIBBLES": False},
        num_warps=FLOAT32_DEFAULTS["num_warps"],
        num_stages=FLOAT32_DEFAULTS["num_stages"],
    )
    return [*specs(values_grad_kernel, "values_grad", out_ptr="*fp32"), wide]
