"""Backend ``native`` of ``packed_experts``: the packed products of the chosen experts, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rt.kernels import packed
from sparse_rt.kernels.backends import register_backend
from sparse_rt.kernels.experts import add_experts, is_gated
from sparse_rt.kernels.native import pages
from sparse_rt.kernels.native.ops import can_run

# Every expert starts on a cache line.
ALIGNMENT = 64


def join(blobs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(packed, spans) of ``packed_experts`` from the packed weight of every expert; empties the list on the way."""
    starts, total = [], 0
    for blob in blobs:
        starts.append(total)
        total += -(-blob.numel() // ALIGNMENT) * ALIGNMENT
    joined = pages.empty(total)
    spans = torch.tensor([[start, start + blob.numel()] for start, blob in zip(starts, blobs, strict=True)])
    for start in reversed(starts):
        blob = blobs.pop()
        joined[start : start + blob.numel()] = blob
    return joined, spans.view(-1, 2)


@register_backend("packed_experts", name="native", can_run=can_run)
def packed_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor,
    up_spans: Tensor,
    down: Tensor,
    down_spans: Tensor,
    intermediate: int,
    activation: str,
) -> Tensor:
    """As the op of this name."""
    rows, hidden = intermediate * (2 if is_gated(activation) else 1), x.shape[-1]
    up_at, down_at = up_spans.tolist(), down_spans.tolist()

    def project(expert: int, x: Tensor) -> Tensor:
        return packed.packed_linear(x, up[slice(*up_at[expert])], None, rows, hidden)

    def project_back(expert: int, h: Tensor) -> Tensor:
        return packed.packed_linear(h, down[slice(*down_at[expert])], None, hidden, intermediate)

    return add_experts(x, weights, ids, project, project_back, activation)
