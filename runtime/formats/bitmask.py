"""Format ``unstructured``: any positions; values as one ragged stream, positions as a bitmask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats.base import Format, check_sparsity, num_kept, register_format
from sparse_rt.formats.packing import pack_bits, row_counts, unpack_bits
from sparse_rt.formats.selection import keep_highest


class BitmaskFormat(Format):
    """What every format with a bitmask shares; subclasses say which masks are legal."""

    metadata_name = "weight_bitmask"

    def pack_mask(self, mask: Tensor) -> Tensor:
        return pack_bits(mask)

    def unpack_mask(self, metadata: Tensor, m: int, n: int) -> Tensor:
        return unpack_bits(metadata, n)

    def metadata_shape(self, m: int, n: int) -> tuple[int, ...]:
        return (m, (n + 7) // 8)

    def num_values(self, metadata: Tensor, m: int, n: int) -> int:
        return int(row_counts(metadata).sum())

    def group_counts(self, metadata: Tensor, m: int, n: int, size: int) -> Tensor:
        if size % 8 and size != n:
            return super().group_counts(metadata, m, n, size)
        width = metadata.shape[1] if size == n else size // 8
        groups = torch.nn.functional.pad(metadata, (0, -metadata.shape[1] % width))
        return row_counts(groups.view(-1, width)).view(m, -1)

    def check_metadata(self, name: str, metadata: Tensor, m: int, n: int) -> None:
        padding = n % 8
        if padding and bool((metadata[:, -1] >> padding).any()):
            row = int((metadata[:, -1] >> padding).nonzero()[0])
            raise FormatError(f"{name}.{self.metadata_name}: padding bits of row {row} are not zero")


@register_format
class Unstructured(BitmaskFormat):
    name = "unstructured"
    priority = 1

    @classmethod
    def parse(cls, pattern: str) -> Unstructured | None:
        return cls("unstructured") if pattern == "unstructured" else None

    def refuse_shape(self, m: int, n: int) -> str | None:
        return None

    def mask_from_scores(self, scores: Tensor, sparsity: float | None = None, scope: str = "matrix") -> Tensor:
        """``scope`` "matrix" ranks the whole weight, "row" ranks every output row on its own (Wanda)."""
        share = check_sparsity(sparsity)
        if scope == "row":
            return keep_highest(scores, num_kept(scores.shape[1], share))
        if scope != "matrix":
            raise UserError(f"scope must be 'matrix' or 'row', got {scope!r}")
        return keep_highest(scores.flatten(), num_kept(scores.numel(), share)).view(scores.shape)

    def mask_of(self, weight: Tensor) -> Tensor:
        return weight != 0

    def values_shape(self, m: int, n: int, nnz: int) -> tuple[int, ...]:
        return (nnz,)
