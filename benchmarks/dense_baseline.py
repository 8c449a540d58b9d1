"""Our own dense bf16 product (dense_baseline.c) as the second baseline of the kernel benchmark.

It is compiled with the compiler, the flags and the cache of the native kernels, and needs AVX-512 BF16.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shlex
from pathlib import Path

import torch
from torch import Tensor

from sparse_rt.errors import BackendError
from sparse_rt.kernels import scratch
from sparse_rt.kernels.native import build

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
SOURCE = Path(__file__).with_name("dense_baseline.c")


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled product; ``BackendError`` where there is no compiler or no AVX-512 BF16."""
    try:
        library = ctypes.CDLL(str(_compile()))
    except (build.BuildError, OSError) as error:
        raise BackendError(f"own dense baseline: {error}") from error
    address, size = ctypes.c_void_p, ctypes.c_int64
    library.dense_pack.argtypes = [address, address, size, size]
    library.dense_linear.argtypes = [address, address, address, address, size, size, size, ctypes.c_int]
    library.dense_scratch_pairs.argtypes, library.dense_scratch_pairs.restype = [size, size], size
    if not library.dense_supported():
        raise BackendError("own dense baseline: this processor has no AVX-512 BF16")
    return library


def unavailable_reason() -> str | None:
    """None, or why the baseline cannot run here."""
    try:
        load()
    except BackendError as error:
        return str(error)
    return None


def _compile() -> Path:
    compiler = build.find_compiler()
    identity = build.compiler_identity(compiler)
    flags = [*build.FLAGS, *build.openmp_flags(identity)]
    key = build.cache_key([SOURCE], shlex.join([*compiler, identity]), flags)
    return build.cached("native", f"dense_baseline-{key}", compiler, flags, [SOURCE])


def pack(weight: Tensor) -> Tensor:
    """bf16 weight [m, n] -> the panels that ``linear`` reads, int32 [ceil(m / 16), ceil(n / 2), 16]."""
    _check(weight)
    m, n = weight.shape
    packed = _empty_in_huge_pages((-(-m // 16), -(-n // 2), 16))
    load().dense_pack(weight.data_ptr(), packed.data_ptr(), m, n)
    return packed


def linear(x: Tensor, packed: Tensor, m: int, n: int) -> Tensor:
    """y = x W^T: x [T, n] bf16 -> [T, m] bf16, on ``torch.get_num_threads()`` threads."""
    _check(x)
    if x.shape[1] != n or tuple(packed.shape) != (-(-m // 16), -(-n // 2), 16):
        raise ValueError(f"x {tuple(x.shape)} and packed {tuple(packed.shape)} do not fit a weight ({m}, {n})")
    tokens = x.shape[0]
    y = torch.empty((tokens, m), dtype=torch.bfloat16)
    library = load()
    room = scratch.buffer("dense_baseline", (library.dense_scratch_pairs(tokens, n),), torch.int32)
    addresses = x.data_ptr(), packed.data_ptr(), y.data_ptr(), room.data_ptr()
    library.dense_linear(*addresses, m, n, tokens, torch.get_num_threads())
    return y


def _empty_in_huge_pages(shape: tuple[int, ...]) -> Tensor:
    """int32, on pages of 2 MiB where the system gives them: a tenth to a quarter faster to read than pages of 4 KiB."""
    elements = math.prod(shape)
    if elements * 4 < HUGE_PAGE:
        return torch.empty(shape, dtype=torch.int32)
    raw = torch.empty(elements + 2 * HUGE_PAGE // 4, dtype=torch.int32)
    start = -raw.data_ptr() % HUGE_PAGE
    size = -(-elements * 4 // HUGE_PAGE) * HUGE_PAGE
    # A refusal costs speed, nothing else.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(raw.data_ptr() + start), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return raw[start // 4 : start // 4 + elements].view(shape)


def _check(matrix: Tensor) -> None:
    if matrix.dtype != torch.bfloat16 or matrix.dim() != 2 or not matrix.is_contiguous() or 0 in matrix.shape:
        raise ValueError(
            f"the dense baseline takes contiguous bfloat16 matrices that are not empty, "
            f"got {matrix.dtype} {tuple(matrix.shape)}"
        )
