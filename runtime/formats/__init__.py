"""Sparsity patterns and how they are stored; depends on torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.formats.base import (
    VALUE_DTYPES,
    VALUES_NAME,
    Format,
    all_finite,
    check_finite,
    formats,
    get_format,
    is_pattern,
    known_patterns,
    register_format,
)
from sparse_rt.formats.selection import pieces

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

__all__ = [
    "VALUES_NAME",
    "VALUE_DTYPES",
    "Format",
    "all_finite",
    "check_finite",
    "formats",
    "get_format",
    "is_pattern",
    "known_patterns",
    "normalize_zeros",
    "positions",
    "register_format",
]


def positions(fmt: Format, metadata: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Row and column of every kept value in storage order: int32 [nnz] each."""
    index = fmt.unpack_mask(metadata, m, n).flatten().nonzero().squeeze(-1)
    return (index // n).to(torch.int32), (index % n).to(torch.int32)


def normalize_zeros(weight: Tensor) -> Tensor:
    """-0.0 -> +0.0, everything else bit for bit; done before a mask is chosen (-0.0 once broke 2:4 kernels).

    ``weight`` itself where it holds no -0.0, else a copy.
    """
    flat = weight.flatten()
    bits = flat.view(_INTEGERS[weight.dtype.itemsize])
    negative = torch.iinfo(bits.dtype).min  # the sign bit alone: -0.0
    if not any(bool((bits[part] == negative).any()) for part in pieces(len(bits), 1)):
        return weight
    return torch.where(weight == 0, torch.zeros_like(weight), weight)
