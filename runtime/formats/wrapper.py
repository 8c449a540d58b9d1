"""A wrapped weight: what is stored compressed is the core of a product with two block-diagonal matrices.

    W = A S B        y = x W^T = A (S (B x))

S [m, n] is the core, values and metadata like those of any other weight. A [m, m] and B [n, n] are zero outside of
equal square blocks on the diagonal, and only these are stored: [m / a, a, a] and [n / b, b, b], m a + n b numbers in
all. The pruner ARMOR (arXiv 2510.05528) finds such weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_rt.errors import FormatError
from sparse_rt.formats.base import check_finite

BLOCK_DIAGONAL = "block_diagonal"
OUT_NAME, IN_NAME = NAMES = ("weight_wrapper_out", "weight_wrapper_in")
REMEDY = "copy the folder again or convert the model again"


class Wrapper(NamedTuple):
    """``out``: the blocks of A [m / a, a, a]; ``inner``: those of B [n / b, b, b]; in the dtype of the values."""

    out: Tensor
    inner: Tensor

    @property
    def nbytes(self) -> int:
        return self.out.nbytes + self.inner.nbytes

    def to(self, *args, **options) -> Wrapper:
        return Wrapper(self.out.to(*args, **options), self.inner.to(*args, **options))

    def dense(self, core: Tensor) -> Tensor:
        """A S B [m, n] of the dense ``core`` S, computed in float32 (float64 where that is) and rounded once."""
        compute = torch.promote_types(core.dtype, torch.float32)
        out, inner = self.to(compute)
        right = apply_blocks(inner.mT, core.to(compute))  # a row of S times B is B^T times that row
        return apply_blocks(out, right.mT).mT.to(core.dtype).contiguous()


def apply_blocks(blocks: Tensor, x: Tensor) -> Tensor:
    """The block-diagonal matrix with ``blocks`` [k, b, b] times every vector of x [..., k b]: the same shape."""
    k, b, _ = blocks.shape
    parts = x.reshape(-1, k, b).transpose(0, 1)
    return torch.bmm(parts, blocks.mT).transpose(0, 1).reshape(x.shape)


def shapes(m: int, n: int, out: int, inner: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of the two tensors of a wrapped (m, n) weight with blocks of ``out`` rows and ``inner`` columns."""
    return (m // out, out, out), (n // inner, inner, inner)


def check_header(
    name: str, dtypes: Sequence[torch.dtype], found: Sequence[Sequence[int]], m: int, n: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Block sizes (a, b) of a wrapper; ``FormatError`` for another dtype than the values' or blocks that do not fit."""
    for suffix, tensor_dtype, shape, side in zip(NAMES, dtypes, found, (m, n), strict=True):
        blocks = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == side
        if not blocks or tensor_dtype != dtype:
            raise FormatError(
                f"{name}.{suffix} is {tensor_dtype} {tuple(shape)}, a wrapped weight ({m}, {n}) with {dtype} values "
                f"needs {dtype} square blocks (k, b, b) with k * b = {side}; {REMEDY}"
            )
    return found[0][1], found[1][1]


def check_data(name: str, wrapper: Wrapper) -> None:
    """``FormatError`` for NaN or Inf."""
    for suffix, tensor in zip(NAMES, wrapper, strict=True):
        check_finite(f"{name}.{suffix}", tensor)
