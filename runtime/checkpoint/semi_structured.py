"""torch's ``SparseSemiStructuredTensor`` (2:4) as it lies in a pickled state dict, decoded without a GPU.

The CUTLASS form holds the kept values (``packed`` [m, n/2]) and the positions in the order of the tensor cores
(``meta``, int16 [m, n/16]; [m, n/8] for float32, where one of two is kept), and torch can undo it anywhere
(``torch.sparse._semi_structured_conversions``). The cuSPARSELt form is one buffer, and the order of the metadata in it
is defined by that library alone, for the GPU it ran on: it is refused, not guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import VALUE_DTYPES

# What ``torch.load(weights_only=True)`` may build besides plain tensors: nothing else.
CLASSES = (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT)


def is_semi_structured(tensor: Tensor) -> bool:
    return isinstance(tensor, CLASSES)


def check(name: str, tensor: Tensor) -> None:
    """What can be told without decoding: ``UserError`` for cuSPARSELt or another dtype, ``FormatError`` for damage."""
    if isinstance(tensor, SparseSemiStructuredTensorCUSPARSELT):
        raise UserError(
            f"{name} is stored by cuSPARSELt, whose metadata has an order that the library keeps to itself; where the "
            "file was made, replace each such weight by weight.to_dense() and save it again"
        )
    packed, meta = getattr(tensor, "packed", None), getattr(tensor, "meta", None)
    if tensor.dtype not in VALUE_DTYPES:
        raise UserError(
            f"{name} has 2:4 values of {tensor.dtype}; sparse-rt stores plain "
            f"{', '.join(str(dtype) for dtype in VALUE_DTYPES)} values only"
        )
    if packed is None or meta is None or tensor.dim() != 2:
        raise FormatError(
            f"{name} is a transposed SparseSemiStructuredTensor, or one of another release of torch; save the weight "
            "itself, or weight.to_dense()"
        )
    m, n = tensor.shape
    groups = n // (8 if tensor.dtype == torch.float32 else 16)
    if tuple(packed.shape) != (m, n // 2) or tuple(meta.shape) != (m, groups) or meta.dtype != torch.int16:
        raise FormatError(
            f"{name}: a 2:4 weight of shape ({m}, {n}) has packed ({m}, {n // 2}) and int16 meta ({m}, {groups}), the "
            f"file holds {tuple(packed.shape)} and {meta.dtype} {tuple(meta.shape)}; save weight.to_dense() instead"
        )


def mask(name: str, tensor: Tensor) -> Tensor:
    """bool [m, n], two of four True; ``FormatError`` when the metadata names a column twice. Stored zeros are kept."""
    kept = _dense(torch.ones_like(tensor.packed), tensor.meta) != 0
    if int(kept.sum()) != tensor.packed.numel():
        raise FormatError(
            f"{name}: the metadata names a column twice in {tensor.packed.numel() - int(kept.sum())} groups"
        )
    return kept


def dense(tensor: Tensor) -> Tensor:
    """The weight [m, n] in the dtype of its values."""
    return _dense(tensor.packed, tensor.meta)


def _dense(packed: Tensor, meta: Tensor) -> Tensor:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    # As integers: in torch 2.13 the function moves halves of float32 values as float16, which changes the bits of those
    # that look like a NaN. The metadata of a float32 is that of its two halves.
    return sparse_semi_structured_to_dense_cutlass(packed.view(torch.int16), meta).view(packed.dtype)
