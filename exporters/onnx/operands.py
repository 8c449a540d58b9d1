"""A compressed weight as an operator of domain ``sparse_rt``: which one, its attributes, and the tensors it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_rt.checkpoint import Checkpoint, WeightEntry
from sparse_rt.errors import UserError
from sparse_rt.exporters.onnx import functions
from sparse_rt.exporters.onnx.rows import JoinedCheckpoint
from sparse_rt.formats import VALUES_NAME, get_format, int8
from sparse_rt.formats.packing import row_offsets

# accuracy_level of BitmaskLinearQ, as ONNX Runtime's MatMulNBits counts: what x may be rounded to.
ACCURACY_LEVELS = {"float32": 1, "int8": 4}
BITMASK = "unstructured"
OFFSETS_NAME, BITMASK_NAME = "row_offsets", "weight_bitmask"


@dataclass(frozen=True)
class Quantization:
    """How plain values become int8 on the way, and what activations meet int8 values ("int8" or "float32")."""

    quantize: bool = False
    group_size: int | None = None
    activations: str = "int8"

    def check(self, checkpoint: Checkpoint) -> None:
        """``UserError`` for a choice that would have no effect on ``checkpoint``."""
        stored = {entry.group_size for entry in checkpoint.weights.values() if entry.values == int8.INT8}
        if stored and self.group_size not in {None, *stored}:
            raise UserError(
                f"group_size={self.group_size} was asked for, the folder has int8 values already (group_size "
                f"{', '.join(map(str, stored))}); leave it out, or export the model before it was rounded"
            )
        if self.activations != "int8" and not (stored or self.quantize):
            raise UserError(f"activations={self.activations} is for int8 values; add values=int8, or leave it out")

    def is_int8(self, entry: WeightEntry) -> bool:
        return self.quantize or entry.values == int8.INT8

    def group_size_of(self, entry: WeightEntry) -> int | None:
        return entry.group_size if entry.values == int8.INT8 else self.group_size


def operator(entry: WeightEntry, how: Quantization) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Name of the operator, its attributes, and the names of its tensors without the module."""
    attributes: dict[str, Any] = {"in_features": entry.n}
    if how.is_int8(entry):
        attributes |= {
            "group_size": how.group_size_of(entry) or 0,
            "accuracy_level": ACCURACY_LEVELS[how.activations],
        }
        return functions.QUANTIZED, attributes, (VALUES_NAME, BITMASK_NAME, OFFSETS_NAME, int8.SCALES_NAME)
    name, parts = functions.operator_of(entry.pattern), get_format(entry.pattern).tensor_names
    return name, attributes, parts if name == "Sparse24Linear" else (*parts, OFFSETS_NAME)


def tensors(checkpoint: JoinedCheckpoint, key: str, how: Quantization) -> tuple[Tensor, ...]:
    """The tensors of weight ``key`` in the order of ``operator``, in the bytes of the checkpoint where it has them."""
    entry = checkpoint.weights[key]
    fmt, shape = get_format(entry.pattern), (entry.m, entry.n)
    if not how.is_int8(entry):
        values, metadata = checkpoint.load_weight(key)
        if entry.pattern == "2:4":
            return values, metadata
        return _flat(values), metadata, row_offsets(metadata)
    if entry.values == int8.INT8:
        values, scales, metadata = checkpoint.load_quantized(key)
    else:
        values, metadata = checkpoint.load_weight(key)
        values, scales = int8.quantize(fmt, values, metadata, *shape, how.group_size)
    if fmt.metadata_name != BITMASK_NAME:  # one operator reads int8 values, and a bitmask is as large as 2:4 nibbles
        metadata = get_format(BITMASK).pack_mask(fmt.unpack_mask(metadata, *shape))
    return _flat(values), metadata, row_offsets(metadata), scales


def _flat(values: Tensor) -> Tensor:
    """A weight without a single kept value still needs something to look up."""
    return values.flatten() if values.numel() else values.new_zeros(1)
