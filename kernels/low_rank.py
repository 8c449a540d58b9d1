"""The gradients of a low-rank update of the kept weights (MaskLoRA), where the gradient of the weight never exists.

    W' = W + scale (b a) at the kept positions      a [r, n], b [m, r]

For the tensors that ``refusal`` accepts, which lie on a GPU; whoever uses this has a slower way for all others.
"""

from __future__ import annotations

import os

from torch import Tensor

from sparse_rt.kernels.backends import FORCE_VARIABLE, Call
from sparse_rt.kernels.triton import dispatch
from sparse_rt.kernels.triton import ops as triton


def gradients(
    dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Of a and b, float32, under y = x W'^T: dy [..., m], x [..., n]."""
    from sparse_rt.kernels.triton import gradient_epilogues

    return gradient_epilogues.rank_products(dy, x, metadata, pattern, m, n, a, b, scale)


def refusal(pattern: str, m: int, n: int, *tensors: Tensor) -> str | None:
    """Why this kernel does not take a weight (m, n); None: it does. tensors: the values, x and dy (or some of them)."""
    forced = os.environ.get(FORCE_VARIABLE)
    if forced and forced != "triton":
        return f"{FORCE_VARIABLE}={forced}"
    calls = (Call("values_grad", pattern, m, n, 0, tensor.dtype, tensor.device.type) for tensor in tensors)
    reason = next((reason for reason in map(triton.can_run, calls) if reason), None)
    if reason is None and len(tensors) == 3:
        values, x, dy = tensors
        if not triton.takes_gradient("rank_products", dy, x, values, pattern, m, n):
            return dispatch.refusal("rank_products")
    return reason
