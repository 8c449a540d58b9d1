"""Weights in the derived layout of a device: made once at load, for serving; the canonical tensors can then go.

    packed = pack(values, metadata, pattern, m, n)       uint8, private to this process
    y = packed_linear(x, packed, bias, m, n)             any number of tokens
    values, metadata = unpack(packed, pattern, m, n)     bit for bit what was packed

``refusal`` says whether there is one here. Training works on the canonical tensors (``ops``).
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from sparse_rt.errors import BackendError
from sparse_rt.kernels import ops
from sparse_rt.kernels.backends import FORCE_VARIABLE, Call, explain

_library = torch.library.Library("sparse_rt", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, int m, int n) -> Tensor")
# An operator of its own, so that torch.compile need not look into a packed weight to trace the gradient.
_library.define("packed_linear_t(Tensor dy, Tensor packed, int m, int n) -> Tensor")
# The same product for calls without gradients: those of ``packed_linear`` run Python even where nobody asks for one
# (no_grad; a token of a model on the CPU has a hundred such calls).
_library.define("packed_linear_forward(Tensor x, Tensor packed, Tensor? bias, int m, int n) -> Tensor")
_library.impl("packed_linear_forward", torch.library.fallthrough_kernel, "Autograd")

_differentiable = torch.ops.sparse_rt.packed_linear.default
_forward = torch.ops.sparse_rt.packed_linear_forward.default


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m] with fp32 sums. Gradients for x and bias.

    x and bias have the dtype of the packed values; ``BackendError`` says what does not fit.
    """
    if torch.compiler.is_compiling():
        return _differentiable(x, packed, bias, m, n)
    try:
        return (_differentiable if torch.is_grad_enabled() else _forward)(x, packed, bias, m, n)
    except RuntimeError as error:
        raise BackendError(str(error).partition("\n")[0]) from error


def refusal(
    pattern: str, m: int, n: int, dtype: torch.dtype, device: str = "cpu", sparsity: float | None = None
) -> str | None:
    """None when such a weight can be packed here, otherwise the reasons.

    With its ``sparsity``: also why it should not be, because no kernel that reads the layout is used on this device.
    """
    call, forced = Call("packed_linear", pattern, m, n, 1, dtype, device), os.environ.get(FORCE_VARIABLE) or None
    reason = (_known_refusal if device == "cuda" else _refusal)(call, forced)
    if reason is not None:
        return reason
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and packing waits for the GPU; pack before (sparse_rt.nn.pack_weights)"
    if sparsity is None:
        return None
    layout, reason = choose_layout(pattern, dtype, sparsity, device, (m, n))
    return reason if layout is None else None


def _refusal(call: Call, forced: str | None) -> str | None:
    choice = explain(call, forced)
    return None if choice.backend else "; ".join(f"{name}: {reason}" for name, reason in choice.refused)


# A layer on a GPU that stays as it is stored asks at every call.
_known_refusal = functools.lru_cache(maxsize=4096)(_refusal)


def pack(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int, layout: str | None = None) -> Tensor:
    """uint8 [bytes]; ``BackendError`` with the reasons where there is no derived layout."""
    reason = refusal(pattern, m, n, values.dtype, values.device.type)
    if reason is not None:
        raise BackendError(f"a {pattern} weight ({m}, {n}) cannot be packed: {reason}")
    return _layouts(values.device.type).pack(values, metadata, pattern, m, n, layout)


def unpack(packed: Tensor, pattern: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    """(values, metadata) of the canonical format."""
    return _layouts(packed.device.type).unpack(packed, pattern, m, n)


def page_out(*canonical: Tensor) -> None:
    """Say that these tensors have been packed and will hardly be read again: pages of a mapped file leave memory."""
    for tensor in canonical:
        if tensor.device.type == "cpu":
            _layouts("cpu").pages.page_out(tensor)


def describe(packed: Tensor) -> dict:
    """Layout, dtype, m, n, nnz and nbytes."""
    return _layouts(packed.device.type).describe(packed)


def choose_layout(
    pattern: str, dtype: torch.dtype, sparsity: float, device: str = "cpu", shape: tuple[int, int] | None = None
) -> tuple[str | None, str]:
    """The layout that a served weight (default: a large one) gets on this processor or GPU, and the reason in words.

    None: it is served as it is stored.
    """
    if device == "cuda":
        return _layouts(device).choose_layout(pattern, dtype, sparsity, shape)
    return _layouts(device).choose_layout(pattern, dtype, sparsity)


def _layouts(device: str):
    """The module that knows the layouts of a type of device."""
    if device == "cuda":
        from sparse_rt.kernels.triton import packed
    else:
        from sparse_rt.kernels.native import packed
    return packed


def _run_t(dy, packed, m, n):
    pattern = _layouts("cpu").canonical_pattern(packed)
    return ops.linear_t(dy, *unpack(packed, pattern, m, n), pattern, m, n)


def _run_on_gpu(x, packed, bias, m, n):
    return _layouts("cuda").linear(x, packed, bias, m, n)


def _run_t_on_gpu(dy, packed, m, n):
    return _layouts("cuda").linear_t(dy, packed, m, n)


# The product on the CPU is registered from C (kernels/native/torch_op.py).
_library.impl("packed_linear", _run_on_gpu, "CUDA")
_library.impl("packed_linear_forward", _run_on_gpu, "CUDA")
_library.impl("packed_linear_t", _run_t, "CompositeExplicitAutograd")
_library.impl("packed_linear_t", _run_t_on_gpu, "CUDA")


@torch.library.register_fake("sparse_rt::packed_linear", lib=_library)
@torch.library.register_fake("sparse_rt::packed_linear_forward", lib=_library)
def _(x, packed, bias, m, n):
    ops.check_devices("packed_linear", x, packed, bias)
    torch._check(x.shape[-1] == n, lambda: f"packed_linear: x has {x.shape[-1]} columns, the weight {n}")
    return x.new_empty((*x.shape[:-1], m))


@torch.library.register_fake("sparse_rt::packed_linear_t", lib=_library)
def _(dy, packed, m, n):
    ops.check_devices("packed_linear_t", dy, packed)
    torch._check(dy.shape[-1] == m, lambda: f"packed_linear_t: dy has {dy.shape[-1]} columns, the weight {m} rows")
    return dy.new_empty((*dy.shape[:-1], n))


def _setup(ctx, inputs, output):
    _, packed, bias, ctx.m, ctx.n = inputs
    ctx.save_for_backward(packed)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    (packed,) = ctx.saved_tensors
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    dx = torch.ops.sparse_rt.packed_linear_t(dy, packed, ctx.m, ctx.n) if need_x else None
    db = dy.unsqueeze(0).flatten(0, -2).sum(0) if ctx.has_bias and need_bias else None
    return dx, None, db, None, None


def _setup_t(ctx, inputs, output):
    _, packed, ctx.m, ctx.n = inputs
    ctx.save_for_backward(packed)


def _backward_t(ctx, grad):
    (packed,) = ctx.saved_tensors
    return packed_linear(grad, packed, None, ctx.m, ctx.n), None, None, None


torch.library.register_autograd("sparse_rt::packed_linear", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("sparse_rt::packed_linear_t", _backward_t, setup_context=_setup_t, lib=_library)
