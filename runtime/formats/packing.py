"""Bits and nibbles: the byte layouts of metadata, and the positions they stand for.

Bit ``j`` of byte ``b`` is column ``8 b + j`` (little bit order); padding bits are 0. A 2:4 nibble holds the first
kept column of a group of four in bits 0-1 and the second in bits 2-3; the low nibble of a byte is the earlier group.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def _bit_values(device: str) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


@functools.lru_cache(maxsize=8)
def _popcount_table(device: str) -> Tensor:
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (bits & 1).sum(1).to(torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [m, n] -> uint8 [m, ceil(n/8)]."""
    m, n = mask.shape
    bits = torch.nn.functional.pad(mask, (0, -n % 8)).view(m, -1, 8)
    return (bits * _bit_values(str(mask.device))).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """uint8 [m, ceil(n/8)] -> bool [m, n]."""
    bits = packed.unsqueeze(-1).bitwise_and(_bit_values(str(packed.device))) != 0
    return bits.flatten(1)[:, :n].contiguous()


def popcount(packed: Tensor) -> Tensor:
    """Set bits of every byte: uint8 [...] -> uint8 [...]."""
    return _popcount_table(str(packed.device))[packed.int()]


def row_counts(packed: Tensor) -> Tensor:
    """Set bits of every row: uint8 [m, b] -> int64 [m]."""
    return popcount(packed).sum(-1, dtype=torch.int64)


def row_offsets(packed: Tensor) -> Tensor:
    """Where the values of every row begin, and where the last ends: uint8 [m, b] -> int32 [m + 1]."""
    return torch.nn.functional.pad(row_counts(packed).cumsum(0), (1, 0)).to(torch.int32)


def pack_nibbles(first: Tensor, second: Tensor) -> Tensor:
    """Kept columns 0..3 of every group, [m, g] each -> uint8 [m, ceil(g/2)]."""
    m, groups = first.shape
    nibbles = (first | (second << 2)).to(torch.uint8)
    pairs = torch.nn.functional.pad(nibbles, (0, groups % 2)).view(m, -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """uint8 [m, ceil(g/2)] -> (first, second), uint8 [m, g] each."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :groups]
    return nibbles & 3, nibbles >> 2
