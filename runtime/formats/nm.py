"""Format ``N:M``: N kept of every M consecutive columns (4:8, 1:4, 16:32, ...), positions as a bitmask.

2:4 has a format of its own with nibbles (``two_four.py``); the group arithmetic is shared from here.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats.base import Format, register_format
from sparse_rt.formats.bitmask import BitmaskFormat
from sparse_rt.formats.packing import pack_bits, unpack_bits
from sparse_rt.formats.selection import keep_highest, pieces

MAX_GROUP = 256


@register_format
class NM(BitmaskFormat):
    name = "N:M"
    priority = 2

    def __init__(self, kept: int, group: int):
        super().__init__(f"{kept}:{group}")
        self.kept, self.group = kept, group
        self.default_sparsity = 1 - kept / group

    @classmethod
    def parse(cls, pattern: str) -> Format | None:
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if not match or pattern == "2:4":
            return None
        kept, group = int(match[1]), int(match[2])
        if not 0 < kept < group <= MAX_GROUP:
            raise UserError(
                f"pattern {pattern!r}: need 0 < N < M <= {MAX_GROUP}; N:M means N kept of M consecutive columns"
            )
        return cls(kept, group)

    def refuse_shape(self, m: int, n: int) -> str | None:
        return None if n % self.group == 0 else f"{n} columns are not a multiple of {self.group}"

    def mask_from_scores(self, scores: Tensor, sparsity: float | None = None, scope: str = "matrix") -> Tensor:
        return keep_in_groups(scores, self.kept, self.group)

    def mask_of(self, weight: Tensor) -> Tensor:
        return nm_mask_of(weight, self.kept, self.group)

    def values_shape(self, m: int, n: int, nnz: int) -> tuple[int, ...]:
        return (m, n // self.group * self.kept)

    def check_metadata(self, name: str, metadata: Tensor, m: int, n: int) -> None:
        super().check_metadata(name, metadata, m, n)
        counts = unpack_bits(metadata, n).view(m, n // self.group, self.group).sum(-1)
        wrong = counts != self.kept
        if bool(wrong.any()):
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise FormatError(
                f"{name}.{self.metadata_name}: row {row}, group {group} keeps {int(counts[row, group])} weights, "
                f"the pattern {self.pattern} keeps {self.kept}"
            )


def keep_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """Keep the ``kept`` highest scores of every ``group`` consecutive columns, ties by lower index."""
    m, n = scores.shape
    return keep_highest(scores.reshape(m, n // group, group), kept).view(m, n)


def nm_mask_of(weight: Tensor, kept: int, group: int) -> Tensor:
    """Mask of a weight that already obeys N:M; groups with fewer nonzeros keep zeros at the lowest free columns."""
    m, n = weight.shape
    mask = torch.empty(m, n, dtype=torch.bool, device=weight.device)
    for rows in pieces(m, n):
        nonzero = weight[rows] != 0
        mask[rows] = _filled(nonzero, kept, group)
        if bool((nonzero > mask[rows]).any()):  # more than fit
            counts = nonzero.view(-1, n // group, group).sum(-1)
            row, index = (int(i) for i in (counts > kept).nonzero()[0])
            raise FormatError(
                f"row {rows.start + row}, columns {index * group}..{index * group + group - 1} hold "
                f"{int(counts[row, index])} nonzeros, the pattern {kept}:{group} allows {kept}; prune the weight first"
            )
    return mask


def _filled(nonzero: Tensor, kept: int, group: int) -> Tensor:
    """``kept`` of every group of ``nonzero`` [m, n]: the lowest that are set, then the lowest others."""
    m, n = nonzero.shape
    if 8 % group:
        return keep_highest(nonzero.view(m, n // group, group).to(torch.uint8), kept).view(m, n)
    return _table(kept, group, str(nonzero.device))[pack_bits(nonzero).int()].view(torch.bool)[:, :n]


@functools.lru_cache(maxsize=32)
def _table(kept: int, group: int, device: str) -> Tensor:
    """``_filled`` of every byte of packed bits, its eight bytes in a 64-bit word: int64 [256]."""
    groups = unpack_bits(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1), 8).view(256, -1, group)
    return keep_highest(groups.to(torch.uint8), kept).view(256, 8).view(torch.int64).squeeze(1)


def kept_of(fmt: Format) -> int:
    """N of an N:M format."""
    return round(fmt.group * (1 - fmt.default_sparsity))


def is_transposable(mask: Tensor, kept: int, group: int) -> bool:
    """Whether every M x M block of ``mask`` (bool [m, n]) keeps N in each row and each column."""
    m, n = mask.shape
    if m % group or n % group:
        return False
    rows = mask.view(m, n // group, group).sum(-1)
    columns = mask.view(m // group, group, n).sum(1)
    return bool((rows == kept).all()) and bool((columns == kept).all())
