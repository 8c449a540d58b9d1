"""y = x W^T + bias and dx = dy W on the canonical tensors: tiles of W are decoded in registers and multiplied there.

Correct for every pattern and number of tokens, and the fallback where no derived layout fits. Decoding a weight takes
about as many instructions as an H200 can issue in the time that it needs to read the dense weight, so at few tokens
this is at best as fast as dense; ``ops`` expands the weight for many tokens, and serving packs it (``packed``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.kernels.triton import configs
from sparse_rt.kernels.triton.language import BLOCK, cast, dot, load_tile
from sparse_rt.kernels.triton.tiles import on_device, rows_contiguous, tile_arguments

# Rows and tokens of a program. More tokens a program decode a tile fewer times.
DEFAULTS = {
    "linear": (
        (16, dict(BN=32, BT=16, num_warps=4, num_stages=3)),
        (32, dict(BN=64, BT=32, num_warps=4, num_stages=3)),
        (None, dict(BN=64, BT=64, num_warps=4, num_stages=3)),
    ),
    "linear_t": (
        (16, dict(BN=32, BT=16, num_warps=4, num_stages=3)),
        (None, dict(BN=32, BT=64, num_warps=4, num_stages=3)),
    ),
}


@triton.jit
def linear_kernel(
    x_ptr,
    values_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    m,
    n,
    stride_x,
    meta_stride,
    BN: tl.constexpr,
    BT: tl.constexpr,
    NIBBLES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask = rows < m
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    token_mask = token < tokens
    x_rows = x_ptr + token.to(tl.int64) * stride_x
    # Rows of W are the M of the product: its tile then goes from registers to the tensor cores, without shared memory.
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for block in range(0, tl.cdiv(n, BLOCK)):
        weights = load_tile(
            values_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BN, NIBBLES
        )
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = token_mask[:, None] & (columns < n)[None, :]
        x = tl.load(x_rows[:, None] + columns[None, :], mask=inside, other=0.0)
        total = dot(cast(weights, x.dtype), tl.trans(x), total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    y = y_ptr + token.to(tl.int64)[None, :] * m + rows[:, None]
    tl.store(y, cast(total, y_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


@triton.jit
def linear_t_kernel(
    dy_ptr,
    values_ptr,
    meta_ptr,
    starts_ptr,
    offsets_ptr,
    dx_ptr,
    tokens,
    m,
    n,
    stride_dy,
    meta_stride,
    BN: tl.constexpr,
    BT: tl.constexpr,
    NIBBLES: tl.constexpr,
):
    block = tl.program_id(0)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    token_mask = token < tokens
    dy_rows = dy_ptr + token.to(tl.int64) * stride_dy
    total = tl.zeros((BLOCK, BT), dtype=tl.float32)
    for start in range(0, m, BN):
        rows = start + tl.arange(0, BN)
        row_mask = rows < m
        weights = load_tile(
            values_ptr, meta_ptr, starts_ptr, offsets_ptr, rows, row_mask, block, m, n, meta_stride, BN, NIBBLES
        )
        dy = tl.load(dy_rows[:, None] + rows[None, :], mask=token_mask[:, None] & row_mask[None, :], other=0.0)
        total = dot(tl.trans(cast(weights, dy.dtype)), tl.trans(dy), total)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    dx = dx_ptr + token.to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(dx, cast(total, dx_ptr.dtype.element_ty), mask=token_mask[None, :] & (columns < n)[:, None])


def linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, pattern: str, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m] in the dtype of x, float32 sums; values are rounded to it on load."""
    y = torch.empty((*x.shape[:-1], m), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    flat = rows_contiguous(x, n)
    tokens = flat.shape[0]
    weight = tile_arguments(metadata, pattern, m, n)
    options = launch_options("linear", m, n, tokens, x.device)
    grid = triton.cdiv(m, options["BN"]), triton.cdiv(tokens, options["BT"])
    with on_device(x):
        linear_kernel[grid](
            flat,
            values.detach().contiguous(),
            weight.meta,
            weight.starts,
            weight.offsets,
            y if bias is None else bias.detach().contiguous(),
            y,
            tokens,
            m,
            n,
            flat.stride(0),
            weight.meta_stride,
            NIBBLES=weight.nibbles,
            HAS_BIAS=bias is not None,
            **options,
        )
    return y


def linear_t(dy: Tensor, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """dx = dy W: dy [..., m] -> [..., n] in the dtype of dy, float32 sums."""
    dx = torch.empty((*dy.shape[:-1], n), dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    flat = rows_contiguous(dy, m)
    tokens = flat.shape[0]
    weight = tile_arguments(metadata, pattern, m, n)
    options = launch_options("linear_t", m, n, tokens, dy.device)
    grid = triton.cdiv(n, BLOCK.value), triton.cdiv(tokens, options["BT"])
    with on_device(dy):
        linear_t_kernel[grid](
            flat,
            values.detach().contiguous(),
            weight.meta,
            weight.starts,
            weight.offsets,
            dx,
            tokens,
            m,
            n,
            flat.stride(0),
            weight.meta_stride,
            NIBBLES=weight.nibbles,
            **options,
        )
    return dx


def launch_options(kernel: str, m: int, n: int, tokens: int, device: torch.device) -> dict:
    """Block sizes, warps and stages: the shipped configuration of this GPU, otherwise ``DEFAULTS``."""
    default = next(options for limit, options in DEFAULTS[kernel] if limit is None or tokens <= limit)
    return configs.config(kernel, m, n, tokens, device, **default)


def compile_specs() -> list[configs.Spec]:
    """Both kernels, both kinds of metadata, every default and shipped configuration in bfloat16; float32 and wide
    values once."""
    specs = []
    for kernel, function in (("linear", linear_kernel), ("linear_t", linear_t_kernel)):
        shipped = configs.shipped(kernel)
        defaults = [options for _, options in DEFAULTS[kernel] if options not in shipped]
        for options in shipped + defaults:
            for nibbles in (False, True):
                specs.append(_spec(kernel, function, "bf16", nibbles, options, options in shipped))
        for dtype, values in (("fp32", "fp32"), ("bf16", "fp32")):
            specs.append(_spec(kernel, function, dtype, False, DEFAULTS[kernel][0][1], False, values))
    return specs


def _spec(
    kernel: str, function, dtype: str, nibbles: bool, options: dict, shipped: bool, values: str = ""
) -> configs.Spec:
    forward = kernel == "linear"
    pointers = ("x_ptr", "values_ptr", "bias_ptr", "y_ptr") if forward else ("dy_ptr", "values_ptr", "dx_ptr")
    numbers = ("tokens", "m", "n", "stride_x" if forward else "stride_dy", "meta_stride")
    # Launches with 2:4 pass the metadata for the index that they do not read.
    starts = "*i32" if nibbles else "*i64"
    signature = {"meta_ptr": "*i32", "starts_ptr": starts, "offsets_ptr": "*i32"}
    signature |= dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(numbers, "i32")
    signature |= {"values_ptr": f"*{values or dtype}"}
    constexprs = {**configs.constexprs(options), "NIBBLES": nibbles} | ({"HAS_BIAS": True} if forward else {})
    wide = ",wide" if values not in ("", dtype) else ""
    shape = f"{options['BN']}x{options['BT']}w{options['num_warps']}"
    return configs.Spec(
        name=f"{kernel}[{dtype}{wide},{'2:4' if nibbles else 'bitmask'},{shape}]",
        kernel=function,
        signature=signature,
        constexprs=constexprs,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        weights_per_iteration=options["BN"] * BLOCK.value,
        expects=() if dtype == "fp32" else ("HMMA|HGMMA|UTCHMMA",),
        config=kernel if shipped else "",
        divisible=(*pointers, "meta_ptr", "starts_ptr", "offsets_ptr", *numbers[1:]),
    )
