"""Weights in the derived layout of a processor: made once at load, for serving; the canonical tensors can then go.

    packed = pack(values, metadata, pattern, m, n)       uint8, private to this process
    y = packed_linear(x, packed, bias, pattern, m, n)    any number of tokens
    values, metadata = unpack(packed, pattern, m, n)     bit for bit what was packed

``refusal`` says whether there is one here. Training works on the canonical tensors (``ops``).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sparse_rt.errors import BackendError
from sparse_rt.kernels import ops
from sparse_rt.kernels.backends import FORCE_VARIABLE, Call, explain, select

_library = torch.library.Library("sparse_rt", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, str pattern, int m, int n) -> Tensor")
# An operator of its own, so that torch.compile need not look into a packed weight to trace the gradient.
_library.define("packed_linear_t(Tensor dy, Tensor packed, str pattern, int m, int n) -> Tensor")


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, pattern: str, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m]; x has the dtype of the packed values. Gradients for x and bias."""
    if _is_plain(x):
        return _run(x, packed, bias, pattern, m, n)
    return torch.ops.sparse_rt.packed_linear(x, packed, bias, pattern, m, n)


def _is_plain(x: Tensor) -> bool:
    """Whether nobody watches this call: no gradient, no trace, no mode.

    Then the function runs without torch's dispatcher, which takes longer than a small product.
    """
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not watched and type(x) is Tensor


def refusal(pattern: str, m: int, n: int, dtype: torch.dtype, device: str = "cpu") -> str | None:
    """None when such a weight can be packed here, otherwise the reasons."""
    choice = explain(Call("packed_linear", pattern, m, n, 1, dtype, device), os.environ.get(FORCE_VARIABLE) or None)
    return None if choice.backend else "; ".join(f"{name}: {reason}" for name, reason in choice.refused)


def pack(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int, layout: str | None = None) -> Tensor:
    """uint8 [bytes]; ``BackendError`` with the reasons where there is no derived layout."""
    reason = refusal(pattern, m, n, values.dtype, values.device.type)
    if reason is not None:
        raise BackendError(f"a {pattern} weight ({m}, {n}) cannot be packed: {reason}")
    return _native().pack(values, metadata, pattern, m, n, layout)


def unpack(packed: Tensor, pattern: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    """(values, metadata) of the canonical format."""
    return _native().unpack(packed, pattern, m, n)


def describe(packed: Tensor) -> dict:
    """Layout, dtype, m, n, nnz and nbytes."""
    return _native().describe(packed)


def choose_layout(pattern: str, dtype: torch.dtype, sparsity: float) -> tuple[str, str]:
    """The layout that ``pack`` gives such a weight on this processor, and the reason in words."""
    return _native().choose_layout(pattern, dtype, sparsity)


def _native():
    from sparse_rt.kernels.native import packed

    return packed


def _run(x, packed, bias, pattern, m, n):
    tokens = x.numel() // max(1, n)
    return select(Call("packed_linear", pattern, m, n, tokens, x.dtype, x.device.type))(x, packed, bias, pattern, m, n)


def _run_t(dy, packed, pattern, m, n):
    return ops.linear_t(dy, *unpack(packed, pattern, m, n), pattern, m, n)


_library.impl("packed_linear", _run, "CompositeExplicitAutograd")
_library.impl("packed_linear_t", _run_t, "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_rt::packed_linear", lib=_library)
def _(x, packed, bias, pattern, m, n):
    ops.check_devices("packed_linear", x, packed, bias)
    torch._check(x.shape[-1] == n, lambda: f"packed_linear: x has {x.shape[-1]} columns, the weight {n}")
    return x.new_empty((*x.shape[:-1], m))


@torch.library.register_fake("sparse_rt::packed_linear_t", lib=_library)
def _(dy, packed, pattern, m, n):
    ops.check_devices("packed_linear_t", dy, packed)
    torch._check(dy.shape[-1] == m, lambda: f"packed_linear_t: dy has {dy.shape[-1]} columns, the weight {m} rows")
    return dy.new_empty((*dy.shape[:-1], n))


def _setup(ctx, inputs, output):
    _, packed, bias, *ctx.weight = inputs
    ctx.save_for_backward(packed)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    (packed,) = ctx.saved_tensors
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    dx = torch.ops.sparse_rt.packed_linear_t(dy, packed, *ctx.weight) if need_x else None
    db = dy.unsqueeze(0).flatten(0, -2).sum(0) if ctx.has_bias and need_bias else None
    return dx, None, db, None, None, None


def _setup_t(ctx, inputs, output):
    _, packed, *ctx.weight = inputs
    ctx.save_for_backward(packed)


def _backward_t(ctx, grad):
    (packed,) = ctx.saved_tensors
    return packed_linear(grad, packed, None, *ctx.weight), None, None, None, None


torch.library.register_autograd("sparse_rt::packed_linear", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("sparse_rt::packed_linear_t", _backward_t, setup_context=_setup_t, lib=_library)
