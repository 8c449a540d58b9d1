"""What an ONNX file holds of the weights, decoded with numpy: independent of the package's own code on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from sparse_rt.checkpoint import Checkpoint, WeightEntry
from sparse_rt.errors import CheckFailed
from sparse_rt.exporters.int8 import HALF_STEP
from sparse_rt.exporters.onnx import external
from sparse_rt.exporters.onnx.functions import QUANTIZED
from sparse_rt.exporters.onnx.graph import all_nodes
from sparse_rt.exporters.onnx.operands import ACCURACY_LEVELS
from sparse_rt.exporters.onnx.rows import JoinedCheckpoint, noted
from sparse_rt.exporters.onnx.skeleton import Names
from sparse_rt.formats import get_format, int8

_PARTS = ("weight_values", "weight_meta", "weight_bitmask", "row_offsets", int8.SCALES_NAME, "weight")


class StoredWeights:
    """The weights of ``checkpoint`` as the ONNX file ``path`` has them; ``names`` as that has them."""

    def __init__(self, checkpoint: Checkpoint, path: Path, names: Names | None = None):
        self.folder, self.count, self.names = path.parent, len(checkpoint.weights), names or Names()
        self.source_is_int8 = any(entry.values == int8.INT8 for entry in checkpoint.weights.values())
        proto = onnx.load(str(path), load_external_data=False)
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.joined = JoinedCheckpoint(checkpoint, noted(proto))
        self._modules = self._module_names()
        self._attributes = {
            node.name: {entry.name: entry.i for entry in node.attribute}
            for node in all_nodes(proto.graph)
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
        """Compare every weight with the checkpoint; returns how many compressed ones. ``CheckFailed`` names the first.

        Bit for bit; int8 values that the checkpoint does not have: within half a step of what it has, where a step is
        1/127 of the largest weight of its group.
        """
        for key, entry in self.joined.weights.items():
            parts = self._parts(key)
            wrong = self._wrong_int8(key, entry, parts) if int8.SCALES_NAME in parts else self._wrong(key, entry, parts)
            if wrong:
                raise CheckFailed(
                    f"weight {key}: {wrong} of {entry.m * entry.n} weights in the ONNX file differ from the "
                    "checkpoint; export again"
                )
        for name, tensor in self._tensors.items():
            key = self.names.key(name, self.joined.tensors)
            if key is None or not name.endswith(".weight") or len(tensor.dims) < 2:
                continue  # norms are float32 in the graph, and some graphs add to them
            expected = self.joined.load(key)
            if tensor.data_type == onnx.TensorProto.FLOAT:
                expected = expected.float()  # small tables that a model reads itself are widened
            if not np.array_equal(external.read(tensor, self.folder).view(np.uint8), _bytes(expected)):
                raise CheckFailed(f"dense weight {key} in the ONNX file differs from the checkpoint; export again")
        return self.count

    def put_into(self, model: torch.nn.Module) -> None:
        """Give the linear layers of the dense float32 ``model`` the weights that int8 values of the file stand for."""
        modules = dict(model.named_modules())
        for key, entry in self.joined.weights.items():
            parts = self._parts(key)
            if int8.SCALES_NAME not in parts:
                continue
            weight = torch.from_numpy(self._widened(key, entry, parts))
            members = self.joined.members(key)
            for name, piece in zip(members, weight.split(list(members.values())), strict=True):
                modules[self.names.owner(name, modules)].weight.data.copy_(piece)

    def _module_names(self) -> dict[str, str]:
        """Checkpoint name -> module name in the ONNX file (they may differ)."""
        owners = {name.rpartition(".")[0] for name in self._tensors}
        names = {key: self.names.owner(key, owners) for key in self.joined.weights}
        missing = [key for key, name in names.items() if name is None]
        if missing:
            raise CheckFailed(f"weight {missing[0]} of the checkpoint is not in the ONNX file; export again")
        return names

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
        steps = self._steps(key, entry, parts)
        coarse = np.abs(steps - self._largest(key, expected)) > 1e-6 * steps
        far = np.abs(found - expected) > HALF_STEP * steps
        mask = fmt.unpack_mask(metadata, *shape).numpy()
        return int((((far | coarse) & mask) | ((found != 0) & ~mask)).sum())

    def _largest(self, key: str, weight: np.ndarray) -> np.ndarray:
        """1/127 of the largest absolute weight of every group, for every weight."""
        m, n = weight.shape
        size = self._group_size(key) or n
        groups = np.pad(np.abs(weight), ((0, 0), (0, -n % size))).reshape(m, -1, size)
        return np.repeat(groups.max(-1) / np.float32(int8.HIGHEST), size, axis=1)[:, :n]

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
        return {part: external.read(tensor, self.folder) for part, tensor in named.items() if tensor is not None}


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
        raise CheckFailed("row_offsets in the ONNX file contradict the bitmask; export again")
    dense[kept] = values[: offsets[-1]]
    return dense


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The raw bits of a float tensor as integers, so that -0.0 differs from 0.0."""
    integer = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
    return tensor.contiguous().view(integer).numpy()


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor [m, n] in its own order: uint8 [m, n * size]."""
    return tensor.contiguous().view(torch.uint8).numpy()
