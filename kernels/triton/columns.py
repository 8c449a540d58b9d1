"""A scale for every column of an activation, forwards and back in one pass each (DCFT).

    scale_columns        y = h diag(s)                        h [..., n], s [n]
    scale_columns_grad   dh = dy diag(s),  ds[j] = sum_t h[t, j] dy[t, j]

DCFT needs no gradient of a weight: a map shared by two matrices is a scale between them. Sums over tokens are float32,
each program sums a part of the tokens, and the parts are added in a second step, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels import scratch
from sparse_rt.kernels.triton import configs
from sparse_rt.kernels.triton.configs import Spec
from sparse_rt.kernels.triton.gradient import DTYPES
from sparse_rt.kernels.triton.language import cast
from sparse_rt.kernels.triton.tiles import on_device, rows_contiguous

DEFAULTS: dict[str, Any] = {"BN": 128, "BT": 32, "num_warps": 4, "num_stages": 2}
PARTS = 64  # parts of the tokens: with 32 blocks of 128 columns (n = 4096) 2048 programs


@triton.jit
def scale_columns_kernel(h_ptr, scale_ptr, out_ptr, tokens, n, h_stride, BN: tl.constexpr, BT: tl.constexpr):
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (token < tokens)[:, None] & (columns < n)[None, :]
    scale = tl.load(scale_ptr + columns, mask=columns < n, other=0.0)
    h = tl.load(h_ptr + token.to(tl.int64)[:, None] * h_stride + columns[None, :], mask=mask, other=0.0)
    out = h.to(tl.float32) * scale[None, :]
    out_at = out_ptr + token.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_at, cast(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_columns_grad_kernel(
    dy_ptr,
    h_ptr,
    scale_ptr,
    dh_ptr,
    part_ptr,
    tokens,
    n,
    part_tokens,
    dy_stride,
    h_stride,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    """dh of one part of the tokens and one block of columns, and part [parts, n] = sum of h dy over them."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    column_mask = columns < n
    scale = tl.load(scale_ptr + columns, mask=column_mask, other=0.0)
    total = tl.zeros((BT, BN), dtype=tl.float32)
    begin = part * part_tokens
    for start in range(begin, tl.minimum(begin + part_tokens, tokens), BT):
        token = (start + tl.arange(0, BT)).to(tl.int64)
        mask = (token < tokens)[:, None] & column_mask[None, :]
        dy = tl.load(dy_ptr + token[:, None] * dy_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + token[:, None] * h_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += h * dy
        dh = dy * scale[None, :]
        tl.store(dh_ptr + token[:, None] * n + columns[None, :], cast(dh, dh_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + part.to(tl.int64) * n + columns, tl.sum(total, axis=0), mask=column_mask)


@torch.no_grad()
def scale_columns(h: Tensor, scale: Tensor) -> Tensor:
    """h [..., n] times scale [n], computed in float32 and rounded once to the dtype of h."""
    n = _check(scale, h)
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if out.numel() == 0:
        return out
    flat = rows_contiguous(h.detach(), n)
    chosen = configs.config("scale_columns", n, n, flat.shape[0], h.device, **DEFAULTS)
    with on_device(h):
        scale_columns_kernel[triton.cdiv(flat.shape[0], chosen["BT"]), triton.cdiv(n, chosen["BN"])](
            flat, scale.detach().float().contiguous(), out, flat.shape[0], n, flat.stride(0), **chosen
        )
    return out


@torch.no_grad()
def scale_columns_grad(dy: Tensor, h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dh [..., n] in the dtype of dy, ds [n] float32) of y = h diag(scale), from dy and h [..., n]."""
    n = _check(scale, dy, h)
    if dy.shape != h.shape:
        raise UserError(f"dy {tuple(dy.shape)} and h {tuple(h.shape)} have different shapes")
    dh, ds = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device), torch.zeros(n, device=dy.device)
    if dh.numel() == 0:
        return dh, ds
    dy, h = rows_contiguous(dy.detach(), n), rows_contiguous(h.detach(), n)
    tokens = dy.shape[0]
    chosen = configs.config("scale_columns_grad", n, n, tokens, dy.device, **DEFAULTS)
    part_tokens = triton.cdiv(triton.cdiv(tokens, PARTS), chosen["BT"]) * chosen["BT"]
    parts = triton.cdiv(tokens, part_tokens)
    part = scratch.buffer("columns", (parts, n), torch.float32, dy.device)
    with on_device(dy):
        scale_columns_grad_kernel[parts, triton.cdiv(n, chosen["BN"])](
            *(dy, h, scale.detach().float().contiguous(), dh, part, tokens, n, part_tokens, dy.stride(0), h.stride(0)),
            **chosen,
        )
    return dh, torch.sum(part, 0, out=ds)


def _check(scale: Tensor, *activations: Tensor) -> int:
    for tensor in activations:
        if tensor.dtype not in DTYPES:
            raise UserError(f"columns of bfloat16, float16 and float32 are scaled, not of {tensor.dtype}")
        if scale.dim() != 1 or tensor.shape[-1] != scale.shape[0]:
            raise UserError(f"a scale {tuple(scale.shape)} does not fit columns of {tuple(tensor.shape)}")
    return scale.shape[0]


def compile_specs() -> list[Spec]:
    """Both kernels in their default and shipped configurations, bfloat16."""
    found = []
    activations = ("h_ptr", "out_ptr", "dy_ptr", "dh_ptr")
    for name, kernel in (("scale_columns", scale_columns_kernel), ("scale_columns_grad", scale_columns_grad_kernel)):
        kinds = {"scale_ptr": "*fp32", "part_ptr": "*fp32"} | dict.fromkeys(activations, "*bf16")
        signature = {key: kinds.get(key, "i32") for key in kernel.arg_names if key not in ("BN", "BT")}
        shipped = configs.shipped(name)
        for chosen in shipped if DEFAULTS in shipped else [*shipped, DEFAULTS]:
            found.append(
                Spec(
                    name=f"{name}[bf16,{chosen['BN']}x{chosen['BT']}w{chosen['num_warps']}]",
                    kernel=kernel,
                    signature=signature,
                    constexprs=configs.constexprs(chosen),
                    num_warps=chosen["num_warps"],
                    num_stages=chosen["num_stages"],
                    config=name if chosen in shipped else "",
                    divisible=tuple(key for key in signature if key not in ("tokens", "part_tokens")),
                )
            )
    return found
