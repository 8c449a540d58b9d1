"""What the C side takes on trust: devices, dtypes, layout and the size of the metadata."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import get_format

# How the kernels that compute (not only move) number the dtypes: numbers.h.
NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
DTYPES = tuple(NUMBERS)


def is_pairs(pattern: str) -> bool:
    return get_format(pattern).metadata_name == "weight_meta"


def check(target: Tensor, source: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> None:
    """Refuse what a kernel that moves elements from ``source`` to ``target`` cannot take."""
    check_weight(metadata, pattern, m, n, source, target)
    if source.dtype not in DTYPES or target.dtype != source.dtype or not target.is_contiguous():
        raise UserError(
            f"native kernels need one dtype of bfloat16, float16 and float32 and a contiguous result, "
            f"got {short(source.dtype)} into {short(target.dtype)}"
        )


def check_weight(metadata: Tensor, pattern: str, m: int, n: int, *others: Tensor) -> None:
    """Refuse metadata that is not that of an (m, n) weight, and tensors that are not on the CPU."""
    if {tensor.device.type for tensor in (metadata, *others)} != {"cpu"}:
        raise UserError(
            "native kernels need every tensor on the CPU, got "
            + ", ".join(str(tensor.device) for tensor in (*others, metadata))
        )
    refusal = get_format(pattern).refuse_shape(m, n)
    if refusal:
        raise FormatError(f"a ({m}, {n}) weight cannot be {pattern}: {refusal}")
    if metadata.dtype != torch.uint8 or tuple(metadata.shape) != (m, (n + 7) // 8):
        raise FormatError(
            f"the metadata of a {pattern} weight ({m}, {n}) is uint8 {(m, (n + 7) // 8)}, "
            f"got {short(metadata.dtype)} {tuple(metadata.shape)}"
        )


def check_count(pattern: str, m: int, n: int, marked: int, given: int, complete: bool = True) -> None:
    """Refuse metadata that marks another number of kept weights than there are values."""
    if marked > given or (complete and marked != given):
        raise FormatError(
            f"the metadata of a {pattern} weight ({m}, {n}) marks {marked} kept weights, there are {given} values"
        )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
