"""A weight times a factor of its row and one of its column group, in one pass over the compressed values (SPP).

    W'[i, j] = W[i, j] (1 + scale b[i] a[g(i), j])      a [groups, n], b [m], g(i) = i // (m / groups)

``apply`` forms the values of W', ``gradients`` those of a and b under y = x W'^T; both for the tensors that ``refusal``
accepts: in C on a CPU, in Triton on a GPU. Whoever uses them has a slower way in plain torch for all others.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from sparse_rt.kernels.backends import FORCE_VARIABLE, Call
from sparse_rt.kernels.native import gradient
from sparse_rt.kernels.native import ops as native
from sparse_rt.kernels.triton import dispatch
from sparse_rt.kernels.triton import ops as triton


def apply(
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
    """out = values (1 + scale b[i] a[g(i), j]), or without the 1: float32, rounded once to the dtype of ``out``."""
    return _module(values).apply_factors(out, values, metadata, pattern, m, n, a, b, scale, with_base)


def gradients(
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
    """Gradients of a [groups, n] and b [m], float32, from dy [..., m] and x [..., n]."""
    return _module(values).factors_grad(dy, x, values, metadata, pattern, m, n, a, b, scale)


def refusal(pattern: str, m: int, n: int, *tensors: Tensor) -> str | None:
    """Why these kernels do not take a weight (m, n); None: they do.

    tensors: the values and the result of ``apply``, or the values, x and dy of ``gradients``.
    """
    name = _name(tensors[0])
    forced = os.environ.get(FORCE_VARIABLE)
    if forced and forced != name:
        return f"{FORCE_VARIABLE}={forced}"
    can_run = {"native": native.can_run, "triton": triton.can_run}[name]
    for tensor in tensors:
        reason = can_run(Call("values_grad", pattern, m, n, 0, tensor.dtype, tensor.device.type))
        if reason:
            return reason
    if name == "triton" and len(tensors) == 3:
        values, x, dy = tensors
        if not triton.takes_gradient("factors_grad", dy, x, values, pattern, m, n):
            return dispatch.refusal("factors_grad")
    if name == "native" and not gradient.can_run(*tensors):
        return "this processor has no tile kernels"
    return None


def _name(tensor: Tensor) -> str:
    """Triton's interpreter runs on CPU tensors too, where it is asked for."""
    return "triton" if tensor.is_cuda or os.environ.get(FORCE_VARIABLE) == "triton" else "native"


def _module(tensor: Tensor) -> ModuleType:
    if _name(tensor) == "native":
        return gradient
    from sparse_rt.kernels.triton import factors

    return factors
