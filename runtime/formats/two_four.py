"""Format ``2:4``: two kept of every four consecutive columns, a nibble of positions a group.

The nibbles are the metadata of NVIDIA's sparse tensor cores in logical order, before any kernel's reordering.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_rt.errors import FormatError
from sparse_rt.formats.base import Format, register_format
from sparse_rt.formats.nm import keep_in_groups, nm_mask_of
from sparse_rt.formats.packing import pack_bits, pack_nibbles, unpack_bits, unpack_nibbles


@register_format
class TwoFour(Format):
    name = "2:4"
    metadata_name = "weight_meta"
    priority = 0
    default_sparsity = 0.5
    group = 4

    @classmethod
    def parse(cls, pattern: str) -> TwoFour | None:
        return cls("2:4") if pattern == "2:4" else None

    def refuse_shape(self, m: int, n: int) -> str | None:
        return None if n % 4 == 0 else f"{n} columns are not a multiple of 4"

    def mask_from_scores(self, scores: Tensor, sparsity: float | None = None, scope: str = "matrix") -> Tensor:
        return keep_in_groups(scores, 2, 4)

    def mask_of(self, weight: Tensor) -> Tensor:
        return nm_mask_of(weight, 2, 4)

    def pack_mask(self, mask: Tensor) -> Tensor:
        return _nibbles(str(mask.device))[pack_bits(mask).int()]

    def unpack_mask(self, metadata: Tensor, m: int, n: int) -> Tensor:
        return unpack_bits(_bits(str(metadata.device))[metadata.int()], n)

    def values_shape(self, m: int, n: int, nnz: int) -> tuple[int, ...]:
        return (m, n // 2)

    def metadata_shape(self, m: int, n: int) -> tuple[int, ...]:
        return (m, (n + 7) // 8)

    def num_values(self, metadata: Tensor, m: int, n: int) -> int:
        return m * (n // 2)

    def check_metadata(self, name: str, metadata: Tensor, m: int, n: int) -> None:
        first, second = unpack_nibbles(metadata, n // 4)
        wrong = first >= second
        if bool(wrong.any()):
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise FormatError(
                f"{name}.weight_meta: row {row}, group {group} keeps columns {int(first[row, group])} and "
                f"{int(second[row, group])}; the first must be lower than the second"
            )
        if (n // 4) % 2 and bool((metadata[:, -1] >> 4).any()):
            row = int((metadata[:, -1] >> 4).nonzero()[0])
            raise FormatError(f"{name}.weight_meta: padding bits of row {row} are not zero")


@functools.lru_cache(maxsize=8)
def _nibbles(device: str) -> Tensor:
    """Byte of a bitmask (two groups) -> byte of metadata, uint8 [256]; without a bit, as padding is, it is 0."""
    numbers = torch.arange(4, dtype=torch.uint8, device=device)
    groups = unpack_bits(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1), 8).view(256, 2, 4)
    first, last = torch.where(groups, numbers, 3).amin(-1), torch.where(groups, numbers, 0).amax(-1)
    return pack_nibbles(torch.where(groups.any(-1), first, 0), last).squeeze(1)


@functools.lru_cache(maxsize=8)
def _bits(device: str) -> Tensor:
    """Byte of metadata -> byte of a bitmask, uint8 [256]."""
    lanes = torch.arange(4, dtype=torch.uint8, device=device)
    first, second = unpack_nibbles(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1), 2)
    return pack_bits(((first.unsqueeze(-1) == lanes) | (second.unsqueeze(-1) == lanes)).view(256, 8)).squeeze(1)
