"""Compressed weights for the tests of packed weights, with the dense weight in float64 to compare with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rt.formats import get_format
from sparse_rt.kernels import packed
from sparse_rt.kernels.native import library
from sparse_rt.kernels.native.packed import DTYPES, LAYOUTS

# Relative RMS error of a product. Measured on Zen 4 over all cells of test_packed_product.py: 2.9e-3 and 2.5e-4 (the
# rounding of the result) and 1.2e-6 (float32 sums of 4097 products; `scalar` adds them one after the other).
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6}
# Of fewer outputs the mean says nothing: half a unit in the last place, and sums that cancel to a hundredth.
FEW, FEW_TOLERANCE = 64, {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}


@dataclass(frozen=True)
class Weight:
    values: Tensor
    metadata: Tensor
    pattern: str
    m: int
    n: int
    dense: Tensor  # float64 [m, n]

    @property
    def shape(self):
        return self.pattern, self.m, self.n

    def pack(self, layout: str | None = None) -> Tensor:
        return packed.pack(self.values, self.metadata, *self.shape, layout)


@functools.cache
def weight(pattern: str, m: int, n: int, sparsity: float | None, dtype: torch.dtype, seed: int = 0) -> Weight:
    """Normal values; an unstructured one has an empty and a full row, unless its sparsity is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    fmt = get_format(pattern)
    if pattern == "unstructured":
        mask = torch.rand(m, n, generator=generator) >= sparsity
        if 0 < sparsity < 1 and m > 2:
            mask[m // 2], mask[m // 3] = False, True
    else:
        mask = fmt.mask_from_scores(torch.rand(m, n, generator=generator))
    dense = torch.where(mask, torch.randn(m, n, generator=generator), 0.0).to(dtype)
    return Weight(*fmt.compress(dense, mask), pattern, m, n, dense.double())


def patchy(m: int, n: int, dtype: torch.dtype) -> Weight:
    """An unstructured weight of 90 % zeros in which every eighth group of 20 columns is full: kernels that load what a
    sparse row has at most must notice."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(m, n, generator=generator) >= 0.9
    mask[:, torch.arange(n) // 20 % 8 == 3] = True
    dense = torch.where(mask, torch.randn(m, n, generator=generator), 0.0).to(dtype)
    return Weight(*get_format("unstructured").compress(dense, mask), "unstructured", m, n, dense.double())


def layouts(pattern: str, dtype: torch.dtype) -> list[str]:
    """What the instruction set in use multiplies with."""
    runs = library.load().handle.srt_packed_runs
    found = [name for name in LAYOUTS if runs(LAYOUTS.index(name), DTYPES.index(dtype))]
    return [name for name in found if name != "pairs" or pattern == "2:4"]


def error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in RMS; where zeros are expected, |actual|."""
    actual, expected = actual.detach().double(), expected.detach()
    norm = expected.norm()
    return float((actual - expected).norm() / (norm if norm > 0 else 1))


def assert_close(actual: Tensor, expected: Tensor, *case) -> None:
    """The relative RMS error is within the tolerance of the dtype of ``actual``; ``case`` is shown where it is not."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape, *case)
    allowed = (TOLERANCE if expected.numel() >= FEW else FEW_TOLERANCE)[actual.dtype]
    found = error(actual, expected)
    assert found <= allowed, (f"relative RMS error {found:.2e}, allowed {allowed:.0e}", *case)


def shifted(tensor: Tensor) -> Tensor:
    """The same elements one element further in memory than an allocation starts."""
    return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)


def inside_nan(tensor: Tensor) -> Tensor:
    """The same elements as a part of a larger tensor of NaN."""
    room = torch.full([size + 5 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    part = room[tuple(slice(2, size + 2) for size in tensor.shape)]
    return part.copy_(tensor)
