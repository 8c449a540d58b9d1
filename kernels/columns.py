"""A scale for every column of an activation (DCFT): on a GPU one pass each way, elsewhere plain torch.

    y = h diag(s)      h [..., n], s [n]      dh = dy diag(s),   ds[j] = sum over tokens of h[t, j] dy[t, j]

Computed in float32 (float64 when anything is) and rounded once to the dtype of h.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sparse_rt.kernels.backends import FORCE_VARIABLE, Call
from sparse_rt.kernels.triton import dispatch
from sparse_rt.kernels.triton import ops as triton

# Tokens of one piece of the reduction on a CPU: its float32 products stay in a core's cache.
TOKENS = 256


def scale_columns(h: Tensor, scale: Tensor) -> Tensor:
    """h [..., n] times scale [n] (float32), in the dtype of h; differentiable in both."""
    return _ScaleColumns.apply(h, scale)


class _ScaleColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, scale):
        ctx.save_for_backward(h, scale)
        if refusal(h, scale) is None:
            from sparse_rt.kernels.triton import columns

            return columns.scale_columns(h, scale)
        return _scaled(h, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        h, scale = ctx.saved_tensors
        need_h, need_scale = ctx.needs_input_grad
        if need_scale and refusal(dy, scale) is None:
            from sparse_rt.kernels.triton import columns

            return columns.scale_columns_grad(dy, h, scale)
        return _scaled(dy, scale) if need_h else None, _column_sums(h, dy, scale.dtype) if need_scale else None


def _scaled(h: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(h, scale.to(torch.promote_types(h.dtype, torch.float32))).to(h.dtype)


def _column_sums(h: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over tokens of h dy -> [n]."""
    n = h.shape[-1]
    tokens = TOKENS if h.device.type == "cpu" else max(1, h.numel() // max(1, n))
    total = torch.zeros(n, dtype=torch.promote_types(h.dtype, dtype), device=h.device)
    for one, other in zip(h.reshape(-1, n).split(tokens), dy.reshape(-1, n).split(tokens), strict=True):
        total += (one.to(total.dtype) * other).sum(0)
    return total.to(dtype)


def refusal(h: Tensor, scale: Tensor) -> str | None:
    """Why the kernel does not take these tensors; None: it does."""
    forced = os.environ.get(FORCE_VARIABLE)
    if forced and forced != "triton":
        return f"{FORCE_VARIABLE}={forced}"
    # The pattern is any: there is no weight in this operation.
    calls = (Call("linear", "2:4", 0, 0, 0, tensor.dtype, tensor.device.type) for tensor in (h, scale))
    reason = next((reason for reason in map(triton.can_run, calls) if reason), None)
    n = h.shape[-1]
    limits = dispatch.limits("scale_columns", dispatch.BITMASK, 1, n, 0.0, h.dtype, h.device) if reason is None else ()
    return reason or (None if h.numel() // max(1, n) in limits else dispatch.refusal("scale_columns"))
