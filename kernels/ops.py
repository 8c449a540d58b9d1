"""The operations on compressed weights, each declared once: schema, shape rule (fake) and gradient.

    linear       y  = x W^T + b        x [..., n], W (m, n)             -> [..., m]
    linear_t     dx = dy W             dy [..., m]                      -> [..., n]
    values_grad  dv = (dy^T x)[mask]   dy [..., m], x [..., n]          -> shape and dtype of the values
    decompress   W                     values, metadata                 -> [m, n]
    gather       W[mask]               dense [m, n]                     -> shape of the values

W is given as ``values`` and ``metadata`` of a pattern (``sparse_rt.formats``). Values may be wider than x (float32
effective values of an adapter under bfloat16 activations): they are rounded once to the dtype of x, and their gradient
comes back unrounded in their own dtype. The gradients close over each other, so double backward works too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_rt.kernels import transposed
from sparse_rt.kernels.backends import Call, select

_WEIGHT = "str pattern, int m, int n"
_library = torch.library.Library("sparse_rt", "DEF")
_library.define(f"linear(Tensor x, Tensor values, Tensor metadata, Tensor? bias, {_WEIGHT}) -> Tensor")
_library.define(f"linear_t(Tensor dy, Tensor values, Tensor metadata, {_WEIGHT}) -> Tensor")
_library.define(f"values_grad(Tensor dy, Tensor x, Tensor metadata, {_WEIGHT}, Tensor values_like) -> Tensor")
_library.define(f"decompress(Tensor values, Tensor metadata, {_WEIGHT}) -> Tensor")
_library.define(f"gather(Tensor dense, Tensor metadata, {_WEIGHT}, Tensor values_like) -> Tensor")


def linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, pattern: str, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m] in the dtype of x."""
    return torch.ops.sparse_rt.linear(x, values, metadata, bias, pattern, m, n)


def linear_t(dy: Tensor, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """dx = dy W: dy [..., m] -> [..., n] in the dtype of dy."""
    return torch.ops.sparse_rt.linear_t(dy, values, metadata, pattern, m, n)


def values_grad(dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """dY^T X at the kept positions, in the shape and dtype of ``values_like``; the dense gradient is never formed."""
    return torch.ops.sparse_rt.values_grad(dy, x, metadata, pattern, m, n, values_like)


def decompress(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """The dense weight [m, n], zeros where nothing is kept."""
    return torch.ops.sparse_rt.decompress(values, metadata, pattern, m, n)


def gather(dense: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """The inverse of decompress: dense [m, n] at the kept positions, in the shape of ``values_like``."""
    return torch.ops.sparse_rt.gather(dense, metadata, pattern, m, n, values_like)


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _run_linear(x, values, metadata, bias, pattern, m, n):
    call = Call("linear", pattern, m, n, _tokens(x), x.dtype, x.device.type)
    return select(call)(x, values, metadata, bias, pattern, m, n)


def _run_linear_t(dy, values, metadata, pattern, m, n):
    call = Call("linear_t", pattern, m, n, _tokens(dy), dy.dtype, dy.device.type)
    return select(call)(dy, values, metadata, pattern, m, n)


def _run_values_grad(dy, x, metadata, pattern, m, n, values_like):
    call = Call("values_grad", pattern, m, n, _tokens(x), x.dtype, x.device.type)
    return select(call)(dy, x, metadata, pattern, m, n, values_like)


def _run_decompress(values, metadata, pattern, m, n):
    call = Call("decompress", pattern, m, n, 0, values.dtype, values.device.type)
    return select(call)(values, metadata, pattern, m, n)


def _run_gather(dense, metadata, pattern, m, n, values_like):
    call = Call("gather", pattern, m, n, 0, dense.dtype, dense.device.type)
    return select(call)(dense, metadata, pattern, m, n, values_like)


for _name, _run in (
    ("linear", _run_linear),
    ("linear_t", _run_linear_t),
    ("values_grad", _run_values_grad),
    ("decompress", _run_decompress),
    ("gather", _run_gather),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


def check_devices(op: str, *tensors: Tensor | None) -> None:
    """PyTorch runs the shape rule, and returns what it made, as soon as one operand is on the meta device."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    torch._check(len(devices) == 1, lambda: f"{op}: the operands are on {' and '.join(sorted(devices))}")


@torch.library.register_fake("sparse_rt::linear", lib=_library)
def _(x, values, metadata, bias, pattern, m, n):
    check_devices("linear", x, values, metadata, bias)
    torch._check(x.shape[-1] == n, lambda: f"linear: x has {x.shape[-1]} columns, the weight has in_features {n}")
    return x.new_empty((*x.shape[:-1], m))


@torch.library.register_fake("sparse_rt::linear_t", lib=_library)
def _(dy, values, metadata, pattern, m, n):
    check_devices("linear_t", dy, values, metadata)
    torch._check(dy.shape[-1] == m, lambda: f"linear_t: dy has {dy.shape[-1]} columns, the weight has out_features {m}")
    return dy.new_empty((*dy.shape[:-1], n))


@torch.library.register_fake("sparse_rt::values_grad", lib=_library)
def _(dy, x, metadata, pattern, m, n, values_like):
    check_devices("values_grad", dy, x, metadata)
    return torch.empty_like(values_like, memory_format=torch.contiguous_format)


@torch.library.register_fake("sparse_rt::decompress", lib=_library)
def _(values, metadata, pattern, m, n):
    check_devices("decompress", values, metadata)
    return values.new_empty((m, n))


@torch.library.register_fake("sparse_rt::gather", lib=_library)
def _(dense, metadata, pattern, m, n, values_like):
    check_devices("gather", dense, metadata)
    return dense.new_empty(values_like.shape)


def _save(ctx, inputs, tensors):
    ctx.save_for_backward(*tensors)
    ctx.weight = inputs


def _setup_linear(ctx, inputs, output):
    x, values, metadata, bias, *weight = inputs
    _save(ctx, weight, (x, values, metadata))
    ctx.has_bias = bias is not None


def _backward_linear(ctx, dy):
    x, values, metadata = ctx.saved_tensors
    need_x, need_values, _, need_bias, *_ = ctx.needs_input_grad
    dx = None
    if need_x:
        # Not where a gradient of this gradient is wanted (create_graph).
        frozen = not need_values and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dx = transposed.linear_t(dy, values, metadata, *ctx.weight) if frozen else None
        dx = linear_t(dy, values, metadata, *ctx.weight) if dx is None else dx
    dv = values_grad(dy, x, metadata, *ctx.weight, values.detach()) if need_values else None
    db = dy.unsqueeze(0).flatten(0, -2).sum(0) if ctx.has_bias and need_bias else None
    return dx, dv, None, db, None, None, None


def _setup_linear_t(ctx, inputs, output):
    dy, values, metadata, *weight = inputs
    _save(ctx, weight, (dy, values, metadata))


def _backward_linear_t(ctx, grad):
    dy, values, metadata = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    ddy = linear(grad, values, metadata, None, *ctx.weight) if need_dy else None
    dv = values_grad(dy, grad, metadata, *ctx.weight, values.detach()) if need_values else None
    return ddy, dv, None, None, None, None


def _setup_values_grad(ctx, inputs, output):
    dy, x, metadata, *weight, _ = inputs
    _save(ctx, weight, (dy, x, metadata))


def _backward_values_grad(ctx, grad):
    dy, x, metadata = ctx.saved_tensors
    need_dy, need_x = ctx.needs_input_grad[:2]
    ddy = linear(x, grad, metadata, None, *ctx.weight) if need_dy else None
    dx = linear_t(dy, grad, metadata, *ctx.weight) if need_x else None
    return ddy, dx, None, None, None, None, None


def _setup_decompress(ctx, inputs, output):
    values, metadata, *weight = inputs
    _save(ctx, weight, (values, metadata))


def _backward_decompress(ctx, grad):
    values, metadata = ctx.saved_tensors
    return gather(grad, metadata, *ctx.weight, values.detach()), None, None, None, None


def _setup_gather(ctx, inputs, output):
    _, metadata, *weight, _ = inputs
    _save(ctx, weight, (metadata,))


def _backward_gather(ctx, grad):
    (metadata,) = ctx.saved_tensors
    return decompress(grad, metadata, *ctx.weight), None, None, None, None, None


for _name, _backward, _setup in (
    ("linear", _backward_linear, _setup_linear),
    ("linear_t", _backward_linear_t, _setup_linear_t),
    ("values_grad", _backward_values_grad, _setup_values_grad),
    ("decompress", _backward_decompress, _setup_decompress),
    ("gather", _backward_gather, _setup_gather),
):
    torch.library.register_autograd(f"sparse_rt::{_name}", _backward, setup_context=_setup, lib=_library)
