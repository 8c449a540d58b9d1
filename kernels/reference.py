"""The truth: every operation in plain torch, short enough to check by eye. Runs on any device and dtype.

Other backends are tested against this file; it is also what runs where no faster backend fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.formats import get_format
from sparse_rt.kernels.backends import register_backend
from sparse_rt.kernels.experts import add_experts, is_gated

# Rows of dY^T X formed at once by values_grad: the dense gradient of a weight never exists as a whole.
ROW_BLOCK = 256


@register_backend("decompress", name="reference", priority=0)
def decompress(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    return get_format(pattern).decompress(values, metadata, m, n)


@register_backend("gather", name="reference", priority=0)
def gather(dense: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    fmt = get_format(pattern)
    return fmt.kept_values(dense, fmt.unpack_mask(metadata, m, n)).view(values_like.shape)


@register_backend("linear", name="reference", priority=0)
def linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, pattern: str, m: int, n: int) -> Tensor:
    weight = decompress(values.to(x.dtype), metadata, pattern, m, n)
    return torch.nn.functional.linear(x, weight, bias)


@register_backend("linear_t", name="reference", priority=0)
def linear_t(dy: Tensor, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor:
    return dy @ decompress(values.to(dy.dtype), metadata, pattern, m, n)


@register_backend("values_grad", name="reference", priority=0)
def values_grad(dy: Tensor, x: Tensor, metadata: Tensor, pattern: str, m: int, n: int, values_like: Tensor) -> Tensor:
    mask = get_format(pattern).unpack_mask(metadata, m, n)
    accumulate = torch.float64 if values_like.dtype == torch.float64 else torch.float32
    dy, x = dy.reshape(-1, m).to(accumulate), x.reshape(-1, n).to(accumulate)
    blocks = []
    for start in range(0, m, ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        blocks.append((dy[:, rows].T @ x)[mask[rows]].to(values_like.dtype))
    return torch.cat(blocks).view(values_like.shape) if blocks else torch.empty_like(values_like)


@register_backend("experts", name="reference", priority=0)
def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up_values: Tensor,
    up_metadata: Tensor,
    down_values: Tensor,
    down_metadata: Tensor,
    up_pattern: str,
    down_pattern: str,
    experts: int,
    intermediate: int,
    activation: str,
) -> Tensor:
    """One chosen expert after the other is decompressed, used and forgotten; waits for the device to know them."""
    hidden, rows = x.shape[-1], intermediate * (2 if is_gated(activation) else 1)

    def multiply(pattern: str, values: Tensor, metadata: Tensor, m: int, n: int):
        fmt, total = get_format(pattern), experts * m

        def one(expert: int, x: Tensor) -> Tensor:
            piece = fmt.select_rows(values, metadata, total, n, expert * m, (expert + 1) * m)
            return torch.nn.functional.linear(x, decompress(piece[0].to(x.dtype), piece[1], pattern, m, n))

        return one

    project = multiply(up_pattern, up_values, up_metadata, rows, hidden)
    project_back = multiply(down_pattern, down_values, down_metadata, hidden, intermediate)
    return add_experts(x, weights, ids, project, project_back, activation)
