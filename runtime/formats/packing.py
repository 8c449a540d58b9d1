"""Bits and nibbles: the byte layouts of metadata, and the positions they stand for.

Bit ``j`` of byte ``b`` is column ``8 b + j`` (little bit order); padding bits are 0. A 2:4 nibble holds the first
kept column of a group of four in bits 0-1 and the second in bits 2-3; the low nibble of a byte is the earlier group.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_rt.formats.selection import pieces

# Times this, the eight lowest bits of the bytes of a 64-bit word meet in its highest byte, in order.
_GATHER = 0x0102040810204080


@functools.lru_cache(maxsize=8)
def _spread_table(device: str) -> Tensor:
    """Byte -> its eight bits as eight bytes, in one 64-bit word."""
    bits = (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).squeeze(1)


@functools.lru_cache(maxsize=8)
def _popcount_table(device: str) -> Tensor:
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return (bits & 1).sum(1).to(torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """bool [m, n] -> uint8 [m, ceil(n/8)]."""
    packed = torch.empty(mask.shape[0], (mask.shape[1] + 7) // 8, dtype=torch.uint8, device=mask.device)
    for rows in pieces(*mask.shape):
        words = torch.nn.functional.pad(mask[rows], (0, -mask.shape[1] % 8)).flatten().view(torch.int64)
        packed[rows] = ((words * _GATHER) >> 56).view(packed[rows].shape)
    return packed


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """uint8 [m, ceil(n/8)] -> bool [m, n]."""
    bits = _spread_table(str(packed.device))[packed.int()].view(torch.bool)
    return bits if bits.shape[1] == n else bits[:, :n].contiguous()


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
