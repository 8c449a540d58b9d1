"""dX = dY W of a frozen weight through the packed W^T: what a transposable N:M mask allows (arXiv 2505.23949).

A mask that keeps N of M in the columns of every M x M block as well is a mask of W^T in the same pattern. So W^T has
the layout that serves W in inference (``packed``), and the backward pass multiplies with it instead of expanding W: at
2:4 2.9 to 3.8 times as fast for 16 tokens, 1.3 to 1.5 for 128, 1.14 to 1.23 for 512 to 2048, at 4:8 3.0 to 4.8, 1.3 to
1.5 and 1.03 to 1.14 (Zen 4, one and two threads; benchmarks/results/transposed_product.jsonl). DCFT, LoRA and layers
without an adapter have frozen values; SPP, SEFT and MaskLoRA multiply with others in every step.

The first product of a weight looks whether its mask is transposable, and packs W^T if it is; that is kept as long as
values and metadata live unchanged, and takes as much memory as the packed weight. Only for weights that are not
trained: making it anew in every step costs more than it saves. On a GPU the product forms the dense weight (no kernel
of a layout was measured to be faster for as many tokens as training has), so nothing is kept there.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_rt.formats import get_format
from sparse_rt.formats.nm import is_transposable, kept_of


class _State(NamedTuple):
    """What a tensor holds, as far as it can be told: data that was exchanged (``tensor.data = other``) shows in the
    storage, which is told from a later one at its address, a change in place in the version.
    """

    storage: StorageWeakRef
    offset: int
    version: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _State:
        where = StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset()
        return cls(*where, tensor._version, tensor.dtype)

    def is_that_of(self, tensor: Tensor) -> bool:
        return not self.storage.expired() and self == _State.of(tensor)


class _Entry(NamedTuple):
    shape: tuple[str, int, int]
    states: tuple[_State, _State]  # of values and metadata
    layout: Tensor | None  # W^T packed; None where the mask is not transposable or nothing packs such a weight


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def linear_t(dy: Tensor, values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor | None:
    """dY W: dy [..., m] -> [..., n] in the dtype of dy; None where the ordinary product has to do it."""
    group = get_format(pattern).group
    if group is None or m % group or dy.numel() == 0 or dy.device.type != "cpu" or dy.dtype != values.dtype:
        return None
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in (dy, values, metadata)):
        return None
    if shards_models() or any(tensor.is_inference() for tensor in (values, metadata)):
        return None
    layout = _packed(values, metadata, pattern, m, n)
    if layout is None:
        return None
    from sparse_rt.kernels import packed  # which builds on the operators that call this

    return packed.packed_linear(dy, layout, None, n, m)


def _packed(values: Tensor, metadata: Tensor, pattern: str, m: int, n: int) -> Tensor | None:
    shape, tensors = (pattern, m, n), (values, metadata)
    entry = _entries.get(values)
    known = entry is not None and entry.shape == shape
    if not known or not all(state.is_that_of(tensor) for state, tensor in zip(entry.states, tensors, strict=True)):
        states = _State.of(values), _State.of(metadata)
        entry = _entries[values] = _Entry(shape, states, _made(values, metadata, *shape))
    return entry.layout


def shards_models() -> bool:
    """Whether ``fully_shard`` was used in this process: it makes a subclass for every class of modules it shards.

    During a call the tensors of a sharded layer look like any others, and are put together anew for the next one.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())


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
