"""What an ONNX file holds of the weights, decoded with numpy: independent of the package's own code on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import external_data_helper, numpy_helper

from sparse_rt.checkpoint import Checkpoint, WeightEntry
from sparse_rt.errors import CheckFailed
from sparse_rt.exporters.onnx.functions import QUANTIZED
from sparse_rt.exporters.onnx.operands import ACCURACY_LEVELS
from sparse_rt.exporters.onnx.rows import JoinedCheckpoint, noted
from sparse_rt.formats import get_format, int8

_PARTS = ("weight_values", "weight_meta", "weight_bitmask", "row_offsets", int8.SCALES_NAME, "weight")
# A value may lie half a step from what it stands for; the quotient is rounded, too.
_HALF_STEP = 0.5 * (1 + 1e-5)


class StoredWeights:
    """The compressed weights of ``checkpoint`` as the ONNX file ``path`` has them."""

    def __init__(self, checkpoint: Checkpoint, path: Path):
        self.folder, self.count = path.parent, len(checkpoint.weights)
        proto = onnx.load(str(path), load_external_data=False)
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._groups = noted(proto)
        self.joined = JoinedCheckpoint(checkpoint, self._groups)
        self._modules = _module_names(self.joined, self._tensors)
        self._attributes = {
            node.name: {entry.name: entry.i for entry in node.attribute}
            for node in proto.graph.node
            if node.op_type == QUANTIZED
        }

    @property
    def quantized(self) -> bool:
        """Whether the file has int8 values."""
        return any(name.endswith(f".{int8.SCALES_NAME}") for name in self._tensors)

    @property
    def rounds_activations(self) -> bool:
        levels = {found["accuracy_level"] for found in self._attributes.values()}
        return ACCURACY_LEVELS["int8"] in levels

    def check(self) -> int:
        """Compare every compressed weight with the checkpoint; returns how many. ``CheckFailed`` names the first.

        Bit for bit, and int8 values that the checkpoint does not have within half a step of what it has.
        """
        for key, entry in self.joined.weights.items():
            parts = self._parts(key)
            wrong = self._wrong_int8(key, entry, parts) if int8.SCALES_NAME in parts else self._wrong(key, entry, parts)
            if wrong:
                raise CheckFailed(
                    f"weight {key}: {wrong} of {entry.m * entry.n} weights in the ONNX file differ from the checkpoint"
                )
        return self.count

    def put_into(self, model: torch.nn.Module) -> None:
        """Give the linear layers of the dense float32 ``model`` the weights that int8 values of the file stand for."""
        prefix = model.base_model_prefix
        modules = dict(model.named_modules())
        for key, entry in self.joined.weights.items():
            parts = self._parts(key)
            if int8.SCALES_NAME not in parts:
                continue
            weight = torch.from_numpy(self._widened(key, entry, parts))
            names = self._groups.get(key, (key,))
            rows = [self.joined.original(name).m for name in names]
            for name, piece in zip(names, weight.split(rows), strict=True):
                found = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
                module = next(modules[candidate] for candidate in found if candidate in modules)
                module.weight.data.copy_(piece)

    def _wrong(self, key: str, entry: WeightEntry, parts: dict[str, np.ndarray]) -> int:
        fmt = get_format(entry.pattern)
        expected = _bits(fmt.decompress(*self.joined.load_weight(key), entry.m, entry.n))
        found = parts["weight"] if "weight" in parts else decode(entry.pattern, entry.m, entry.n, parts)
        return int((found.view(expected.dtype) != expected).sum())

    def _wrong_int8(self, key: str, entry: WeightEntry, parts: dict[str, np.ndarray]) -> int:
        fmt, shape = get_format(entry.pattern), (entry.m, entry.n)
        found = self._widened(key, entry, parts)
        if entry.values == int8.INT8:
            q, scales, metadata = self.joined.load_quantized(key)
            values = int8.dequantize(fmt, q, scales, metadata, *shape, entry.group_size, torch.float32)
            return int((found != fmt.decompress(values, metadata, *shape).numpy()).sum())
        values, metadata = self.joined.load_weight(key)
        expected = fmt.decompress(values.float(), metadata, *shape).numpy()
        far = np.abs(found - expected) > _HALF_STEP * self._steps(key, entry, parts)
        mask = fmt.unpack_mask(metadata, *shape).numpy()
        return int((far | ((found != 0) & ~mask)).sum())

    def _widened(self, key: str, entry: WeightEntry, parts: dict[str, np.ndarray]) -> np.ndarray:
        integers = decode("unstructured", entry.m, entry.n, parts)
        return integers.astype(np.float32) * self._steps(key, entry, parts)

    def _steps(self, key: str, entry: WeightEntry, parts: dict[str, np.ndarray]) -> np.ndarray:
        """The scale of every weight, [m, n]."""
        size = self._group_size(key) or entry.n
        return np.repeat(parts[int8.SCALES_NAME], size, axis=1)[:, : entry.n]

    def _group_size(self, key: str) -> int:
        """Of the file; an inlined model has no operator that would say it, but then the scales do."""
        found = self._attributes.get(self._modules[key])
        if found is not None:
            return found["group_size"]
        groups, n = self._tensors[f"{self._modules[key]}.{int8.SCALES_NAME}"].dims[1], self.joined.weights[key].n
        return next((size for size in int8.GROUP_SIZES if -(-n // size) == groups and groups > 1), 0)

    def _parts(self, key: str) -> dict[str, np.ndarray]:
        named = {part: self._tensors.get(f"{self._modules[key]}.{part}") for part in _PARTS}
        return {part: _read(tensor, self.folder) for part, tensor in named.items() if tensor is not None}


def decode(pattern: str, m: int, n: int, parts: dict[str, np.ndarray]) -> np.ndarray:
    """[m, n] from the initializers of one weight."""
    values = parts["weight_values"].reshape(-1)
    dense = np.zeros((m, n), values.dtype)
    if pattern == "2:4":
        meta = parts["weight_meta"]
        nibbles = np.stack([meta & 15, meta >> 4], axis=-1).reshape(m, -1)[:, : n // 4]
        columns = np.stack([nibbles & 3, nibbles >> 2], axis=-1) + 4 * np.arange(n // 4)[:, None]
        np.put_along_axis(dense, columns.reshape(m, n // 2).astype(np.int64), values.reshape(m, n // 2), axis=1)
        return dense
    offsets = parts["row_offsets"]
    kept = np.unpackbits(parts["weight_bitmask"], axis=1, count=n, bitorder="little").astype(bool)
    if not np.array_equal(np.diff(offsets), kept.sum(1)) or offsets[0] != 0:
        raise CheckFailed("row_offsets contradict the bitmask")
    dense[kept] = values[: offsets[-1]]
    return dense


def _module_names(checkpoint: Checkpoint, tensors: dict[str, Any]) -> dict[str, str]:
    """Checkpoint name -> module name in the ONNX file (they may differ by the base model's prefix)."""
    owners = {name.rpartition(".")[0] for name in tensors}
    names = {}
    for key in checkpoint.weights:
        found = [o for o in owners if o == key or o.endswith(f".{key}") or key.endswith(f".{o}")]
        if len(found) != 1:
            raise CheckFailed(f"weight {key} of the checkpoint is not in the ONNX file")
        names[key] = found[0]
    return names


def _read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)  # the data goes with the copy, not with the model
    if external_data_helper.uses_external_data(loaded):
        external_data_helper.load_external_data_for_tensor(loaded, str(folder))
    return numpy_helper.to_array(loaded)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The raw bits of a float tensor as integers, so that -0.0 differs from 0.0."""
    integer = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
    return tensor.contiguous().view(integer).numpy()
