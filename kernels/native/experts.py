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
    weights, ids = weights.float().contiguous(), ids.contiguous()
    up_spans, down_spans = up_spans.contiguous(), down_spans.contiguous()
    y, culprit = torch.empty((tokens, hidden), dtype=x.dtype), ctypes.c_int64()
    found = library.load().handle.srt_packed_experts(
        *(x.data_ptr(), x.stride(0), tokens, hidden, NUMBERS[x.dtype]),
        *(weights.data_ptr(), ids.data_ptr(), ids.element_size(), ids.shape[1]),
        *(up.data_ptr(), up.numel(), up_spans.data_ptr(), down.data_ptr(), down.numel(), down_spans.data_ptr()),
        *(len(up_spans), intermediate, FUNCTIONS.index(activation.removesuffix(PLAIN)), gated),
        *(y.data_ptr(), ctypes.addressof(culprit), torch.get_num_threads()),
    )
    if found != 0:
        rows = intermediate * (2 if gated else 1)
        raise _refusal(found, culprit.value, x.dtype, len(up_spans), (rows, hidden), (hidden, intermediate))
    return y


def _check(x: Tensor, weights: Tensor, ids: Tensor, packed: Pair, spans: Pair, intermediate: int) -> None:
    """What the C side takes on trust: devices, dtypes and shapes."""
    others = {tensor.device.type for tensor in (x, weights, ids, *packed, *spans)} - {"cpu"}
    if others:
        raise UserError(f"packed_experts: every tensor must be on the CPU, there are some on {', '.join(others)}")
    if x.dim() != 2 or x.dtype not in NUMBERS or x.shape[1] < 1 or intermediate < 1:
        raise UserError(
            f"packed_experts: x is [tokens, hidden] of bfloat16, float16 or float32, got {short(x.dtype)} "
            f"{tuple(x.shape)} and an intermediate size of {intermediate}"
        )
    routed = ids.dim() == 2 and len(ids) == len(x) and ids.shape == weights.shape
    if not routed or ids.dtype not in (torch.int32, torch.int64):
        raise UserError(
            f"packed_experts: {len(x)} tokens have weights [{len(x)}, k] and int32 or int64 ids [{len(x)}, k], "
            f"got {tuple(weights.shape)} and {short(ids.dtype)} {tuple(ids.shape)}"
        )
    if any(part.dtype != torch.uint8 or part.dim() != 1 or not part.is_contiguous() for part in packed):
        raise UserError("packed_experts: packed weights are contiguous uint8 [bytes], as sparse_rt's join makes them")
    if spans[0].shape != spans[1].shape or any(
        part.dtype != torch.int64 or part.dim() != 2 or part.shape[1] != 2 for part in spans
    ):
        raise UserError(
            f"packed_experts: spans are int64 [experts, 2], got {tuple(spans[0].shape)} and {tuple(spans[1].shape)}"
        )


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
