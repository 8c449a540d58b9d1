"""Backend ``native`` of ``packed_experts``: one call of csrc/experts.c."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_rt.errors import BackendError, SparseRTError, UserError
from sparse_rt.kernels.backends import register_backend
from sparse_rt.kernels.experts import PLAIN, is_gated
from sparse_rt.kernels.native import library, pages
from sparse_rt.kernels.native.checks import NUMBERS, short
from sparse_rt.kernels.native.ops import can_run

# Every expert starts on a cache line.
ALIGNMENT = 64
# In the order of csrc/activation.h.
FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu2")
_IDS = (torch.int32, torch.int64)

Pair = tuple[Tensor, Tensor]


def join(blobs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(packed, spans) of ``packed_experts`` from the packed weight of every expert; empties the list on the way."""
    starts, total = [], 0
    for blob in blobs:
        starts.append(total)
        total += -(-blob.numel() // ALIGNMENT) * ALIGNMENT
    joined = pages.empty(total)
    spans = torch.tensor([[start, start + blob.numel()] for start, blob in zip(starts, blobs, strict=True)])
    for start in reversed(starts):
        blob = blobs.pop()
        joined[start : start + blob.numel()] = blob
    return joined, spans.view(-1, 2)


@register_backend("packed_experts", name="native", can_run=can_run)
def packed_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor,
    up_spans: Tensor,
    down: Tensor,
    down_spans: Tensor,
    intermediate: int,
    activation: str,
) -> Tensor:
    """As the op of this name; ``UserError`` for arguments that do not fit each other or an expert that is not there,
    ``BackendError`` for a span that holds no packed weight of the shape and dtype."""
    gated = is_gated(activation)
    _check(x, weights, ids, (up, down), (up_spans, down_spans), intermediate)
    tokens, hidden = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    if weights.dtype != torch.float32:
        weights = weights.float()
    weights, ids = _contiguous(weights), _contiguous(ids)
    y, culprit = torch.empty((tokens, hidden), dtype=x.dtype), ctypes.c_int64()
    found = library.load().handle.srt_packed_experts(
        *(x.data_ptr(), x.stride(0), tokens, hidden, NUMBERS[x.dtype]),
        *(weights.data_ptr(), ids.data_ptr(), ids.element_size(), ids.shape[1]),
        *(up.data_ptr(), up.numel(), up_spans.data_ptr(), down.data_ptr(), down.numel(), down_spans.data_ptr()),
        *(up_spans.shape[0], intermediate, FUNCTIONS.index(activation.removesuffix(PLAIN)), gated),
        *(y.data_ptr(), ctypes.addressof(culprit), torch.get_num_threads()),
    )
    if found != 0:
        rows = intermediate * (2 if gated else 1)
        raise _refusal(found, culprit.value, x.dtype, len(up_spans), (rows, hidden), (hidden, intermediate))
    return y


def _contiguous(tensor: Tensor) -> Tensor:
    """Without torch's dispatcher where there is nothing to do: a token has a call for every layer, with cold caches."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _check(x: Tensor, weights: Tensor, ids: Tensor, packed: Pair, spans: Pair, intermediate: int) -> None:
    """What the C side takes on trust: devices, dtypes and shapes."""
    up, down = packed
    up_spans, down_spans = spans
    if not (x.is_cpu and weights.is_cpu and ids.is_cpu and up.is_cpu and down.is_cpu):
        raise UserError("packed_experts: the native kernels need every tensor on the CPU")
    if x.dim() != 2 or x.dtype not in NUMBERS or x.shape[1] < 1 or intermediate < 1:
        raise UserError(
            f"packed_experts: x is [tokens, hidden] of bfloat16, float16 or float32, got {short(x.dtype)} "
            f"{tuple(x.shape)} and an intermediate size of {intermediate}"
        )
    if ids.dtype not in _IDS or ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.shape != weights.shape:
        raise UserError(
            f"packed_experts: {len(x)} tokens have weights [{len(x)}, k] and int32 or int64 ids [{len(x)}, k], "
            f"got {tuple(weights.shape)} and {short(ids.dtype)} {tuple(ids.shape)}"
        )
    if not (_is_list(up, torch.uint8, 1) and _is_list(down, torch.uint8, 1)):
        raise UserError("packed_experts: packed weights are contiguous uint8 [bytes], as ``join`` makes them")
    same = _is_list(up_spans, torch.int64, 2) and _is_list(down_spans, torch.int64, 2)
    if not same or up_spans.shape != down_spans.shape or up_spans.shape[1] != 2:
        raise UserError(
            f"packed_experts: spans are contiguous int64 [experts, 2] on the CPU, got {short(up_spans.dtype)} "
            f"{tuple(up_spans.shape)} and {short(down_spans.dtype)} {tuple(down_spans.shape)}"
        )


def _is_list(tensor: Tensor, dtype: torch.dtype, dim: int) -> bool:
    return tensor.dtype == dtype and tensor.dim() == dim and tensor.is_contiguous() and tensor.is_cpu


def _refusal(
    found: int, culprit: int, dtype: torch.dtype, experts: int, up_shape: tuple[int, int], down_shape: tuple[int, int]
) -> SparseRTError:
    """The error of what srt_packed_experts returned (csrc/experts.c)."""
    if found == -1:
        allowed = f"0 to {experts - 1}, or -1 for an expert of another rank"
        return UserError(f"packed_experts: ids has expert {culprit}; allowed are {allowed}")
    if found in (-2, -3):
        name, shape = ("up", up_shape) if found == -2 else ("down", down_shape)
        return BackendError(
            f"packed_experts: the span of expert {culprit} in {name} does not hold a packed {shape} weight at a "
            "multiple of 8 bytes, or it was made for an instruction set that is switched off now"
        )
    if found == -4:
        return BackendError(
            f"packed_experts: x is {dtype}, the packed values of expert {culprit} are not; they must be of one dtype"
        )
    return BackendError(f"packed_experts: there is no memory for {culprit} bytes of work space")
