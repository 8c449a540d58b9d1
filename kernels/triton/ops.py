"""Backend ``triton``: the operations on canonical tensors that lie on a GPU. Importing this does not import Triton.

The dispatch rule is conservative: products expand the weight into scratch and leave the rest to the dense GEMM, which
then runs at its full speed, and gradients at the kept positions are gathered from a dense one, a block of rows at a
time. The kernels that decode tiles, and those that keep what is wanted of a tile of dY^T X, take their place where they
were measured to be faster on this GPU (``dispatch``); experts have no such way beside their kernel. Nothing here waits
for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_rt.errors import BackendError
from sparse_rt.formats import get_format, is_pattern
from sparse_rt.kernels import scratch
from sparse_rt.kernels.backends import Call, register_backend
from sparse_rt.kernels.triton import dispatch

PRIORITY = 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Elements of a block of dY^T X: 64 MB of bfloat16, many times what fills the GPU, shared by all layers.
GRADIENT_ELEMENTS = 1 << 25
ROW_MULTIPLE = 128  # of such a block, so that what describes its rows begins at an aligned address
# The tensor-core kernels are compiled for Ampere and later.
CAPABILITY = (8, 0)
NOT_INSTALLED = "Triton is not installed; pip install triton"


def interpreted() -> bool:
    """Whether Triton interprets kernels, on any device (TRITON_INTERPRET=1 before it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def can_run(call: Call) -> str | None:
    """None, or the sentence that says why the Triton kernels do not take this call."""
    if call.device != "cuda" and not (call.device == "cpu" and interpreted()):
        return f"the Triton kernels run on CUDA devices, the tensors are on {call.device}"
    if call.dtype not in DTYPES:
        dtype = str(call.dtype).removeprefix("torch.")
        return f"the Triton kernels multiply bfloat16, float16 and float32, not {dtype}"
    return unreadable(call.pattern) or unavailable_reason()


def unreadable(pattern: str) -> str | None:
    """Why no kernel reads weights of ``pattern``, or None."""
    if not is_pattern(pattern):
        return f"unknown pattern {pattern!r}"
    metadata_name = get_format(pattern).metadata_name
    if metadata_name not in ("weight_meta", "weight_bitmask"):
        return f"the Triton kernels read weight_meta and weight_bitmask, not {metadata_name}"
    return None


@functools.cache
def unavailable_reason() -> str | None:
    """Why no Triton kernel runs in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return NOT_INSTALLED
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (torch.cuda.get_device_capability(), CAPABILITY))
        return f"the Triton kernels need compute capability {need}, this GPU has {have}"
    return None


@register_backend("linear", name="triton", priority=PRIORITY, can_run=can_run)
@torch.no_grad()
def linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, pattern: str, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m] in the dtype of x; values of another dtype are rounded to it first."""
    tokens = x.numel() // max(1, n)
    if dispatch.takes("linear", tokens, values, pattern, m, n):
        from sparse_rt.kernels.triton import linear as kernels

        return kernels.linear(x, values, metadata, bias, pattern, m, n)
    return F.linear(x, _expanded(values, metadata, pattern, m, n, x.dtype), bias)


@register_backend("linear_t", name="triton", priority=PRIORITY, can_run=can_run)
@torch.no_grad()
def linear_t(dy: Tensor, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """dx = dy W: dy [..., m] -> [..., n] in the dtype of dy."""
    tokens = dy.numel() // max(1, m)
    if dispatch.takes("linear_t", tokens, values, pattern, m, n):
        from sparse_rt.kernels.triton import linear as kernels

        return kernels.linear_t(dy, values, metadata, pattern, m, n)
    return dy @ _expanded(values, metadata, pattern, m, n, dy.dtype)


@register_backend("values_grad", name="triton", priority=PRIORITY, can_run=can_run)
@torch.no_grad()
def values_grad(dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """dY^T X at the kept positions: shape and dtype of ``values_like``, float32 sums, rounded once."""
    if takes_gradient("values_grad", dy, x, values_like, pattern, m, n):
        from sparse_rt.kernels.triton import gradient

        return gradient.values_grad(dy, x, metadata, pattern, m, n, values_like)
    return _gathered_grad(dy, x, metadata, pattern, m, n, values_like)


@register_backend("decompress", name="triton", priority=PRIORITY, can_run=can_run)
@torch.no_grad()
def decompress(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """Dense [m, n] in the dtype of the values."""
    from sparse_rt.kernels.triton import decompress as kernels

    return kernels.decompress(values, metadata, pattern, m, n)


@register_backend("gather", name="triton", priority=PRIORITY, can_run=can_run)
@torch.no_grad()
def gather(dense: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """The elements of dense [m, n] at the kept positions, in the shape of ``values_like``."""
    from sparse_rt.kernels.triton import decompress as kernels

    return kernels.gather(dense, metadata, pattern, m, n, values_like)


@register_backend("experts", name="triton", priority=PRIORITY, can_run=can_run)
@torch.no_grad()
def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up_values: Tensor,
    up_metadata: Tensor,
    down_values: Tensor,
    down_metadata: Tensor,
    up_pattern: str,
    down_pattern: str,
    experts: int,
    intermediate: int,
    activation: str,
) -> Tensor:
    """The grouped kernel for any number of tokens, measured or not: see ``dispatch.ALWAYS_USED``."""
    from sparse_rt.kernels.triton import experts as kernels

    reason = unreadable(down_pattern)
    if reason is not None:
        raise BackendError(f"experts with the down_pattern: {reason}; SPARSE_RT_BACKEND=reference runs them")
    return kernels.experts(
        *(x, weights, ids, up_values, up_metadata, down_values, down_metadata),
        *(up_pattern, down_pattern, experts, intermediate, activation),
    )


def _expanded(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int, dtype: torch.dtype) -> Tensor:
    from sparse_rt.kernels.triton.decompress import decompress_into

    weight = scratch.buffer("dense", (m, n), dtype, values.device)
    return decompress_into(weight, values, metadata, pattern)


def takes_gradient(kernel: str, dy: Tensor, x: Tensor, values: Tensor, pattern: str, m: int, n: int) -> bool:
    """Whether ``kernel`` is used for a gradient at the kept positions: its speed is that of the dtype of dy and x."""
    sparsity = 1 - values.numel() / max(1, m * n)
    dtype = dy.dtype if dy.dtype == x.dtype else torch.float32
    return x.numel() // max(1, n) in dispatch.limits(kernel, pattern, m, n, sparsity, dtype, x.device)


def _gathered_grad(
    dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor
) -> Tensor:
    """``values_grad`` by way of a dense dY^T X: a block of its rows is in scratch at a time."""
    from sparse_rt.kernels.triton.decompress import gather_rows

    dtype = torch.promote_types(dy.dtype, x.dtype)
    wide = torch.promote_types(dtype, values_like.dtype)  # what float32 values get is not rounded in between
    found = torch.empty(values_like.shape, dtype=wide, device=x.device)
    dy, x = dy.detach().reshape(-1, m).to(dtype), x.detach().reshape(-1, n).to(dtype)
    if x.shape[0] == 0 or found.numel() == 0:
        return found.zero_().to(values_like.dtype)
    rows = min(m, max(1, GRADIENT_ELEMENTS // n // ROW_MULTIPLE) * ROW_MULTIPLE)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        block = scratch.buffer("gradient", (stop - start, n), wide, x.device)
        _product(dy[:, start:stop].t(), x, block)
        gather_rows(block, metadata, pattern, m, n, start, found)
    return found.to(values_like.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; float32 sums of 16-bit factors stay float32 where ``out`` is."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:  # in the interpreter; torch has this product for GPUs
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
