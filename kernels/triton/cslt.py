"""2:4 weights times many tokens: cuSPARSELt, through the operators that torch has for it.

    blob = compress(values, metadata, m, n)      opaque: values and metadata in the library's order
    sweep(blob, m, n, tokens)                    once per shape, at load: which of its algorithms is the fastest here
    y = linear(x, blob, bias, m, n)              never tunes and never waits for the device

Which algorithm (alg_id) wins depends on the GPU, the shape and the library; nobody publishes a table. ``linear`` takes
the swept one of its shape and number of tokens (to the next power of two), otherwise that of the nearest number that
was swept, otherwise the library's default, 0. For which products this is used at all is measured (``dispatch``).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_rt.errors import BackendError
from sparse_rt.kernels import ops
from sparse_rt.kernels.triton import configs

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 16  # of rows and columns of the weight
TOKEN_MULTIPLE = 8  # torch pads the other operand likewise
# Ids run from 0 without gaps; the library does not say in every version where they end, it refuses the first too high.
MAX_ALGORITHMS = 64

IDENTITY_ROWS = 1024  # multiplied at a time to get a weight back

_algorithms: dict[tuple, dict[int, int]] = {}  # GPU, dtype, m, n -> tokens (``bucket``) -> alg_id


@functools.cache
def unavailable_reason() -> str | None:
    """Why cuSPARSELt cannot be called in this process, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not hasattr(torch, "_cslt_sparse_mm") or not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} was built without cuSPARSELt; the wheels of pytorch.org for CUDA have it"
    if torch.cuda.get_device_capability() < (8, 0):
        return "sparse tensor cores need compute capability 8.0"
    return None


def refusal(dtype: torch.dtype, m: int, n: int) -> str | None:
    """None when a 2:4 weight (m, n) of this dtype can be multiplied by cuSPARSELt here, otherwise the reason."""
    if dtype not in DTYPES:
        return f"cuSPARSELt is used for bfloat16 and float16, not {str(dtype)[len('torch.') :]}"
    if m == 0 or n == 0 or m % MULTIPLE or n % MULTIPLE:
        return f"cuSPARSELt needs rows and columns in multiples of {MULTIPLE}, the weight is ({m}, {n})"
    return unavailable_reason()


def compress(values: Tensor, metadata: Tensor, m: int, n: int) -> Tensor:
    """The library's form of a canonical 2:4 weight, 1.125 bytes a weight. ``BackendError`` for what is refused.

    Made from the dense weight, which exists only meanwhile. Positions that are not kept are +0.0 there, so that kept
    zeros of either sign never make a third nonzero of a group.
    """
    _require(values.dtype, m, n)
    return torch._cslt_compress(ops.decompress(values.detach(), metadata, "2:4", m, n))


@torch.no_grad()
def linear(x: Tensor, blob: Tensor, bias: Tensor | None, m: int, n: int) -> Tensor:
    """y = x W^T + bias: x [..., n] -> [..., m] in the dtype of x, float32 sums."""
    _require(x.dtype, m, n)
    flat = x.detach().reshape(-1, n)
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], m)
    algorithm = _algorithm(x.device, x.dtype, m, n, flat.shape[0])
    return _product(flat, blob, bias, algorithm).view(*x.shape[:-1], m)


@torch.no_grad()
def expand(blob: Tensor, m: int, n: int, out: Tensor) -> Tensor:
    """Fill ``out`` [m, n] with the dense weight: products with the rows of an identity, which are exact but for the
    sign of zeros. 2 m n^2 operations, so only for who wants the weight back."""
    _require(blob.dtype, m, n)
    for start in range(0, n, IDENTITY_ROWS):
        rows = min(IDENTITY_ROWS, n - start)
        x = torch.zeros(rows, n, dtype=blob.dtype, device=blob.device)
        x[:, start : start + rows].fill_diagonal_(1)
        out[:, start : start + rows] = linear(x, blob, None, m, n).t()
    return out


def sweep(blob: Tensor, m: int, n: int, tokens: int, repeats: int = 10) -> dict[int, float]:
    """Time every algorithm for ``tokens`` tokens and remember the fastest; milliseconds by id, {} if known already.

    Waits for the device; call it while a model is loaded, never inside a graph capture.
    """
    _require(blob.dtype, m, n)
    known = _algorithms.setdefault(_key(blob.device, blob.dtype, m, n), {})
    if bucket(tokens) in known:
        return {}
    x = torch.randn(tokens, n, device=blob.device).to(blob.dtype)
    times: dict[int, float] = {}
    for algorithm in range((torch.backends.cusparselt.get_max_alg_id() or MAX_ALGORITHMS) + 1):
        try:
            times[algorithm] = _milliseconds(lambda a=algorithm: _product(x, blob, None, a), repeats)
        except RuntimeError as error:
            if not times:
                raise BackendError(f"cuSPARSELt cannot multiply a ({m}, {n}) weight: {error}") from error
            break
    known[bucket(tokens)] = min(times, key=times.__getitem__)
    return times


def _product(x: Tensor, blob: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    tokens = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -tokens % TOKEN_MULTIPLE)).contiguous()
    bias = None if bias is None else bias.detach().to(x.dtype)
    y = torch._cslt_sparse_mm(blob, padded.t(), bias=bias, transpose_result=True, alg_id=algorithm)
    return y[:tokens]


def _milliseconds(call, repeats: int) -> float:
    """The fastest of ``repeats`` calls after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def _key(device: torch.device, dtype: torch.dtype, m: int, n: int) -> tuple:
    return configs.gpu_name(device), dtype, m, n


def _algorithm(device: torch.device, dtype: torch.dtype, m: int, n: int, tokens: int) -> int:
    """The one that was swept for these tokens, or for the nearest number of them; the library's default is 0."""
    swept, size = _algorithms.get(_key(device, dtype, m, n)), bucket(tokens)
    if not swept:
        return 0
    return swept[size] if size in swept else swept[min(swept, key=lambda other: abs(math.log2(other / size)))]


def bucket(tokens: int) -> int:
    """Numbers of tokens that share an algorithm: up to the same power of two."""
    return 1 << max(0, tokens - 1).bit_length()


def _require(dtype: torch.dtype, m: int, n: int) -> None:
    reason = refusal(dtype, m, n)
    if reason is not None:
        raise BackendError(reason)
