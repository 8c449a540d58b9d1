"""Layout "mma_sp" of a 2:4 weight: the registers of every lane of the sparse tensor-core instruction, in reading order.

The instruction mma.sp.m16n8k32 multiplies 16 rows by 32 columns of a 2:4 weight with 8 tokens. 16 rows by 256 columns
(a unit) are stored together, so that a lane reads 16 bytes at a time and never shuffles:

    fragments  int32 [ceil(m/16), ceil(n/256), 8 tiles, 32 lanes, 4]   register i of a lane: the two weights of a group
    metadata   int32 [ceil(m/16), ceil(n/256), 32 lanes, 4]            word i serves tiles 2i (selector 0), 2i+1 (1)

Which lane holds what: PTX ISA 9.7.14.6.2.2, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". A
lane needs one half of every second group of x; so that it can read two whole groups (16 bytes) at a time, the groups of
a tile are renumbered: the one at 4 v + 2 p + s in memory is number 4 v + 2 s + p of the instruction (v, p, s = 0, 1).

Rows and columns beyond the weight hold zeros at positions 0 and 1, because equal positions are undefined behaviour.
Everything here is a permutation: values keep their bits, -0.0 and NaN included. Runs on the device of the tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_rt.errors import BackendError

ROWS = 16  # of a unit, and of the instruction
COLUMNS = 256  # of a unit: eight instructions, whose metadata are 16 bytes a lane
TILES = COLUMNS // 32
DTYPES = (torch.bfloat16, torch.float16)
EMPTY = 0x4  # positions 0 and 1


def refusal(dtype: torch.dtype, m: int, n: int) -> str | None:
    """None when a 2:4 weight (m, n) can be stored as fragments, otherwise the reason."""
    if dtype not in DTYPES:
        return f"the sparse tensor cores multiply bfloat16 and float16, the values are {str(dtype)[len('torch.') :]}"
    if m == 0 or n == 0:
        return "the weight is empty"
    return None if n % 4 == 0 else f"{n} columns are not a multiple of 4"


def shapes(m: int, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (fragments, metadata), both int32."""
    rows, units = -(-m // ROWS), -(-n // COLUMNS)
    return (rows, units, TILES, 32, 4), (rows, units, 32, 4)


def pack_fragments(values: Tensor, metadata: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Canonical 2:4 tensors -> (fragments, metadata) of ``shapes(m, n)``, contiguous.

    values: [m, n/2] bfloat16 or float16; metadata: uint8 [m, ceil(n/8)]. Raises ``BackendError`` for other weights.
    """
    reason = refusal(values.dtype, m, n)
    if reason is not None:
        raise BackendError(f"a 2:4 weight ({m}, {n}) cannot be stored in fragment order: {reason}")
    pairs = values.detach().reshape(m, n // 2).contiguous().view(torch.int32)
    nibbles = torch.stack((metadata & 15, metadata >> 4), dim=-1).flatten(1)[:, : n // 4]
    # high, g, unit, tile, v, p, s -> lane (g, s, p), register (v, high)
    fragments = _split(pairs, m, n, 0).permute(0, 3, 4, 2, 7, 6, 5, 1).contiguous()
    # The nibbles of a lane's word, lowest first: (high, s, p); the lane is (g, selector, v).
    words = _split(nibbles, m, n, EMPTY).unflatten(4, (TILES // 2, 2)).permute(0, 3, 2, 5, 6, 4, 1, 8, 7)
    packed = (words[..., 0] | (words[..., 1] << 4)).contiguous().flatten(-2).view(torch.int32)
    first, second = shapes(m, n)
    return fragments.view(first), packed.view(second)


def unpack_fragments(fragments: Tensor, metadata: Tensor, m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The canonical tensors (values [m, n/2] of ``dtype``, metadata uint8 [m, ceil(n/8)]), bit for bit."""
    rows, units = shapes(m, n)[1][:2]
    pairs = fragments.reshape(rows, units, TILES, 8, 2, 2, 2, 2).permute(0, 7, 3, 1, 2, 6, 5, 4)
    values = pairs.reshape(rows * ROWS, -1)[:m, : n // 4].contiguous().view(dtype)
    packed = metadata.reshape(rows, units, 8, 2, 2, TILES // 2, 1).view(torch.uint8)
    packed = packed.view(rows, units, 8, 2, 2, TILES // 2, 2, 2)  # the last two: high, s
    both = torch.stack((packed & 15, packed >> 4), dim=-1)  # ..., p
    nibbles = both.permute(0, 6, 2, 1, 5, 3, 4, 8, 7).reshape(rows * ROWS, -1)[:m, : n // 4]
    nibbles = F.pad(nibbles, (0, n // 4 % 2)).view(m, -1, 2)
    return values, nibbles[..., 0] | (nibbles[..., 1] << 4)


def _split(groups: Tensor, m: int, n: int, empty: int) -> Tensor:
    """[m, n/4] -> [row tile, high, g, unit, tile, v, p, s], padded: row = 8 high + g, group = 4 v + 2 p + s."""
    padded = F.pad(groups, (0, -n % COLUMNS // 4, 0, -m % ROWS), value=empty)
    return padded.view(padded.shape[0] // ROWS, 2, 8, -1, TILES, 2, 2, 2)
