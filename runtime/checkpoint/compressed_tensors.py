"""Reading the sparse checkpoints of compressed-tensors (up to 0.14): ``sparse-bitmask`` and ``sparse-24-bitmask``.

A compressed tensor NAME is NAME.compressed (kept values in row-major order, flat; [m, n/2] for 2:4), NAME.bitmask
(uint8 [m, ceil(n/8)], little bit order), NAME.shape and, for sparse-bitmask, NAME.row_offsets. The bitmask is taken as
it is: explicit zeros stay kept.

What NAME is changed with release 0.9.0. Before, every tensor of the model was compressed, norms, biases and embeddings
included, under its full name; since then only the weights of linear modules are, under the name of the module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rt.checkpoint.reader import SourceCheckpoint
from sparse_rt.errors import FormatError, UserError
from sparse_rt.formats import VALUE_DTYPES
from sparse_rt.formats.packing import row_counts, unpack_bits

SPARSE_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
# Four-bit weights, 2:4: a format of the quantization that says nothing about sparsity elsewhere in config.json.
MARLIN = "marlin-24"
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def sparsity_format(stored: dict[str, Any]) -> str | None:
    """Storage format that config.json announces: "dense", one of ``SPARSE_FORMATS``, or None for anything else.

    ``UserError`` for sparse weights that are quantized as well.
    """
    if not stored:
        return "dense"
    described = stored.get("quantization_config") or stored.get("compression_config") or {}
    if described.get("quant_method", "compressed-tensors") not in ("compressed-tensors", "sparseml"):
        return None
    sparsity = described.get("sparsity_config") or stored.get("sparsity_config") or {}
    name = sparsity.get("format") or "dense"
    quantized = bool(described.get("config_groups")) or described.get("format", "dense") not in ("dense", name)
    stored_as = described.get("format")
    if quantized and (name in SPARSE_FORMATS or stored_as == MARLIN):
        sparse = "2:4" if stored_as == MARLIN else name
        raise UserError(
            f"the model is sparse ({sparse}) and quantized ({stored_as}); sparse-rt stores plain values only, convert "
            "the sparse model from before its quantization"
        )
    return None if quantized or name not in ("dense", *SPARSE_FORMATS) else name


def is_sparse_format(name: str | None) -> bool:
    return name in SPARSE_FORMATS


@dataclass(frozen=True)
class CompressedWeight:
    prefix: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nnz: int


class CompressedTensors:
    """The compressed tensors of a checkpoint, by the name each has in a dense one (``NAME.weight``, ``NAME.bias``)."""

    def __init__(self, checkpoint: SourceCheckpoint):
        self.checkpoint = checkpoint
        self.weights: dict[str, CompressedWeight] = {}
        self.parts: set[str] = set()
        compressed = (name.rpartition(".") for name in checkpoint.tensors)
        prefixes = [prefix for prefix, _, part in compressed if part == "compressed"]
        if not prefixes:
            raise FormatError(f"{checkpoint.folder}: config.json announces sparse weights, no NAME.compressed is there")
        # Releases before 0.9.0 wrote every tensor's full name, and some weight is always among them.
        full_names = any(prefix.endswith(".weight") for prefix in prefixes)
        for prefix in prefixes:
            self._add(prefix, prefix if full_names else f"{prefix}.weight")

    def _add(self, prefix: str, name: str) -> None:
        for part in ("bitmask", "shape"):
            if f"{prefix}.{part}" not in self.checkpoint.tensors:
                raise FormatError(f"tensor {prefix}.{part} is missing beside {prefix}.compressed")
        # A few integers: the column count cannot be told from the bitmask, which is padded to bytes.
        shape = tuple(int(size) for size in self.checkpoint.load(f"{prefix}.shape").flatten())
        if not shape or min(shape) < 1:
            raise FormatError(f"{prefix}.shape says {list(shape)}, which is not the shape of a tensor")
        values = self.checkpoint.tensors[f"{prefix}.compressed"]
        if values.dtype not in VALUE_DTYPES and name.endswith(".weight"):
            raise UserError(
                f"{prefix}.compressed is {values.dtype}: sparse and quantized weights cannot be converted, only plain "
                f"{', '.join(str(dtype) for dtype in VALUE_DTYPES)}"
            )
        want = (math.prod(shape[:-1]), (shape[-1] + 7) // 8)
        found = self.checkpoint.tensors[f"{prefix}.bitmask"].shape
        if math.prod(found) != math.prod(want):
            raise FormatError(f"{prefix}.bitmask has shape {found}, a weight of shape {shape} needs {want}")
        self.weights[name] = CompressedWeight(prefix, values.dtype, shape, math.prod(values.shape))
        self.parts |= {f"{prefix}.{part}" for part in _PARTS if f"{prefix}.{part}" in self.checkpoint.tensors}

    def mask(self, name: str) -> Tensor:
        """bool, dense shape; ``FormatError`` when bits, padding, row offsets and values contradict each other."""
        weight = self.weights[name]
        n = weight.shape[-1]
        bits = self.checkpoint.load(f"{weight.prefix}.bitmask").reshape(-1, (n + 7) // 8)
        counts = row_counts(bits)
        if n % 8 and bool((bits[:, -1] >> n % 8).any()):
            raise FormatError(f"{weight.prefix}.bitmask: padding bits are not zero")
        if int(counts.sum()) != weight.nnz:
            raise FormatError(
                f"{weight.prefix}: the bitmask marks {int(counts.sum())} kept weights, .compressed holds {weight.nnz}"
            )
        if f"{weight.prefix}.row_offsets" in self.parts:
            offsets = self.checkpoint.load(f"{weight.prefix}.row_offsets").flatten().to(torch.int64)
            if not torch.equal(offsets, counts.cumsum(0) - counts):
                raise FormatError(f"{weight.prefix}.row_offsets contradicts the bitmask")
        return unpack_bits(bits, n).view(weight.shape)

    def load(self, name: str) -> Tensor:
        """The weight, dense."""
        mask = self.mask(name)
        values = self.checkpoint.load(f"{self.weights[name].prefix}.compressed").flatten()
        return values.new_zeros(mask.shape).masked_scatter_(mask, values)
