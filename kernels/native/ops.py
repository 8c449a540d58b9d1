"""Backend ``native``: decompress with the C kernels into a scratch buffer, then the dense GEMM of torch.

That makes any number of tokens work at close to dense speed (a core writes 20-30 GB/s of dense weight); what beats
dense at few tokens multiplies without expanding and registers with a higher priority.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_rt.formats import get_format, is_pattern
from sparse_rt.kernels import reference, scratch
from sparse_rt.kernels.backends import Call, register_backend
from sparse_rt.kernels.native import gradient, library
from sparse_rt.kernels.native.checks import DTYPES, check, check_count, is_pairs, short

# linear() with few tokens is bound by memory: there the weight is expanded and multiplied a block of rows at a time,
# while the block is in the cache (11008 x 4096 bf16, 1 token, one core: 7.7 ms; 12.3 ms through a whole dense copy;
# dense 8.2). With more tokens the GEMM is slower on blocks than what they save. Measured crossover, per dtype of x:
BLOCKED_TOKENS = {torch.bfloat16: 32, torch.float16: 32, torch.float32: 128}
BLOCK_BYTES = 8 << 20
BLOCK_BYTES_PER_THREAD = 1 << 20  # less work than this is not worth waking a thread for


def can_run(call: Call) -> str | None:
    """None, or the sentence that says why the native kernels do not take this call."""
    if call.device != "cpu":
        return f"the native kernels run on the CPU, the tensors are on {call.device}"
    if call.dtype not in DTYPES:
        return f"the native kernels move bfloat16, float16 and float32, not {short(call.dtype)}"
    if not is_pattern(call.pattern):
        return f"unknown pattern {call.pattern!r}"
    metadata_name = get_format(call.pattern).metadata_name
    if metadata_name not in ("weight_meta", "weight_bitmask"):
        return f"the native kernels read weight_meta and weight_bitmask, not {metadata_name}"
    return library.unavailable_reason()


@register_backend("decompress", name="native", can_run=can_run)
def decompress(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """Dense [m, n] in the dtype of the values; ``FormatError`` where values and metadata contradict each other."""
    return _expand_whole(torch.empty((m, n), dtype=values.dtype), values, metadata, pattern)


@register_backend("gather", name="native", can_run=can_run)
def gather(dense: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """The elements of dense [m, n] at the kept positions, in the shape of ``values_like``."""
    values = torch.empty(values_like.shape, dtype=dense.dtype)
    found = gather_into(values.view(-1), dense, metadata, pattern)
    check_count(pattern, m, n, found, values.numel())
    return values


@register_backend("linear", name="native", can_run=can_run)
@torch.no_grad()
def linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, pattern: str, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m] in the dtype of x; values of another dtype are rounded to it first."""
    values = _in_dtype(values, x.dtype)
    tokens = x.numel() // max(1, n)
    rows = _block_rows(n, x.dtype)
    if tokens > BLOCKED_TOKENS[x.dtype] or rows >= m:
        weight = _expand_whole(scratch.buffer("dense", (m, n), x.dtype), values, metadata, pattern)
        return F.linear(x, weight, bias)
    y = torch.empty((*x.shape[:-1], m), dtype=x.dtype)
    flat, done = values.reshape(-1), 0
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        weight = scratch.buffer("dense", (stop - start, n), x.dtype)
        done += expand_into(weight, flat[done:], metadata[start:stop], pattern)
        check_count(pattern, m, n, done, flat.numel(), complete=stop == m)
        y[..., start:stop] = F.linear(x, weight, None if bias is None else bias[start:stop])
    return y


@register_backend("linear_t", name="native", can_run=can_run)
@torch.no_grad()
def linear_t(dy: Tensor, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    """dx = dy W: dy [..., m] -> [..., n] in the dtype of dy."""
    # Not in blocks: they would cut the sum over m, and each partial sum would be rounded to the dtype of dy.
    weight = scratch.buffer("dense", (m, n), dy.dtype)
    return dy @ _expand_whole(weight, _in_dtype(values, dy.dtype), metadata, pattern)


@register_backend("values_grad", name="native", can_run=can_run)
@torch.no_grad()
def values_grad(dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """dY^T X at the kept positions. Where the processor has no kernel for it (``gradient``), a block of rows at a time:
    the GEMM of torch into scratch, then a gather.

    The block is formed in float32 unless inputs and result are all bfloat16, where the GEMM accumulates in float32 and
    rounds once, to the dtype of the result. A float32 gradient (adapters accumulate in it) must not be rounded to
    bfloat16 on the way, and torch has no CPU GEMM from bfloat16 to float32, so the inputs are widened then.
    """
    if values_like.dtype not in DTYPES:
        return reference.values_grad(dy, x, metadata, pattern, m, n, values_like)
    if gradient.can_run(dy, x):
        return gradient.values_grad(dy, x, metadata, pattern, m, n, values_like)
    narrow = {dy.dtype, x.dtype, values_like.dtype} == {torch.bfloat16} and _bf16_gemm()
    dtype = torch.bfloat16 if narrow else torch.float32
    dy, x = dy.reshape(-1, m), x.reshape(-1, n).to(dtype)
    result = torch.empty(values_like.shape, dtype=values_like.dtype)
    gathered = result if result.dtype == dtype else scratch.buffer("values", tuple(result.shape), dtype)
    flat, done = gathered.view(-1), 0
    rows = _block_rows(n, dtype)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        block = scratch.buffer("dense", (stop - start, n), dtype)
        torch.mm(dy[:, start:stop].to(dtype).t(), x, out=block)
        done += gather_into(flat[done:], block, metadata[start:stop], pattern)
        check_count(pattern, m, n, done, flat.numel(), complete=stop == m)
    return result if gathered is result else result.copy_(gathered)


def expand_into(out: Tensor, values: Tensor, metadata: Tensor, pattern: str) -> int:
    """Fill the contiguous ``out`` [m, n] from the front of ``values`` (same dtype) and return how many it took.

    Where the metadata marks more than there are, the returned number says so and ``out`` is incomplete.
    """
    m, n = out.shape
    values, metadata = values.contiguous(), metadata.contiguous()
    check(out, values, metadata, pattern, m, n)
    tail = m, n, out.element_size(), torch.get_num_threads()
    handle, count = library.load().handle, values.numel()
    if not is_pairs(pattern):
        return handle.srt_expand_bitmask(values.data_ptr(), count, metadata.data_ptr(), out.data_ptr(), *tail)
    if count < m * n // 2:
        return m * n // 2
    return handle.srt_expand_24(values.data_ptr(), metadata.data_ptr(), out.data_ptr(), *tail)


def gather_into(values: Tensor, dense: Tensor, metadata: Tensor, pattern: str) -> int:
    """The inverse: write dense [m, n] at the kept positions to the front of ``values`` (contiguous, same dtype).

    Returns how many the metadata marks. The rest of ``values`` may be overwritten too; where there is too little room,
    nothing behind it is, and the returned number says so.
    """
    m, n = dense.shape
    dense, metadata = dense.contiguous(), metadata.contiguous()
    check(values, dense, metadata, pattern, m, n)
    tail = m, n, dense.element_size(), torch.get_num_threads()
    handle, room = library.load().handle, values.numel()
    if not is_pairs(pattern):
        return handle.srt_gather_bitmask(dense.data_ptr(), metadata.data_ptr(), values.data_ptr(), room, *tail)
    if room < m * n // 2:
        return m * n // 2
    return handle.srt_gather_24(dense.data_ptr(), metadata.data_ptr(), values.data_ptr(), *tail)


def _expand_whole(out: Tensor, values: Tensor, metadata: Tensor, pattern: str) -> Tensor:
    found = expand_into(out, values, metadata, pattern)
    check_count(pattern, *out.shape, found, values.numel())
    return out


def _in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype == dtype else scratch.buffer("values", tuple(values.shape), dtype).copy_(values)


def _block_rows(n: int, dtype: torch.dtype) -> int:
    block = max(BLOCK_BYTES, BLOCK_BYTES_PER_THREAD * torch.get_num_threads())
    return max(1, block // max(1, n * dtype.itemsize))


def _bf16_gemm() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
