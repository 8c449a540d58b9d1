"""dY^T X at the kept positions through the tile kernels (csrc/grad.c), and the factors of a weight, forwards and back.

The tiles are formed in registers with float32 sums, from bfloat16 pairs where the processor multiplies them; torch has
no CPU GEMM from bfloat16 to float32. One core of Zen 4, bfloat16 to float32, 8192 x 2048, 256 tokens: 45 ms, and 40 to
47 ms for the dense bfloat16 GEMMs of torch of that size; 227 ms through its float32 GEMM. At high sparsity the kept
positions alone are formed, as dot products: 1.6 times as fast at 75%, 2 to 2.6 times at 90%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_rt.errors import UserError
from sparse_rt.kernels import scratch
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.checks import NUMBERS, check_count, check_weight, is_pairs, short

# Tokens packed at once: the packed copy of x and dy stays below what they take themselves in a long batch.
TOKENS = 2048
# 0: the faster one by density; 1: whole tiles of the product; 2: dot products of the kept positions only (grad.h).
KERNEL = 0


def can_run(*inputs: Tensor) -> bool:
    """Whether this processor has tile kernels for inputs of these dtypes."""
    if any(tensor.dtype not in NUMBERS or tensor.device.type != "cpu" for tensor in inputs):
        return False
    if library.unavailable_reason() is not None:
        return False
    return library.load().handle.srt_grad_bytes(1, 1, 1, NUMBERS[_common(*inputs)], 0) >= 0


def values_grad(dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    """As the op of this name: dy [..., m], x [..., n] -> shape and dtype of ``values_like``, rounded once."""
    metadata, result = metadata.contiguous(), torch.empty(values_like.shape, dtype=values_like.dtype)
    tokens = x.numel() // max(1, n)
    if tokens == 0 or result.numel() == 0:
        return result.zero_()
    wide = result
    if tokens > TOKENS and result.dtype != torch.float32:
        wide = scratch.buffer("values", tuple(result.shape), torch.float32)

    def one(dy: Tensor, x: Tensor, add: bool, work: Tensor) -> int:
        return library.load().handle.srt_values_grad(
            *_inputs(dy, x, metadata, pattern),
            *(wide.data_ptr(), wide.numel(), m, n, NUMBERS[x.dtype], NUMBERS[wide.dtype], add, KERNEL),
            *(work.data_ptr(), work.numel(), torch.get_num_threads()),
        )

    _in_blocks(one, dy, x, metadata, pattern, m, n, wide.numel(), groups=0)
    return result if wide is result else result.copy_(wide)


@torch.no_grad()
def factors_grad(
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
    """Gradients of a [groups, n] and b [m], float32, of y = x W'^T with W' as in ``apply_factors``.

    The gradient of the values never exists: what a tile gives is reduced in registers.
    """
    a, b, values = _factors(values, m, n, a, b)
    metadata = metadata.contiguous()
    da, db = torch.empty_like(a), torch.empty_like(b)
    if x.numel() == 0:
        return da.zero_(), db.zero_()

    def one(dy: Tensor, x: Tensor, add: bool, work: Tensor) -> int:
        return library.load().handle.srt_factors_grad(
            *_inputs(dy, x, metadata, pattern),
            *(values.data_ptr(), values.numel(), m, n, NUMBERS[x.dtype], NUMBERS[values.dtype]),
            *(a.data_ptr(), b.data_ptr(), scale, a.shape[0], da.data_ptr(), db.data_ptr(), add, KERNEL),
            *(work.data_ptr(), work.numel(), torch.get_num_threads()),
        )

    _in_blocks(one, dy, x, metadata, pattern, m, n, values.numel(), groups=a.shape[0])
    return da, db


@torch.no_grad()
def apply_factors(
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
    """out = values (1 + scale b[i] a[g(i), j]), or without the 1; a [groups, n], b [m], g(i) = i // (m / groups).

    ``out`` is contiguous, of the shape of the values and of bfloat16, float16 or float32; computed in float32, rounded
    once.
    """
    check_weight(metadata, pattern, m, n, values, out, a, b)
    a, b, values = _factors(values, m, n, a, b)
    if out.dtype not in NUMBERS or not out.is_contiguous() or out.numel() != values.numel():
        raise UserError(
            f"factors need a contiguous result of {values.numel()} bfloat16, float16 or float32 values, "
            f"got {short(out.dtype)} {tuple(out.shape)}"
        )
    metadata, starts = metadata.contiguous(), scratch.buffer("starts", (m + 1,), torch.int64)
    marked = library.load().handle.srt_factors_apply(
        *(values.data_ptr(), NUMBERS[values.dtype], values.numel(), metadata.data_ptr(), is_pairs(pattern), m, n),
        *(a.data_ptr(), b.data_ptr(), scale, a.shape[0], float(with_base), out.data_ptr(), NUMBERS[out.dtype]),
        *(starts.data_ptr(), torch.get_num_threads()),
    )
    _check_done(marked)
    check_count(pattern, m, n, marked, values.numel())
    return out


def _in_blocks(
    run: Callable[[Tensor, Tensor, bool, Tensor], int],
    dy: Tensor,
    x: Tensor,
    metadata: Tensor,
    pattern: str,
    m: int,
    n: int,
    kept: int,
    groups: int,
) -> None:
    """Call ``run(dy, x, add, work)`` for every block of tokens."""
    check_weight(metadata, pattern, m, n, dy, x)
    for index, (dy_block, x_block) in enumerate(_token_blocks(dy, x, m, n)):
        number = NUMBERS[x_block.dtype]
        size = library.load().handle.srt_grad_bytes(m, n, x_block.shape[0], number, groups)
        _check_done(size)
        marked = run(dy_block, x_block, index > 0, scratch.buffer("gradient", (size,), torch.uint8))
        _check_done(marked)
        check_count(pattern, m, n, marked, kept)


def _token_blocks(dy: Tensor, x: Tensor, m: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    dy, x = dy.reshape(-1, m), x.reshape(-1, n)
    if dy.shape[0] != x.shape[0]:
        raise UserError(f"dy has {dy.shape[0]} tokens and x has {x.shape[0]}")
    dtype = _common(dy, x)
    for start in range(0, x.shape[0], TOKENS):
        block = slice(start, start + TOKENS)
        yield dy[block].to(dtype).contiguous(), x[block].to(dtype).contiguous()


def _inputs(dy: Tensor, x: Tensor, metadata: Tensor, pattern: str) -> tuple[int, int, int, int, bool]:
    return dy.data_ptr(), x.data_ptr(), x.shape[0], metadata.data_ptr(), is_pairs(pattern)


def _factors(values: Tensor, m: int, n: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.dim() != 2 or a.shape[1] != n or tuple(b.shape) != (m,) or a.shape[0] < 1 or m % a.shape[0] != 0:
        raise UserError(
            f"factors of a ({m}, {n}) weight are a [groups, {n}] and b [{m}] with groups a divisor of {m}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if values.dtype not in NUMBERS:
        raise UserError(f"factors apply to bfloat16, float16 and float32 values, not {short(values.dtype)}")
    return a.detach().float().contiguous(), b.detach().float().contiguous(), values.detach().contiguous()


def _common(*inputs: Tensor) -> torch.dtype:
    first = inputs[0].dtype
    return first if all(tensor.dtype == first for tensor in inputs) else torch.float32


def _check_done(result: int) -> None:
    if result < 0:
        raise UserError("the native kernels have no tile kernel for this processor, shape or dtype")
