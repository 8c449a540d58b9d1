"""dX = dY W of a frozen weight through the packed W^T: what a transposable N:M mask allows (arXiv 2505.23949).

A mask that keeps N of M in the columns of every M x M block as well is a mask of W^T in the same pattern. So W^T has
the layout that serves W in inference (``packed``), and the backward pass multiplies with it instead of expanding W: at
2:4 3.3 to 3.8 times as fast for 16 tokens, 1.4 to 1.5 for 128, 1.14 to 1.23 for 512 to 2048, at 4:8 about half of that
gain (Zen 4, one and two threads; benchmarks/results/transposed_product.jsonl).

The first product of a weight looks whether its mask is transposable, and packs W^T if it is; that is kept as long as
values and metadata live unchanged, and takes as much memory as the packed weight. Only for weights that are not
trained: making it anew in every step costs more than it saves. On a GPU the product forms the dense weight (no kernel
of a layout was measured to be faster for as many tokens as training has), so nothing is kept there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_rt.formats import get_format
from sparse_rt.formats.nm import is_transposable, kept_of


class _Entry(NamedTuple):
    stamp: tuple
    layout: Tensor | None  # W^T packed; None where the mask is not transposable or nothing packs such a weight


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def linear_t(dy: Tensor, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor | None:
    """dY W: dy [..., m] -> [..., n] in the dtype of dy; None where the ordinary product has to do it."""
    group = get_format(pattern).group
    if group is None or m % group or dy.numel() == 0 or dy.device.type != "cpu" or dy.dtype != values.dtype:
        return None
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in (dy, values, metadata)):
        return None
    if any(tensor.is_inference() for tensor in (values, metadata)):
        return None
    layout = _packed(values, metadata, pattern, m, n)
    if layout is None:
        return None
    from sparse_rt.kernels import packed  # which builds on the operators that call this

    return packed.packed_linear(dy, layout, None, n, m)


def _packed(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor | None:
    # Data that was exchanged (`tensor.data = other`) shows in the address, a change in place in the version.
    stamp = (*((tensor.data_ptr(), tensor._version) for tensor in (values, metadata)), pattern, m, n)
    entry = _entries.get(values)
    if entry is None or entry.stamp != stamp:
        entry = _entries[values] = _Entry(stamp, _made(values, metadata, pattern, m, n))
    return entry.layout


@torch.no_grad()
def _made(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor | None:
    from sparse_rt.kernels import packed

    fmt = get_format(pattern)
    mask = fmt.unpack_mask(metadata, m, n)
    reason = packed.refusal(pattern, n, m, values.dtype, "cpu", fmt.default_sparsity)
    if reason is not None or not is_transposable(mask, kept_of(fmt), fmt.group):
        return None
    weight = fmt.decompress(values.detach(), metadata, m, n)
    return packed.pack(*fmt.compress(weight.T.contiguous(), mask.T.contiguous()), pattern, n, m)
